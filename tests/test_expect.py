"""What decode from disk can be expected to take, and the page that is computed from it."""

from __future__ import annotations

import runpy

import pytest
from conftest import ROOT

from coterie.offload.expect import Weights

MODEL = Weights(dense=10.0, expert=2.0, layers=3, experts=8, top_k=2)


def test_sizes_and_shares_by_hand() -> None:
    assert MODEL.total == 10 + 3 * 8 * 2
    assert MODEL.share(13.9) == -1 and MODEL.share(58) == 1 and MODEL.share(100) == 1
    assert MODEL.share(34) == pytest.approx(0.5)


def test_a_token_takes_the_longer_of_computing_and_reading() -> None:
    assert MODEL.read(0.75) == 3 * 2 * 0.25 * 2
    assert MODEL.seconds(0.75, memory_rate=22.0, link_rate=1.0) == 3.0
    assert MODEL.seconds(1.0, memory_rate=22.0, link_rate=1.0) == 1.0


def test_the_page_of_cards_is_what_its_script_prints() -> None:
    page = runpy.run_path(str(ROOT / "bench" / "cards.py"))["page"]()
    assert (ROOT / "docs" / "cards.md").read_text() == page, "python bench/cards.py > docs/cards.md"
