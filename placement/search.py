"""Local search over placements: steepest descent by swaps, restarted from perturbations of the best found.

Swaps keep every rank's number of experts; empty slots take part as experts without load or traffic, so a move into a free
slot is a swap too. Deterministic for a seed and a number of rounds. The planner for hundreds of experts on many ranks
will stand beside this file and fill the same seam, `planner.Solver`.
"""

from __future__ import annotations

import itertools
import time

import numpy as np
from numpy.typing import NDArray

from coterie.placement.baselines import Assignment, packed
from coterie.placement.problem import Problem, balance, one_hot


def search(problem: Problem, seed: int, rounds: int | None, deadline: float) -> Assignment:
    """The best feasible placement found, int64 `[L, E]`.

    rounds: perturbations tried in all, None for as many as fit; deadline: `time.monotonic()` value at which to stop early.
    """
    rng = np.random.default_rng(seed)
    padded = _pad(problem)
    best = descend(padded, _start(padded))
    best_cost = padded.cost(best)
    for _ in itertools.count() if rounds is None else range(rounds):
        if time.monotonic() > deadline:
            break
        trial = descend(padded, _perturbed(padded, best, rng))
        cost = padded.cost(trial)
        if cost <= best_cost:
            best, best_cost = trial, cost
    return best[:, : problem.experts]


def descend(problem: Problem, assignment: Assignment) -> Assignment:
    """Apply the best improving swap of a layer until no layer has one."""
    current = assignment.copy()
    quiet, layer = 0, 0
    while quiet < problem.layers:
        delta = swap_deltas(problem, current, layer)
        delta[~_allowed(problem, current, layer)] = np.inf
        e, f = np.unravel_index(delta.argmin(), delta.shape)
        if delta[e, f] < -1e-9:
            current[layer, e], current[layer, f] = current[layer, f], current[layer, e]
            quiet = 0
        else:
            quiet += 1
            layer = (layer + 1) % problem.layers
    return current


def swap_deltas(problem: Problem, assignment: Assignment, layer: int) -> NDArray[np.float64]:
    """What the cost changes by if experts e and f of `layer` change places, float64 `[E, E]`."""
    if problem.transitions is not None:
        return _hops_deltas(problem.transitions, assignment, layer, problem.ranks)
    return _dispatch_deltas(problem.members[layer], problem.prices[layer], assignment[layer])


def _hops_deltas(transitions: NDArray[np.float64], assignment: Assignment, layer: int, ranks: int) -> NDArray[np.float64]:
    together = np.zeros((assignment.shape[1], ranks))  # what is saved if the expert stands on the rank
    if layer > 0:
        together += transitions[layer - 1].T @ one_hot(assignment[layer - 1], ranks)
    if layer < len(transitions):
        together += transitions[layer] @ one_hot(assignment[layer + 1], ranks)
    here = assignment[layer]
    at_other = together[:, here]  # [e, f]: what e saves on f's rank
    own = np.diagonal(at_other)
    return np.asarray(own[:, None] + own[None, :] - at_other - at_other.T)


def _dispatch_deltas(members: NDArray[np.bool_], prices: NDArray[np.float64], here: NDArray[np.int64]) -> NDArray[np.float64]:
    """Patterns that hold only one of the two change; those that hold both do not, and are taken out again."""
    count = members.astype(np.int64) @ one_hot(here, prices.shape[1])
    alone = members & (count[:, here] == 1)
    saved = np.where(alone, prices[:, here], 0.0)  # [pattern, e]: e leaving its rank frees the row
    joining = members.astype(np.float64).T @ np.where(count == 0, prices, 0.0)  # [e, rank]
    both = saved.T @ members.astype(np.float64)  # [e, f]: counted as saved though f takes e's place
    leave = saved.sum(0)
    change = -leave[:, None] + joining[:, here] + both
    return np.asarray(change + change.T)


def _allowed(problem: Problem, assignment: Assignment, layer: int) -> NDArray[np.bool_]:
    """Swaps between two ranks that leave both under the cap, or under what the busier one carries already."""
    here, load = assignment[layer], problem.load[layer]
    carried = np.bincount(here, weights=load, minlength=problem.ranks)
    after = carried[here][:, None] - load[:, None] + load[None, :]  # [e, f]: e's rank with f instead
    limit = np.maximum(problem.caps[layer] * (1 + 1e-9), np.maximum(carried[here][:, None], carried[here][None, :]))
    return np.asarray((here[:, None] != here[None, :]) & (after <= limit) & (limit >= after.T))


def _pad(problem: Problem) -> Problem:
    extra = problem.ranks * problem.slots - problem.experts
    if extra == 0:
        return problem
    wide = ((0, 0), (0, extra))
    transitions = None if problem.transitions is None else np.pad(problem.transitions, ((0, 0), (0, extra), (0, extra)))
    return Problem(
        problem.ranks, problem.slots, np.pad(problem.load, wide), problem.caps, problem.scale, transitions,
        tuple(np.pad(m, wide) for m in problem.members), problem.prices,
    )  # fmt: skip


def _start(problem: Problem) -> Assignment:
    """Balanced packing; layers that miss their cap are brought under it by swaps of load alone."""
    assignment = packed(problem.load, problem.ranks)
    for layer in range(problem.layers):
        balance(assignment[layer], problem.load[layer], problem.ranks, float(problem.caps[layer]))
    return assignment


def _perturbed(problem: Problem, assignment: Assignment, rng: np.random.Generator) -> Assignment:
    """A few random allowed swaps in a run of neighbouring layers."""
    trial = assignment.copy()
    first = int(rng.integers(problem.layers))
    for layer in range(first, min(problem.layers, first + int(rng.integers(1, 4)))):
        for _ in range(int(rng.integers(1, 2 + problem.ranks))):
            allowed = np.argwhere(_allowed(problem, trial, layer))
            if len(allowed):
                e, f = allowed[rng.integers(len(allowed))]
                trial[layer, e], trial[layer, f] = trial[layer, f], trial[layer, e]
    return trial
