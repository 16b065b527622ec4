"""Copies: slots beyond the experts are filled, layer by layer, where they help the objective most.

The dispatcher takes the copy on the token's own rank, else one on its node, else another; a copy therefore helps the tokens
of its own rank (and node). Greedy by exact gains, recomputed as copies are placed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from coterie.placement.baselines import Assignment
from coterie.placement.cost import destinations
from coterie.placement.problem import on_nodes, one_hot
from coterie.placement.topology import Topology
from coterie.routing.affinity import Patterns

Array = NDArray[np.float64]
Holds = NDArray[np.bool_]  # [L, E, ranks]
Slots = NDArray[np.int64]
Cost = Callable[[int, Array, Array, Array, Array], float]
"""Layer, rows per token from rank to rank `[ranks, ranks]` and into other nodes `[ranks, nodes]`, pairs and touched experts by
rank -> cost."""

TRIED = 6  # candidates of each kind that are judged by the whole layer before one is taken


def held(assignment: Assignment, ranks: int) -> Holds:
    """bool `[L, E, ranks]` from the rank of every expert."""
    return one_hot(assignment, ranks).astype(bool)


def for_hops(transitions: Array, holds: Holds, slots: int | Slots) -> Holds:
    """Fill free slots with the copies that bring most pairs of consecutive layers together.

    transitions: `[L-1, E, E]`; slots: of every rank, or `[L, ranks]`. A pair is together if the two experts share any rank.
    Layers are visited from the one with most to gain; a copy's gain counts both neighbours.
    """
    holds = holds.copy()
    room = slots - holds.sum(1)  # [L, ranks]
    gains = [_hop_gains(transitions, holds, layer) for layer in range(len(holds))]
    while True:
        open_gain = [np.where((room[l] > 0)[None] & ~holds[l], gains[l], -1.0) for l in range(len(holds))]  # noqa: E741
        layer = int(np.argmax([g.max() for g in open_gain]))
        expert, rank = np.unravel_index(open_gain[layer].argmax(), open_gain[layer].shape)
        if open_gain[layer][expert, rank] <= 0:
            return holds
        holds[layer, expert, rank] = True
        room[layer, rank] -= 1
        for near in range(max(0, layer - 1), min(len(holds), layer + 2)):
            gains[near] = _hop_gains(transitions, holds, near)


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
    scenarios: Sequence[tuple[Patterns, ...]], weights: Sequence[float], holds: Holds, slots: int | Slots, topology: Topology,
    cost: Cost,
) -> Holds:  # fmt: skip
    """Fill free slots of every layer with the copies that lower `cost` most, every home equally likely; stop where none does.

    scenarios: the patterns of each, by layer.
    Candidates are the copies that save most rows at their own rank, and copies of the heaviest experts of the busiest rank
    on the lightest; each is judged by the whole layer, since other ranks may change the copy that they use.
    """
    filled = holds.copy()
    open_slots = np.broadcast_to(slots, (len(holds), topology.ranks))
    for layer, parts in enumerate(zip(*scenarios, strict=True)):
        members = np.concatenate([p.experts for p in parts]).astype(np.float32)
        rows = np.concatenate([p.weight * w / p.tokens for p, w in zip(parts, weights, strict=True)])
        touched = np.sum([w * (p.weight @ p.experts > 0) for p, w in zip(parts, weights, strict=True)], axis=0)
        _fill_layer(_Traffic(members, rows, topology, touched), filled[layer], open_slots[layer], partial(cost, layer))
    return filled


class _Traffic:
    """One layer's patterns. members: float32 `[patterns, E]`; weight: float64 `[patterns]`, share of the tokens.

    touched: `[E]`, the share of the scenarios in which an expert is used at all; None: there is one.
    """

    def __init__(self, members: NDArray[np.float32], weight: Array, topology: Topology, touched: Array | None = None) -> None:
        self.members, self.weight, self.topology = members, weight, topology
        self.load = weight @ members
        self.touched = (self.load > 0).astype(np.float64) if touched is None else touched

    def of(self, holds: NDArray[np.bool_]) -> tuple[Array, Array, Array, Array]:
        """Rows per token from home to rank `[ranks, ranks]` and into other nodes `[ranks, nodes]`; by rank `[ranks]` pairs, and
        experts that are touched there.

        holds: bool `[E, ranks]`.
        """
        ranks, per_node = self.topology.ranks, self.topology.ranks_per_node
        table = destinations(holds, self.topology)
        sent, entered, pairs = np.zeros((ranks, ranks)), np.zeros((ranks, self.topology.nodes)), np.zeros(ranks)
        known: dict[bytes, tuple[Array, Array]] = {}
        for home in range(ranks):
            key = table[home].tobytes()
            if key not in known:
                hosts = self.members @ one_hot(table[home].astype(np.int64), ranks).astype(np.float32) > 0
                known[key] = self.weight @ hosts / ranks, self.weight @ on_nodes(hosts, per_node) / ranks
            sent[home], entered[home] = known[key]
            entered[home, home // per_node] = 0.0
            pairs += np.bincount(table[home], weights=self.load, minlength=ranks) / ranks
        np.fill_diagonal(sent, 0.0)
        used = np.zeros((ranks, len(holds)), dtype=bool)
        used[table, np.arange(len(holds))] = True
        return sent, entered, pairs, used @ self.touched


def _fill_layer(
    traffic: _Traffic, holds: NDArray[np.bool_], slots: Slots, cost: Callable[[Array, Array, Array, Array], float]
) -> None:
    room = slots - holds.sum(0)
    now = cost(*traffic.of(holds))
    while room.any():
        best, chosen = now, None
        for expert, rank in _candidates(traffic, holds, room):
            holds[expert, rank] = True
            if (value := cost(*traffic.of(holds))) < best - 1e-12:
                best, chosen = value, (expert, rank)
            holds[expert, rank] = False
        if chosen is None:
            return
        holds[chosen] = True
        room[chosen[1]] -= 1
        now = best


def _candidates(traffic: _Traffic, holds: NDArray[np.bool_], room: NDArray[np.int64]) -> list[tuple[int, int]]:
    gain = np.full(holds.shape, -1.0)
    for rank in np.flatnonzero(room):
        gain[:, rank] = _row_gains(traffic, holds, int(rank))
    gain[holds] = -1.0
    flat = np.argsort(-gain, axis=None, kind="stable")[:TRIED]
    found = [divmod(int(i), holds.shape[1]) for i in flat if gain.flat[i] > 0]
    _, _, pairs, _ = traffic.of(holds)
    heavy = np.argsort(-np.where(holds[:, pairs.argmax()], traffic.load / holds.sum(1), -1.0), kind="stable")[:TRIED]
    light = min(np.flatnonzero(room), key=lambda rank: pairs[rank])
    return found + [(int(e), int(light)) for e in heavy if not holds[e, light]]


def _row_gains(traffic: _Traffic, holds: NDArray[np.bool_], home: int) -> Array:
    """Rows saved at `home` by a further copy there, `[E]`: those that the expert alone sends to its present copy."""
    used = destinations(holds, traffic.topology)[home].astype(np.int64)
    hosts = one_hot(used, traffic.topology.ranks).astype(np.float32)
    alone = (traffic.members @ hosts)[:, used] == 1  # [patterns, E]: no other expert of the pattern goes to the same rank
    return np.asarray((traffic.weight @ (traffic.members * alone)) * (used != home))
