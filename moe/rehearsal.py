"""How long ranks wait for each other: a few steps of the model itself, timed before the strategies are chosen.

The links alone say what a message takes between ranks that do nothing else. Ranks that compute wait for the last of them, the
longer the more tokens they compute for, and much longer where they share processors.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from coterie.moe.batch import Batch, Request, Running
from coterie.moe.choose import Links, Waits
from coterie.moe.layer import StepContext
from coterie.moe.strategy import Strategy
from coterie.moe.traffic import Traffic
from coterie.routing.record import expert_modules

WARM, STEPS = 1, 3  # steps of each size that are not timed, and that are
TRIED_TOKENS = 64  # of a prompt that is tried first, to see how many can be afforded
MOST_TOKENS = 512  # of a rank in one step; a longer prompt's waits are taken to grow on
MOST_SECONDS = 0.3  # a step; fewer tokens where it would take longer
EXCHANGES = 2  # of the rehearsed strategy, in a layer


@dataclass(frozen=True)
class Rehearsed:
    """Of one step: seconds in all; wait: of a layer, of the rank that waited least, beyond what the links account for."""

    seconds: float
    wait: float


def rehearse(model: Any, context: StepContext, strategy: Strategy, links: Links, rows: int, tokens: int) -> Waits:
    """Waits of steps with `rows` (a decode step) up to `tokens` (a prompt's) tokens on every rank; the same on all ranks.

    strategy: `AllToAll`. Nothing of it is counted, and nothing of the model changes. Every rank must call it.
    """
    with _aside(context, strategy.group.traffic):
        few = _steps(model, context, strategy, links, rows, 1)
        length = max(2, tokens // rows)  # of a prompt
        at_once, more = _prompts(model, context, strategy, links, length, min(tokens, TRIED_TOKENS))
        affordable = int(at_once * MOST_SECONDS / max(more.seconds, 1e-9))
        many = min(tokens, MOST_TOKENS, affordable)
        if many > at_once:
            at_once, more = _prompts(model, context, strategy, links, length, many)
        if at_once <= rows:
            return Waits(max(few.wait, more.wait), 0.0)
        slope = max(more.wait - few.wait, 0.0) / (at_once - rows)
        return Waits(max(few.wait - rows * slope, 0.0), slope)


def _prompts(
    model: Any, context: StepContext, strategy: Strategy, links: Links, length: int, tokens: int
) -> tuple[int, Rehearsed]:
    """Prompts of `length` tokens, about `tokens` together; how many it were, and what was seen."""
    count, length = max(1, tokens // length), max(2, min(length, tokens))
    return count * length, _steps(model, context, strategy, links, count, length)


@contextmanager
def _aside(context: StepContext, traffic: Traffic) -> Iterator[None]:
    kept = dict(vars(context))
    context.loads = None
    try:
        with traffic.aside():
            yield
    finally:
        vars(context).update(kept)


@torch.inference_mode()
def _steps(model: Any, context: StepContext, strategy: Strategy, links: Links, rows: int, length: int) -> Rehearsed:
    """Of sequences of `length` tokens, `rows` on every rank: of one token the steps after it, of several their prompt's."""
    group, layers = strategy.group, max(1, len(expert_modules(model)))
    vocabulary = model.config.get_text_config().vocab_size
    drawn = torch.randint(vocabulary, (group.size, rows, length), generator=torch.Generator().manual_seed(rows)).tolist()
    mine = [[Running(Request(i, tuple(ids), 1), rank) for i, ids in enumerate(own)] for rank, own in enumerate(drawn)]
    batch = Batch(model, context, None, strategy)
    if length == 1:
        batch.prefill(mine)
    found = []
    for _ in range(WARM + STEPS):
        group.agree([0])
        before, sent = group.traffic.exchanging(), group.traffic.bytes_to.copy()
        started = time.perf_counter()
        if length == 1:
            batch.decode((rows,) * group.size)
        else:
            Batch(model, context, None, strategy).prefill(mine)
        took = time.perf_counter() - started
        moved = {rank: count - sent[rank] for rank, count in group.traffic.bytes_to.items()}
        found.append((took, group.traffic.exchanging() - before, _bytes_seconds(strategy, links, moved)))
    took, waited, moving = (statistics.median(values) for values in zip(*found[WARM:], strict=True))
    said = group.agree([int(s * 1e9) for s in (took, waited, moving)])
    longest, least, bytes_seconds = max(s[0] for s in said), min(s[1] for s in said), max(s[2] for s in said)
    wait = (least - bytes_seconds) / 1e9 / layers - EXCHANGES * links.latency(group.nodes)
    return Rehearsed(longest / 1e9, max(wait, 0.0))


def _bytes_seconds(strategy: Strategy, links: Links, moved: dict[int, int]) -> float:
    """Of bytes sent; moved: by the rank they went to."""
    group = strategy.group
    node = group.rank // group.ranks_per_node
    inside = sum(count for rank, count in moved.items() if rank // group.ranks_per_node == node)
    outside = group.ranks_per_node * (sum(moved.values()) - inside)
    return max(inside / links.within.bytes_per_second, outside / links.between.bytes_per_second)
