"""What the changes of a layer cost under each objective: `moving.Layer` with prices."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from coterie.placement import balance, local
from coterie.placement.moving import Array, Given, Holds, Ids, Layer, State
from coterie.placement.starts import transport


class Chain(Layer):
    """`hops`: a layer given its neighbours.

    transitions: `[L-1, E, E]`; everyone: float32 `[L, E, ranks]`, who holds what, shared by all layers.
    """

    def __init__(self, layer: int, transitions: NDArray[np.float32], everyone: NDArray[np.float32], given: Given) -> None:
        self.near = [(transitions[layer - 1].T, everyone[layer - 1])] if layer > 0 else []
        self.near += [(transitions[layer], everyone[layer + 1])] if layer < len(transitions) else []
        self.mine = everyone[layer]
        super().__init__(given)

    def _count(self) -> None:
        super()._count()
        self.mine[:] = self.on[:-1]

    def cost(self) -> float:
        """Pairs apart, with both neighbours."""
        return float(sum((weights * ((self.mine @ other.T) == 0)).sum(dtype=np.float64) for weights, other in self.near))

    def swaps(self) -> Array:
        """See `Layer`."""
        kept = self.kept()
        at_other = kept[:, self.here]
        own = np.diagonal(at_other)
        return np.asarray(own[:, None] + own[None, :] - at_other - at_other.T)

    def settle(self, price: float) -> None:
        """The best placement given the neighbours, a move costing `price`: exact without limits and copies."""
        self.place(State(self.expert, transport(self.kept() - price * self.new[self.expert], self.slots)))

    def kept(self) -> Array:
        """What each column alone keeps together if it is on a rank, `[n, ranks]`."""
        others = self.on[self.expert].astype(np.float32)
        others[np.arange(len(others)), self.here] = 0
        return self._kept(others, self.expert)

    def _kept(self, others: NDArray[np.float32], expert: Ids) -> Array:
        gain = np.zeros((len(expert), self.ranks), np.float32)
        for weights, other in self.near:
            rows = np.pad(weights, ((0, 1), (0, 0)))[expert]
            gain += (rows * ((others @ other.T) == 0) if others.any() else rows) @ other
        return gain.astype(np.float64)

    def retakes(self) -> Array | None:
        """A further copy brings together what it can; the column's own part is lost."""
        if len(self.here) == self.experts:
            return None
        further = self._kept(self.mine, np.arange(self.experts))  # [E, ranks]
        own = self.kept()[np.arange(len(self.here)), self.here]
        return np.asarray(own[:, None] - further[:, self.here].T)


class Rows(Layer):
    """`dispatch`, or with a score `time`: experts with copies stay where they are, and patterns are priced without them.

    members `[patterns, E]`, prices `[patterns, ranks]`: as in `Problem`.
    load `[E]`, score: see `local.Score`.
    """

    def __init__(self, members: Holds, prices: Array, load: Array | None, score: local.Score | None, given: Given) -> None:
        self.members, self.prices, self.score = members, prices, score
        self.load = None if load is None else np.append(load, 0.0)
        self.table: local.Layer | None = None
        super().__init__(given)

    def place(self, state: State) -> None:
        """Start from other columns."""
        before = self.expert if self.table is not None else None
        super().place(state)
        if self.table is not None and before is not None and np.array_equal(before, self.expert):
            self.table.place(self.here)
            return
        self.fixed = self.copies[self.expert] > 1
        padded = np.pad(self.members, ((0, 0), (0, 1)))[:, self.expert] & ~self.fixed
        self.table = local.Layer(padded, self.prices, self.here)

    def cost(self) -> float:
        """Rows paid, or the score."""
        assert self.table is not None
        if self.score is None:
            return self.table.cost()
        load: Array = np.bincount(self.here, weights=self._load(), minlength=self.ranks).astype(np.float64)
        return float(self.score(self.table.rows[None], load[None])[0])

    def swaps(self) -> Array:
        """See `Layer`; under a score only of columns on the busiest ranks, and of those that have moved."""
        assert self.table is not None
        change = self.table.changes()
        if self.score is None:
            value = change + change.T
        else:
            moved = np.flatnonzero(self.new[self.expert, self.here])
            value = local.scored(self.table, change, self._load(), self.score, moved) - self.cost()
            value = np.minimum(value, value.T)
        value[self.fixed] = value[:, self.fixed] = np.inf
        return np.asarray(value)

    def _load(self) -> Array:
        assert self.load is not None
        return np.asarray(self.load[self.expert] / self.copies[self.expert])

    def _swap(self, i: int, j: int) -> None:
        assert self.table is not None
        self.table.swap(i, j)
        self.here = self.table.here.copy()

    def _retake(self, i: int, expert: int) -> None:
        state = self.state
        state.expert[i] = expert
        self.place(state)


class Even(Layer):
    """`load`: goes by a smooth maximum of the ranks' loads, which has a slope where the busiest rank alone has none.

    loads: `[scenarios, E]` relative to the mean rank; mix `[scenarios]`: what each counts.
    """

    def __init__(self, loads: Array, mix: Array, given: Given) -> None:
        self.loads, self.mix, self.sharpness = np.pad(loads, ((0, 0), (0, 1))), mix, 60.0
        super().__init__(given)

    def _count(self) -> None:
        super()._count()
        self.share = self.loads[:, self.expert] / self.copies[self.expert]
        carried = [np.bincount(self.here, weights=s, minlength=self.ranks) for s in self.share]
        self.carried: Array = np.array(carried, dtype=np.float64)

    def cost(self) -> float:
        """Busiest over mean."""
        return float(self.mix @ self.carried.max(1))

    def swaps(self) -> Array:
        """See `Layer`."""
        heat = self._heat(self.carried)
        change = self.share[:, None, :] - self.share[:, :, None]
        after = self._heat(self.carried[:, self.here, None] + change)
        at = heat[:, self.here]
        total = heat.sum(1)[:, None, None] + after + after.transpose(0, 2, 1) - at[:, :, None] - at[:, None, :]
        return self._smooth(total) - self._smooth(heat.sum(1))

    def _heat(self, carried: Array) -> Array:
        """Of loads `[scenarios, ...]`, in that of the busiest rank now."""
        top = self.carried.max(1).reshape(-1, *[1] * (carried.ndim - 1))
        return np.asarray(np.exp(np.minimum(self.sharpness * (carried - top), balance.HIGHEST)))

    def _smooth(self, heat: Array) -> Array:
        return np.asarray(np.tensordot(self.mix, np.log(np.maximum(heat, 1e-300)), 1) / self.sharpness)

    def retakes(self) -> Array | None:
        """Copies of the experts of the busiest ranks, in place of spare ones or in empty slots."""
        value = np.full((len(self.here), self.experts), np.inf)
        spare = np.flatnonzero((self.expert == self.experts) | (self.copies[self.expert] > 1))
        hot = np.isin(self.here, self.carried.argmax(1)) | (self.new[self.expert, self.here] > 0)
        now = self._smooth(self._heat(self.carried).sum(1))
        for expert in np.unique(self.expert[hot]):
            if expert < self.experts and len(spare):
                after = self._carried_after(int(expert), spare)
                value[spare, expert] = self._smooth(self._heat(after).sum(2)) - now
        return value

    def _carried_after(self, expert: int, spare: Ids) -> Array:
        """`[scenarios, spare, ranks]`: every rank's load if one of the `spare` columns takes the expert."""
        gone, rank, n = self.expert[spare], self.here[spare], np.arange(len(spare))
        each = self.loads[:, expert] / (self.copies[expert] + 1)
        less = self.loads[:, expert] / self.copies[expert] - each
        after = np.repeat(self.carried[:, None, :] - less[:, None, None] * self.on[expert], len(spare), axis=1)
        left = np.maximum(self.copies[gone] - 1, 1)
        was = self.loads[:, gone] / self.copies[gone]
        more = self.loads[:, gone] / left - was
        after += more[:, :, None] * self.on[gone]
        after[:, n, rank] += each[:, None] - was - more
        return np.asarray(after)
