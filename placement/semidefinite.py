"""Semidefinite lower bounds: for `hops` over the whole chain, for `dispatch` layer by layer.

A placement of 2E experts of two consecutive layers is a 0/1 matrix N that says who shares a rank with whom. N is positive
semidefinite, non-negative, 1 on its diagonal, its rows sum to `slots` in each layer, it obeys the star inequalities of
`cuts.py` and, under a load cap, sum_j load_j N_ij <= cap. Consecutive pairs share the block of their common layer, and by the
chordal structure of a chain that is all that positive semidefiniteness of the whole says.

The relaxation (Zhao, Karisch, Rendl, Wolkowicz 1998 for partitioning; Frieze and Jerrum 1997 for the cut matrix) is solved by
the alternating direction method of multipliers, inequalities priced by a dual ascent. Any multipliers give a valid bound: the
one stated is recomputed from them in float64, with the eigenvalue error counted at its worst.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coterie.placement.cuts import LoadRows, Stars
from coterie.placement.deadline import Deadline

Array = NDArray[np.float64]

PENALTY, LARGE_PENALTY = 0.1, 0.2
WARM_UP, EVERY = 30, 10  # iterations before the first cuts, and between rounds of cuts
LARGE_WARM_UP, LARGE_EVERY = 10, 5  # the same where an iteration costs more than finding cuts
LARGE = 256  # rows of a matrix from which single precision is used between checks
CHECK = 10  # iterations between evaluations of the bound
STALLED = 2e-5  # relative improvement over STALL_CHECKS checks under which it stops
STALL_CHECKS = 12


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
        self.stars, self.rows = Stars(gain.shape), LoadRows(loads, blocks)
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
        self.stars.ascend(self.placed, self.penalty)
        self.rows.ascend(self.placed, self.penalty)
        if self.made >= self.first and (self.made - self.first) % self.every == 0:
            self.stars.renew(self.placed)
        self.price = self._priced(self.gain.dtype)

    def _priced(self, dtype: Any) -> Array:
        """The gain of every entry less what the inequalities' prices take off it."""
        charge = np.zeros(self.gain.shape, dtype)
        self.stars.add_to(charge)
        self.rows.add_to(charge)
        return np.asarray((self.exact if dtype == np.float64 else self.gain) - charge)

    def _project(self, matrices: Array) -> Array:
        """The nearest positive semidefinite matrices whose rows sum to `slots` in each block."""
        result = np.empty_like(matrices)
        for m, centred in enumerate(_centred(matrices, self.blocks)):
            values, vectors = _large_eigh(centred) if self.large else np.linalg.eigh(centred)
            first = int(np.searchsorted(values, 0))
            result[m] = (vectors[:, first:] * values[first:]) @ vectors[:, first:].T
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
        total = float(residual.sum()) / self.ranks + self.stars.total() + self.rows.total()
        trace = n * (1 - 1 / self.ranks)  # of the part of N beyond its row sums
        total += trace * float(np.maximum(0, np.linalg.eigvalsh(_centred(residual, self.blocks))[:, -1]).sum())
        slots = width // self.ranks
        if self.blocks == 2:
            total += _most(reduced[:, :width, width:] + reduced[:, width:, :width].transpose(0, 2, 1), slots)
            layers = np.zeros((count + 1, width, width))
            layers[:-1] += reduced[:, :width, :width]
            layers[1:] += reduced[:, width:, width:]
        else:
            layers = reduced.copy()
        ends = np.arange(width)
        total += float(layers[:, ends, ends].sum())
        layers[:, ends, ends] = layers.min() - 1
        return float(total + (_most(layers, slots - 1) if slots > 1 else 0.0))


def _most(gain: Array, each: int) -> float:
    """An upper bound on sum(gain * B) over all B with entries in 0 to 1 whose rows and columns sum to `each`.

    gain: `[matrices, E, E]`; each: at least 1. Rows and columns are priced; any prices bound it, and each given the other is
    best between the `each`-th largest entry and the next.
    """
    size = gain.shape[2]
    cut = (max(size - each - 1, 0), size - each)
    rows = np.partition(gain, cut, axis=2)[:, :, cut].mean(2, keepdims=True)
    columns = np.partition(gain - rows, cut, axis=1)[:, cut].mean(1, keepdims=True)
    return float(each * (rows.sum() + columns.sum()) + np.maximum(0, gain - rows - columns).sum())


def _large_eigh(matrix: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """As `numpy.linalg.eigh`; with 512 rows in half the time, which is worth importing torch for, where it is there."""
    try:
        import torch
    except ImportError:
        return np.linalg.eigh(matrix)

    values, vectors = torch.linalg.eigh(torch.from_numpy(matrix))
    return values.numpy(), vectors.numpy()


def _centred(matrices: Array, blocks: int) -> Array:
    """Each block of rows and columns with its means taken out."""
    count, n = matrices.shape[:2]
    parts = matrices.reshape(count, blocks, n // blocks, blocks, n // blocks)
    parts = parts - parts.mean(4, keepdims=True)
    parts = parts - parts.mean(2, keepdims=True)
    result = parts.reshape(count, n, n)
    return np.asarray((result + result.transpose(0, 2, 1)) / 2)
