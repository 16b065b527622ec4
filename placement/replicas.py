"""Plans with copies: what they begin with, before free slots are filled one by one.

A placement of every expert once leaves company apart that copies, added one at a time, hardly bring together again. So a plan
is also made for a part of the ranks and placed several times, as many as there are slots for: on two nodes with room for all
experts on each, no row need leave its node.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from coterie.placement import balance, copies, limits
from coterie.placement.copies import Allowed
from coterie.placement.cost import carried
from coterie.placement.plan import holders
from coterie.placement.problem import Limit, Problem
from coterie.placement.task import Solver, Task, none_found, replaced
from coterie.placement.topology import Topology
from coterie.routing.errors import InputError

THINNED = 0.4  # of a further placement, what there must be slots for if it is to be placed and thinned
TIGHTER = 0.25  # of what a load cap is above the mean, what is left of it where copies will be taken away
SEARCHED = 0.8  # of the time; the rest is for the bound
EVENING = 8  # descents of an even placement
SEARCH_SHARE = 0.6  # of the time of one beginning; the rest is for its copies

Fill = Callable[[Task, NDArray[np.bool_]], NDArray[np.bool_]]
"""Who holds what, `[L, E, ranks]`, with free slots filled by the task's deadline."""


def with_copies(task: Task, solver: Solver, fill: Fill, thins: bool = False) -> tuple[NDArray[np.bool_], int]:
    """The best by what is minimised, as evaluated, of all beginnings, filled or as they are; and the iterations made.

    thins: `fill` also takes copies away where there are more than slots.
    Raises InputError if none is found within the limits.
    """
    begun, made = _beginnings(task, thins), 0
    found: list[NDArray[np.bool_]] = []
    if not _may_begin(task):
        with suppress(InputError):  # as even as that it is not
            found.append(_evened(replaced(task, task.deadline.share(1 / (1 + len(begun))))))
    for number, (part, times) in enumerate(begun):
        deadline = task.deadline.share(1 / (len(begun) - number))
        if _may_begin(part):
            solution = solver(replace(part, deadline=deadline.share(SEARCH_SHARE), fills=False, prove=False))
            made += solution.iterations
            placed = np.tile(solution.holds, times)
            found += [placed, fill(replaced(task, deadline), placed)]
    within = [holds for holds in found if fits(task, holds)]
    mine = min(within, key=task.minimised) if within else None
    best = [holds for holds in task.world.gather(mine) if holds is not None]
    if not best:
        raise none_found(task)
    return min(best, key=task.minimised), made


def _may_begin(task: Task) -> bool:
    """Whether a placement without copies is found within the limits."""
    layers, experts = task.scenarios[0].load.shape
    problem = Problem(layers, experts, task.ranks, task.slots, 1.0, task.limits).padded()
    return problem.feasible(limits.start(problem))


def _evened(task: Task) -> NDArray[np.bool_]:
    """Where only copies make ranks as even as they must be: from an even placement, by what is minimised."""
    from coterie.placement.replan import improved

    caps = np.stack([limit.weights for limit in task.limits if not limit.memory])
    room = task.open_slots if task.short_of_memory else None
    slots, _ = balance.search(
        caps, task.ranks, task.slots, task.request.seed, EVENING, task.deadline.share(0.4), worst=True, room=room
    )
    return improved(task, holders(slots, caps.shape[2], task.ranks))


def for_hops(transitions: NDArray[np.float64]) -> Fill:
    """Fills by `copies.for_hops`; transitions `[L-1, E, E]`."""
    return lambda task, holds: copies.for_hops(transitions, holds, task.open_slots, within_limits(task), task.deadline)


def fits(task: Task, holds: NDArray[np.bool_]) -> bool:
    """Whether every layer is within its slots and limits."""
    allowed = within_limits(task)
    full = bool((holds.sum(1) <= task.open_slots).all())
    return full and all(allowed(layer, placed) for layer, placed in enumerate(holds))


def within_limits(task: Task) -> Allowed:
    """Whether copies, as the dispatcher uses them, leave a layer within its load caps; memory is `Task.open_slots`."""
    caps = [limit for limit in task.limits if not limit.memory]

    def allowed(layer: int, holds: NDArray[np.bool_]) -> bool:
        return all(
            (carried(holds, limit.weights[layer], task.request.topology) <= limit.caps[layer] * (1 + 1e-9)).all()
            for limit in caps
        )

    return allowed


def _beginnings(task: Task, thins: bool) -> list[tuple[Task, int]]:
    """Tasks without copies, and how often their placements are to be beside each other on the ranks."""
    experts, ranks = task.scenarios[0].load.shape[1], task.ranks
    least = -(-experts // ranks)
    found = [(task, 1)]
    if task.slots > least and not task.short_of_memory:
        found.insert(0, (replace(task, slots=least), 1))
    divisors = [n for n in range(2, ranks + 1) if ranks % n == 0]
    times = [n for n in divisors if ranks // n * task.slots >= experts]
    nodes = task.request.topology.nodes
    found += [(_part(task, n, task.slots), n) for n in sorted({*times[-1:], *({nodes} & set(times))})]
    for n in divisors[len(times) :][:1]:
        if thins and ranks * task.slots >= experts * (n - 1 + THINNED) and not task.short_of_memory:
            found.append((_part(task, n, -(-experts * n // ranks)), n))
    return found


def _part(task: Task, times: int, slots: int) -> Task:
    """The task on a part of the ranks, each of which stands for `times` of them and has the least that any of them has.

    With more slots than there are, copies will be taken away, which makes ranks less even: load caps are tighter then.
    """
    topology = task.request.topology
    ranks = topology.ranks // times
    nodes = topology.nodes // times if topology.nodes % times == 0 else 1
    memory = topology.memory_bytes
    if isinstance(memory, tuple):
        memory = tuple(np.reshape(memory, (times, ranks)).min(0).tolist())
    part: Topology = replace(topology, nodes=nodes, ranks_per_node=ranks // nodes, memory_bytes=memory)
    limits = tuple(_least(limit, times, 1.0 if slots <= task.slots else TIGHTER) for limit in task.limits)
    request, silent = replace(task.request, topology=part), lambda value, bound, iterations: None  # another problem's numbers
    return replace(task, request=request, slots=slots, limits=limits, progress=silent)


def _least(limit: Limit, times: int, kept: float) -> Limit:
    """Copies share load, but not memory. kept: of what a load cap is above the mean."""
    caps = limit.caps.reshape(len(limit.caps), times, -1).min(1)
    if limit.memory:
        return replace(limit, caps=caps)
    mean = limit.weights.sum(1, keepdims=True) / caps.shape[1]
    return replace(limit, caps=mean + kept * (caps * times - mean))
