"""What is planned for: one or several recordings of the same model, and how a plan does on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from coterie.placement.cost import CostReport, evaluate, evaluate_load, homes_of
from coterie.placement.plan import PlacementPlan
from coterie.routing.affinity import Patterns, expert_load, pattern_counts, shared, transition_counts
from coterie.routing.errors import InputError
from coterie.routing.trace import LoadStatistics, RoutingTrace

ROBUST: dict[str, Callable[[Sequence[float]], float]] = {"worst": max, "mean": lambda values: float(np.mean(values))}

PARTS, LONG_TRACE = (4, 16), 1000  # parts of a shorter and of a longer trace; tokens of the latter
FEW_PICKS = 32  # of an expert in a layer: recordings with fewer are short ones
REPORTS = 4  # that a scenario remembers
SHARED = 0.1  # of a short recording's transitions, what companions share

DEFINITIONS = {
    "hops": ("hops", "pairs of consecutive-layer experts on different ranks; what context-coherent execution pays at top-1"
             " (ExFlow, Yao et al. 2024)"),
    "coherent": ("coherent", "rows that context-coherent execution sends per token and layer at any top-k"
                 " (ExFlow generalised, docs/planning.md)"),
    "dispatch": ("dispatch", "distinct ranks other than home per token and layer; what return-home execution pays when a row is"
                 " sent once per rank (DeepEP, DeepSeek 2025; Tutel, Hwang et al. 2023)"),
    "load": ("load", "busiest rank over the mean rank (EPLB, DeepSeek 2025; MoETuner, Go and Mahajan 2025)"),
    "time": ("seconds", "2T + Q per layer: the slowest link, there and back, and the slowest rank's experts (minimax;"
             " docs/planning.md)"),
}  # fmt: skip
"""Every objective: the field of `CostReport` that it is, and what that means. Computed in `cost.py`, once."""


@dataclass(frozen=True)
class Scenario:
    """One recording. load: float64 `[L, E]`, (token, expert) pairs; trace: None where only the load is known."""

    name: str
    load: NDArray[np.float64]
    trace: RoutingTrace | None
    statistics: LoadStatistics | None = None
    index: int = 0
    _reports: list[tuple[PlacementPlan, CostReport]] = field(default_factory=list, repr=False, compare=False)

    @cached_property
    def transitions(self) -> NDArray[np.float64]:
        """See `Affinity`, `[L-1, E, E]`; counted when first asked for, as `patterns` are: few objectives need both."""
        assert self.trace is not None
        return transition_counts(self.trace)

    @cached_property
    def shared_transitions(self) -> NDArray[np.float64]:
        """The same of a short recording, which has seen few of the pairs that will follow: see `affinity.shared`."""
        return shared(self.transitions, self.patterns, SHARED)

    @cached_property
    def patterns(self) -> tuple[Patterns, ...]:
        """Of every layer."""
        assert self.trace is not None
        return pattern_counts(self.trace)

    def patterns_by_home(self, ranks: int, homes: NDArray[np.int64] | None = None) -> tuple[Patterns, ...]:
        """The same split by the tokens' home ranks, `[tokens]`; None: those that they have without a plan of homes."""
        assert self.trace is not None
        return pattern_counts(self.trace, homes_of(self.trace, ranks) if homes is None else homes, ranks)

    def parts(self) -> list[NDArray[np.float64]]:
        """The load `[L, E]` of parts of the trace, each of tokens that follow each other; none of load statistics."""
        if self.trace is None or self.trace.tokens < 2 * PARTS[0]:
            return []
        count = PARTS[self.trace.tokens >= LONG_TRACE]
        order = np.lexsort((self.trace.positions, self.trace.sequence_ids))
        return [expert_load(self.trace.select(part)) for part in np.array_split(order, count)]

    def report(self, plan: PlacementPlan) -> CostReport:
        """What the plan does to it; known of the last few plans that were asked about."""
        if (known := next((report for p, report in self._reports if p is plan), None)) is not None:
            return known
        if self.trace is not None:
            report = evaluate(plan, self.trace)
        else:
            assert self.statistics is not None
            report = evaluate_load(plan, self.statistics, self.index)
        self._reports[:] = [*self._reports[-REPORTS + 1 :], (plan, report)]
        return report


def gathered(routings: Sequence[RoutingTrace | LoadStatistics], names: Sequence[str] = ()) -> tuple[Scenario, ...]:
    """The scenarios in some recordings. Raises InputError unless all are of one model."""
    if not routings:
        raise InputError("plan: found no recording, expected at least one")
    found: list[Scenario] = []
    named = next((routing for routing in routings if routing.model), routings[0])  # an empty name matches any
    for number, routing in enumerate(routings):
        name = names[number] if number < len(names) else f"scenario {number}"
        _check_same(named, routing, name)
        if isinstance(routing, RoutingTrace):
            found.append(Scenario(name, expert_load(routing), routing))
        else:
            loads = routing.expert_load.astype(np.float64)
            found += [Scenario(f"{name}:{s}", loads[i], None, routing, i) for i, s in enumerate(routing.scenarios)]
    return tuple(found)


def _check_same(first: RoutingTrace | LoadStatistics, other: RoutingTrace | LoadStatistics, name: str) -> None:
    for attribute in ("model", "num_experts", "layer_ids"):
        ours, theirs = getattr(first, attribute), getattr(other, attribute)
        if ours != theirs and not (attribute == "model" and "" in (ours, theirs)):
            raise InputError(
                f"{name}: {attribute}: found {theirs!r}, expected {ours!r} as in another: scenarios are of one model"
            )


def short(scenarios: Sequence[Scenario]) -> bool:
    """Whether so little was recorded that what is best for these tokens is not so for others."""
    return float(sum(s.load.mean() for s in scenarios)) < FEW_PICKS


def summarised(plan: PlacementPlan, scenarios: Sequence[Scenario], objective: str, robust: str) -> float:
    """The number that `evaluate` prints for the objective: the worst or the mean over scenarios."""
    number = DEFINITIONS[objective][0]
    values = [getattr(s.report(plan), number) for s in scenarios]
    if any(v is None for v in values):
        raise InputError(f"--objective: found {objective!r}, which {plan.strategy!r} has no model of, or no single tokens of")
    combine: Callable[[Sequence[float]], float] = ROBUST[robust]
    return float(combine(values))
