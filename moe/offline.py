"""Many prompts at once: what ends on any rank reaches rank 0 about every second, at steps that all ranks know.

When to gather is told in steps, not by a clock, since all ranks must do it at the same one: after each gathering the ranks take
from rank 0's pace how many steps the next second has.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from coterie.moe.batch import Request, Running
from coterie.moe.collectives import Group
from coterie.moe.generate import OnToken, Sampling
from coterie.moe.home_ranks import HomeRanks
from coterie.moe.journal import Entry
from coterie.routing.errors import CoterieError, InputError
from coterie.routing.record import expert_modules

if TYPE_CHECKING:
    from coterie.moe.model import Model, Statistics

GATHER_SECONDS = 1.0
SAMPLED = 64  # values of a tensor, about
MOST_STEPS = 256  # between two gatherings, should the pace change much


class Kept(Protocol):
    """Where rank 0 puts finished sequences: a `Journal`, or `Held`."""

    def append(self, entries: Sequence[Entry]) -> None: ...  # noqa: D102


class Held:
    """Finished sequences in memory, for runs without an output file."""

    def __init__(self) -> None:
        self.entries: dict[int, Entry] = {}

    def append(self, entries: Sequence[Entry]) -> None:
        """Add finished sequences."""
        self.entries.update((entry.index, entry) for entry in entries)

    def entry(self, index: int) -> Entry:
        """The finished sequence of prompt `index`."""
        return self.entries[index]


@dataclass
class Totals:
    """Of all ranks, as of the last gathering."""

    prompts: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0


class Collector:
    """`between` of `Generator.run`. kept: rank 0's, None on the others; told: called there after each gathering."""

    def __init__(
        self, group: Group, kept: Kept | None, told: Callable[[Totals], object] = lambda totals: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.group = group
        self.kept = kept
        self.told = told
        self.totals = Totals()
        self._clock = clock
        self._pending: list[Running] = []
        self._steps, self._due, self._since = 0, 1, clock()

    def __call__(self, ended: list[Running]) -> None:
        """One step is over. Raises on all ranks alike if rank 0 cannot keep what ended."""
        self._pending += ended
        self._steps += 1
        if self._steps >= self._due:
            self.gather()

    def gather(self) -> None:
        """Bring what ended to rank 0. Every rank must call it at the same step."""
        now = self._clock()
        pace = (now - self._since) / max(self._steps, 1)
        mine = [
            (Entry(s.request.index, tuple(s.new_tokens), str(s.finish_reason)), len(s.request.token_ids)) for s in self._pending
        ]
        said = self.group.gather((mine, pace))
        ended = [pair for theirs, _ in said for pair in theirs]
        self.totals.prompts += len(ended)
        self.totals.prompt_tokens += sum(length for _, length in ended)
        self.totals.new_tokens += sum(len(entry.token_ids) for entry, _ in ended)
        self._keep([entry for entry, _ in ended])
        self._pending, self._steps, self._since = [], 0, now
        self._due = min(max(1, int(GATHER_SECONDS / max(said[0][1], 1e-9))), MOST_STEPS)

    def _keep(self, entries: list[Entry]) -> None:
        failure: tuple[type[CoterieError], str] | None = None
        if self.kept is not None:
            try:
                self.kept.append(entries)
                self.told(self.totals)
            except CoterieError as error:
                failure = (InputError if isinstance(error, InputError) else CoterieError, str(error))
        failure = self.group.gather(failure)[0]
        if failure is not None:
            kind, message = failure
            raise kind(message).known(alone=False)


def run(
    model: Model, requests: Sequence[Request], batch_size: int, sampling: Sampling, collector: Collector,
    on_token: OnToken | None = None, use_homes: bool = True,
    settled: Callable[[HomeRanks | None], object] = lambda homes: None,
) -> Statistics:  # fmt: skip
    """Generate; every rank calls it with the same requests. Finished sequences go to the collector, the figures come back.

    use_homes: carry out the plan's homes; settled: called when the strategies are chosen, before anything is generated, with
    what the homes came to, None if they are not carried out.
    """
    rows, started = model.group.traffic.rows, time.perf_counter()
    requests = model.scheduled(requests, batch_size)
    choice, homes = model.settle(requests, batch_size, use_homes)
    settled(homes)
    at = None if homes is None else homes.ranks
    model.run(requests, batch_size, sampling, choice, on_token, homes=at, between=collector, boundary=model.boundary)
    collector.gather()
    totals, seconds = collector.totals, time.perf_counter() - started
    return model.statistics(totals.prompt_tokens, totals.new_tokens, seconds, model.group.traffic.rows - rows)


def fingerprint(model: Model) -> str:
    """Tells the weights of two models of one shape apart, by a few values of each tensor that every rank holds."""
    experts = {id(p) for _, module in expert_modules(model.transformers).values() for p in module.parameters()}
    made = hashlib.sha256()
    for parameter in model.transformers.parameters():
        if id(parameter) not in experts:
            flat = parameter.detach().reshape(-1)
            made.update(flat[:: max(1, len(flat) // SAMPLED)].float().cpu().numpy().tobytes())
    return made.hexdigest()
