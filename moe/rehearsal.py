"""How long layers take, and ranks wait for each other: a few steps of the model itself, timed before strategies are chosen.

The links alone say what a message takes between ranks that do nothing else. Ranks that compute wait for the last of them, the
longer the more tokens they compute for, and much longer where they share processors.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch

from coterie.moe.batch import Batch, Request, Running, Scored
from coterie.moe.choose import Links, Load, Pace, Trial, predict
from coterie.moe.coherent import CoherentBatch
from coterie.moe.layer import StepContext
from coterie.moe.probe import finish
from coterie.moe.strategy import Coherent, Strategy
from coterie.moe.traffic import Traffic
from coterie.moe.traits import Traits
from coterie.routing.record import expert_modules

WARM, STEPS, DECODE_STEPS = 1, 5, 9  # steps that are not timed, and that are: of prompts, and that decode
NEW = 1 + WARM + DECODE_STEPS  # tokens of a sequence that is tried
TRIED_TOKENS = 64  # of a prompt that is tried first, to see how many can be afforded
MOST_TOKENS = 1024  # of a rank in one step; a longer prompt's times are taken to grow on
MOST_SECONDS = 0.3  # a step; fewer tokens where it would take longer
TRIAL_SECONDS = 2.0  # of steps that compare strategies, of prompts and of decoding each; the turn that passes it is the last
FAR = 1.2  # times as long as the shortest: not tried any further
Run = Callable[[], object]  # a step


@dataclass(frozen=True)
class Step:
    """One step: tokens of a rank; seconds in all; exchanging: seconds of the rank that waited least; rows sent by all ranks."""

    tokens: int
    seconds: float
    exchanging: float
    rows: int


@dataclass
class Rehearsal:
    """Steps with `rows` (a decode step) up to `tokens` (a prompt's) tokens on every rank, with what they say to each other.

    first: `AllToAll`, which all others are compared with. prompts: token ids of what is to run, by home rank: steps are made
    of them, since other text would visit other experts. trial: what was found so far; seen: traits as measured. Nothing of the
    steps is counted, and nothing of the model changes. Every rank must do the same, and finds the same.
    """

    model: Any
    context: StepContext
    first: Strategy
    traits: Traits
    links: Links
    rows: int
    tokens: int
    prompts: Sequence[Sequence[tuple[int, ...]]]

    def __post_init__(self) -> None:
        self.group = self.first.group
        self.layers = max(1, len(expert_modules(self.model)))
        self.length = max(2, self.tokens // self.rows)  # of a prompt
        self.trial = self._begun()

    @torch.inference_mode()
    def _begun(self) -> Trial:
        """Of the first strategy."""
        with _aside(self.context, self.group.traffic):
            probe = self._step(*self._prompts(self.first, min(self.tokens, TRIED_TOKENS)), 1)
            affordable = min(self.tokens, MOST_TOKENS, int(probe.tokens * MOST_SECONDS / max(probe.seconds, 1e-9)))
            more = self._step(*self._prompts(self.first, max(affordable, min(self.tokens, TRIED_TOKENS))), STEPS)
            self.tried = more.tokens
            few = self._step(*self._decoding(self.first), DECODE_STEPS)
        self.few, self.more = few, more
        ranks = more.rows / (2 * self.group.size * more.tokens * self.layers)
        self.seen = replace(self.traits, ranks=ranks, nodes=self.traits.nodes * ranks / max(self.traits.ranks, 1e-9))
        least, most = (s.seconds / self.layers - self._exchanging(s) for s in (few, more))
        computing = Pace(few.tokens, least, more.tokens, max(least, most))  # more tokens are not computed in less time
        self.spent = [s.seconds / self.layers - computing.seconds(s.tokens) for s in (few, more)]
        return Trial(computing, {self.first.name: self._beyond(self.first, self.spent)}, self.layers)

    def _exchanging(self, step: Step) -> float:
        """Seconds of a layer: as counted; on GPUs, where that holds what was queued before, as the links account for."""
        if self.group.device.type == "cpu":
            return step.exchanging / self.layers
        return min(self._accounted(self.first, step.tokens), step.seconds / self.layers)

    def _share(self, load: Load, share: float) -> float:
        """Seconds: of a job that asks for `load`, as long as it takes by the first strategy."""
        prompts = self.more.seconds * load.prefill / self.more.tokens
        return share * load.rounds * (prompts + self.few.seconds * load.steps)

    def affordable(self, load: Load, share: float) -> float:
        """Seconds that comparing may take, of prompts and of decode steps each, if it may take that share of the job."""
        return min(TRIAL_SECONDS, self._share(load, share))

    def pays(self, load: Load, others: int, share: float) -> bool:
        """Whether there is time to compare so many others: a prompt for each to decode behind, and the least turns."""
        turn = (1 + others) * (self.more.seconds + (WARM + 1) * max(self.more.seconds, self.few.seconds))
        return turn <= 2 * self._share(load, share)

    @torch.inference_mode()
    def compare(self, strategies: Sequence[Strategy], most: float = TRIAL_SECONDS) -> None:
        """More strategies; all in which their steps take longer or shorter than the first one's counts as waiting.

        most: seconds of prompts, and of decode steps, after which no other turn begins.
        """
        waits = dict(self.trial.waits)
        both = [strategy for strategy in strategies if not isinstance(strategy, Coherent)]
        with _aside(self.context, self.group.traffic):
            few = self._in_turns([self._decoding(side)[0] for side in (self.first, *strategies)], DECODE_STEPS, most)
            asked = [self._prompts(side, self.tried)[0] for side in (self.first, *both)] if both else []
            more = self._in_turns(asked, STEPS, most) if both else []
        longer = {strategy.name: [seconds] for strategy, seconds in zip(strategies, few, strict=True)}
        for strategy, seconds in zip(both, more, strict=True):
            longer[strategy.name].append(seconds)
        for strategy in strategies:  # decode steps, and prompts where they were tried
            found = zip(self.spent, longer[strategy.name], strict=False)
            waits[strategy.name] = self._beyond(strategy, [mine + seconds / self.layers for mine, seconds in found])
        self.trial = replace(self.trial, waits=waits)

    def _beyond(self, strategy: Strategy, spent: Sequence[float]) -> Pace:
        """What exchanges take beyond what the links account for, of the sizes that were tried: of both, or of decode steps."""
        sizes = (self.rows, self.tried)[: len(spent)]
        beyond = [s - self._accounted(strategy, tokens) for s, tokens in zip(spent, sizes, strict=True)]
        return Pace(sizes[0], beyond[0], sizes[-1], beyond[-1])

    def _accounted(self, strategy: Strategy, tokens: int) -> float:
        """Seconds of a layer that the links account for."""
        group = self.group
        known = (self.seen, self.links, group.size, group.ranks_per_node)
        return predict(strategy.name, *known, tokens, group.free_bytes, group.counts_inside)

    def _prompts(self, strategy: Strategy, tokens: int) -> tuple[Run, int]:
        """Prompts of the length, about `tokens` together; how many it are."""
        mine = self._drawn(max(1, tokens // self.length), max(2, min(self.length, tokens)))
        count = sum(len(sequence.request.token_ids) for sequence in mine[0])

        def run() -> None:
            batch = Batch(self.model, self.context, None, strategy)
            batch.agree(self.rows, 0)
            batch.prefill(mine)

        return run, count

    def _decoding(self, strategy: Strategy) -> tuple[Run, int]:
        """One token more of `rows` sequences, behind as long a prompt as was tried."""
        mine = self._drawn(self.rows, max(1, min(self.length, self.tried // self.rows)))
        coherent = isinstance(strategy, Coherent)
        batch: CoherentBatch | Batch = (
            CoherentBatch(self.model, self.context, self.group, self.first)
            if coherent
            else Batch(self.model, self.context, None, strategy)
        )
        self._extend(batch, batch.prefill(mine))

        def run() -> None:
            batch.agree(self.rows, 0)
            self._extend(batch, batch.decode((self.rows,) * len(mine)))

        return run, self.rows

    def _extend(self, batch: CoherentBatch | Batch, scored: Scored) -> None:
        """By the same token everywhere."""
        for sequence, token in batch.settle([(sequence, 0) for sequence, _ in scored], 0):
            sequence.new_tokens.append(token)

    def _drawn(self, rows: int, length: int) -> list[list[Running]]:
        """Sequences of every rank, each a prompt of its own, cut or repeated; of all prompts where it has none."""
        whole = [ids for own in self.prompts for ids in own]
        drawn = [list(islice(cycle(own or whole), rows)) for own in self.prompts]
        return [
            [Running(Request(i, tuple(islice(cycle(ids), length)), NEW), rank) for i, ids in enumerate(own)]
            for rank, own in enumerate(drawn)
        ]

    def _step(self, run: Run, tokens: int, steps: int) -> Step:
        """The median of that many steps; of one, where it takes long."""
        found = [self._timed(run) for _ in range(WARM + 1)]
        if not self._is_slow(found[-1][0]):
            found += [self._timed(run) for _ in range(steps - 1)]
        took, waited, sent = (statistics.median(values) for values in zip(*found[WARM:], strict=True))
        said = self.group.agree([int(took * 1e9), int(waited * 1e9), int(sent)])
        return Step(tokens, max(s[0] for s in said) / 1e9, min(s[1] for s in said) / 1e9, sum(s[2] for s in said))

    def _is_slow(self, seconds: float) -> bool:
        """Whether a step takes so long on any rank that it is not repeated; the same on all."""
        return max(ns for (ns,) in self.group.agree([int(seconds * 1e9)])) > 2 * MOST_SECONDS * 1e9

    def _in_turns(self, runs: Sequence[Run], steps: int, most: float = TRIAL_SECONDS) -> list[float]:
        """By how many seconds all but the first run's steps take longer than its own: taking turns, for machines drift.

        most: seconds after which no other turn begins. What is FAR behind after two turns is left out of the others.
        """
        left, turns, spent = list(range(len(runs))), np.full((0, len(runs)), np.nan), 0.0
        for number in range(WARM + steps):
            said = self.group.agree([int(self._timed(runs[i])[0] * 1e9) for i in left])
            turn = np.full((1, len(runs)), np.nan)
            turn[0, left] = np.max(said, axis=0) / 1e9  # the slowest rank's, so that all ranks go on alike
            spent += float(np.nansum(turn))
            if number < WARM:
                continue
            turns = np.concatenate([turns, turn])
            if spent > most:
                break
            if len(turns) > 1:
                typical = np.nanmedian(turns, axis=0)
                left = [i for i in left if i == 0 or typical[i] <= FAR * typical[left].min()]
            if left == [0]:
                break
        longer: list[float] = np.nanmedian(turns[:, 1:] - turns[:, :1], axis=0).tolist()
        return longer

    def _timed(self, run: Run) -> tuple[float, float, int]:
        """Seconds of one step, those in exchanges, and rows sent."""
        group = self.group
        finish(group.device)
        group.agree([0])
        before, sent = group.traffic.exchanging(), group.traffic.rows
        started = time.perf_counter()
        run()
        finish(group.device)
        return time.perf_counter() - started, group.traffic.exchanging() - before, group.traffic.rows - sent


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
