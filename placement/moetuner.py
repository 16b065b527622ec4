"""MoETuner's placement: even clusters of experts first, then the clusters on GPUs so that the busiest link carries least.

S. Go, D. Mahajan: MoETuner: Optimized Mixture of Expert Serving with Balanced Expert Placement and Token Routing,
arXiv 2502.06643. Two integer programs. The first splits every layer's experts into as many clusters as there are GPUs and
minimises the summed distance of the clusters' tokens from the layer's mean. The second gives every cluster a GPU of its own
and minimises, summed over consecutive layers, the largest traffic between two GPUs divided by their bandwidth.

Here every cluster has floor(E / ranks) or ceil(E / ranks) experts of its layer: the paper asks for equally many experts per
GPU over the whole model, which for equal clusters follows. A rank stands for the paper's GPU.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pulp
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from coterie.placement import ilp
from coterie.placement.baselines import Assignment, contiguous
from coterie.placement.deadline import Deadline
from coterie.placement.limits import balance
from coterie.placement.problem import one_hot

BETWEEN = 9.0  # what a token between nodes costs relative to one within: the paper's H200 nodes, 900 to 100 GB/s
EVEN = 1e-3  # of a cluster's mean load: clusters this even are not improved
SCALE = 1000.0  # mean cluster load and largest traffic as the solver sees them: its tolerances are absolute
MAX_CLUSTERING = 20_000  # experts x clusters of one program
MAX_COEFFICIENTS = 150_000  # of one placement program
WIDTHS = (1, 2, 4)  # layers of the windows that are tried before the widest


def moetuner(
    load: NDArray[np.float64],
    transitions: NDArray[np.float64],
    nodes: int,
    ranks_per_node: int,
    deadline: Deadline,
    threads: int = 1,
) -> Assignment:
    """The rank of every expert, int64 `[L, E]`; rank r is on node r // ranks_per_node.

    load: float64 `[L, E]`, tokens per expert; transitions: float64 `[L-1, E, E]`, tokens from each expert to each of the
    next layer. At most half the time is for the clusters.
    """
    ranks = nodes * ranks_per_node
    clusters = even_clusters(load, ranks, deadline.share(0.5 if len(load) > 1 else 1), threads)
    hosts = one_hot(clusters, ranks).astype(np.float64)
    traffic = np.einsum("lec,lef,lfd->lcd", hosts[:-1], transitions, hosts[1:], optimize=True)
    gpus = place_clusters(traffic, link_costs(nodes, ranks_per_node), deadline, threads)
    return np.take_along_axis(gpus, clusters, axis=1)


def link_costs(nodes: int, ranks_per_node: int) -> NDArray[np.float64]:
    """What a token costs from rank to rank, float64 `[ranks, ranks]`: 0 at home, 1 within the node, BETWEEN across."""
    node = np.arange(nodes * ranks_per_node) // ranks_per_node
    costs = np.where(node[:, None] == node, 1.0, BETWEEN)
    np.fill_diagonal(costs, 0.0)
    return np.asarray(costs)


def even_clusters(load: NDArray[np.float64], clusters: int, deadline: Deadline, threads: int = 1) -> Assignment:
    """The cluster of every expert, int64 `[L, E]`: the least summed distance to the layer's mean load; load `[L, E]`.

    The start is contiguous and evened by swaps. A layer keeps it if it is as even as EVEN, if the program would have more
    than MAX_CLUSTERING binaries, or if the solver has nothing better when the layer's share of the time is over.
    """
    found = contiguous(load, clusters)
    for layer, row in enumerate(load):
        balance(found[layer], row, clusters, 0.0)
    for layer, row in enumerate(load):
        if deadline.passed() or row.size * clusters > MAX_CLUSTERING:
            break
        if unevenness(row, found[layer], clusters) > EVEN * row.sum() / clusters:
            better = _cluster(row, found[layer], clusters, deadline.share(1 / (len(load) - layer)), threads)
            if better is not None and unevenness(row, better, clusters) < unevenness(row, found[layer], clusters):
                found[layer] = better
    return found


def unevenness(load: NDArray[np.float64], clusters_of: NDArray[np.int64], clusters: int) -> float:
    """Summed over the clusters, how far their load is from the mean; load and clusters_of `[E]`."""
    return float(np.abs(np.bincount(clusters_of, weights=load, minlength=clusters) - load.sum() / clusters).sum())


def _cluster(
    load: NDArray[np.float64], start: NDArray[np.int64], clusters: int, deadline: Deadline, threads: int
) -> NDArray[np.int64] | None:
    scaled = load * (SCALE * clusters / load.sum())
    model = pulp.LpProblem("clusters", pulp.LpMinimize)
    x = ilp.equal_groups(model, [start], range(1), clusters)
    values = {v.name: 1.0 for (_, e, c), v in x.items() if start[e] == c}
    distances = []
    for c in range(clusters):
        distances.append(distance := model.add_variable(f"d_{c}", 0))
        carried = [(x[0, e, c], float(scaled[e])) for e in range(len(load))]
        model += pulp.LpAffineExpression([*carried, (distance, -1.0)]) <= SCALE
        model += pulp.LpAffineExpression([*carried, (distance, 1.0)]) >= SCALE
        values[distance.name] = abs(float(scaled[start == c].sum()) - SCALE)
    model += pulp.lpSum(distances)
    if not ilp.run(model, values, deadline, threads, (0.0, EVEN * SCALE)).found:
        return None
    return ilp.read_groups(x, [start], range(1), clusters)[0]


def place_clusters(
    traffic: NDArray[np.float64], costs: NDArray[np.float64], deadline: Deadline, threads: int = 1
) -> Assignment:
    """The rank of every cluster, int64 `[L, ranks]`, each layer a permutation.

    traffic: float64 `[L-1, ranks, ranks]`, tokens between the clusters of consecutive layers; costs: `[ranks, ranks]`.
    The start places each layer best given the one before it, the first in order. It is improved over windows of ever more
    layers, up to all of them where that program is no larger than MAX_COEFFICIENTS, and stays where none improved it in time.
    """
    ranks = costs.shape[0]
    scaled = traffic * (SCALE / (traffic.max(initial=0.0) or 1.0))
    start = [np.arange(ranks)]
    for pairs in scaled:
        start.append(narrowest(_arriving(pairs, start[-1], costs)))
    if ranks == 1 or len(start) == 1:
        return np.array(start, dtype=np.int64)

    def improve(gpus: ilp.Layers, first: int, end: int, until: Deadline) -> ilp.Layers | None:
        return _window(scaled, costs, gpus, range(first, end), until, threads)

    def cost(gpus: ilp.Layers) -> float:
        return tail(scaled, costs, gpus)

    found, most = start, min(len(start), max(1, MAX_COEFFICIENTS // (5 * ranks**4)))
    widths = [width for width in WIDTHS if width < most] + [most]
    for i, width in enumerate(widths):
        found = ilp.over_windows(found, width, deadline.share(1 / (len(widths) - i)), improve, cost)
    return np.array(found, dtype=np.int64)


def tail(traffic: NDArray[np.float64], costs: NDArray[np.float64], gpus: ilp.Layers | Assignment) -> float:
    """Summed over consecutive layers, the largest cost between two ranks; shapes as in `place_clusters`."""
    return float(sum((t * costs[np.ix_(a, b)]).max() for t, a, b in zip(traffic, gpus, gpus[1:], strict=False)))


def _arriving(pairs: NDArray[np.float64], before: NDArray[np.int64], costs: NDArray[np.float64]) -> NDArray[np.float64]:
    """The largest cost of a link into the rank if the cluster is there, float64 `[clusters, ranks]`; before: as placed."""
    return np.asarray((pairs[:, :, None] * costs[before][:, None, :]).max(0))


def _window(
    traffic: NDArray[np.float64], costs: NDArray[np.float64], gpus: ilp.Layers, span: range, deadline: Deadline, threads: int
) -> ilp.Layers | None:
    """The program for the layers of `span`, the others staying as in `gpus`; None if the solver ended without a solution."""
    ranks, first, end = len(costs), span[0], span[-1] + 1
    model = pulp.LpProblem("moetuner", pulp.LpMinimize)
    x = ilp.equal_groups(model, gpus, span, ranks)
    pairs = range(max(0, first - 1), min(end, len(traffic)))
    widest = {layer: model.add_variable(f"m_{layer}", 0) for layer in pairs}
    if len(span) == len(gpus):
        model += x[0, 0, int(gpus[0][0])] == 1  # ranks are alike: one cluster may keep its own
    y: ilp.Cell = {}
    for layer in pairs:
        if layer < first:
            _beside(model, widest[layer], x, first, _arriving(traffic[layer], gpus[layer], costs))
        elif layer + 1 == end:
            _beside(model, widest[layer], x, layer, _arriving(traffic[layer].T, gpus[end], costs.T))
        else:
            y |= _between(model, widest[layer], x, layer, traffic[layer], costs)
    model += pulp.lpSum(widest.values())
    start = {v.name: 1.0 for (layer, c, g), v in x.items() if gpus[layer][c] == g}
    start |= {v.name: tail(traffic[k : k + 1], costs, gpus[k : k + 2]) for k, v in widest.items()}
    start |= {v.name: 1.0 for (k, c, d, g, h), v in y.items() if gpus[k][c] == g and gpus[k + 1][d] == h}
    if not ilp.run(model, start, deadline, threads, (0.0, EVEN)).found:
        return None
    return [*gpus[:first], *ilp.read_groups(x, gpus, span, ranks), *gpus[end:]]


def _beside(model: pulp.LpProblem, widest: pulp.LpVariable, x: ilp.Cell, layer: int, cost: NDArray[np.float64]) -> None:
    """Next to a layer that stays: the one cluster on each rank pays cost `[clusters, ranks]`."""
    for g in range(len(cost)):
        terms = [(x[layer, c, g], float(cost[c, g])) for c in range(len(cost))]
        model += pulp.LpAffineExpression([*terms, (widest, -1.0)]) <= 0


def _between(
    model: pulp.LpProblem,
    widest: pulp.LpVariable,
    x: ilp.Cell,
    layer: int,
    traffic: NDArray[np.float64],
    costs: NDArray[np.float64],
) -> ilp.Cell:
    """Two layers that both move: y[layer,c,d,g,h] says that c is on g and, a layer later, d on h; with it each link's cost."""
    ranks = range(len(costs))
    y: ilp.Cell = {}
    for c, d, g, h in product(ranks, repeat=4):
        y[layer, c, d, g, h] = model.add_variable(f"y_{layer}_{c}_{d}_{g}_{h}", 0, 1)
    for a, b, r in product(ranks, repeat=3):
        model += pulp.lpSum(y[layer, a, b, r, h] for h in ranks) == x[layer, a, r]
        model += pulp.lpSum(y[layer, a, d, r, b] for d in ranks) == x[layer, a, r]
        model += pulp.lpSum(y[layer, a, b, g, r] for g in ranks) == x[layer + 1, b, r]
        model += pulp.lpSum(y[layer, c, a, b, r] for c in ranks) == x[layer + 1, a, r]
    for g, h in np.argwhere(costs > 0).tolist():
        sent = [(y[layer, c, d, g, h], float(traffic[c, d] * costs[g, h])) for c, d in product(ranks, repeat=2)]
        model += pulp.LpAffineExpression([*sent, (widest, -1.0)]) <= 0
    return y


def narrowest(cost: NDArray[np.float64]) -> NDArray[np.int64]:
    """The permutation whose largest entry of `cost` `[n, n]` is least (bottleneck assignment, by bisection): row to column."""
    levels = np.unique(cost)
    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if (_matched(cost <= levels[middle]) >= 0).all() else (middle + 1, high)
    return _matched(cost <= levels[low])


def _matched(allowed: NDArray[np.bool_]) -> NDArray[np.int64]:
    """A largest matching, the column of every row, -1 for none."""
    return np.asarray(maximum_bipartite_matching(csr_array(allowed), perm_type="column"), dtype=np.int64)
