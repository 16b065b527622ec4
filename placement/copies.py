"""Copies: slots beyond the experts are filled, layer by layer, where they help the objective most.

The dispatcher takes the copy on the token's own rank, else one on its node, else another; a copy therefore helps the tokens
of its own rank (and node). Greedy by exact gains, recomputed as copies are placed. What to begin with: `replicas.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from coterie.placement.baselines import Assignment
from coterie.placement.cost import destinations
from coterie.placement.deadline import Deadline
from coterie.placement.problem import on_nodes, one_hot
from coterie.placement.topology import Topology
from coterie.routing.affinity import Patterns

Array = NDArray[np.float64]
Holds = NDArray[np.bool_]  # [L, E, ranks]
Slots = NDArray[np.int64]
Ids = NDArray[np.int64]
Cost = Callable[[int, Array, Array, Array, Array], float]
"""Layer, rows per token from rank to rank `[ranks, ranks]` and into other nodes `[ranks, nodes]`, pairs and touched experts by
rank -> cost."""
Allowed = Callable[[int, NDArray[np.bool_]], bool]
"""Layer, who holds what `[E, ranks]` -> whether that is within every limit."""

TRIED = 6  # candidates of each kind that are judged by the whole layer before one is taken
LOOKED_AT = 60  # candidates of each kind that are looked at for TRIED within the limits


def held(assignment: Assignment, ranks: int) -> Holds:
    """bool `[L, E, ranks]` from the rank of every expert."""
    return one_hot(assignment, ranks).astype(bool)


def for_hops(transitions: Array, holds: Holds, slots: int | Slots, allowed: Allowed, deadline: Deadline) -> Holds:
    """Fill free slots with the copies that bring most pairs of consecutive layers together, until the deadline.

    transitions: `[L-1, E, E]`; slots: of every rank, or `[L, ranks]`. A pair is together if the two experts share any rank.
    A copy's gain counts both neighbours; the copy of any layer that gains most goes first.
    """
    holds = holds.copy()
    room = slots - holds.sum(1)  # [L, ranks]
    gains = [_open_gains(transitions, holds, layer, room[layer]) for layer in range(len(holds))]
    most = np.array([gain.max() for gain in gains])
    while most.max(initial=0.0) > 0 and not deadline.passed():
        layer = int(most.argmax())
        at = np.unravel_index(gains[layer].argmax(), gains[layer].shape)
        holds[layer][at] = True
        if allowed(layer, holds[layer]):
            room[layer, at[1]] -= 1
            changed = range(max(0, layer - 1), min(len(holds), layer + 2))
            for near in changed:
                gains[near] = _open_gains(transitions, holds, near, room[near])
        else:
            holds[layer][at], gains[layer][at], changed = False, -1.0, range(layer, layer + 1)
        for near in changed:
            most[near] = gains[near].max()
    return holds


def _open_gains(transitions: Array, holds: Holds, layer: int, room: Slots) -> Array:
    """`_hop_gains` of copies that there is a slot for, else -1."""
    return np.where((room > 0)[None] & ~holds[layer], _hop_gains(transitions, holds, layer), -1.0)


def _hop_gains(transitions: Array, holds: Holds, layer: int) -> Array:
    """Traffic that a further copy would bring together, `[E, ranks]`."""
    gain = np.zeros(holds.shape[1:])
    mine = holds[layer].astype(np.float64)
    for near, weights in ((layer - 1, None if layer == 0 else transitions[layer - 1].T),
                          (layer + 1, None if layer == len(holds) - 1 else transitions[layer])):  # fmt: skip
        if weights is not None:
            other = holds[near].astype(np.float64)
            apart = (mine @ other.T) == 0
            gain += (weights * apart) @ other
    return gain


def for_rows(
    scenarios: Sequence[tuple[Patterns, ...]], weights: Sequence[float], shares: Sequence[float], holds: Holds,
    slots: int | Slots, topology: Topology, cost: Cost, allowed: Allowed, deadline: Deadline,
) -> Holds:  # fmt: skip
    """Fill free slots of every layer with the copies that lower `cost` most; stop where none does, or at the deadline.

    Where ranks hold more than they have slots for, copies are first taken away, as far as limits and the deadline let them.

    scenarios: the patterns of each, by layer; homes are those of `by_home` where all have it, else equally likely.
    weights: of the scenarios' tokens in the rows and pairs of a mixture; shares: of the scenarios in what is touched.
    Candidates are the copies that save most rows at their own rank, and copies of the heaviest experts of the busiest rank
    on the lightest; each is judged by the whole layer, since other ranks may change the copy that they use.
    """
    filled = holds.copy()
    open_slots = np.broadcast_to(slots, (len(holds), topology.ranks))
    for layer, parts in enumerate(zip(*scenarios, strict=True)):
        share = deadline.share(1 / (len(holds) - layer))
        if share.passed():
            break
        work = _Work(_Traffic.mixed(parts, weights, shares, topology), partial(cost, layer), partial(allowed, layer), share)
        work.thin(filled[layer], open_slots[layer])
        work.fill(filled[layer], open_slots[layer])
    return filled


def _by_home(patterns: Patterns, ranks: int) -> Array:
    """Tokens of every pattern by home, `[patterns, ranks]`."""
    if patterns.by_home is not None:
        return patterns.by_home
    return np.asarray(np.repeat(patterns.weight[:, None] / ranks, ranks, axis=1))


class _Traffic:
    """One layer's patterns. members: float32 `[patterns, E]`; weight: float64 `[patterns, ranks]`, tokens by home.

    touched: `[E]`, the share of the scenarios in which an expert is used at all.
    """

    def __init__(self, members: NDArray[np.float32], weight: Array, topology: Topology, touched: Array) -> None:
        self.members, self.weight, self.topology, self.touched = members, weight, topology, touched
        self.load: Array = weight.T @ members  # [home, E]

    @classmethod
    def mixed(
        cls, parts: Sequence[Patterns], weights: Sequence[float], shares: Sequence[float], topology: Topology
    ) -> _Traffic:
        """Of one layer of some scenarios, by `for_rows`."""
        members = np.concatenate([p.experts for p in parts]).astype(np.float32)
        by_home = [_by_home(p, topology.ranks) * (w / p.tokens) for p, w in zip(parts, weights, strict=True)]
        touched = np.sum([w * (p.weight @ p.experts > 0) for p, w in zip(parts, shares, strict=True)], axis=0)
        return cls(members, np.concatenate(by_home), topology, touched)

    def of(self, holds: NDArray[np.bool_]) -> tuple[Array, Array, Array, Array]:
        """Rows per token from home to rank `[ranks, ranks]` and into other nodes `[ranks, nodes]`; by rank `[ranks]` pairs, and
        experts that are touched there.

        holds: bool `[E, ranks]`.
        """
        ranks, per_node = self.topology.ranks, self.topology.ranks_per_node
        table = destinations(holds, self.topology)
        sent, entered = np.zeros((ranks, ranks)), np.zeros((ranks, self.topology.nodes))
        known: dict[bytes, tuple[NDArray[np.bool_], NDArray[np.bool_]]] = {}
        for home in range(ranks):
            key = table[home].tobytes()
            if key not in known:
                hosts = self.members @ one_hot(table[home].astype(np.int64), ranks).astype(np.float32) > 0
                known[key] = hosts, on_nodes(hosts, per_node)
            sent[home], entered[home] = (self.weight[:, home] @ places for places in known[key])
            entered[home, home // per_node] = 0.0
        np.fill_diagonal(sent, 0.0)
        used = np.zeros((ranks, len(holds)), dtype=bool)
        used[table, np.arange(len(holds))] = True
        pairs: Array = np.bincount(table.ravel(), weights=self.load.ravel(), minlength=ranks).astype(np.float64)
        return sent, entered, pairs, used @ self.touched


@dataclass(frozen=True)
class _Work:
    """One layer whose slots are filled: what a placement `[E, ranks]` costs, and whether it may be."""

    traffic: _Traffic
    cost: Callable[[Array, Array, Array, Array], float]
    allowed: Callable[[NDArray[np.bool_]], bool]
    deadline: Deadline

    def thin(self, holds: NDArray[np.bool_], slots: Slots) -> None:
        """Take copies away until every rank keeps to its slots: always of the least loaded expert that may have one less."""
        load = self.traffic.load.sum(0)
        while (over := holds.sum(0) > slots).any() and not self.deadline.passed():
            copies = np.argwhere(holds & (holds.sum(1) > 1)[:, None] & over)
            order = np.lexsort((-holds.sum(0)[copies[:, 1]], load[copies[:, 0]]))  # of equal ones that of the fullest rank
            following = next(self._fitting(holds, copies[order], False), None)
            if following is None:
                return
            holds[:] = following

    def fill(self, holds: NDArray[np.bool_], slots: Slots) -> None:
        """Add the copy that lowers the cost most, again and again."""
        room = slots - holds.sum(0)
        least = self.cost(*self.traffic.of(holds))
        while (room > 0).any() and not self.deadline.passed():
            trials = [(self.cost(*self.traffic.of(trial)), trial) for trial in self._candidates(holds, room)]
            value, best = min(trials, key=lambda t: t[0], default=(np.inf, holds))
            if value >= least - 1e-12:
                return
            holds[:], least = best, value
            room = slots - holds.sum(0)

    def _candidates(self, holds: NDArray[np.bool_], room: Slots) -> list[NDArray[np.bool_]]:
        """Placements with one copy more, by `for_rows`."""
        gain = np.full(holds.shape, -1.0)
        for rank in np.flatnonzero(room > 0):
            gain[:, rank] = _row_gains(self.traffic, holds, int(rank))
        gain[holds] = -1.0
        order = np.argsort(-gain, axis=None, kind="stable")[:LOOKED_AT]
        saving = np.stack(np.unravel_index(order[gain.flat[order] > 0], gain.shape), axis=1)
        _, _, pairs, _ = self.traffic.of(holds)
        load = np.where(holds[:, pairs.argmax()], self.traffic.load.sum(0) / holds.sum(1), -1.0)
        heavy = np.argsort(-load, kind="stable")[:TRIED]
        light = int(np.where(room > 0, pairs, np.inf).argmin())
        relieving = np.array([(expert, light) for expert in heavy if not holds[expert, light]]).reshape(-1, 2)
        return [*islice(self._fitting(holds, saving, True), TRIED), *self._fitting(holds, relieving, True)]

    def _fitting(self, holds: NDArray[np.bool_], copies: Ids, there: bool) -> Iterator[NDArray[np.bool_]]:
        """`holds` with each one of the copies `[n, 2]` there or not there, if that may be."""
        for expert, rank in copies:
            changed = holds.copy()
            changed[expert, rank] = there
            if self.allowed(changed):
                yield changed


def _row_gains(traffic: _Traffic, holds: NDArray[np.bool_], home: int) -> Array:
    """Rows saved at `home` by a further copy there, `[E]`: those that the expert alone sends to its present copy."""
    used = destinations(holds, traffic.topology)[home].astype(np.int64)
    hosts = one_hot(used, traffic.topology.ranks).astype(np.float32)
    alone = (traffic.members @ hosts)[:, used] == 1  # [patterns, E]: no other expert of the pattern goes to the same rank
    return np.asarray((traffic.weight[:, home] @ (traffic.members * alone)) * (used != home))
