"""The traffic between consecutive layers, laid out for the search of chains: as a list of what is not zero, or dense."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from coterie.placement.baselines import Assignment
from coterie.placement.problem import Problem

DENSE = 128  # a list takes longer than a dense product where its share of all pairs is above ranks / DENSE (measured)


@dataclass(frozen=True)
class _Entries:
    """Traffic into some layers: at[i] = row * ranks of the expert, source[i] = layer * E + expert of a neighbour, weight."""

    at: NDArray[np.int64]
    source: NDArray[np.int64]
    weight: NDArray[np.float64]


@dataclass
class Traffic:
    """A `hops` problem's transitions. Its methods give the same, listed or dense, up to rounding; counts exactly."""

    problem: Problem
    _lists: dict[bytes, _Entries] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.problem.transitions is not None
        self.pairs = [np.nonzero(matrix) for matrix in self.problem.transitions]
        self.weights = [matrix[pair] for matrix, pair in zip(self.problem.transitions, self.pairs, strict=True)]
        share = sum(map(len, self.weights)) / max(self.problem.transitions.size, 1)
        self.listed = share * DENSE <= self.problem.ranks
        self.dense = None if self.listed else self.problem.transitions.astype(np.float32)
        self.total = float(sum(w.sum() for w in self.weights))

    def gains(self, assignment: Assignment, layers: NDArray[np.int64]) -> NDArray[np.float32]:
        """What each expert of `layers` keeps together if it stands on a rank, float32 `[layers, E, ranks]`.

        assignment: `[L, E]`, of which only the neighbours of `layers` are read.
        """
        if self.dense is not None:
            return self._multiplied(self.dense, assignment, layers)
        ranks, experts = self.problem.ranks, self.problem.experts
        entries = self._entries(layers)
        to = assignment.ravel().take(entries.source)
        to += entries.at
        kept = np.bincount(to, entries.weight, len(layers) * experts * ranks)
        return kept.astype(np.float32).reshape(len(layers), experts, ranks)

    def _multiplied(self, dense: NDArray[np.float32], assignment: Assignment, layers: NDArray[np.int64]) -> NDArray[np.float32]:
        ranks = np.arange(self.problem.ranks)
        kept = np.zeros((len(layers), assignment.shape[1], len(ranks)), np.float32)
        after, before = layers > 0, layers < len(assignment) - 1
        ahead, behind = assignment[layers[after] - 1], assignment[layers[before] + 1]
        kept[after] += np.matmul(dense[layers[after] - 1].transpose(0, 2, 1), (ahead[:, :, None] == ranks).astype(np.float32))
        kept[before] += np.matmul(dense[layers[before]], (behind[:, :, None] == ranks).astype(np.float32))
        return kept

    def _entries(self, layers: NDArray[np.int64]) -> _Entries:
        key = layers.tobytes()
        if key not in self._lists:
            self._lists[key] = self._listed(layers)
        return self._lists[key]

    def _listed(self, layers: NDArray[np.int64]) -> _Entries:
        experts = self.problem.experts
        empty = np.zeros(0, dtype=np.int64)
        parts: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]] = [(empty, empty, np.zeros(0))]
        for row, layer in enumerate(layers):
            sides = []
            if layer > 0:
                one, two = self.pairs[layer - 1]
                sides.append((two, (layer - 1) * experts + one, self.weights[layer - 1]))
            if layer < self.problem.layers - 1:
                one, two = self.pairs[layer]
                sides.append((one, (layer + 1) * experts + two, self.weights[layer]))
            parts += [((row * experts + expert) * self.problem.ranks, source, weight) for expert, source, weight in sides]
        at, source, weight = zip(*parts, strict=True)
        return _Entries(np.concatenate(at), np.concatenate(source), np.concatenate(weight))

    def cost(self, assignment: Assignment) -> float:
        """As `Problem.cost`, which it takes the place of in the search: it is asked for often."""
        together = 0.0
        for layer, ((one, two), weight) in enumerate(zip(self.pairs, self.weights, strict=True)):
            together += float(weight[assignment[layer].take(one) == assignment[layer + 1].take(two)].sum())
        return self.total - together

    def met(self, layer: int, one: NDArray[np.int64], two: NDArray[np.int64]) -> NDArray[np.float64]:
        """The traffic from ranks of `layer` to ranks of the next, `[ranks, ranks]`; one, two: the ranks of experts, `[E]`."""
        ranks = self.problem.ranks
        at = one.take(self.pairs[layer][0]) * ranks + two.take(self.pairs[layer][1])
        return np.asarray(np.bincount(at, self.weights[layer], ranks * ranks).reshape(ranks, ranks))
