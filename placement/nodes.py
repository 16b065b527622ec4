"""Nodes: which ranks share one, and placements by node first.

For a chain of layers ranks that exchange most share a node; renaming ranks changes no hops. For `dispatch` on nodes that have
their own price (`Problem.node_prices`) every layer is grouped by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from coterie.placement import limits
from coterie.placement.baselines import Assignment, packed
from coterie.placement.problem import Problem
from coterie.placement.scenarios import Scenario
from coterie.placement.starts import groups_of

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
    rounding = 1e-12 * max(1.0, float(np.abs(flow).sum()))
    node = min((groups_of(flow, per_node), np.arange(len(flow)) // per_node), key=lambda n: crossing(flow, n))
    while True:
        member = (node[:, None] == np.arange(node.max() + 1)).astype(np.float64)
        kept = flow @ member
        own = kept[np.arange(len(flow)), node]
        at_other = kept[:, node]
        gain = at_other + at_other.T - own[:, None] - own[None, :] - 2 * flow
        gain[node[:, None] == node[None, :]] = 0.0
        i, j = np.unravel_index(gain.argmax(), gain.shape)
        if gain[i, j] <= rounding:
            return np.argsort(node, kind="stable")
        node[i], node[j] = node[j], node[i]


def crossing(flow: NDArray[np.float64], node: NDArray[np.int64]) -> float:
    """What crosses nodes."""
    return float((flow * (node[:, None] != node[None, :])).sum())


def of_nodes(problem: Problem) -> Problem:
    """Experts placed on nodes: only nodes are paid for, and a node may have what its ranks may have together."""
    count = problem.ranks // problem.per_node
    caps = [limit.caps.reshape(problem.layers, count, -1).sum(2) for limit in problem.limits]
    return replace(
        problem, ranks=count, slots=problem.slots * problem.per_node, prices=problem.node_prices, node_prices=(),
        limits=tuple(replace(limit, caps=cap) for limit, cap in zip(problem.limits, caps, strict=True)),
    )  # fmt: skip


def into_ranks(problem: Problem, at: Assignment, otherwise: Assignment) -> Assignment:
    """Ranks for experts whose nodes `at` are known, int64 `[L, E]`: packed evenly within each node.

    A layer that breaks a limit so, even after swaps, is taken from `otherwise`.
    """
    caps = [limit.caps.mean(1, keepdims=True) for limit in problem.limits]
    weights = [limit.weights / np.maximum(cap, 1e-300) for limit, cap in zip(problem.limits, caps, strict=True)]
    heavy = np.sum(weights, axis=0) if weights else np.zeros(at.shape)
    found = np.empty_like(at)
    for layer, row in enumerate(at):
        for node in range(problem.ranks // problem.per_node):
            here = np.flatnonzero(row == node)
            found[layer, here] = node * problem.per_node + packed(heavy[None, layer, here], problem.per_node)[0]
        limits.mend_layer(problem, layer, found[layer])
        if not problem.keeps(layer, found[layer]):
            found[layer] = otherwise[layer]
    return found


def regrouped(problem: Problem, assignment: Assignment) -> Assignment:
    """The same groups of experts with those on one node that share most tokens, layer by layer; int64 `[L, E]`."""
    if not problem.interchangeable:
        return assignment
    found = np.empty_like(assignment)
    for layer, row in enumerate(assignment):
        hosts = (problem.held(layer, row) > 0).astype(np.float64)
        order = node_order((hosts * problem.node_prices[layer].sum(1, keepdims=True)).T @ hosts, problem.per_node)
        found[layer] = np.argsort(order)[row]
    return found


def named(by_rank: NDArray[np.float64], by_node: NDArray[np.float64]) -> NDArray[np.int64]:
    """The rank that each group becomes, int64 `[ranks]`, groups of a node staying together: least cost, exactly.

    by_rank: float64 `[groups, ranks]`, of a group as a rank; by_node `[nodes, nodes]`: besides, of a node's groups as a node.
    """
    count = len(by_node)
    per_node = len(by_rank) // count
    blocks = by_rank.reshape(count, per_node, count, per_node).transpose(0, 2, 1, 3)
    inner = np.array([[linear_sum_assignment(block)[1] for block in row] for row in blocks])  # [node, as node, group]
    least = np.take_along_axis(blocks, inner[..., None], 3).sum((2, 3))
    _, becomes = linear_sum_assignment(least + by_node)
    within = inner[np.arange(count), becomes]
    return np.asarray((becomes[:, None] * per_node + within).reshape(-1))
