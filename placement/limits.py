"""How even a placement must be: load caps, and what balanced packing can reach."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from coterie.placement.baselines import Assignment, contiguous, packed
from coterie.placement.problem import Limit, Problem, carried
from coterie.routing.errors import InputError

DEFAULT_MAX_LOAD = 1.1
MARGIN = 1 / 3  # of what contiguous placement is above even: other text is loaded a little differently


Evenest = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Load `[L, E]` -> the busiest rank's load in every layer `[L]` of a placement that is as even as can be."""


def load_limits(
    loads: Sequence[NDArray[np.float64]], ranks: int, slots: int, max_load: float | None, memory: Limit | None = None,
    with_copies: Evenest | None = None,
) -> tuple[Limit, ...]:  # fmt: skip
    """One limit for each scenario's load `[L, E]`, the same for every rank (`load_caps`).

    Without `max_load` caps give way where `start` cannot keep all of them, and the ranks' memory, at once.
    """
    caps = np.stack([load_caps(load, ranks, slots, max_load, with_copies) for load in loads])
    if max_load is not None:
        return _evenly(loads, caps, ranks)
    while np.isfinite(caps).all():
        problem = _problem(_evenly(loads, caps, ranks), memory, ranks, slots)
        found = start(problem)
        if problem.feasible(found):
            return _evenly(loads, caps, ranks)
        carry = np.stack([carried(limit, found, ranks).max(1) for limit in problem.limits[: len(loads)]])
        if (carry <= caps * (1 + 1e-9)).all():  # it is memory that is not kept: as uneven as what keeps it, or any
            caps = _within_memory(loads, caps, memory, ranks, slots)
        else:
            caps = np.maximum(caps, carry)
    return ()


def _evenly(loads: Sequence[NDArray[np.float64]], caps: NDArray[np.float64], ranks: int) -> tuple[Limit, ...]:
    return tuple(Limit(load, np.tile(cap[:, None], (1, ranks))) for load, cap in zip(loads, caps, strict=True))


def _problem(limits: tuple[Limit, ...], memory: Limit | None, ranks: int, slots: int) -> Problem:
    layers, experts = limits[0].weights.shape
    return Problem(layers, experts, ranks, slots, 1.0, limits if memory is None else (*limits, memory)).padded()


def _within_memory(
    loads: Sequence[NDArray[np.float64]], caps: NDArray[np.float64], memory: Limit | None, ranks: int, slots: int
) -> NDArray[np.float64]:
    """Caps `[scenarios, L]` that a placement within memory keeps; none at all if that is not found even so."""
    found = start(_problem(tuple(Limit(load, np.full((len(load), ranks), np.inf)) for load in loads), memory, ranks, slots))
    wider = np.maximum(caps, [carried(Limit(load, np.empty(0)), found[:, : load.shape[1]], ranks).max(1) for load in loads])
    return np.full_like(caps, np.inf) if (wider <= caps * (1 + 1e-9)).all() else wider


def load_caps(
    load: NDArray[np.float64], ranks: int, slots: int, max_load: float | None, with_copies: Evenest | None = None
) -> NDArray[np.float64]:
    """The most load a rank may carry, float64 `[L]`, for a cap relative to the mean.

    Without `max_load`: 1.1, or a third as far above even as contiguous placement if that is less, or in a layer with an
    expert too hot for that, what balanced packing reaches.
    Raises InputError if `max_load` is below what packing with swaps reaches, or packing `with_copies`, saying what it does.
    """
    mean = load.sum(1) / ranks
    reached = np.array([balanced_peak(row, ranks, slots) for row in load])
    if max_load is None:
        unplanned = carried(Limit(load, np.empty(0)), contiguous(load, ranks), ranks).max(1)
        return np.asarray(np.maximum(np.minimum(DEFAULT_MAX_LOAD * mean, mean + MARGIN * (unplanned - mean)), reached))
    caps = max_load * mean
    if with_copies is not None and (reached > caps * (1 + 1e-9)).any():
        reached = np.minimum(reached, with_copies(load))
    if (reached > caps * (1 + 1e-9)).any():
        worst = float((reached / np.where(mean > 0, mean, 1)).max())
        how = "without copies" if with_copies is None else "with copies"
        raise InputError(
            f"--max-load: found {max_load:g}, but the evenest packing found of one layer, {how}, has {worst:.4f}; "
            "give that or more"
        )
    return np.asarray(caps)


def mean_excess(load: NDArray[np.float64], ranks: int) -> float:
    """Busiest over mean of contiguous placement, averaged over layers; load `[L, E]`."""
    held = carried(Limit(load, np.empty(0)), contiguous(load, ranks), ranks)
    return float(np.mean(held.max(1) / np.maximum(held.mean(1), 1e-300))) if load.any() else 1.0


def balanced_peak(load: NDArray[np.float64], ranks: int, slots: int) -> float:
    """The busiest rank's load under `balanced`; load `[E]`. Not always the least."""
    return float(np.bincount(balanced(load, ranks, slots)[: len(load)], weights=load, minlength=ranks).max())


def balanced(load: NDArray[np.float64], ranks: int, slots: int) -> NDArray[np.int64]:
    """Balanced packing into `slots`, improved by swaps: the rank of every expert, and of every empty slot behind them."""
    padded = np.pad(load, (0, ranks * slots - len(load)))
    here = packed(padded[None], ranks)[0]
    balance(here, padded, ranks, 0.0)
    return np.asarray(here)


def balance(here: NDArray[np.int64], load: NDArray[np.float64], ranks: int, cap: float) -> float:
    """Swap experts of the busiest rank, in place, until it carries at most `cap` or no swap helps; returns its load.

    here: the rank of every expert `[E]`; load `[E]`.
    """
    while True:
        held = np.bincount(here, weights=load, minlength=ranks)
        peak = int(held.argmax())
        inside, outside = np.flatnonzero(here == peak), np.flatnonzero(here != peak)
        if held[peak] <= cap * (1 + 1e-9) or not len(outside):
            return float(held[peak])
        change = load[outside][None, :] - load[inside][:, None]
        after = np.maximum(held[peak] + change, held[here[outside]][None, :] - change)
        i, o = np.unravel_index(after.argmin(), after.shape)
        if after[i, o] >= held[peak] - 1e-9:
            return float(held[peak])
        here[inside[i]], here[outside[o]] = here[outside[o]], here[inside[i]]


def start(problem: Problem, tries: int = 20) -> Assignment:
    """A placement within all limits, int64 `[L, E]`: balanced packing of what is limited, mended by swaps.

    problem: padded. Layers that cannot be mended are returned as near as they came; `Problem.feasible` tells.
    """
    rng = np.random.default_rng(0)  # the same for every search: what one can keep to, all can
    if not problem.limits:
        return packed(np.zeros((problem.layers, problem.experts)), problem.ranks)
    weights = np.stack([limit.weights for limit in problem.limits], 1)  # [L, limits, E]
    caps = np.stack([limit.caps for limit in problem.limits], 1)
    relative = weights / np.maximum(caps.mean(2), 1e-300)[:, :, None]
    found = packed(relative.sum(1), problem.ranks)
    for layer in range(problem.layers):
        best, least = found[layer], np.inf
        for _ in range(tries):
            here = best.copy() if least == np.inf else rng.permutation(best)
            excess = mend(here, weights[layer], caps[layer])
            if excess < least:
                best, least = here, excess
            if least <= 0:
                break
        found[layer] = best
    return found


def mend(here: NDArray[np.int64], weights: NDArray[np.float64], caps: NDArray[np.float64]) -> float:
    """Swap experts, in place, until no limit is exceeded or no swap helps; returns the sum of relative excesses.

    here: `[E]`; weights `[limits, E]`; caps `[limits, ranks]`.
    """
    ranks = caps.shape[1]
    floor = floors(weights, caps)
    while True:
        held = np.stack([np.bincount(here, weights=w, minlength=ranks) for w in weights])
        excess = np.maximum(0.0, held / floor - 1 - 1e-9).sum(0)  # by rank
        if excess.sum() <= 0:
            return 0.0
        worst = int(excess.argmax())
        inside, outside = np.flatnonzero(here == worst), np.flatnonzero(here != worst)
        if not len(outside):
            return float(excess.sum())
        change = weights[:, None, outside] - weights[:, inside, None]  # [limits, inside, outside]
        mine = np.maximum(0.0, (held[:, worst, None, None] + change) / floor[:, worst, None, None] - 1 - 1e-9).sum(0)
        others = here[outside]
        theirs = np.maximum(0.0, (held[:, None, others] - change) / floor[:, None, others] - 1 - 1e-9).sum(0)
        gain = excess[worst] + excess[others][None, :] - mine - theirs
        i, o = np.unravel_index(gain.argmax(), gain.shape)
        if gain[i, o] <= 1e-12 + 1e-9 * excess.sum():
            return float(excess.sum())
        here[inside[i]], here[outside[o]] = here[outside[o]], here[inside[i]]


def floors(weights: NDArray[np.float64], caps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Caps `[limits, ranks]` to divide by: a rank may have no room at all; weights `[limits, E]`."""
    return np.asarray(np.maximum(caps, 1e-3 * weights.max(1, keepdims=True, initial=0.0) + 1e-300))


def mend_layer(problem: Problem, layer: int, here: NDArray[np.int64]) -> None:
    """`mend` for one layer `[E]` of a problem, if it needs to be."""
    if not problem.keeps(layer, here):
        weights = np.stack([limit.weights[layer] for limit in problem.limits])
        mend(here, weights, np.stack([limit.caps[layer] for limit in problem.limits]))
