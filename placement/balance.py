"""Search for `load`: which experts get copies, and which rank holds what, so that no rank is the busiest by much.

Greedy replication and packing as EPLB does it (DeepSeek 2025), for all scenarios at once, then local search: slots change
places, spare copies change their expert. It descends a smooth potential, sum of exp(sharpness * load) over ranks and
scenarios, which has a slope where the busiest rank alone has none, and keeps the best by the true measure.
Deterministic for a seed and a number of iterations.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from coterie.placement.chain import Report
from coterie.placement.deadline import Deadline
from coterie.placement.plan import holders

Array = NDArray[np.float64]
Slots = NDArray[np.int64]

SHARPNESS = (30.0, 60.0, 120.0, 240.0)  # one after the other in every descent
PATIENCE = 60  # iterations without a better placement after which it ends
KICK = 6  # random moves that restart a layer from its best
HIGHEST = 500.0  # exponents beyond this would overflow
TILT = 8.0  # how strongly the scenario that is worst over all layers is weighed up


def search(
    loads: Array, ranks: int, slots: int, seed: int, iterations: int | None, deadline: Deadline, worst: bool,
    report: Report | None = None, room: Slots | None = None, weights: Array | None = None,
) -> tuple[Slots, int]:  # fmt: skip
    """Slots of every rank, int64 `[L, ranks, slots]` of expert ids with -1 for empty ones, and the iterations made.

    loads: `[scenarios, L, E]`, token counts. worst: minimise the worst scenario's mean imbalance, else the scenarios' mean.
    weights: `[scenarios]`, sum 1, what each counts in the mean, None: the same; the worst is sought from there.
    Copies of an expert take equal shares. An iteration is a descent of every layer. room: `[L, ranks]`, the slots of each
    rank that may be used, where memory leaves fewer.
    """
    relative = relative_loads(loads, ranks)
    open_slots = np.full((loads.shape[1], ranks), slots) if room is None else np.minimum(room, slots)
    layers = [
        _Layer(relative[:, layer], open_slots[layer], slots, np.random.default_rng([seed, layer]))
        for layer in range(loads.shape[1])
    ]
    weights = np.full(len(loads), 1 / len(loads)) if weights is None else weights
    made, found_at, best, best_value = 0, 0, [layer.slots.copy() for layer in layers], np.inf
    for made in itertools.count():
        if made == iterations or deadline.passed() or best_value <= 1 + 1e-12 or made - found_at > PATIENCE:
            break
        for number, layer in enumerate(layers):
            share = deadline.share(1 / (len(layers) - number)) if made == 0 else deadline
            layer.improve(weights, share, kick=made > 0)
        by_scenario = np.mean([np.maximum(layer.best_peaks, 1) for layer in layers], axis=0)  # 1 where nothing is loaded
        value = float(by_scenario.max() if worst else weights @ by_scenario)
        if value < best_value:
            best, best_value, found_at = [layer.best.copy() for layer in layers], value, made
        if report is not None:
            report(best_value, made + 1)
        if worst:
            tilted = weights * np.exp(TILT * (by_scenario - by_scenario.max()) / max(by_scenario.max() - 1, 1e-9))
            weights = 0.5 * weights + 0.5 * tilted / tilted.sum()
    found = np.stack(best)
    return np.where(found == loads.shape[2], -1, found), made


def peaks(slots: Slots, load: Array) -> Array:
    """Busiest over mean in every layer, `[L]`; 1 where nothing is loaded. slots: as of `search`; load `[L, E]`."""
    holds = holders(slots, load.shape[1], slots.shape[1]).astype(np.float64)
    share = holds / np.maximum(holds.sum(2, keepdims=True), 1)
    relative = relative_loads(load[None], slots.shape[1])[0]
    return np.asarray(np.maximum(np.einsum("le,ler->lr", relative, share).max(1), 1.0))


def relative_loads(loads: Array, ranks: int) -> Array:
    """Loads over the mean rank's load of their scenario and layer, so that 1 is an even rank; `[scenarios, L, E]`."""
    mean = loads.sum(2, keepdims=True) / ranks
    return np.asarray(np.where(mean > 0, loads / np.where(mean > 0, mean, 1), 0.0))


def replicated(load: Array, ranks: int, total: int) -> NDArray[np.int64]:
    """Copies of each expert `[E]`, `total` in all if they fit: each next one to the largest share in any scenario.

    load: `[scenarios, E]`, relative. No expert gets more copies than ranks.
    """
    copies = np.ones(load.shape[1], dtype=np.int64)
    for _ in range(total - load.shape[1]):
        share = np.where(copies < ranks, (load / copies).max(0), -1.0)
        if share.max() <= 0:
            break
        copies[share.argmax()] += 1
    return copies


class _Layer:
    """One layer: `slots` `[ranks, slots]` (E for an empty one), what a copy has, `share` `[scenarios, E + 1]`, and `held`
    `[scenarios, ranks]`.
    """

    def __init__(self, load: Array, room: Slots, slots: int, rng: np.random.Generator) -> None:
        self.load = np.concatenate([load, np.zeros((len(load), 1))], axis=1)
        self.empty, self.ranks, self.rng, self.room = load.shape[1], len(room), rng, room
        self.closed = np.arange(slots)[None] >= room[:, None]
        self.copies = np.append(replicated(load, len(room), int(room.sum())), 1)
        self.slots = self._packed(slots)
        self._restart(self.slots)
        self.best, self.best_peaks = self.slots.copy(), self.held.max(1)

    def improve(self, weights: Array, deadline: Deadline, kick: bool) -> None:
        """Descend from the best known, shaken if `kick`."""
        self._restart(self.best)
        if kick:
            self._shake()
        for sharpness in SHARPNESS:
            while not deadline.passed() and self._step(sharpness, weights):
                pass
        peaks = self.held.max(1)
        if weights @ peaks < weights @ self.best_peaks - 1e-12:
            self.best, self.best_peaks = self.slots.copy(), peaks

    def _packed(self, slots: int) -> Slots:
        """Heaviest copy first, to the rank that it makes least heavy in its worst scenario."""
        placed = np.full((self.ranks, slots), self.empty)
        held, used = np.zeros((len(self.load), self.ranks)), np.zeros(self.ranks, dtype=np.int64)
        share = self.load / self.copies
        for expert in np.argsort(-share[:, : self.empty].max(0), kind="stable"):
            for _ in range(self.copies[expert]):
                free = (used < self.room) & ~(placed == expert).any(1)
                if not free.any():  # only its own ranks have room: one copy less
                    self.copies[expert] -= 1
                    share = self.load / self.copies
                    continue
                level = (held + share[:, expert, None]).max(0) + 1e-3 * held.mean(0)
                rank = int(np.where(free, level, np.inf).argmin())
                placed[rank, used[rank]] = expert
                used[rank] += 1
                held[:, rank] += share[:, expert]
        return placed

    def _restart(self, slots: Slots) -> None:
        self.slots = slots.copy()
        self.copies = np.bincount(slots.ravel(), minlength=self.empty + 1)
        self.copies[self.empty] = 1
        self.share = self.load / np.maximum(self.copies, 1)
        self.held = self.share[:, self.slots].sum(2)
        self.on = np.zeros((self.empty + 1, self.ranks), dtype=bool)
        self.on[self.slots, np.arange(self.ranks)[:, None]] = True
        self.on[self.empty] = False

    def _shake(self) -> None:
        """Random swaps and, where there are spare copies or empty slots, as many random changes of what they hold."""
        for _ in range(KICK):
            spare = self._spare()
            if len(spare) and self.rng.random() < 0.5:
                rank, slot = self.rng.choice(spare)
                fits = np.flatnonzero(~self.on[:, rank])  # the last one stands for an empty slot
                self.slots[rank, slot] = self.rng.choice(fits)
                self._restart(self.slots)
                continue
            a, b = self.rng.choice(self.ranks, 2, replace=False)
            i, j = self.rng.integers(self.slots.shape[1], size=2)
            u, v = self.slots[a, i], self.slots[b, j]
            if not self.on[u, b] and not self.on[v, a] and not self.closed[a, i] and not self.closed[b, j]:
                self.slots[a, i], self.slots[b, j] = v, u
                self._restart(self.slots)

    def _spare(self) -> Slots:
        """Slots `[n, 2]` that may hold something else: spare copies and empty ones."""
        return np.argwhere((self.copies[self.slots] > 1) | ((self.slots == self.empty) & ~self.closed))

    def _heat(self, held: Array, sharpness: float) -> Array:
        """The potential of loads, in that of the busiest rank now."""
        return np.asarray(np.exp(np.minimum(sharpness * (held - self.held.max()), HIGHEST)))

    def _step(self, sharpness: float, weights: Array) -> bool:
        """The best swap of a slot of the busiest rank, or the best change of one spare copy; False if none helps."""
        heat = weights[:, None] * self._heat(self.held, sharpness)
        rank = int(heat.sum(0).argmax())
        gain, move = self._best_swap(rank, sharpness, weights, heat)
        other, change = self._best_change(rank, sharpness, weights, heat)
        threshold = 1e-6 * heat.sum()
        if max(gain, other) <= threshold:
            return False
        rows, columns, experts = move if gain >= other else change
        self.slots[rows, columns] = experts
        self._restart(self.slots)
        return True

    def _best_swap(
        self, rank: int, sharpness: float, weights: Array, heat: Array
    ) -> tuple[float, tuple[list[int], list[int], list[int]]]:
        mine, others = self.slots[rank], self.slots
        change = self.share[:, others][:, None] - self.share[:, mine][:, :, None, None]  # [scenarios, slot, ranks, slots]
        here = self._heat(self.held[:, rank, None, None, None] + change, sharpness)
        there = self._heat(self.held[:, None, :, None] - change, sharpness)
        after = np.tensordot(weights, here + there, 1)
        gain = heat.sum(0)[rank] + heat.sum(0)[None, :, None] - after
        twice = self.on[mine][:, :, None] | self.on[others, rank][None]
        gain[twice | self.closed[None] | self.closed[rank][:, None, None]] = -np.inf
        gain[:, rank] = -np.inf
        i, b, j = np.unravel_index(gain.argmax(), gain.shape)
        return float(gain[i, b, j]), ([rank, int(b)], [int(i), int(j)], [int(others[b, j]), int(mine[i])])

    def _best_change(
        self, rank: int, sharpness: float, weights: Array, heat: Array
    ) -> tuple[float, tuple[list[int], list[int], list[int]]]:
        """One more copy of an expert of the busiest rank, in place of a spare copy or in an empty slot elsewhere."""
        best: tuple[float, tuple[list[int], list[int], list[int]]] = (-np.inf, ([], [], []))
        spare = self._spare()
        if not len(spare):
            return best
        old = self.slots[spare[:, 0], spare[:, 1]]
        for expert in set(self.slots[rank].tolist()) - {self.empty}:
            fits = ~self.on[expert][spare[:, 0]] & (old != expert)
            if not fits.any():
                continue
            where, gone = spare[fits], old[fits]
            held = np.tile(self.held[:, None, :], (1, len(where), 1))
            less = self.load[:, expert] / (self.copies[expert] + 1) - self.share[:, expert]
            held += less[:, None, None] * self.on[expert][None, None]
            dropped = np.where(
                gone == self.empty, 0.0, self.load[:, gone] / np.maximum(self.copies[gone] - 1, 1) - self.share[:, gone]
            )
            held += dropped[:, :, None] * self.on[gone][None]
            n = np.arange(len(where))
            held[:, n, where[:, 0]] += (self.share[:, expert] + less)[:, None] - self.share[:, gone] - dropped
            after = np.tensordot(weights, self._heat(held, sharpness).sum(2), 1)
            at = int(after.argmin())
            if (gain := float(heat.sum() - after[at])) > best[0]:
                best = (gain, ([int(where[at, 0])], [int(where[at, 1])], [int(expert)]))
        return best
