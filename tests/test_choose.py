"""What the chooser predicts of a strategy, by hand-worked figures."""

from __future__ import annotations

import pytest

from coterie.moe.choose import Links, predict
from coterie.moe.strategy import BESIDE
from coterie.moe.traits import Traits
from coterie.placement.topology import Link

LATENCY, ROW, BACK = 1e-3, 1024.0, 512.0
EVEN = Traits(row_bytes=ROW, back_bytes=BACK, ranks=2.4, nodes=1.0, moves=4.0, top_k=8)  # on 2x2: 0.8 inside, 1.6 between
FREE = 1 << 16  # bytes that take no longer than a collective
ENOUGH = BESIDE * FREE // int(ROW)


def hierarchical(tokens: int, within: float, between: float, nodes: int = 2, counts_inside: bool = True) -> float:
    links = Links(Link(within, LATENCY), Link(between, LATENCY))
    return predict("hierarchical", EVEN, links, 4, 4 // nodes, tokens, FREE, counts_inside)


@pytest.mark.parametrize(("tokens", "beside"), [(ENOUGH - 1, False), (ENOUGH, True)])
def test_hierarchical_is_predicted_as_it_will_run(tokens: int, beside: bool) -> None:
    """Inside a token needs 0.8 rows for its own rank and 0.6 handed on; links inside are as fast as a rank's between nodes."""
    within, between = 1e8, 2e8
    row, back = tokens * ROW / 1e8, tokens * BACK / 1e8
    in_turn = 4 * LATENCY + (1 + 0.8 + 0.6) * (row + back)
    by_hand = LATENCY + max(row, LATENCY + 0.8 * row) + 2 * LATENCY + 0.6 * (row + back) + LATENCY + back
    assert hierarchical(tokens, within, between) == pytest.approx(by_hand if beside else in_turn)
    assert by_hand < in_turn


def test_hierarchical_beside_is_limited_by_the_slower_links() -> None:
    row, back = ENOUGH * ROW / 1e7, ENOUGH * BACK / 1e7
    slow_inside = 5 * LATENCY + 1.4 * (row + back)
    assert hierarchical(ENOUGH, 1e7, 1e12) == pytest.approx(slow_inside, rel=1e-4)


def test_without_counts_inside_each_exchange_of_unknown_size_takes_one_more() -> None:
    more = hierarchical(ENOUGH, 1e12, 1e8, counts_inside=False) - hierarchical(ENOUGH, 1e12, 1e8)
    assert more == pytest.approx(2 * LATENCY)  # the third one's passes while rows are between nodes
