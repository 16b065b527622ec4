"""Recombination of placements of a chain: the best chain of layers from a pool, ranks renamed between them as is best."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from coterie.placement.baselines import Assignment
from coterie.placement.problem import Problem
from coterie.placement.traffic import Traffic


@dataclass(frozen=True)
class _Link:
    """From one member's layers to the next layers of another: what the best renaming of the second's ranks keeps
    together `[L-1]`, and each rank's name in the first `[L-1, ranks]`.
    """

    one: Assignment
    two: Assignment
    kept: NDArray[np.float64]
    names: NDArray[np.int64]


@dataclass
class Pool:
    """Placements to recombine. Links between two of them are worked out once, as long as both stay in it."""

    traffic: Traffic
    _links: dict[tuple[int, int], _Link] = field(default_factory=dict)

    def best(self, members: list[Assignment]) -> Assignment:
        """The best chain of layers, each from any of the members: a Viterbi pass, exact for these members.

        members: not changed in place from one call to the next.
        """
        present = {id(member) for member in members}
        self._links = {key: link for key, link in self._links.items() if present.issuperset(key)}
        links = [[self._link(one, two) for two in members] for one in members]
        kept = np.array([[link.kept for link in row] for row in links])  # [one, two, layer]
        best = np.zeros(len(members))
        back: list[NDArray[np.int64]] = []
        for layer in range(kept.shape[2]):
            total = best[:, None] + kept[:, :, layer]
            back.append(total.argmax(0))
            best = total.max(0)
        path = [int(best.argmax())]
        for origin in reversed(back):
            path.append(int(origin[path[-1]]))
        path.reverse()
        return _renamed(members, links, path)

    def _link(self, one: Assignment, two: Assignment) -> _Link:
        key = (id(one), id(two))
        if key not in self._links:
            steps, ranks = len(one) - 1, self.traffic.problem.ranks
            kept, names = np.zeros(steps), np.zeros((steps, ranks), dtype=np.int64)
            for layer in range(steps):
                meet = self.traffic.met(layer, one[layer], two[layer + 1])
                row, column = linear_sum_assignment(meet, maximize=True)
                kept[layer] = meet[row, column].sum()
                names[layer, column] = row
            self._links[key] = _Link(one, two, kept, names)
        return self._links[key]


def _renamed(members: list[Assignment], links: list[list[_Link]], path: list[int]) -> Assignment:
    """The layers of the members on the path, each with its ranks named as the layer before them has it."""
    chosen = np.stack([members[number][layer] for layer, number in enumerate(path)])
    name = np.arange(links[0][0].names.shape[1])
    for layer in range(1, len(path)):
        name = name[links[path[layer - 1]][path[layer]].names[layer - 1]]
        chosen[layer] = name[chosen[layer]]
    return chosen


def recombined(problem: Problem, members: list[Assignment]) -> Assignment:
    """`Pool.best` of these members alone."""
    return Pool(Traffic(problem)).best(members)
