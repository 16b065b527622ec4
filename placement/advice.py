"""Whether a plan will pay, said before anybody moves an expert for it.

The gain is predicted on text that the plan did not see: half of the sequences are planned for, quickly, and the other half
judges. What makes placement worthless is known beforehand in some cases and is said, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from coterie.placement.plan import PlacementPlan
from coterie.placement.planner import PlanRequest, baseline_plan, plan
from coterie.placement.prices import minimised, minimised_name
from coterie.placement.scenarios import DEFINITIONS, Scenario, gathered, summarised
from coterie.routing.errors import InputError
from coterie.routing.trace import LoadStatistics, RoutingTrace

WORTH = 0.02  # a smaller gain on unseen text is not worth a rearranged model
SMALL_SAMPLE = 2000  # tokens under which the prediction itself is said to be rough
UNEVEN = 1.2  # how much more uneven contiguous placement is if that explains why it pays less
CROWDED = 1.3  # busiest over mean beyond which what is saved on the links is likely lost to waiting


@dataclass(frozen=True)
class Prediction:
    """unseen_gain: share of what is minimised (`prices.minimised`) that the plan saves against contiguous placement on text it
    was not made from, None where there is no second half to judge on; notes: what to know before using the plan, one sentence
    each.
    """

    unseen_gain: float | None
    notes: tuple[str, ...]


def predict(
    made: PlacementPlan, routings: Sequence[RoutingTrace | LoadStatistics], request: PlanRequest, seconds: float
) -> Prediction:
    """What to expect of `made`; plans once more, on half of the sequences, for at most `seconds`."""
    gain = _unseen_gain(routings, request, seconds)
    base = baseline_plan("contiguous", routings[0], request.topology, request.strategy)
    judged = gathered(routings)
    notes = [*_by_strategy(request), *_by_gain(made, base, judged, request, gain), *_by_load(made, judged, request)]
    return Prediction(gain, tuple(notes))


def halves(trace: RoutingTrace) -> tuple[RoutingTrace, RoutingTrace] | None:
    """Every other sequence, or the first and the second half of the only one; None if there are too few tokens."""
    sequences = np.unique(trace.sequence_ids)
    if len(sequences) > 1:
        odd = np.isin(trace.sequence_ids, sequences[1::2])
    else:
        odd = np.arange(trace.tokens) * 2 // trace.tokens == 1
    if odd.all() or not odd.any():
        return None
    return renumbered(trace.select(~odd)), renumbered(trace.select(odd))


def renumbered(trace: RoutingTrace) -> RoutingTrace:
    """The same with sequences numbered from 0 without gaps, so that every rank is some sequence's home."""
    _, number = np.unique(trace.sequence_ids, return_inverse=True)
    return replace(trace, sequence_ids=number.astype(np.int32))


def _unseen_gain(routings: Sequence[RoutingTrace | LoadStatistics], request: PlanRequest, seconds: float) -> float | None:
    parts = [halves(r) for r in routings if isinstance(r, RoutingTrace)]
    if request.previous is not None or len(parts) < len(routings) or any(p is None for p in parts):
        return None  # within a few moves of an old plan, another plan's gain says nothing
    seen, unseen = [p[0] for p in parts if p], [p[1] for p in parts if p]
    quick = replace(request, time_limit=seconds, iterations=request.iterations or 2, previous=None, max_moves=None, exact=False)
    try:
        trial = plan(seen, quick, prove=False)
    except InputError:  # a cap that the whole trace can keep to, but not its half
        return None
    judged = gathered(unseen)
    ours = minimised(trial, judged, request)
    base = baseline_plan("contiguous", seen[0], request.topology, request.strategy)
    theirs = minimised(base, judged, request)
    return 1 - ours / theirs if theirs > 0 else 0.0


def _by_strategy(request: PlanRequest) -> list[str]:
    name, strategy = request.objective_name, request.strategy
    if name == "dispatch" and strategy == "coherent":
        return ["under --strategy coherent tokens stay with their experts: --objective coherent counts the rows they send then"]
    if name in ("hops", "coherent") and strategy != "coherent":
        return [f"under --strategy {strategy} tokens return home after every layer, where hops between layers cost nothing: "
                "plan for --objective dispatch, or run with --strategy coherent"]  # fmt: skip
    if name in ("hops", "dispatch", "coherent") and strategy in ("all_gather", "replicated"):
        return [f"--strategy {strategy} sends every row to every rank wherever experts live: only --objective load can pay"]
    return []


def _by_gain(
    made: PlacementPlan, base: PlacementPlan, judged: Sequence[Scenario], request: PlanRequest, gain: float | None
) -> list[str]:
    name = minimised_name(request)
    before, after = minimised(base, judged, request), minimised(made, judged, request)
    seen = 1 - after / before if before > 0 else 0.0
    notes = []
    if made.ranks == 1:
        return ["on one rank nothing travels: a plan has nothing to save"]
    if request.method != "contiguous" and (seen if gain is None else gain) < WORTH:
        unseen = "" if gain is None else f", {_changed(gain)} on text it did not see"
        why = _why(made, base, judged, request.method)
        notes.append(f"this plan will not pay: {name} is {_changed(seen)} here{unseen}; {why}")
    tokens = sum(s.trace.tokens for s in judged if s.trace is not None)
    if gain is not None and tokens < SMALL_SAMPLE:
        notes.append(f"{tokens} tokens are few to plan from: expect less than predicted, and record more")
    return notes


def _changed(gain: float) -> str:
    return f"{abs(gain):.1%} {'higher' if gain < 0 else 'lower'}"


def _why(made: PlacementPlan, base: PlacementPlan, judged: Sequence[Scenario], method: str) -> str:
    experts, ranks = made.num_experts, made.ranks
    load, contiguous = (summarised(p, judged, "load", "worst") for p in (made, base))
    if method == "auto" and made.objective.name != "load" and contiguous > UNEVEN * load:
        return (
            f"it is more even (busiest rank {load:.2f} times the mean, contiguous {contiguous:.2f}), which takes company apart"
        )
    if experts / ranks < 3:
        return (
            f"{experts} experts on {ranks} ranks leave an expert next to no company: fewer ranks would give a plan more to do"
        )
    if judged[0].trace is None:
        return "the load is even enough as it is"
    if method != "auto":
        return "--method auto may find a better one"
    return "routing is too flat: which experts follow or accompany each other is close to chance"


def _by_load(made: PlacementPlan, judged: Sequence[Scenario], request: PlanRequest) -> list[str]:
    if request.objective_name == "load" or (load := summarised(made, judged, "load", "worst")) <= CROWDED:
        return []
    field = DEFINITIONS[request.objective_name][0]
    if request.max_load is not None and load > request.max_load * (1 + 1e-6):
        kept = "the mean of the recordings keeps to it, and with --robust worst each would"
        if (made.holds().sum(2) > 1).any():
            kept = "copies keep to it where as many tokens come from every rank; here few ranks are home to many"
        return [f"the busiest rank carries {load:.2f} times the mean, more than --max-load {request.max_load:g}: {kept}"]
    return [f"the busiest rank carries {load:.2f} times the mean: --max-load 1.1 trades some {field} for balance"]
