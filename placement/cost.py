"""What a plan does to recorded traffic. Every number that `evaluate` prints is defined here.

hops: ExFlow (Yao et al., 2024). dispatch: rows sent once per token and destination rank, as DeepEP, SGLang and vLLM do.
coherent: ExFlow's context-coherent execution, generalised to any top-k (docs/planning.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from coterie.placement.homes import assign
from coterie.placement.plan import PlacementPlan
from coterie.placement.topology import Topology
from coterie.routing.affinity import transition_counts
from coterie.routing.errors import InputError
from coterie.routing.trace import LoadStatistics, RoutingTrace


@dataclass(frozen=True)
class CostReport:
    """A plan on a trace. Scalars are means over tokens and layers (units: docs/formats.md).

    rows: float64 `[layers, ranks, ranks]`, rows per token sent in dispatch from home rank to destination rank.
    rank_load: float64 `[layers, ranks]`, (token, expert) pairs on each rank.
    Fields that need single tokens are None where only load statistics are known.
    """

    load: float
    rank_load: NDArray[np.float64]
    hops: float | None = None
    dispatch: float | None = None
    remote_rows: float | None = None
    node_rows: float | None = None
    busiest_rank: float | None = None
    coherent: float | None = None
    seconds: float | None = None
    rows: NDArray[np.float64] | None = None

    def to_json(self) -> dict[str, float | None]:
        """The scalars, in the order of the contract."""
        names = ("hops", "dispatch", "remote_rows", "node_rows", "busiest_rank", "load", "coherent", "seconds")
        return {name: getattr(self, name) for name in names}


def check_match(plan: PlacementPlan, routing: RoutingTrace | LoadStatistics) -> None:
    """Raises InputError unless the plan and the recording are of the same model; an empty name matches any."""
    for name in ("model", "num_experts", "layer_ids"):
        ours, theirs = getattr(plan, name), getattr(routing, name)
        if ours != theirs and not (name == "model" and "" in (ours, theirs)):
            raise InputError(f"{name}: the trace has {theirs!r}, the plan {ours!r}; expected a trace of the plan's model")


def homes_of(trace: RoutingTrace, ranks: int) -> NDArray[np.int64]:
    """The home rank of each token, int64 `[tokens]`: its sequence id modulo the number of ranks."""
    return trace.sequence_ids.astype(np.int64) % ranks


def plan_homes(plan: PlacementPlan, trace: RoutingTrace) -> NDArray[np.int64]:
    """The home rank of each token under the plan, int64 `[tokens]`: by its classes, else as in `homes_of`."""
    return homes_of(trace, plan.ranks) if plan.homes is None else assign(plan.homes, trace)


def destinations(holds: NDArray[np.bool_], topology: Topology) -> NDArray[np.int16]:
    """Which copy of an expert a token uses: int16 `[ranks, E]`, by the rank that the token is on.

    holds: bool `[E, ranks]`. The rank's own copy, else one on the same node, else any; among several equal ones that of the
    fewest source ranks so far. Experts on the same ranks are dealt out alike, so that those that keep company on every rank
    also do on the way there. The dispatcher uses this very table.
    """
    table = np.tile(holds.argmax(1).astype(np.int16), (topology.ranks, 1))
    for expert in np.flatnonzero(holds.sum(1) > 1):
        table[:, expert] = dealt(tuple(np.flatnonzero(holds[expert]).tolist()), topology.nodes, topology.ranks_per_node)
    return table


def carried(holds: NDArray[np.bool_], weights: NDArray[np.float64], topology: Topology) -> NDArray[np.float64]:
    """What the tokens of equally many at every rank bring to each rank, float64 `[ranks]`, as `destinations` sends them.

    holds: bool `[E, ranks]`; weights `[E]`: of an expert, all its copies together.
    """
    table = destinations(holds, topology)
    each = np.broadcast_to(weights / topology.ranks, table.shape)
    return np.asarray(np.bincount(table.ravel(), each.ravel(), minlength=topology.ranks), dtype=np.float64)


@lru_cache(maxsize=1 << 16)
def dealt(holders: tuple[int, ...], nodes: int, ranks_per_node: int) -> NDArray[np.int64]:
    """The copy for every source rank `[nodes * ranks_per_node]`, not to be written to; holders: its ranks, ascending."""
    topology, copies = Topology(nodes, ranks_per_node), np.array(holders)
    ranks = np.arange(topology.ranks)
    used = np.full(topology.ranks, -1)
    used[copies] = copies
    sources = np.ones(len(copies), dtype=np.int64)
    for rank in np.roll(ranks, -holders[0]):  # another rank first for other holders
        if used[rank] < 0:
            near = copies // topology.ranks_per_node == rank // topology.ranks_per_node
            chosen = int(np.where(near | ~near.any(), sources, topology.ranks + 1).argmin())
            sources[chosen] += 1
            used[rank] = copies[chosen]
    used.flags.writeable = False
    return used


def evaluate(plan: PlacementPlan, trace: RoutingTrace) -> CostReport:
    """Everything about `plan` on `trace`. Raises InputError if they are of different models."""
    check_match(plan, trace)
    topology, holds, homes = plan.topology, plan.holds(), plan_homes(plan, trace)
    rows = np.zeros((trace.layers, plan.ranks, plan.ranks))
    node_pairs = np.zeros(trace.layers)
    pairs, touched = np.zeros((trace.layers, plan.ranks)), np.zeros((trace.layers, plan.ranks))
    at_home = (homes[:, None] == np.arange(plan.ranks)).astype(np.float32)  # sums below 2**24 are exact
    for layer in range(trace.layers):
        needed, pairs[layer], touched[layer] = layer_use(trace.expert_ids[:, layer], holds[layer], homes, topology)
        rows[layer] = at_home.T @ needed
        node_pairs[layer] = distinct_remote_nodes(needed, homes, topology)
    rows /= trace.tokens
    node_pairs /= trace.tokens
    remote = rows * ~np.eye(plan.ranks, dtype=bool)
    coherent = coherent_rows(trace, holds, topology, homes)
    modelled = plan.strategy == "all_to_all"  # the others' times are not modelled yet
    sent, left = strategy_rows(plan.strategy, remote, node_pairs, coherent, topology)
    return CostReport(
        load=mean_imbalance(pairs),
        rank_load=pairs,
        hops=hops(trace, holds),
        dispatch=float(remote.sum((1, 2)).mean()),
        remote_rows=sent,
        node_rows=left,
        busiest_rank=float(remote.sum(1).max(1).mean()),
        coherent=coherent[0],
        seconds=float(np.mean(layer_seconds(remote * trace.tokens, pairs, touched, trace.phase, topology)))
        if modelled
        else None,
        rows=rows,
    )


def evaluate_load(plan: PlacementPlan, statistics: LoadStatistics, scenario: int) -> CostReport:
    """What load statistics can tell: the balance, copies of an expert taking equal shares."""
    check_match(plan, statistics)
    holds = plan.holds().astype(np.float64)
    share = holds / holds.sum(2, keepdims=True)
    rank_load = np.einsum("le,ler->lr", statistics.expert_load[scenario].astype(np.float64), share)
    return CostReport(load=mean_imbalance(rank_load), rank_load=rank_load)


def layer_use(
    ids: NDArray[np.int16], holds: NDArray[np.bool_], homes: NDArray[np.int64], topology: Topology
) -> tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.float64]]:
    """What tokens at `homes` `[tokens]` use in a layer: the ranks that each needs, bool `[tokens, ranks]`; the (token, expert)
    pairs of every rank and the experts that are touched there, float64 `[ranks]`.

    ids: `[tokens, top_k]`; holds: bool `[E, ranks]`.
    """
    used = destinations(holds, topology)[homes[:, None], ids]
    used[ids < 0] = -1
    at = (used.astype(np.int64) * len(holds) + ids)[used >= 0]
    pairs = np.bincount(at, minlength=holds.size).reshape(topology.ranks, -1)
    return needed_ranks(used, topology.ranks), pairs.sum(1).astype(np.float64), (pairs > 0).sum(1).astype(np.float64)


def needed_ranks(used: NDArray[np.integer], ranks: int) -> NDArray[np.bool_]:
    """bool `[tokens, ranks]`: the ranks that host a token's experts; used: ranks `[tokens, top_k]`, -1 where unused."""
    needed: NDArray[np.bool_] = np.zeros((len(used), ranks + 1), dtype=bool)
    needed[np.arange(len(used))[:, None], used] = True
    return needed[:, :ranks]


def distinct_remote_nodes(needed: NDArray[np.bool_], homes: NDArray[np.int64], topology: Topology) -> int:
    """Over all tokens, the nodes other than home that host an expert of the token; needed: bool `[tokens, ranks]`."""
    by_node = np.asarray(needed.reshape(len(needed), topology.nodes, topology.ranks_per_node).any(2))
    at_home = by_node[np.arange(len(homes)), homes // topology.ranks_per_node]
    return int(by_node.sum() - at_home.sum())


def mean_imbalance(rank_load: NDArray[np.float64]) -> float:
    """Busiest over mean, averaged over layers; rank_load `[layers, ranks]`. 1 is even."""
    mean = rank_load.mean(1)
    return float(np.mean(np.where(mean > 0, rank_load.max(1) / np.where(mean > 0, mean, 1.0), 1.0)))


def hops(trace: RoutingTrace, holds: NDArray[np.bool_]) -> float:
    """Share of (expert at layer i, expert at layer i+1) pairs of a token that share no rank; holds `[layers, E, ranks]`."""
    counts = transition_counts(trace)
    held = holds.astype(np.float64)
    meet = np.einsum("ler,lfr->lef", held[:-1], held[1:]) > 0
    total = counts.sum()
    return float((counts * ~meet).sum() / total) if total else 0.0


def coherent_rows(
    trace: RoutingTrace, holds: NDArray[np.bool_], topology: Topology, homes: NDArray[np.int64] | None = None
) -> tuple[float, float]:
    """Rows per token and layer, and those that leave a node, when tokens stay with their experts.

    At each layer a token with anchor a and expert ranks R sends |R - {a}| rows, moves to a' (a if in R, else the member of
    R with the largest gate mass, the lowest rank among equals) and gets |R - {a'}| rows back. The first layer only sets
    the anchor, so at top_k = 1 this equals the hops. holds: bool `[layers, E, ranks]`; homes: as in `anchors`.
    """
    token = np.arange(trace.tokens)
    rows = outside = 0
    for layer, (needed, anchor, following) in enumerate(anchors(trace, holds, topology, homes)):
        if layer > 0:
            for at in (anchor, following):
                rows += int(needed.sum() - needed[token, at].sum())
                outside += _rows_between_nodes(needed, at, topology)
    steps = trace.tokens * max(trace.layers - 1, 1)
    return rows / steps, outside / steps


def anchors(
    trace: RoutingTrace, holds: NDArray[np.bool_], topology: Topology, homes: NDArray[np.int64] | None = None
) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]]]:
    """Layer by layer: the ranks that each token needs, bool `[tokens, ranks]`, its anchor before and after, int64 `[tokens]`.

    homes: where tokens begin, int64 `[tokens]`; None takes `homes_of`.
    """
    anchor = homes_of(trace, topology.ranks) if homes is None else homes
    for layer in range(trace.layers):
        ids = trace.expert_ids[:, layer]
        used = destinations(holds[layer], topology)[anchor[:, None], ids].astype(np.int64)
        used[ids < 0] = -1
        needed = needed_ranks(used, topology.ranks)
        following = _next_anchor(trace, layer, used, needed, anchor)
        yield needed, anchor, following
        anchor = following


def _next_anchor(
    trace: RoutingTrace, layer: int, used: NDArray[np.int64], needed: NDArray[np.bool_], anchor: NDArray[np.int64]
) -> NDArray[np.int64]:
    token, ranks = np.arange(trace.tokens), needed.shape[1]
    weights = np.ones(used.shape) if trace.router_weights is None else trace.router_weights[:, layer].astype(np.float64)
    flat = token[:, None] * (ranks + 1) + (used + 1)  # unused slots are counted in a first column, cut off below
    mass = np.bincount(flat.ravel(), weights.ravel(), trace.tokens * (ranks + 1)).reshape(trace.tokens, ranks + 1)[:, 1:]
    heaviest = np.where(needed, mass, -np.inf).argmax(1)
    stays = needed[token, anchor] | ~needed.any(1)
    return np.where(stays, anchor, heaviest)


def _rows_between_nodes(needed: NDArray[np.bool_], at: NDArray[np.int64], topology: Topology) -> int:
    node = np.arange(topology.ranks) // topology.ranks_per_node
    return int((needed & (node[None, :] != node[at][:, None])).sum())


def strategy_rows(
    strategy: str,
    remote: NDArray[np.float64],
    node_pairs: NDArray[np.float64],
    coherent: tuple[float, float],
    t: Topology,
) -> tuple[float, float]:
    """(rows sent, rows that leave a node) per token and layer, dispatch and combine together, under `strategy`.

    remote: dispatch rows per token `[layers, ranks, ranks]`, home rank left out; node_pairs `[layers]`: distinct remote
    nodes per token.
    """
    node = np.arange(t.ranks) // t.ranks_per_node
    leaves = float((remote * (node[:, None] != node[None, :])).sum((1, 2)).mean())
    everyone, elsewhere = float(t.ranks - 1), float(t.ranks - t.ranks_per_node)
    if strategy == "coherent":
        return coherent
    if strategy in ("all_gather", "replicated"):
        return 2 * everyone, 2 * elsewhere
    if strategy == "hierarchical":
        return 2 * float(remote.sum((1, 2)).mean()), 2 * float(node_pairs.mean())
    return 2 * float(remote.sum((1, 2)).mean()), 2 * leaves


def layer_seconds(
    remote: NDArray[np.float64], pairs: NDArray[np.float64], touched: NDArray[np.float64], phase: str, t: Topology
) -> NDArray[np.float64]:
    """Predicted seconds per layer for one batch, float64 `[layers]`: 2T + Q of docs/planning.md.

    remote: rows in the batch `[layers, ranks, ranks]`, home rank left out; pairs: (token, expert) pairs `[layers, ranks]`;
    touched: experts that the batch uses `[layers, ranks]`. T is the slowest of: what any rank sends or receives within its
    node, what any node sends or receives; Q the busiest rank's experts.
    """
    node = np.arange(t.ranks) // t.ranks_per_node
    same = node[:, None] == node[None, :]
    inside, outside = remote * same, remote * ~same
    layers = len(remote)
    within = np.maximum(inside.sum(2).max(1), inside.sum(1).max(1)) * t.row_bytes / t.within.bytes_per_second
    by_node = outside.reshape(layers, t.nodes, t.ranks_per_node, t.nodes, t.ranks_per_node).sum((2, 4))
    between = np.maximum(by_node.sum(2).max(1), by_node.sum(1).max(1)) * t.row_bytes / t.between.bytes_per_second
    compute, read = expert_seconds(t, phase, layers)
    experts = np.maximum(pairs.max(1) * compute, touched.max(1) * read)
    return np.asarray(2 * (latency(t) + np.maximum(within, between)) + experts)


def latency(t: Topology) -> float:
    """Of one exchange, in seconds."""
    return t.between.latency_seconds if t.nodes > 1 else t.within.latency_seconds if t.ranks > 1 else 0.0


def expert_seconds(t: Topology, phase: str, layers: int) -> tuple[float, NDArray[np.float64]]:
    """Seconds per (token, expert) pair, and per expert touched by layer `[layers]`; a zero is not the bottleneck.

    Prefill is timed by what is computed, decode by the weights that are read, a mixed trace by the slower of the two.
    """
    read = t.bytes_of_experts(layers) / t.memory_bytes_per_second
    if phase == "prefill":
        read = np.zeros(layers)
    known = phase == "decode" and bool((read > 0).all())
    return (0.0 if known else 1 / t.pairs_per_second), read
