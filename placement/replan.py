"""Re-planning: the best placement within so many moves of an old one (`coterie plan --from OLD --max-moves N`).

A move is an expert on a rank that does not hold it in the old plan: its weights must be copied there. From the old placement
the search goes by single changes under the budget (`budget.Board`); what a plan from scratch found, its ranks renamed to be
nearest to the old one, is mixed in layer by layer as far as the budget allows. The bound is that of the plan from scratch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from coterie.placement import solve
from coterie.placement.moving import Given
from coterie.placement.plan import PlacementPlan
from coterie.placement.scenarios import Scenario
from coterie.placement.task import Solution, Task
from coterie.placement.within import Search, dispatch, load, time
from coterie.placement.within_chain import coherent, hops
from coterie.routing.errors import InputError

Finder = Callable[[Search], NDArray[np.bool_]]
FINDERS: dict[str, Finder] = {"hops": hops, "coherent": coherent, "dispatch": dispatch, "load": load, "time": time}
FRESH_SHARE = 0.4  # of the time, for a plan from scratch and its bound


def moves(old: PlacementPlan, new: PlacementPlan) -> int:
    """Experts that must be copied to a rank, over all layers, to go from one plan to the other of the same shape."""
    return int((new.holds() & ~old.holds()).sum())


def check(previous: PlacementPlan, scenarios: Sequence[Scenario], ranks: int, slots: int | None) -> None:
    """Raises InputError unless the old plan is of the recordings' model, on as many ranks, and fits into the slots."""
    recording = scenarios[0].trace or scenarios[0].statistics
    assert recording is not None
    fields: list[tuple[str, object, object, str]] = [
        ("num_experts", previous.num_experts, recording.num_experts, "the trace"),
        ("layer_ids", previous.layer_ids, recording.layer_ids, "the trace"),
        ("ranks", previous.ranks, ranks, "--topology"),
    ]
    if previous.model and recording.model:
        fields.insert(0, ("model", previous.model, recording.model, "the trace"))
    for name, found, expected, whose in fields:
        if found != expected:
            raise InputError(f"--from: {name}: found {found}, expected {expected} as {whose} has; plan anew without --from")
    most = int(previous.holds().sum(1).max())
    if slots is not None and slots < most:
        raise InputError(
            f"--slots-per-rank: found {slots}, expected at least {most}, which a rank of --from holds; or no --from"
        )


def from_previous(task: Task) -> Solution:
    """`task.Solver` for a request with an old plan."""
    assert task.request.previous is not None and task.request.max_moves is not None
    return replan(task, task.request.previous.holds(), task.request.max_moves)


def replan(task: Task, previous: NDArray[np.bool_], max_moves: int) -> Solution:
    """The best placement found within `max_moves` of `previous`, bool `[L, E, ranks]`; 0 returns it as it is.

    Limits are kept; a default load cap that the old plan exceeds is mended as far as the moves go. Raises InputError
    if `--max-load` or memory asks for more moves than that, saying how many were found to be enough.
    """
    name = task.request.objective_name
    fresh, refused = None, None
    try:
        fresh = solve.SOLVERS[name](replace(task, deadline=task.deadline.share(FRESH_SHARE)))
    except InputError as error:
        refused = error
    given = _given(task, previous)
    search = Search(task, previous, max_moves, given, [], refused)
    search.fresh = [holds for holds in _renamed(task, previous, fresh) if search.kept(holds, required=True)]
    found = FINDERS[name](search)
    if search.mended is not None and not search.kept(found, required=True):
        found = search.mended  # changes of experts with copies are priced as if the others' shares stayed
    found = min(task.world.gather(found), key=task.evaluated)
    if name == "load":
        solve.check_even(task, found)
    bound = None if fresh is None or not search.kept(found) else fresh.lower_bound
    return Solution(found, bound, 0 if fresh is None else fresh.iterations)


def improved(task: Task, holds: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """What the same search makes of a placement with copies, whatever moves it takes; holds: bool `[L, E, ranks]`."""
    search = Search(task, holds, holds.size, _given(task, holds), [], None)
    found = FINDERS[task.request.objective_name](search)
    return found if search.mended is None or search.kept(found, required=True) else search.mended


def _given(task: Task, old: NDArray[np.bool_]) -> list[Given]:
    """What the layers are told; limits other than memory are load, which copies share."""
    layers, experts = task.scenarios[0].load.shape
    shared = np.array([not limit.memory for limit in task.limits], dtype=bool)
    weights = np.array([limit.weights for limit in task.limits]).reshape(-1, layers, experts)
    caps = np.array([limit.caps for limit in task.limits]).reshape(-1, layers, task.ranks)
    required = ~shared | (task.request.max_load is not None)
    return [
        Given(old[n], task.slots, weights[:, n], caps[:, n], shared, required, task.request.topology) for n in range(layers)
    ]


def _renamed(task: Task, old: NDArray[np.bool_], fresh: Solution | None) -> list[NDArray[np.bool_]]:
    """The plan from scratch as it is, with one renaming of all ranks, and (where layers are independent) one for each layer."""
    if fresh is None:
        return []
    holds = fresh.holds
    if not all(limit.even for limit in task.limits):
        return [holds]
    together = holds[:, :, _nearest(holds, old)]
    if task.request.objective_name in ("hops", "coherent"):
        return [holds, together]
    return [holds, together, np.stack([new[:, _nearest(new[None], was[None])] for new, was in zip(holds, old, strict=True)])]


def _nearest(new: NDArray[np.bool_], old: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The rank of `new` that each rank of `old` has most experts in common with, int64 `[ranks]`; both `[L, E, ranks]`."""
    common = np.einsum("leo,len->on", old.astype(np.float32), new.astype(np.float32), optimize=True)
    return np.asarray(linear_sum_assignment(common, maximize=True)[1])
