"""Semidefinite lower bounds: for `hops` over the whole chain, for `dispatch` layer by layer.

A placement of 2E experts of two consecutive layers is a 0/1 matrix N that says who shares a rank with whom. N is positive
semidefinite, non-negative, 1 on its diagonal, its rows sum to `slots` in each layer, it obeys the triangle inequalities
N_ij + N_ik - N_jk <= 1 and, under a load cap, sum_j load_j N_ij <= cap. Consecutive pairs share the block of their common
layer, and by the chordal structure of a chain that is all that positive semidefiniteness of the whole says.

The relaxation (Zhao, Karisch, Rendl, Wolkowicz 1998 for partitioning; Frieze and Jerrum 1997 for the cut matrix) is solved by
the alternating direction method of multipliers, inequalities priced by a dual ascent. Any multipliers give a valid bound: the
one stated is recomputed from them in float64, with the eigenvalue error counted at its worst.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh

from coterie.placement.deadline import Deadline

Array = NDArray[np.float64]

PENALTY, LARGE_PENALTY = 0.1, 0.2
WARM_UP, EVERY = 30, 10  # iterations before the first cuts, and between rounds of cuts
LARGE_WARM_UP, LARGE_EVERY = 15, 5  # the same where an iteration costs more than finding cuts
CUTS_PER_BLOCK = 2.0  # new triangles per row of a matrix and round
VIOLATION = 0.03
LARGE = 256  # rows of a matrix from which single precision is used between checks
CHECK = 10  # iterations between evaluations of the bound
STALLED = 2e-5  # relative improvement over STALL_CHECKS checks under which it stops
STALL_CHECKS = 12


class _Triangles:
    """Triangle inequalities N_ij + N_ik - N_jk <= 1 with prices.

    cuts: int64 `[cuts, 4]` (matrix, i, j, k); price: `[cuts]`. `entries` are the distinct flat positions that they touch, above
    the diagonal, `mirror` the same below it, `slot` `[3, cuts]` which entry each term is.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = shape
        self.cuts, self.price = np.zeros((0, 4), dtype=np.int64), np.zeros(0)
        self._index()

    def _index(self) -> None:
        matrix, i, j, k = self.cuts.T
        n = self.shape[1]
        keys = np.stack([matrix * n * n + np.minimum(a, b) * n + np.maximum(a, b) for a, b in ((i, j), (i, k), (j, k))])
        self.entries, slot = np.unique(keys, return_inverse=True)
        self.slot = slot.reshape(keys.shape)
        within = self.entries % (n * n)
        self.mirror = self.entries - within + within % n * n + within // n
        self.touched = np.bincount(self.slot.ravel(), minlength=len(self.entries))[self.slot].sum(0)

    def _left(self, placed: Array) -> Array:
        ij, ik, jk = placed.ravel()[self.entries][self.slot]
        return np.asarray(ij + ik - jk)

    def add_to(self, charge: Array) -> None:
        """Put what the prices take off the gain of each entry into `charge`, symmetric `[matrices, n, n]`, in place."""
        terms = np.concatenate([self.price, self.price, -self.price]) / 2
        taken = np.bincount(self.slot.ravel(), terms, len(self.entries))
        charge.reshape(-1)[self.entries] += taken
        charge.reshape(-1)[self.mirror] += taken

    def ascend(self, placed: Array, penalty: float) -> None:
        """Raise the price of what `placed` violates, lower that of what it does not."""
        self.price = np.maximum(0.0, self.price + 2 * penalty / np.maximum(self.touched, 1) * (self._left(placed) - 1))

    def renew(self, placed: Array) -> None:
        """Drop triangles that no longer matter, add violated ones that share few entries."""
        kept = (self.price > 1e-9) | (self._left(placed) > 0.98)
        self.cuts, self.price = self.cuts[kept], self.price[kept]
        known = {tuple(c) for c in self.cuts.tolist()}
        found = [c for m in range(self.shape[0]) for c in _violated(placed[m], m) if c not in known]
        self.cuts = np.concatenate([self.cuts, np.array(found, dtype=np.int64).reshape(-1, 4)])
        self.price = np.concatenate([self.price, np.zeros(len(found))])
        self._index()

    def total(self) -> float:
        """Right-hand sides times prices."""
        return float(self.price.sum())


class _LoadRows:
    """Rows under a load cap, sum_j load_j N_ij <= 1 in each block, with prices.

    loads: float64 `[limits, matrices, n]`, over the caps; price: `[limits, blocks, matrices, n]`.
    """

    def __init__(self, loads: Array, blocks: int) -> None:
        self.loads, self.width = loads, loads.shape[2] // blocks
        limits, matrices, n = loads.shape
        self.price = np.zeros((limits, blocks, matrices, n))
        squares = (loads.reshape(limits, matrices, blocks, self.width) ** 2).sum(3)
        self.step = 1 / np.maximum(4 * squares.transpose(0, 2, 1)[..., None], 1e-12)
        self.parts = [slice(block * self.width, (block + 1) * self.width) for block in range(blocks)]

    def add_to(self, charge: Array) -> None:
        """As `_Triangles.add_to`."""
        for limit, loads in enumerate(self.loads):
            for block, part in enumerate(self.parts):
                taken = self.price[limit, block][:, :, None] * loads[:, None, part] / 2
                charge[:, :, part] += taken
                charge[:, part] += taken.transpose(0, 2, 1)

    def ascend(self, placed: Array, penalty: float) -> None:
        """As `_Triangles.ascend`."""
        for limit, loads in enumerate(self.loads):
            for block, part in enumerate(self.parts):
                excess = np.matmul(placed[:, :, part], loads[:, part, None])[:, :, 0] - 1
                raised = self.price[limit, block] + penalty * self.step[limit, block] * excess
                self.price[limit, block] = np.maximum(0.0, raised)

    def total(self) -> float:
        """Right-hand sides times prices."""
        return float(self.price.sum())


def _violated(matrix: Array, number: int) -> list[tuple[int, int, int, int]]:
    """The most violated triangles of one matrix, each entry in at most two of them."""
    n = len(matrix)
    limit = int(CUTS_PER_BLOCK * n)
    most = 8 * limit // n
    candidates = []
    for i in range(n):
        row = matrix[i]
        near = np.flatnonzero(row > VIOLATION)  # both entries of a violated triangle are larger
        near = near[near != i]
        excess = np.triu(row[near][:, None] + row[near][None, :] - matrix[near][:, near] - 1, 1)
        at = np.flatnonzero(excess > VIOLATION)
        if len(at) > most:
            at = at[np.argpartition(-excess.flat[at], most)[:most]]
        for p in at:
            j, k = near[p // len(near)], near[p % len(near)]
            candidates.append((float(excess.flat[p]), i, int(j), int(k)))
    candidates.sort(reverse=True)
    uses: dict[tuple[int, int], int] = {}
    found = []
    for _, i, j, k in candidates:
        pairs = [(i, j) if i < j else (j, i), (i, k) if i < k else (k, i), (j, k)]
        if i not in (j, k) and all(uses.get(pair, 0) < 2 for pair in pairs):
            found.append((number, i, j, k))
            for pair in pairs:
                uses[pair] = uses.get(pair, 0) + 1
            if len(found) == limit:
                break
    return found


def most_together(
    gain: Array, blocks: int, ranks: int, loads: Array, deadline: Deadline, target: float = -np.inf,
    report: Callable[[float], None] | None = None,
) -> float:  # fmt: skip
    """An upper bound on sum(gain * N) over all placements; infinite if there was no time for any.

    gain: float64 `[matrices, n, n]`, symmetric, zero diagonal, n = blocks * E with E a multiple of `ranks`; with two blocks
    the second of a matrix is the same layer as the first of the next. loads: float64 `[limits, matrices, n]`, the load of
    each expert over its layer's cap. Stops at `target`, at the deadline, or when it improves no more.
    """
    unit = float(np.abs(gain).sum()) / gain.shape[0] / (gain.shape[1] // blocks) or 1.0
    state = _Admm(gain / unit, blocks, ranks, loads)
    best, checks = np.inf, []
    while not deadline.passed():
        state.step()
        if state.made % CHECK == 0:
            best = min(best, state.bound() * unit)
            checks.append(best)
            if report is not None:
                report(best)
            settled = len(checks) > STALL_CHECKS and checks[-STALL_CHECKS] - best < STALLED * abs(best)
            if best <= target or (settled and state.made > state.first + 2 * state.every):
                break
    return best


class _Admm:
    """The method's state: `lifted` is positive semidefinite, `placed` keeps to the entries' bounds, `dual` prices the rest."""

    def __init__(self, gain: Array, blocks: int, ranks: int, loads: Array) -> None:
        self.blocks, self.ranks = blocks, ranks
        self.large = gain.shape[1] >= LARGE
        self.penalty = LARGE_PENALTY if self.large else PENALTY
        self.first, self.every = (LARGE_WARM_UP, LARGE_EVERY) if self.large else (WARM_UP, EVERY)
        self.exact = gain.astype(np.float64)  # for the bound; the method itself may use single precision
        self.gain = gain.astype(np.float32 if self.large else np.float64)
        self.placed = np.full_like(self.gain, 1 / ranks)
        self.diagonal = np.arange(gain.shape[1])
        self.placed[:, self.diagonal, self.diagonal] = 1.0
        self.dual = np.zeros_like(self.gain)
        self.residual = np.zeros_like(self.gain)
        self.triangles, self.rows = _Triangles(gain.shape), _LoadRows(loads, blocks)
        self.price = self._priced(self.gain.dtype)
        self.made = 0

    def step(self) -> None:
        """One iteration; cuts are renewed at fixed iterations."""
        self.made += 1
        outside = self.placed - self.dual
        lifted = self._project(outside)
        self.residual = self.penalty * (outside - lifted)
        moved = lifted + self.dual
        self.placed = self._within(moved + self.price / self.penalty)
        self.dual = moved - self.placed
        self.triangles.ascend(self.placed, self.penalty)
        self.rows.ascend(self.placed, self.penalty)
        if self.made >= self.first and (self.made - self.first) % self.every == 0:
            self.triangles.renew(self.placed)
        self.price = self._priced(self.gain.dtype)

    def _priced(self, dtype: Any) -> Array:
        """The gain of every entry less what the inequalities' prices take off it."""
        charge = np.zeros(self.gain.shape, dtype)
        self.triangles.add_to(charge)
        self.rows.add_to(charge)
        return np.asarray((self.exact if dtype == np.float64 else self.gain) - charge)

    def _project(self, matrices: Array) -> Array:
        """The nearest positive semidefinite matrices whose rows sum to `slots` in each block."""
        result = np.empty_like(matrices)
        for m, centred in enumerate(_centred(matrices, self.blocks)):
            if self.large:  # the positive part has a small rank: computing it alone takes half the time
                values, positive = eigh(centred, subset_by_value=(0, np.inf), driver="evr", check_finite=False)
            else:
                values, vectors = np.linalg.eigh(centred)
                first = int(np.searchsorted(values, 0))
                values, positive = values[first:], vectors[:, first:]
            result[m] = (positive * values) @ positive.T
        return result + 1 / self.ranks

    def _within(self, matrices: Array) -> Array:
        """The nearest matrices with entries in 0 to 1, a diagonal of 1, and equal blocks for a shared layer."""
        if self.blocks == 2:
            width = matrices.shape[1] // 2
            shared = (matrices[:-1, width:, width:] + matrices[1:, :width, :width]) / 2
            matrices[:-1, width:, width:] = matrices[1:, :width, :width] = shared
        np.clip(matrices, 0, 1, out=matrices)
        matrices[:, self.diagonal, self.diagonal] = 1.0
        return matrices

    def bound(self) -> float:
        """The Lagrangian's value at the present multipliers: valid whatever they are."""
        count, n = self.gain.shape[:2]
        width = n // self.blocks
        residual = self.residual.astype(np.float64)
        reduced = self._priced(np.float64) - residual
        total = float(residual.sum()) / self.ranks + self.triangles.total() + self.rows.total()
        trace = n * (1 - 1 / self.ranks)  # of the part of N beyond its row sums
        total += trace * float(np.maximum(0, np.linalg.eigvalsh(_centred(residual, self.blocks))[:, -1]).sum())
        if self.blocks == 2:
            total += float(np.maximum(0, reduced[:, :width, width:] + reduced[:, width:, :width].transpose(0, 2, 1)).sum())
            layers = np.zeros((count + 1, width, width))
            layers[:-1] += reduced[:, :width, :width]
            layers[1:] += reduced[:, width:, width:]
        else:
            layers = reduced.copy()
        ends = np.arange(width)
        total += float(layers[:, ends, ends].sum())
        layers[:, ends, ends] = 0
        return float(total + np.maximum(0, layers).sum())


def _centred(matrices: Array, blocks: int) -> Array:
    """Each block of rows and columns with its means taken out."""
    count, n = matrices.shape[:2]
    parts = matrices.reshape(count, blocks, n // blocks, blocks, n // blocks)
    parts = parts - parts.mean(4, keepdims=True)
    parts = parts - parts.mean(2, keepdims=True)
    result = parts.reshape(count, n, n)
    return np.asarray((result + result.transpose(0, 2, 1)) / 2)
