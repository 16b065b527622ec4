"""How long layers take, and ranks wait for each other: a few steps of the model itself, timed before strategies are chosen.

The links alone say what a message takes between ranks that do nothing else. Ranks that compute wait for the last of them, the
longer the more tokens they compute for, and much longer where they share processors.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from coterie.moe.batch import Batch, Request, Running
from coterie.moe.choose import Links, Pace, Traits, Trial, predict
from coterie.moe.collectives import Group
from coterie.moe.layer import StepContext
from coterie.moe.probe import finish
from coterie.moe.strategy import Strategy
from coterie.moe.traffic import Traffic
from coterie.routing.record import expert_modules

WARM, STEPS, DECODE_STEPS = 1, 3, 5  # steps that are not timed, and that are: of prompts, and that decode
TRIED_TOKENS = 64  # of a prompt that is tried first, to see how many can be afforded
MOST_TOKENS = 512  # of a rank in one step; a longer prompt's times are taken to grow on
MOST_SECONDS = 0.3  # a step; fewer tokens where it would take longer


@dataclass(frozen=True)
class Step:
    """One step: tokens of a rank; seconds in all; exchanging: seconds of the rank that waited least; rows sent by all ranks."""

    tokens: int
    seconds: float
    exchanging: float
    rows: int


@dataclass
class Rehearsal:
    """Steps with `rows` (a decode step) up to `tokens` (a prompt's) tokens on every rank, by strategies that `Batch` can run.

    Nothing of them is counted, and nothing of the model changes. Every rank must do the same, and finds the same.
    """

    model: Any
    context: StepContext
    traits: Traits
    links: Links
    rows: int
    tokens: int

    def __post_init__(self) -> None:
        self.layers = max(1, len(expert_modules(self.model)))
        self.length = max(2, self.tokens // self.rows)  # of a prompt

    def first(self, strategy: Strategy) -> Trial:
        """Of `AllToAll`, which all others are compared with."""
        more = self._prompts(strategy, min(self.tokens, TRIED_TOKENS))
        affordable = min(self.tokens, MOST_TOKENS, int(more.tokens * MOST_SECONDS / max(more.seconds, 1e-9)))
        if affordable > more.tokens:
            more = self._prompts(strategy, affordable)
        self.tried = more.tokens
        few = self._decoding(strategy)
        ranks = more.rows / (2 * strategy.group.size * more.tokens * self.layers)
        self.seen = replace(self.traits, ranks=ranks, nodes=self.traits.nodes * ranks / max(self.traits.ranks, 1e-9))
        computing = _through((few.tokens, more.tokens), [(s.seconds - s.exchanging) / self.layers for s in (few, more)])
        return Trial(computing, {strategy.name: self._waits(strategy, computing, few, more)}, self.layers)

    def more(self, strategy: Strategy, trial: Trial) -> Trial:
        """With one strategy more; all in which its steps take longer or shorter than the first one's counts as waiting."""
        waits = self._waits(strategy, trial.computing, self._decoding(strategy), self._prompts(strategy, self.tried))
        return replace(trial, waits={**trial.waits, strategy.name: waits})

    def _waits(self, strategy: Strategy, computing: Pace, few: Step, more: Step) -> Pace:
        """What these steps took beyond computing and what the links account for; less than nothing where they do better."""
        group = strategy.group
        known = (self.seen, self.links, group.size, group.ranks_per_node)
        accounted = [predict(strategy.name, *known, s.tokens, group.free_bytes, group.counts_inside) for s in (few, more)]
        spent = [s.seconds / self.layers - computing.seconds(s.tokens) for s in (few, more)]
        return _through((few.tokens, more.tokens), [s - a for s, a in zip(spent, accounted, strict=True)])

    def _prompts(self, strategy: Strategy, tokens: int) -> Step:
        """Prompts of the length, about `tokens` together."""
        mine = self._drawn(strategy.group.size, max(1, tokens // self.length), max(2, min(self.length, tokens)))
        count = sum(len(sequence.request.token_ids) for sequence in mine[0])
        return self._steps(strategy, lambda: Batch(self.model, self.context, None, strategy).prefill(mine), count, STEPS)

    @torch.inference_mode()
    def _decoding(self, strategy: Strategy) -> Step:
        """One token more of `rows` sequences, behind as long a prompt as was tried."""
        mine = self._drawn(strategy.group.size, self.rows, max(1, min(self.length, self.tried // self.rows)))
        with _aside(self.context, strategy.group.traffic):
            batch = Batch(self.model, self.context, None, strategy)
            batch.prefill(mine)
            return self._steps(strategy, lambda: batch.decode((self.rows,) * len(mine)), self.rows, DECODE_STEPS)

    def _drawn(self, ranks: int, rows: int, length: int) -> list[list[Running]]:
        """Sequences of every rank."""
        vocabulary = self.model.config.get_text_config().vocab_size
        drawn = torch.randint(vocabulary, (ranks, rows, length), generator=torch.Generator().manual_seed(rows)).tolist()
        return [[Running(Request(i, tuple(ids), 1), rank) for i, ids in enumerate(own)] for rank, own in enumerate(drawn)]

    @torch.inference_mode()
    def _steps(self, strategy: Strategy, run: Callable[[], object], tokens: int, steps: int) -> Step:
        """`run` is a step with that many tokens on every rank."""
        group = strategy.group
        with _aside(self.context, group.traffic):
            found = [self._step(group, run) for _ in range(WARM + steps)]
            took, waited, sent = (statistics.median(values) for values in zip(*found[WARM:], strict=True))
            said = group.agree([int(took * 1e9), int(waited * 1e9), int(sent)])
        return Step(tokens, max(s[0] for s in said) / 1e9, min(s[1] for s in said) / 1e9, sum(s[2] for s in said))

    def _step(self, group: Group, run: Callable[[], object]) -> tuple[float, float, int]:
        """Seconds of one step, those in exchanges, and rows sent."""
        finish(group.device)
        group.agree([0])
        before, sent = group.traffic.exchanging(), group.traffic.rows
        started = time.perf_counter()
        run()
        finish(group.device)
        return time.perf_counter() - started, group.traffic.exchanging() - before, group.traffic.rows - sent


def _through(tokens: tuple[int, int], seconds: list[float]) -> Pace:
    """The line through two points."""
    if tokens[1] <= tokens[0]:
        return Pace(max(seconds))
    slope = (seconds[1] - seconds[0]) / (tokens[1] - tokens[0])
    return Pace(seconds[0] - tokens[0] * slope, slope)


@contextmanager
def _aside(context: StepContext, traffic: Traffic) -> Iterator[None]:
    """What is run inside is not counted."""
    kept = dict(vars(context))
    context.loads = None
    try:
        with traffic.aside():
            yield
    finally:
        vars(context).update(kept)
