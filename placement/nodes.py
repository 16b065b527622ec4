"""Which ranks share a node: for a chain of layers, those that exchange most. Renaming ranks changes no hops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from coterie.placement.chain import groups_of
from coterie.placement.scenarios import Scenario

if TYPE_CHECKING:
    from coterie.placement.planner import PlanRequest


def grouped(holds: NDArray[np.bool_], scenarios: Sequence[Scenario], request: PlanRequest) -> NDArray[np.bool_]:
    """The same placement, bool `[L, E, ranks]`, with ranks named so that most hops stay inside nodes.

    Only for `hops`, whose cost does not know rank names, and only where every rank is alike.
    """
    t = request.topology
    plain = request.method == "auto" and request.previous is None and not isinstance(t.memory_bytes, tuple)
    if t.nodes == 1 or not plain or request.objective_name != "hops" or any(s.trace is None for s in scenarios):
        return holds
    traffic = np.zeros((t.ranks, t.ranks))
    for scenario in scenarios:
        pairs = scenario.transitions / max(scenario.transitions.sum(), 1)
        held = holds.astype(np.float64) / holds.sum(2, keepdims=True)
        traffic += np.einsum("leg,lef,lfh->gh", held[:-1], pairs, held[1:], optimize=True)
    order = node_order(traffic + traffic.T, t.ranks_per_node)
    return holds[:, :, order]


def node_order(traffic: NDArray[np.float64], per_node: int) -> NDArray[np.int64]:
    """The present rank that each new rank is, `[ranks]`: groups of `per_node` that exchange most, improved by swaps.

    traffic: float64 `[ranks, ranks]`, symmetric.
    """
    flow = traffic.copy()
    np.fill_diagonal(flow, 0.0)
    node = min((groups_of(flow, per_node), np.arange(len(flow)) // per_node), key=lambda n: crossing(flow, n))
    while True:
        member = (node[:, None] == np.arange(node.max() + 1)).astype(np.float64)
        kept = flow @ member
        own = kept[np.arange(len(flow)), node]
        at_other = kept[:, node]
        gain = at_other + at_other.T - own[:, None] - own[None, :] - 2 * flow
        gain[node[:, None] == node[None, :]] = 0.0
        i, j = np.unravel_index(gain.argmax(), gain.shape)
        if gain[i, j] <= 1e-12:
            return np.argsort(node, kind="stable")
        node[i], node[j] = node[j], node[i]


def crossing(flow: NDArray[np.float64], node: NDArray[np.int64]) -> float:
    """What crosses nodes."""
    return float((flow * (node[:, None] != node[None, :])).sum())
