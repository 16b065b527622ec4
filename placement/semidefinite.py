"""Semidefinite lower bounds: for `hops` over the whole chain, for `dispatch` layer by layer.

A placement of 2E experts of two consecutive layers is a 0/1 matrix N that says who shares a rank with whom. N is positive
semidefinite, non-negative, 1 on its diagonal, its rows sum to `slots` in each layer, it obeys the triangle inequalities
N_ij + N_ik - N_jk <= 1 and, under a load cap, sum_j load_j N_ij <= cap. Consecutive pairs share the block of their common
layer, and by the chordal structure of a chain that is all that positive semidefiniteness of the whole says.

The relaxation (Zhao, Karisch, Rendl, Wolkowicz 1998 for partitioning; Frieze and Jerrum 1997 for the cut matrix) is solved by the
alternating direction method of multipliers, inequalities priced by a dual ascent. Any multipliers give a valid bound: the
one stated is recomputed from them in float64, with the eigenvalue error counted at its worst.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from coterie.placement.deadline import Deadline

Array = NDArray[np.float64]

PENALTY = 0.1
WARM_UP, EVERY = 60, 30  # iterations before the first cuts, and between rounds of cuts
CUTS_PER_BLOCK = 2.0  # new triangles per row of a matrix and round
VIOLATION = 0.03
CHECK = 10  # iterations between evaluations of the bound
STALLED = 2e-5  # relative improvement over STALL_CHECKS checks under which it stops
STALL_CHECKS = 12


@dataclass
class _Inequalities:
    """Triangle cuts `[cuts, 4]` (matrix, i, j, k) with prices, and the rows under a load cap with theirs.

    loads: float64 `[limits, matrices, n]` over caps (so that the right-hand side is 1); row_price like it, by
    `[limits, block, matrices, n]`.
    """

    shape: tuple[int, int, int]
    blocks: int
    loads: Array
    cuts: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 4), dtype=np.int64))
    price: Array = field(default_factory=lambda: np.zeros(0))
    row_price: Array = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        self.row_price = np.zeros((len(self.loads), self.blocks, *self.shape[:2]))
        width = self.shape[1] // self.blocks
        squares = (self.loads.reshape(len(self.loads), self.shape[0], self.blocks, width) ** 2).sum(3)
        self.row_step = 1 / np.maximum(4 * squares.transpose(0, 2, 1)[..., None], 1e-12)

    def entries(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Flat positions of N_ij, N_ik and N_jk of every triangle."""
        matrix, i, j, k = self.cuts.T
        n = self.shape[1]
        base = matrix * n * n
        return base + i * n + j, base + i * n + k, base + j * n + k

    def charge(self) -> Array:
        """What the prices take off the gain of each entry, symmetric `[matrices, n, n]`."""
        ij, ik, jk = self.entries()
        size = int(np.prod(self.shape))
        flat = np.bincount(ij, self.price, size) + np.bincount(ik, self.price, size) - np.bincount(jk, self.price, size)
        charge = flat.astype(np.float64).reshape(self.shape)
        width = self.shape[1] // self.blocks
        for limit, loads in enumerate(self.loads):
            for block in range(self.blocks):
                part = slice(block * width, (block + 1) * width)
                charge[:, :, part] += self.row_price[limit, block][:, :, None] * loads[:, None, part]
        return np.asarray((charge + charge.transpose(0, 2, 1)) / 2)

    def ascend(self, placed: Array, penalty: float) -> None:
        """Raise the price of what `placed` violates, lower that of what it does not."""
        if len(self.price):
            ij, ik, jk = self.entries()
            flat = placed.ravel()
            touched = np.bincount(np.concatenate([ij, ik, jk]), minlength=flat.size).reshape(self.shape)
            touched = (touched + touched.transpose(0, 2, 1)).ravel()
            step = 2 * penalty / (touched[ij] + touched[ik] + touched[jk])
            self.price = np.maximum(0.0, self.price + step * (flat[ij] + flat[ik] - flat[jk] - 1))
        width = self.shape[1] // self.blocks
        for limit, loads in enumerate(self.loads):
            for block in range(self.blocks):
                part = slice(block * width, (block + 1) * width)
                excess = np.matmul(placed[:, :, part], loads[:, part, None])[:, :, 0] - 1
                step = penalty * self.row_step[limit, block]
                self.row_price[limit, block] = np.maximum(0.0, self.row_price[limit, block] + step * excess)

    def renew(self, placed: Array) -> None:
        """Drop triangles that no longer matter, add violated ones that share few entries."""
        if len(self.price):
            ij, ik, jk = self.entries()
            flat = placed.ravel()
            kept = (self.price > 1e-9) | (flat[ij] + flat[ik] - flat[jk] > 0.98)
            self.cuts, self.price = self.cuts[kept], self.price[kept]
        known = {tuple(c) for c in self.cuts.tolist()}
        found = [c for m in range(self.shape[0]) for c in _violated(placed[m], m) if c not in known]
        self.cuts = np.concatenate([self.cuts, np.array(found, dtype=np.int64).reshape(-1, 4)])
        self.price = np.concatenate([self.price, np.zeros(len(found))])

    def total(self) -> float:
        """Right-hand sides times prices."""
        return float(self.price.sum() + self.row_price.sum())


def _violated(matrix: Array, number: int) -> list[tuple[int, int, int, int]]:
    """The most violated triangles of one matrix, each entry in at most two of them."""
    n = len(matrix)
    limit = int(CUTS_PER_BLOCK * n)
    candidates = []
    upper_j, upper_k = np.triu_indices(n, 1)
    joint = matrix[upper_j, upper_k] + 1 + VIOLATION
    for i in range(n):
        row = matrix[i]
        excess = row[upper_j] + row[upper_k] - joint
        at = np.flatnonzero(excess > 0)
        if len(at) > 8 * limit // n:
            at = at[np.argpartition(-excess[at], 8 * limit // n)[: 8 * limit // n]]
        candidates += [(float(excess[p]), i, int(upper_j[p]), int(upper_k[p])) for p in at]
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
            if best <= target or (settled and state.made > WARM_UP + 2 * EVERY):
                break
    return best


class _Admm:
    """The method's state: `lifted` is positive semidefinite, `placed` keeps to the entries' bounds, `dual` prices the rest."""

    def __init__(self, gain: Array, blocks: int, ranks: int, loads: Array) -> None:
        self.gain, self.blocks, self.ranks = gain, blocks, ranks
        self.single = np.float32 if gain.shape[1] >= 256 else np.float64  # of eigenvectors only
        self.placed = np.full(gain.shape, 1 / ranks)
        self.diagonal = np.arange(gain.shape[1])
        self.placed[:, self.diagonal, self.diagonal] = 1.0
        self.dual = np.zeros_like(gain)
        self.residual = np.zeros_like(gain)
        self.inequalities = _Inequalities(gain.shape, blocks, loads)
        self.charge = np.zeros_like(gain)
        self.made = 0

    def step(self) -> None:
        """One iteration; cuts are renewed at fixed iterations."""
        self.made += 1
        outside = self.placed - self.dual
        lifted = self._project(outside)
        self.residual = PENALTY * (outside - lifted)
        moved = lifted + self.dual
        self.placed = self._within(moved + (self.gain - self.charge) / PENALTY)
        self.dual = moved - self.placed
        self.inequalities.ascend(self.placed, PENALTY)
        if self.made >= WARM_UP and (self.made - WARM_UP) % EVERY == 0:
            self.inequalities.renew(self.placed)
        self.charge = self.inequalities.charge()

    def _project(self, matrices: Array) -> Array:
        """The nearest positive semidefinite matrices whose rows sum to `slots` in each block."""
        result = np.empty_like(matrices)
        for m, centred in enumerate(_centred(matrices, self.blocks)):
            values, vectors = np.linalg.eigh(centred.astype(self.single))
            first = int(np.searchsorted(values, 0))
            positive = vectors[:, first:]
            result[m] = (positive * values[first:]) @ positive.T
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
        reduced = self.gain - self.charge - self.residual
        total = float(self.residual.sum()) / self.ranks + self.inequalities.total()
        trace = n * (1 - 1 / self.ranks)  # of the part of N beyond its row sums
        total += trace * float(np.maximum(0, np.linalg.eigvalsh(_centred(self.residual, self.blocks))[:, -1]).sum())
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
        return total + float(np.maximum(0, layers).sum())


def _centred(matrices: Array, blocks: int) -> Array:
    """Each block of rows and columns with its means taken out."""
    count, n = matrices.shape[:2]
    parts = matrices.reshape(count, blocks, n // blocks, blocks, n // blocks)
    parts = parts - parts.mean(4, keepdims=True)
    parts = parts - parts.mean(2, keepdims=True)
    result = parts.reshape(count, n, n)
    return np.asarray((result + result.transpose(0, 2, 1)) / 2)
