"""One layer of a placement whose changes are priced in cost and in moves: what re-planning is made of.

A layer is a set of columns, one per slot: the expert (E for an empty slot) and the rank it is on. Two columns change places, or
a spare column (an empty slot, or one of several copies) takes another expert. A move is an expert on a rank where the old
plan does not have it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from coterie.placement.chain import allowed_swaps
from coterie.placement.cost import dealt
from coterie.placement.limits import floors
from coterie.placement.problem import Limit, Problem
from coterie.placement.topology import Topology

Array = NDArray[np.float64]
Ids = NDArray[np.int64]
Holds = NDArray[np.bool_]  # [E, ranks]
TENURE = (3, 8)  # changes of the layer in which a column may not return to a rank
MOVES = (-2, -1, 0, 1, 2)  # that one change can make


class State(NamedTuple):
    """expert, here: int64 `[ranks * slots]`, the expert (E: none) and the rank of every column; experts' first copies lead."""

    expert: Ids
    here: Ids


class Change(NamedTuple):
    """What the search goes by, and the moves that are added: columns i and j change places, or i takes expert j."""

    cost: float
    moves: int
    i: int
    j: int
    swap: bool


def state_of(holds: Holds, slots: int) -> State:
    """The columns of a layer."""
    experts, ranks = holds.shape
    first = holds.argmax(1)
    further = holds.copy()
    further[np.arange(experts), first] = False
    expert, rank = np.nonzero(further)
    free = slots - holds.sum(0)
    return State(
        np.concatenate([np.arange(experts), expert, np.full(free.sum(), experts)]),
        np.concatenate([first, rank, np.repeat(np.arange(ranks), free)]),
    )


def holds_of(state: State, experts: int, ranks: int) -> Holds:
    """The reverse of `state_of`."""
    held = np.zeros((experts + 1, ranks), dtype=bool)
    held[state.expert, state.here] = True
    return held[:experts]


@dataclass(frozen=True)
class Given:
    """What every layer is told, whatever its objective.

    old: bool `[E, ranks]`; slots: of a rank. weights: float64 `[limits, E]`, caps `[limits, ranks]`; shared: bool `[limits]`,
    copies of an expert share its weight (load) as the dispatcher deals them out, else each has all of it (bytes).
    required: bool `[limits]`, what must be kept, not only as far as moves go.
    """

    old: Holds
    slots: int
    weights: Array
    caps: Array
    shared: NDArray[np.bool_]
    required: NDArray[np.bool_]
    topology: Topology


class Layer:
    """A layer with its old placement and its limits; a subclass prices its changes."""

    def __init__(self, given: Given) -> None:
        self.experts, self.ranks = given.old.shape
        self.slots = given.slots
        self.new = np.pad((~given.old).astype(np.int64), ((0, 1), (0, 0)))
        self.weights, self.caps, self.shared = np.pad(given.weights, ((0, 0), (0, 1))), given.caps, given.shared
        self.required, self.topology = given.required, given.topology
        self.rng = np.random.default_rng(0)
        self.place(state_of(given.old, given.slots))

    def place(self, state: State) -> None:
        """Start from other columns."""
        self.expert, self.here = state.expert.copy(), state.here.copy()
        self.until = np.zeros((len(self.here), self.ranks), dtype=np.int64)
        self.step = 0
        self._count()

    def _count(self) -> None:
        self.copies = np.bincount(self.expert, minlength=self.experts + 1)
        self.copies[self.experts] = 1
        self.on = np.zeros((self.experts + 1, self.ranks), dtype=bool)
        self.on[self.expert, self.here] = True
        self.on[self.experts] = False
        self.weight = self.weights[:, self.expert] * np.where(self.shared[:, None], self._shares(), 1.0)

    def _shares(self) -> Array:
        """Of its expert's tokens, what each column gets, `[n]`; those of equally many tokens at every rank."""
        share, t = np.ones(len(self.here)), self.topology
        for expert in np.flatnonzero(self.copies[: self.experts] > 1):
            served = np.bincount(dealt(tuple(np.flatnonzero(self.on[expert]).tolist()), t.nodes, t.ranks_per_node))
            columns = self.expert == expert
            share[columns] = served[self.here[columns]] / self.ranks
        return share

    @property
    def state(self) -> State:
        """A copy of the columns."""
        return State(self.expert.copy(), self.here.copy())

    @property
    def holds(self) -> Holds:
        """bool `[E, ranks]`."""
        return holds_of(State(self.expert, self.here), self.experts, self.ranks)

    @property
    def moves(self) -> int:
        """Made so far."""
        return int(self.new[self.expert, self.here].sum())

    def cost(self) -> float:
        """What is minimised, of this layer as it stands."""
        raise NotImplementedError

    def swaps(self) -> Array:
        """What swaps of columns change, `[n, n]`, symmetric; infinite for what the objective does not move."""
        raise NotImplementedError

    def retakes(self) -> Array | None:
        """What it changes if a spare column takes an expert, `[n, E]`, infinite for the other columns; None: not done."""
        return None

    def changes(self, better: float = -np.inf, price: float = 0.0) -> list[Change]:
        """The best allowed change for each number of moves; what is forbidden must be below `better`, moves at `price` each."""
        added, swaps = self._moves_of_swaps(), self.swaps()
        barred = self.until[:, self.here] > self.step
        barred = (barred | barred.T) & (swaps + price * added >= better)
        found = _best_by_moves(np.where(self._possible() & ~barred, swaps, np.inf), added, True)
        retakes = self.retakes()
        if retakes is not None:
            busy = np.repeat(self.until[np.arange(len(self.here)), self.here][:, None] > self.step, self.experts, axis=1)
            added = self.new[:-1, self.here].T - self.new[self.expert, self.here][:, None]
            value = np.where(busy & (retakes + price * added >= better) | ~self._retakable(), np.inf, retakes)
            found += _best_by_moves(value, added, False)
        return found

    def promising(self, count: int, slack: int) -> list[tuple[int, int]]:
        """`count` pairs of columns whose swaps are priced lowest, are allowed, and add at most `slack` moves."""
        fits = np.triu(self._possible() & (self._moves_of_swaps() <= slack))
        pairs = np.argwhere(fits)
        order = np.argsort(self.swaps()[fits], kind="stable")[:count]
        return [(int(i), int(j)) for i, j in pairs[order]]

    def mending(self, required: bool) -> list[Change]:
        """As `changes`, going by `excess`; copies may go, too."""
        kept = self.required | (not required)
        held, floor, weight = self.held()[kept], floors(self.weights, self.caps)[kept], self.weight[kept]
        change = weight[:, None, :] - weight[:, :, None]  # the rank of i, j instead: [limits, i, j]
        after = over((held[:, self.here, None] + change) / floor[:, self.here, None])
        before = over(held / floor)
        at = before[self.here]
        value = np.where(self._distinct(), after + after.T - at[:, None] - at[None, :], np.inf)
        drops = [self._drop(int(i), required) for i in np.flatnonzero(self.copies[self.expert] > 1)]
        return _best_by_moves(value, self._moves_of_swaps(), True) + drops

    def _drop(self, i: int, required: bool) -> Change:
        """What it does to `excess` if column i is emptied."""
        before, expert = self.excess(required), int(self.expert[i])
        self.expert[i] = self.experts
        Layer._count(self)
        change = Change(self.excess(required) - before, -int(self.new[expert, self.here[i]]), i, self.experts, False)
        self.expert[i] = expert
        Layer._count(self)
        return change

    def excess(self, required: bool = False) -> float:
        """How far the limits, or only those that are required, are exceeded, in shares of the caps, summed."""
        return self.excess_of(self.required | (not required))

    def excess_of(self, limits: NDArray[np.bool_]) -> float:
        """The same of some limits, bool `[limits]`."""
        return float(over(self.held()[limits] / floors(self.weights, self.caps)[limits]).sum())

    def held(self) -> Array:
        """What each rank carries of what is limited, `[limits, ranks]`."""
        rows = [np.bincount(self.here, weights=w, minlength=self.ranks) for w in self.weight]
        return np.array(rows, dtype=np.float64).reshape(len(self.weight), self.ranks)

    def take(self, change: Change) -> float:
        """Make it; returns what the cost changed by."""
        before, i = self.cost(), change.i
        self.step += 1
        tenure = self.step + self.rng.integers(*TENURE, size=2)
        self.until[i, self.here[i]] = tenure[0]
        if change.swap:
            self.until[change.j, self.here[change.j]] = tenure[1]
            self._swap(i, change.j)
        else:
            self._retake(i, change.j)
        self._count()
        return self.cost() - before

    def _swap(self, i: int, j: int) -> None:
        self.here[i], self.here[j] = self.here[j], self.here[i]

    def _retake(self, i: int, expert: int) -> None:
        self.expert[i] = expert

    def _moves_of_swaps(self) -> Ids:
        added = self.new[self.expert][:, self.here]
        own = np.diagonal(added)
        return np.asarray(added + added.T - own[:, None] - own[None, :])

    def _distinct(self) -> NDArray[np.bool_]:
        """Swaps between ranks that leave no expert twice on one."""
        twice = self.on[self.expert][:, self.here]
        return np.asarray(~(twice | twice.T) & (self.here[:, None] != self.here[None, :]))

    def _possible(self) -> NDArray[np.bool_]:
        limits = tuple(Limit(w[None], c[None]) for w, c in zip(self.weight, self.caps, strict=True))
        problem = Problem(1, len(self.here), self.ranks, self.slots, 1.0, limits)
        return np.asarray(self._distinct() & allowed_swaps(problem, self.here, 0))

    def _retakable(self) -> NDArray[np.bool_]:
        """Spare columns and the experts that their rank lacks and has room for, `[n, E]`."""
        spare = (self.expert == self.experts) | (self.copies[self.expert] > 1)
        fits: NDArray[np.bool_] = spare[:, None] & ~self.on[:-1][:, self.here].T
        if self.shared.any():  # what copies share shifts between ranks: not weighed, so not done
            return np.zeros_like(fits)
        for held, weight, caps, own in zip(self.held(), self.weights, self.caps, self.weight, strict=True):
            after = held[self.here][:, None] - own[:, None] + weight[None, :-1]
            fits &= after <= np.maximum(caps * (1 + 1e-9), held)[self.here][:, None]
        return fits


def over(shares: Array) -> Array:
    """How far shares of the caps exceed 1, summed over the limits, the first axis."""
    return np.asarray(np.maximum(0.0, shares - 1 - 1e-9).sum(0))


def _best_by_moves(value: Array, moves: Ids, swap: bool) -> list[Change]:
    found = []
    for count in MOVES:
        at = np.where(moves == count, value, np.inf)
        i, j = np.unravel_index(at.argmin(), at.shape)
        if np.isfinite(at[i, j]):
            found.append(Change(float(at[i, j]), count, int(i), int(j), swap))
    return found
