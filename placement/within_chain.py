"""Re-planning where layers hang together: hops, and rows of tokens that stay with their experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from coterie.placement import anchors
from coterie.placement.budget import Option, combined
from coterie.placement.moving import Array, Holds, State
from coterie.placement.pricing import Chain
from coterie.placement.problem import hops_problem
from coterie.placement.task import replaced
from coterie.placement.within import TRIED, Search, row_layers, swapped, walk

ROUNDS = 100  # of the coherent search, at most
STALLED = 6
REST = 0.15  # of the time, for the descent at its end
SWEEPS = 9  # prices of a move that are tried


def hops(s: Search) -> NDArray[np.bool_]:
    """Pairs of consecutive layers apart."""
    task = s.task
    transitions = np.asarray(hops_problem(task.transitions(), task.weights, task.ranks, task.slots, ()).transitions)
    everyone = np.zeros(s.old.shape, np.float32)
    counts = transitions.astype(np.float32)
    board = s.board([Chain(n, counts, everyone, g) for n, g in enumerate(s.given)], linked=True)
    pool = [s.holds(board.best), *s.fresh]
    board.improve(task.deadline.share(0.3), s.rounds())
    pool.append(s.holds(board.best))
    if not s.task.limits and not task.copied and s.budget > 0:
        pool += _swept(s, [layer for layer in board.layers if isinstance(layer, Chain)], max(board.price, 1e-9 * counts.sum()))
    mixed = _linked_mix(s, transitions, pool)
    board.begin([s.state(holds) for holds in mixed])
    board.improve(task.deadline, s.rounds())
    return min([s.holds(board.best), *s.whole()], key=lambda holds: _apart(transitions, holds))


def _swept(s: Search, layers: Sequence[Chain], price: float) -> list[NDArray[np.bool_]]:
    """Chains in which every layer is best given its neighbours, a move costing a price near that at which the budget is met."""
    found: list[NDArray[np.bool_]] = []
    low, high = 0.0, np.inf
    for _ in range(SWEEPS):
        if s.task.deadline.passed():
            break
        for layer, old in zip(layers, s.old, strict=True):
            layer.place(s.state(old))
        for layer in 2 * [*layers, *layers[-2:0:-1]]:
            layer.settle(price)
        found.append(s.holds([layer.state for layer in layers]))
        low, high = (price, high) if s.moves(found[-1]) > s.budget else (low, price)
        price = (low + high) / 2 if np.isfinite(high) else 2 * low
    return found


def _apart(transitions: Array, holds: NDArray[np.bool_]) -> float:
    return float(sum(_pair(t, holds[n], holds[n + 1]) for n, t in enumerate(transitions)))


def _pair(transitions: Array, one: Holds, two: Holds) -> float:
    return float((transitions * ((one.astype(np.float32) @ two.T.astype(np.float32)) == 0)).sum())


def _pairs(transitions: Array, ones: NDArray[np.bool_], twos: NDArray[np.bool_]) -> Array:
    """`_pair` of every two placements of neighbouring layers, `[ones, twos]`."""
    if ones.sum() + twos.sum() > (len(ones) + len(twos)) * ones.shape[1]:  # copies: what meets on two ranks counts once
        return np.array([[_pair(transitions, one, two) for two in twos] for one in ones])
    ahead = np.einsum("aer,ef->afr", ones.astype(np.float64), transitions, optimize=True)
    return np.asarray(transitions.sum() - np.tensordot(ahead, twos.astype(np.float64), ([1, 2], [1, 2])))


def _linked_mix(s: Search, transitions: Array, pool: Sequence[NDArray[np.bool_]]) -> NDArray[np.bool_]:
    """The best chain of layers, each from any member of the pool, within the budget."""
    options = []
    for number in range(len(s.old)):
        different = {p[number].tobytes(): p[number] for p in pool}
        options.append([Option(0.0, int((h & ~s.old[number]).sum()), s.state(h)) for h in different.values()])
    held = [s.holds([o.what for o in layer]) for layer in options]
    between = [_pairs(t, held[n], held[n + 1]) for n, t in enumerate(transitions)]
    return s.holds([o.what for o in combined(options, s.budget, between)])


def coherent(s: Search) -> NDArray[np.bool_]:
    """Layers priced with the anchors of the moment as homes; only what lowers the rows as evaluated is kept."""
    task = s.task

    def rows(holds: NDArray[np.bool_]) -> float:
        return anchors.mean_rows(holds, task.scenarios, task.weights, task.request.topology)

    start = s.holds(s.board(row_layers(s, anchors.anchored(task, s.old))).best)
    if s.budget == 0:
        return start
    early = replace(s, task=replaced(task, task.deadline.share(0.2)))
    best = min([start, hops(early), *s.whole()], key=rows)
    least, quiet, rest = rows(best), 0, REST * task.deadline.left()
    for number in range(ROUNDS if s.rounds() is None else s.rounds() or 0):
        if task.deadline.left() < rest or quiet == STALLED:
            break
        trial = _anchored_trial(s, best, number, quiet)
        value = rows(trial)
        quiet = 0 if value < least - 1e-12 else quiet + 1
        if value < least:
            best, least = trial, value
    return min((_lowered(s, holds, rows) for holds in (best, start)), key=rows)


def _lowered(s: Search, holds: NDArray[np.bool_], rows: Callable[[NDArray[np.bool_]], float]) -> NDArray[np.bool_]:
    """Goes by the evaluated rows themselves: swaps of any layer, those priced lowest with the present anchors."""

    def following(whole: NDArray[np.bool_]) -> Iterator[NDArray[np.bool_]]:
        for number, layer in enumerate(row_layers(s, anchors.anchored(s.task, whole))):
            layer.place(s.state(whole[number]))
            for i, j in layer.promising(TRIED, s.budget - s.moves(whole)):
                trial = whole.copy()
                trial[number] = s.holds([swapped(layer.state, i, j)])[0]
                yield trial

    return min(walk(s, holds, following, rows, lambda whole: whole.tobytes()), key=rows)


def _anchored_trial(s: Search, best: NDArray[np.bool_], number: int, quiet: int) -> NDArray[np.bool_]:
    """A placement that is better if anchors stay as they are; after failures only every second layer changes."""
    board = s.board(row_layers(s, anchors.anchored(s.task, best)), begin=best)
    board.rng = np.random.default_rng([s.task.request.seed, number])
    board.improve(s.task.deadline.share(0.3), 2)
    options = []
    for n, layer in enumerate(board.layers):
        states = [s.state(best[n])]
        if not quiet or n % 2 == number % 2:
            states += [o.what for o in board.seen[n].values() if isinstance(o.what, State)]
            states += [s.state(holds[n]) for holds in s.fresh]
        found = []
        for state in states:
            layer.place(state)
            found.append(Option(layer.cost(), layer.moves, state))
        options.append(found)
    return s.holds([o.what for o in combined(options, s.budget)])
