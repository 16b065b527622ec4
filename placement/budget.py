"""Changes of all layers under one budget of moves: greedy by gain per move, then exchanges, then the best mix of what was seen.

A move's price is what the last one that the budget paid for gained. Bursts of tabu steps (Glover 1989) on a few layers at that
price trade moves between places; layers that do not depend on each other are combined by a knapsack over the best placement
seen for every number of moves, a chain of layers by the same dynamic program along the chain.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from coterie.placement.deadline import Deadline
from coterie.placement.moving import Array, Change, Layer, State

STEPS = 24  # of a burst
STALLED = 40  # rounds without gain after which the search ends
RETURN = 3  # rounds without gain after which the search goes on from the best
PRICES = (0.0, 0.5, 1.0, 2.0)  # of a move in a burst, in multiples of what it costs now
EPS = 1e-9


@dataclass(frozen=True)
class Option:
    """One placement of a layer: what it costs, how many moves it is away, and `what` it is."""

    cost: float
    moves: int
    what: object


@dataclass
class Board:
    """All layers of a placement that is at most `budget` moves from the old one; linked: they form a chain (hops).

    least, gained: by how much the cost has changed since the start, at its best and now; seen: of each layer, by moves.
    """

    layers: Sequence[Layer]
    budget: int
    linked: bool
    rng: np.random.Generator
    price: float = 0.0
    best: list[State] = field(default_factory=list)
    gained: float = 0.0
    least: float = 0.0
    seen: list[dict[int, Option]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.begin()

    def begin(self, states: Sequence[State] | None = None) -> None:
        """Start from these columns, or from the present ones, and forget what was seen."""
        self.restore(states or [])
        self.best, self.least, self.gained = [layer.state for layer in self.layers], 0.0, 0.0
        self.seen = [{} for _ in self.layers]
        for number in range(len(self.layers)):
            self._see(number)

    @property
    def moves(self) -> int:
        """Made so far."""
        return sum(layer.moves for layer in self.layers)

    def mend(self) -> float:
        """Bring every layer within its limits as far as changes help and the budget allows, those that are required first.

        What these are still exceeded by, in shares.
        """
        for required in (True, False):
            for number in np.argsort([-layer.excess(required) for layer in self.layers], kind="stable"):
                self._mend(self.layers[number], required)
        self.begin()
        return sum(layer.excess(True) for layer in self.layers)

    def _mend(self, layer: Layer, required: bool) -> None:
        """One layer; what is required is not broken for the rest, and copies go only if that helps in the end."""
        start: State | None = None  # before copies that were given up for the room
        while layer.excess(required) > EPS:
            known = [c for c in layer.mending(required) if c.moves <= self.budget - self.moves]
            helps = sorted((c for c in known if c.cost < -EPS), key=_per_move)
            room = [c for c in known if not c.swap and c.cost <= EPS] if layer.excess_of(~layer.shared) > EPS else []
            if any(_helped(layer, change, required) for change in helps):
                start = None
            elif room:
                start = start or layer.state
                layer.take(room[0])
            else:
                break
        if start is not None and layer.excess(required) > EPS:
            layer.place(start)

    def improve(self, deadline: Deadline, rounds: int | None) -> None:
        """Search until the deadline, for so many rounds, or until nothing is gained any more; `best` is then the placement."""
        self.greedy(deadline)
        quiet = 0
        for _ in itertools.count() if rounds is None else range(rounds):
            if deadline.passed() or quiet == STALLED or self.budget == 0:
                break
            before = self.least
            for layers in self._groups():
                if not deadline.passed():
                    self._burst(layers, self.price * float(self.rng.choice(PRICES)))
            if not self.linked:
                self._mix()
            self.greedy(deadline)
            quiet = 0 if self.least < before - EPS else quiet + 1
            if quiet % RETURN == RETURN - 1:
                self._return()
        self._return()

    def greedy(self, deadline: Deadline) -> None:
        """Take the change of any layer that gains most per move, until none gains or fits."""
        table = [layer.changes() for layer in self.layers]
        used = self.moves
        while not deadline.passed():
            slack = self.budget - used
            found = [(_per_move(c), l, c) for l, changes in enumerate(table) for c in changes if c.moves <= slack]  # noqa: E741
            gaining = [f for f in found if f[2].cost < -EPS]
            if not gaining:
                self.price = max(self.price, max((-f[0] for f in found if f[2].moves > 0), default=0.0))
                break
            value, number, choice = min(gaining, key=lambda f: f[0])
            if choice.moves > 0:
                self.price = -value
            if self._take(number, choice) >= -EPS and choice.cost > -1e-6:
                break  # rounding: the search would turn in circles
            used += choice.moves
            for near in range(number - 1, number + 2) if self.linked else [number]:
                if 0 <= near < len(table):
                    table[near] = self.layers[near].changes()
        self._keep()

    def restore(self, states: Sequence[State]) -> None:
        """Place all layers anew."""
        for layer, state in zip(self.layers, states, strict=False):
            if not _same(layer.state, state):
                layer.place(state)

    def _return(self) -> None:
        self.restore(self.best)
        self.gained = self.least

    def _take(self, number: int, change: Change) -> float:
        difference = self.layers[number].take(change)
        self.gained += difference
        self._see(number)
        return difference

    def _keep(self) -> None:
        if self.gained < self.least - EPS:
            self.best, self.least = [layer.state for layer in self.layers], self.gained

    def _see(self, number: int) -> None:
        layer = self.layers[number]
        if self.linked:
            return
        moves, cost = layer.moves, layer.cost()
        known = self.seen[number].get(moves)
        if known is None or cost < known.cost - EPS:
            self.seen[number][moves] = Option(cost, moves, layer.state)

    def _groups(self) -> list[list[int]]:
        """Layers that a burst may change together: each alone, or in a chain two or three neighbours and some others."""
        order, count = self.rng.permutation(len(self.layers)).tolist(), len(self.layers)
        if count <= 3:
            return [list(range(count))] * 3
        if not self.linked:
            return [[number] for number in order]
        return [[*range(max(0, n - 1), min(count, n + 2))] for n in order[: max(4, count // 4)]]

    def _burst(self, group: Sequence[int], price: float) -> None:
        """Tabu steps on these layers only; they end at the best that was met, a move counting `price`."""
        used, gained = self.moves, self.gained
        best, states = gained + price * used, [self.layers[n].state for n in group]
        merit, ends = best, (used, gained)
        for _ in range(STEPS):
            slack = self.budget - used
            found = [
                (c.cost + price * c.moves, n, c)
                for n in group for c in self.layers[n].changes(best - merit - EPS, price) if c.moves <= slack
            ]  # fmt: skip
            if not found:
                break
            _, number, choice = min(found, key=lambda f: f[0])
            self._take(number, choice)
            used += choice.moves
            merit = self.gained + price * used
            if self.gained < self.least - EPS:
                self._keep()
            if merit < best - EPS:
                best, states, ends = merit, [self.layers[n].state for n in group], (used, self.gained)
        for number, state in zip(group, states, strict=True):
            self.layers[number].place(state)
        self.gained = ends[1]

    def _mix(self) -> None:
        """The best mix of the placements seen of every layer."""
        chosen = combined([list(options.values()) for options in self.seen], self.budget)
        before = sum(layer.cost() for layer in self.layers)
        self.restore([option.what for option in chosen])  # type: ignore[misc]
        self.gained += sum(layer.cost() for layer in self.layers) - before
        self._keep()


def combined(options: Sequence[Sequence[Option]], budget: int, between: Sequence[Array] | None = None) -> list[Option]:
    """One option for each layer, least cost in all within the budget of moves; some choice must be within it.

    between: what neighbours cost together, `[options of l, options of l + 1]` for each l; None: nothing.
    """
    budget = min(budget, sum(max(o.moves for o in layer) for layer in options))
    total = np.full((len(options[0]), budget + 1), np.inf)  # by the last option and the moves used at most
    for row, option in zip(total, options[0], strict=True):
        row[option.moves :] = option.cost
    origins: list[NDArray[np.int64]] = []
    for number, layer in enumerate(options[1:], start=1):
        before, following = total, np.full((len(layer), budget + 1), np.inf)
        origin = np.zeros(following.shape, dtype=np.int64)
        for at, option in enumerate(layer):
            if option.moves > budget:
                continue
            reach = before[:, : budget + 1 - option.moves]
            reach = reach if between is None else reach + between[number - 1][:, at, None]
            origin[at, option.moves :] = reach.argmin(0)
            following[at, option.moves :] = reach.min(0) + option.cost
        total = following
        origins.append(origin)
    at, left = int(total[:, budget].argmin()), budget
    chosen = [options[-1][at]]
    for number in range(len(options) - 1, 0, -1):
        at, left = int(origins[number - 1][at, left]), left - chosen[-1].moves
        chosen.append(options[number - 1][at])
    return chosen[::-1]


def _helped(layer: Layer, change: Change, required: bool) -> bool:
    """Takes it, unless limits are then exceeded as far: where a copy moves all are dealt out anew, which no price knows."""
    before, needed, state = layer.excess(required), layer.excess(True), layer.state
    layer.take(change)
    if layer.excess(required) < before - EPS and layer.excess(True) <= needed + EPS:
        return True
    layer.place(state)
    return False


def _per_move(change: Change) -> float:
    """Cost per move; what needs none goes first."""
    return change.cost / change.moves if change.moves > 0 else change.cost * 1e12


def _same(one: State, other: State) -> bool:
    return np.array_equal(one.expert, other.expert) and np.array_equal(one.here, other.here)
