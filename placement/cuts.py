"""Inequalities that the semidefinite bounds add to their relaxation, each with a price: stars as they are found, load rows.

A star is an expert i and a set T of others: sum_t N_it - sum_{t<u} N_tu <= 1. Of T, let s experts share i's rank; then the
left side is at most s - s (s - 1) / 2, which no whole number s makes more than 1. With two arms it is the triangle inequality;
these are the 2-partition inequalities of the clique partitioning polytope with a single centre (Groetschel and Wakabayashi
1990). They are separated greedily: for every centre and first arm, the arm that adds most, as long as one does.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

ARMS = 4  # most arms of a star
NEAR = 16  # experts most with a centre that may be its arms
CUTS_PER_ROW = 4.0  # new stars per row of a matrix and round
VIOLATION = 0.03
SHARED = 4  # new stars of a round that may have an entry in common
LEAST_ARM = 1e-3  # what a further arm has to add
TIPS, TOPS = np.triu_indices(ARMS, 1)


class Stars:
    """Star inequalities with prices.

    cuts: int64 `[cuts, 2 + ARMS]` (matrix, centre, arms ascending, n where there is none); price: `[cuts]`. `entries` are the
    distinct flat positions that they touch, above the diagonal, `mirror` the same below it; the terms of all cuts lie one
    after another, those of a cut from `first` on: `slot` is the entry of each, `sign` its factor.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.cuts, self.price = np.zeros((0, 2 + ARMS), dtype=np.int64), np.zeros(0)
        self._index()

    def _index(self) -> None:
        n = self.shape[1]
        keys = _terms(self.cuts[:, 1:], n)
        there = keys >= 0
        self.count = there.sum(1)
        self.first = np.cumsum(self.count) - self.count
        self.sign = np.broadcast_to(SIGNS, keys.shape)[there]
        self.entries, self.slot = np.unique((keys + self.cuts[:, :1] * n * n)[there], return_inverse=True)
        within = self.entries % (n * n)
        self.mirror = self.entries - within + within % n * n + within // n
        shared = np.bincount(self.slot, minlength=len(self.entries))
        self.touched = self._summed(shared[self.slot].astype(np.float64))

    def _summed(self, terms: Array) -> Array:
        return np.asarray(np.add.reduceat(terms, self.first)) if len(self.first) else np.zeros(0)

    def _left(self, placed: Array) -> Array:
        return self._summed(self.sign * placed.reshape(-1)[self.entries][self.slot])

    def add_to(self, charge: Array) -> None:
        """Put what the prices take off the gain of each entry into `charge`, symmetric `[matrices, n, n]`, in place."""
        taken = np.bincount(self.slot, self.sign * np.repeat(self.price / 2, self.count), len(self.entries))
        charge.reshape(-1)[self.entries] += taken
        charge.reshape(-1)[self.mirror] += taken

    def ascend(self, placed: Array, penalty: float) -> None:
        """Raise the price of what `placed` violates, lower that of what it does not."""
        self.price = np.maximum(0.0, self.price + 2 * penalty / np.maximum(self.touched, 1) * (self._left(placed) - 1))

    def renew(self, placed: Array) -> None:
        """Drop stars that no longer matter, add violated ones that share few entries."""
        kept = (self.price > 1e-9) | (self._left(placed) > 0.98)
        found = [np.insert(violated(matrix), 0, number, axis=1) for number, matrix in enumerate(placed)]
        cuts = np.concatenate([self.cuts[kept], *found])
        _, first = np.unique(cuts, axis=0, return_index=True)
        first.sort()
        self.cuts = cuts[first]
        self.price = np.concatenate([self.price[kept], np.zeros(len(first) - int(kept.sum()))])
        self._index()

    def total(self) -> float:
        """Right-hand sides times prices."""
        return float(self.price.sum())


SIGNS = np.concatenate([np.ones(ARMS), -np.ones(len(TIPS))])


def _terms(stars: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """The entries of each star, `[stars, terms]` in the order of SIGNS, as row * n + column above the diagonal, -1 for none.

    stars: (centre, arms) `[stars, 1 + ARMS]`, n where there is no arm.
    """
    centre, arms = stars[:, :1], stars[:, 1:]
    one = np.concatenate([np.broadcast_to(centre, arms.shape), arms[:, TIPS]], axis=1)
    two = np.concatenate([arms, arms[:, TOPS]], axis=1)
    return np.where((one < n) & (two < n), np.minimum(one, two) * n + np.maximum(one, two), -1)


def violated(matrix: Array) -> NDArray[np.int64]:
    """The most violated stars that were found, few of which share an entry, int64 `[stars, 1 + ARMS]` (centre, arms).

    matrix: `[n, n]`, symmetric; arms ascending, n where there is none.
    """
    n = len(matrix)
    if n < 2:
        return np.zeros((0, 1 + ARMS), dtype=np.int64)
    near, arms, excess = _grown(matrix)
    centre, begin = np.nonzero(excess > VIOLATION)
    excess = excess[centre, begin]
    chosen = np.concatenate([near, np.full((n, 1), n)], axis=1)[centre[:, None], arms[centre, begin]]
    stars = np.concatenate([centre[:, None], np.sort(chosen, axis=1)], axis=1)
    stars = stars[np.argsort(-excess, kind="stable")]
    _, first = np.unique(stars, axis=0, return_index=True)
    stars = stars[np.sort(first)]
    keys = _terms(stars, n)
    return stars[_shared(keys) < SHARED][: int(CUTS_PER_ROW * n)]


def _grown(matrix: Array) -> tuple[NDArray[np.int64], NDArray[np.int64], Array]:
    """For every centre its NEAR nearest `[n, near]`; for each of these as first arm the arms `[n, near, ARMS]`, and the excess.

    Arms are numbers in the centre's row of nearest, NEAR or fewer; that number itself where there is none.
    """
    n = len(matrix)
    count = min(NEAR, n - 1)
    others = matrix.copy()
    np.fill_diagonal(others, -1.0)
    near = np.argpartition(-others, count - 1, axis=1)[:, :count]
    towards = np.take_along_axis(others, near, axis=1)
    between = matrix[near[:, :, None], near[:, None, :]]
    own = np.arange(count)
    between[:, own, own] = 2.0  # nobody is an arm twice
    arms = np.full((n, count, ARMS), count)
    arms[:, :, 0] = own
    excess = np.where(towards > LEAST_ARM, towards - 1, -np.inf)
    adds = towards[:, None, :] - between
    row, begin = np.arange(n)[:, None], own[None]
    for arm in range(1, ARMS):
        best = adds.argmax(2)
        most = adds[row, begin, best]
        more = most > LEAST_ARM
        arms[:, :, arm] = np.where(more, best, count)
        excess = excess + np.where(more, most, 0)
        adds -= between[row, best]
    return near, arms, excess


def _shared(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many earlier rows have an entry in common with each, the most over its entries; keys `[rows, terms]`, -1 for none."""
    flat = keys.ravel()
    order = np.argsort(flat, kind="stable")
    ordered = flat[order]
    begins = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(flat) else np.zeros(0, dtype=np.int64)
    since = np.arange(len(flat)) - np.repeat(begins, np.diff(np.append(begins, len(flat))))
    earlier = np.empty(len(flat), dtype=np.int64)
    earlier[order] = since
    return np.asarray(np.where(keys >= 0, earlier.reshape(keys.shape), 0).max(1, initial=0))


class LoadRows:
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
        """As `Stars.add_to`."""
        for limit, loads in enumerate(self.loads):
            for block, part in enumerate(self.parts):
                taken = self.price[limit, block][:, :, None] * loads[:, None, part] / 2
                charge[:, :, part] += taken
                charge[:, part] += taken.transpose(0, 2, 1)

    def ascend(self, placed: Array, penalty: float) -> None:
        """As `Stars.ascend`."""
        for limit, loads in enumerate(self.loads):
            for block, part in enumerate(self.parts):
                excess = np.matmul(placed[:, :, part], loads[:, part, None])[:, :, 0] - 1
                raised = self.price[limit, block] + penalty * self.step[limit, block] * excess
                self.price[limit, block] = np.maximum(0.0, raised)

    def total(self) -> float:
        """Right-hand sides times prices."""
        return float(self.price.sum())
