"""Local search on the true patterns, one layer at a time: for `dispatch`, `time`, and `coherent` between its passes.

All E x E swaps of a layer are priced at once from three tables that are kept up to date (a swap touches only the patterns that
hold one of the two experts), and a tabu search takes the best that is not forbidden, up or down hill (Glover 1989).
Deterministic for a seed and a number of iterations; layers do not depend on each other's random numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from coterie.placement import limits
from coterie.placement.baselines import Assignment
from coterie.placement.chain import Report, allowed_swaps
from coterie.placement.deadline import Deadline
from coterie.placement.nodes import node_order
from coterie.placement.problem import Problem, held_by, one_hot

BURST = 150  # tabu steps of one layer in one iteration
TENURE = (4, 10)  # steps that an expert may not return to a rank
PATIENCE = 40  # bursts without a better placement in any layer after which it ends
KICK = 4  # random swaps that start a burst from the best known, if the last burst found nothing

Score = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]
"""(rows received `[n, ranks]`, load `[n, ranks]`) -> what to minimise `[n]`, of a layer."""


class Layer:
    """One layer's placement with the tables that price its swaps.

    here: int64 `[E]`. joining `[E, ranks]`: rows paid if the expert joins the rank. freed `[E, E]`: of the rows that e alone
    causes on its rank, those of patterns with f; its diagonal is what e leaving saves. rows `[ranks]`: paid on each rank.
    """

    def __init__(self, members: NDArray[np.bool_], prices: NDArray[np.float64], here: NDArray[np.int64]) -> None:
        used = members.any(1)
        self.members = members if used.all() else members[used]
        alike = bool((prices == prices[:, :1]).all())  # one price for all ranks takes the memory of one
        narrow = (prices[:, :1] if alike else prices)[used].astype(np.float32)
        self.prices = np.broadcast_to(narrow, (len(narrow), prices.shape[1])) if alike else narrow
        self.picks = csr_array(self.members.astype(np.float32))
        self.with_expert = [np.flatnonzero(m) for m in self.members.T]
        self.ranks = prices.shape[1]
        self.place(here)

    def place(self, here: NDArray[np.int64]) -> None:
        """Start from another placement `[E]`."""
        self.here = here.copy()
        self.count = self.picks @ one_hot(here, self.ranks).astype(np.float32)
        self.joining = (self.picks.T @ np.where(self.count == 0, self.prices, 0)).astype(np.float64)
        alone = np.where(self.count == 1, self.prices, 0)
        pattern = np.repeat(np.arange(len(self.members)), np.diff(self.picks.indptr))
        paid = alone[pattern, here[self.picks.indices]]
        only = csr_array((paid, self.picks.indices, self.picks.indptr), shape=self.picks.shape)
        self.freed = (only.T @ self.picks).toarray().astype(np.float64)
        self.rows = np.where(self.count > 0, self.prices, 0).sum(0, dtype=np.float64)

    def changes(self) -> NDArray[np.float64]:
        """What the rows of e's rank change by if e and f change places, float64 `[e, f]`; f's rank is the transpose."""
        saved = np.diagonal(self.freed)
        return np.asarray(self.freed - saved[:, None] + self.joining.T[self.here])

    def cost(self) -> float:
        """All that is paid."""
        return float(self.rows.sum())

    def swap(self, e: int, f: int) -> None:
        """Let e and f change places."""
        a, b = int(self.here[e]), int(self.here[f])
        self.rows[a] += self.freed[e, f] - self.freed[e, e] + self.joining[f, a]
        self.rows[b] += self.freed[f, e] - self.freed[f, f] + self.joining[e, b]
        one, two = self.with_expert[e], self.with_expert[f]
        touched = np.concatenate([one[~self.members[one, f]], two[~self.members[two, e]]])
        sign = np.where(self.members[touched, e], 1, -1).astype(np.float32)
        neighbours = np.flatnonzero((self.here == a) | (self.here == b))
        members, prices = self.members[touched].astype(np.float32), self.prices[touched[:, None], [a, b]]
        before = self.count[touched][:, [a, b]]
        after = before + np.stack([-sign, sign], 1)
        column = (self.here[neighbours] == b).astype(np.int64)
        alone = np.where(after == 1, prices, 0) - np.where(before == 1, prices, 0)
        self.freed[neighbours] += (members[:, neighbours] * alone[:, column]).T @ members
        empty = np.where(after == 0, prices, 0) - np.where(before == 0, prices, 0)
        self.joining[:, [a, b]] += members.T @ empty
        self.count[touched[:, None], [a, b]] = after
        self.here[e], self.here[f] = b, a
        for expert, patterns, rank in ((e, one, b), (f, two, a)):
            lone = np.where(self.count[patterns, rank] == 1, self.prices[patterns, rank], 0)
            self.freed[expert] = lone @ self.members[patterns].astype(np.float32)


class TieredLayer(Layer):
    """A layer whose patterns also pay for every node that hosts one of their experts: the same tables once more, by node."""

    def __init__(
        self, members: NDArray[np.bool_], prices: NDArray[np.float64], node_prices: NDArray[np.float64], here: NDArray[np.int64]
    ) -> None:
        self.per_node = prices.shape[1] // node_prices.shape[1]
        self.by_node = Layer(members, node_prices, here // self.per_node)
        super().__init__(members, prices, here)

    def place(self, here: NDArray[np.int64]) -> None:
        """Start from another placement `[E]`."""
        super().place(here)
        self.by_node.place(here // self.per_node)

    def changes(self) -> NDArray[np.float64]:
        """As of a layer; what e's node changes by is counted with e's rank."""
        node = self.by_node.here
        return super().changes() + np.where(node[:, None] == node[None, :], 0.0, self.by_node.changes())

    def cost(self) -> float:
        """All that is paid, by rank and by node."""
        return super().cost() + self.by_node.cost()

    def swap(self, e: int, f: int) -> None:
        """Let e and f change places."""
        super().swap(e, f)
        if self.by_node.here[e] != self.by_node.here[f]:
            self.by_node.swap(e, f)


def layer_of(problem: Problem, layer: int, here: NDArray[np.int64]) -> Layer:
    """The tables of a layer with its experts at `here` `[E]`."""
    members, prices = problem.members[layer], problem.prices[layer]
    if problem.node_prices:
        return TieredLayer(members, prices, problem.node_prices[layer], here)
    return Layer(members, prices, here)


def search(
    problem: Problem, seed: int, iterations: int | None, deadline: Deadline, begin: Assignment | None = None,
    score: Score | None = None, report: Report | None = None,
) -> tuple[Assignment, int]:  # fmt: skip
    """The best placement found, int64 `[L, E]`, and the iterations (bursts of every layer) made.

    begin: where to start, else `_begun`. score: what to minimise in place of all rows paid, given rows and load
    of every rank; the first limit's weights are the load. Every layer gets its share of
    the time in the first iteration.
    """
    if problem.ranks == 1:
        return np.zeros((problem.layers, problem.experts), dtype=np.int64), 0
    padded = problem.padded()
    start = _begun(padded) if begin is None else _padded_start(padded, begin)
    layers = [_Tabu(padded, layer, start[layer], np.random.default_rng([seed, layer]), score) for layer in range(padded.layers)]
    made = 0
    for made in itertools.count():
        stale = all(layer.quiet > PATIENCE for layer in layers)
        if stale or made == iterations or deadline.passed():
            break
        for number, layer in enumerate(layers):
            layer.burst(deadline.share(1 / (len(layers) - number)) if made == 0 else deadline)
        if report is not None and np.isfinite(cost := sum(layer.best_cost for layer in layers)):
            report(cost, made + 1)
    found = np.stack([layer.best for layer in layers])
    return found[:, : problem.experts], made


class _Tabu:
    def __init__(
        self, problem: Problem, layer: int, here: NDArray[np.int64], rng: np.random.Generator, score: Score | None
    ) -> None:
        self.problem, self.layer, self.rng, self.score = problem, layer, rng, score
        self.state: Layer | None = None
        self.load = problem.limits[0].weights[layer] if problem.limits else np.zeros(problem.experts)
        self.until = np.zeros((problem.experts, problem.ranks), dtype=np.int64)
        self.step, self.quiet = 0, 0
        self.best, self.best_cost = here.copy(), np.inf

    def _cost(self, state: Layer) -> float:
        if self.score is None:
            return state.cost()
        held = held_by(state.here, self.load, self.problem.ranks)
        return float(self.score(state.rows[None], held[None])[0])

    def burst(self, deadline: Deadline) -> None:
        """BURST tabu steps; from the best known, shaken, if the last burst found nothing better."""
        if self.state is None:
            if deadline.passed():
                return  # large tables, for nothing
            self.state = layer_of(self.problem, self.layer, self.best)
            self.best_cost = self._cost(self.state)
        before, state = self.best_cost, self.state
        if self.quiet:
            state.place(self.best)
            self._kick(state, KICK + self.quiet % 4)
        for _ in range(BURST):
            if deadline.passed() or not self._step(state):
                break
        self.quiet = 0 if self.best_cost < before * (1 - 1e-9) else self.quiet + 1

    def _step(self, state: Layer) -> bool:
        change = state.changes()
        value = change + change.T if self.score is None else scored(state, change, self.load, self.score)
        possible = allowed_swaps(self.problem, state.here, self.layer)
        forbidden = self.until[:, state.here] > self.step
        forbidden |= forbidden.T
        now = self._cost(state)
        better = value < (self.best_cost - now - 1e-6 if self.score is None else self.best_cost * (1 - 1e-9))
        value = np.where(possible & (~forbidden | better), value, np.inf)
        e, f = np.unravel_index(value.argmin(), value.shape)
        if not np.isfinite(value[e, f]):
            return False
        self._take(state, int(e), int(f))
        if (cost := self._cost(state)) < self.best_cost * (1 - 1e-9):
            self.best, self.best_cost = state.here.copy(), cost
        return True

    def _take(self, state: Layer, e: int, f: int) -> None:
        a, b = state.here[e], state.here[f]
        state.swap(e, f)
        self.step += 1
        tenure = self.rng.integers(*TENURE, size=2)
        self.until[e, a], self.until[f, b] = self.step + tenure

    def _kick(self, state: Layer, swaps: int) -> None:
        for _ in range(swaps):
            possible = np.flatnonzero(allowed_swaps(self.problem, state.here, self.layer))
            if not len(possible):
                return
            e, f = divmod(int(self.rng.choice(possible)), self.problem.experts)
            self._take(state, e, f)


def scored(
    state: Layer, change: NDArray[np.float64], load: NDArray[np.float64], score: Score,
    also: NDArray[np.int64] | tuple[()] = (),
) -> NDArray[np.float64]:  # fmt: skip
    """The score after each swap of an expert on the busiest ranks, or of those in `also`, `[E, E]`, infinite for the others.

    change: as `changes` gave it; load `[E]`.
    """
    held = held_by(state.here, load, state.ranks)
    value = np.full(change.shape, np.inf)
    busy = np.isin(state.here, [state.rows.argmax(), held.argmax()])
    busy[list(also)] = True
    for e in np.flatnonzero(busy):
        others = np.flatnonzero(state.here != state.here[e])
        a, b, n = state.here[e], state.here[others], np.arange(len(others))
        rows, loads = np.tile(state.rows, (len(others), 1)), np.tile(held, (len(others), 1))
        rows[:, a] += change[e, others]
        rows[n, b] += change[others, e]
        loads[:, a] += load[others] - load[e]
        loads[n, b] += load[e] - load[others]
        value[e, others] = score(rows, loads)
    return value


def _begun(problem: Problem) -> Assignment:
    """Where to start, int64 `[L, E]`: of every layer balanced packing, or experts grouped with those that they are picked with.

    Tabu steps move single experts and seldom find a way to other groups. problem: padded.
    """
    start = limits.start(problem)
    for layer, row in enumerate(start):
        picks = csr_array(problem.members[layer].astype(np.float64))
        together = (picks.multiply(problem.prices[layer].sum(1, keepdims=True)).T @ picks).toarray()
        grouped = np.empty_like(row)
        grouped[node_order(together, problem.slots)] = np.arange(problem.experts) // problem.slots
        limits.mend_layer(problem, layer, grouped)
        if not problem.keeps(layer, row) or problem.layer_cost(layer, grouped) < problem.layer_cost(layer, row):
            start[layer] = grouped if problem.keeps(layer, grouped) else row
    return start


def _padded_start(problem: Problem, begin: Assignment) -> Assignment:
    """`begin` with an expert that weighs nothing in every empty slot."""
    start = np.zeros((problem.layers, problem.experts), dtype=np.int64)
    start[:, : begin.shape[1]] = begin
    for layer, row in enumerate(begin):
        free = problem.slots - np.bincount(row, minlength=problem.ranks)
        start[layer, begin.shape[1] :] = np.repeat(np.arange(problem.ranks), free)
    return start
