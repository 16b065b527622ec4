"""ExFlow's placement: as few token crossings between consecutive layers as an integer program finds.

J. Yao, Q. Anthony, A. Shafi, H. Subramoni, D. K. Panda: Exploiting Inter-Layer Expert Affinity for Accelerating
Mixture-of-Experts Model Inference, IPDPS 2024, arXiv 2401.08383. Its program has a binary per expert and GPU, equally many
experts of every layer on every GPU, and a cost per token and pair of layers that is 1 if the two experts are apart. It is
solved in stages: over the nodes first, then, for the experts each node was given, over that node's GPUs.

Here tokens with the same pair of experts share a variable, which changes no optimum:
together[l,e,g] <= sum_f t[l,e,f] x[l+1,f,g], and <= x[l,e,g] times the most that expert e can have together.
A stage too large for one program is solved over windows of layers with the layers around them fixed, from a start in
which each layer in turn is placed exactly, given its neighbours (a transportation problem).
"""

from __future__ import annotations

import math

import numpy as np
import pulp
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from coterie.placement import ilp
from coterie.placement.baselines import Assignment
from coterie.placement.deadline import Deadline
from coterie.placement.problem import one_hot

MAX_COEFFICIENTS = 70_000  # of one program; beyond it the solver seldom leaves the root in the time of a window
ROUNDS, SHUFFLED = 1000, 4  # of the start: how often, and at most how many layers in a row
SCALE = 1000.0  # the largest entry as the solver sees it: its tolerances are absolute
Chain = list[NDArray[np.float64]]  # tokens from each expert of a layer to each of the next, [E_l, E_l+1]


def exflow(
    transitions: NDArray[np.float64], nodes: int, ranks_per_node: int, deadline: Deadline, threads: int = 1
) -> Assignment:
    """The rank of every expert, int64 `[L, E]`; rank r is on node r // ranks_per_node.

    transitions: float64 `[L-1, E, E]`, tokens from each expert to each of the next layer.
    Every rank gets floor(E / ranks) or ceil(E / ranks) experts of every layer. The node stage takes at most half the time.
    Layers that no program improved in time, or whose window alone is too large for one, keep their place in the start.
    """
    sizes = [transitions.shape[1]] * (len(transitions) + 1)
    scaled = transitions * (SCALE / (transitions.max(initial=0.0) or 1.0))
    return np.array(_staged(list(scaled), sizes, (nodes, ranks_per_node), deadline, threads), dtype=np.int64)


def crossings(chain: Chain, groups: ilp.Layers) -> float:
    """Tokens whose experts of consecutive layers are in different groups."""
    return float(sum(t[a[:, None] != b].sum() for t, a, b in zip(chain, groups, groups[1:], strict=False)))


def _staged(chain: Chain, sizes: list[int], stages: tuple[int, ...], deadline: Deadline, threads: int) -> ilp.Layers:
    parts, rest = stages[0], stages[1:]
    half = deadline.share(1 / (2 if max(rest, default=1) > 1 else 1))
    groups = partition(chain, sizes, parts, half, threads)
    if not rest:
        return groups
    ranks = [group * math.prod(rest) for group in groups]
    for part in range(parts):
        members = [np.flatnonzero(group == part) for group in groups]
        inside = [pairs[np.ix_(a, b)] for pairs, a, b in zip(chain, members, members[1:], strict=False)]
        share = deadline.share(1 / (parts - part))
        local = _staged(inside, [len(m) for m in members], rest, share, threads)
        for rank, chosen, within in zip(ranks, members, local, strict=True):
            rank[chosen] += within
    return ranks


def partition(chain: Chain, sizes: list[int], parts: int, deadline: Deadline, threads: int) -> ilp.Layers:
    """One stage: the group of each of the `sizes[l]` experts of every layer, group sizes as equal as can be."""
    if parts == 1 or len(sizes) == 1:
        return [np.arange(size) * parts // max(1, size) for size in sizes]
    width = MAX_COEFFICIENTS // max(1, max(sizes) ** 2 * parts)
    start = _start(chain, sizes, parts, deadline.share(0.5 if width > 1 else 1))
    if width < 2:  # one layer is what the start solves exactly
        return start

    def improve(groups: ilp.Layers, first: int, end: int, until: Deadline) -> ilp.Layers | None:
        return _window(chain, groups, parts, range(first, end), until, threads)

    return ilp.over_windows(start, width, deadline, improve, lambda groups: crossings(chain, groups))


def _start(chain: Chain, sizes: list[int], parts: int, deadline: Deadline) -> ilp.Layers:
    """Each layer by the one before it, swept; then up to ROUNDS times a few layers are shuffled a little and swept again."""
    groups = [np.arange(size) * parts // max(1, size) for size in sizes]
    for layer in range(1, len(sizes)):
        groups[layer] = transport(_saved(chain, groups, layer, parts, after=False))
    best = swept(chain, groups, parts, deadline)
    cost, rng = crossings(chain, best), np.random.default_rng(0)
    for _ in range(ROUNDS):
        if deadline.passed() or cost == 0:
            break
        groups, first = list(best), int(rng.integers(len(sizes)))
        for layer in range(first, min(len(sizes), first + int(rng.integers(1, SHUFFLED + 1)))):
            groups[layer] = _shuffled(groups[layer], parts, rng)
        groups = swept(chain, groups, parts, deadline)
        if (found := crossings(chain, groups)) <= cost:
            best, cost = groups, found
    return best


def _shuffled(group: NDArray[np.int64], parts: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """The groups of up to 2 x parts experts, exchanged among them."""
    chosen = rng.permutation(len(group))[: int(rng.integers(2, 2 * parts + 1))]
    shuffled = group.copy()
    shuffled[np.sort(chosen)] = group[chosen]
    return shuffled


def swept(chain: Chain, groups: ilp.Layers, parts: int, deadline: Deadline) -> ilp.Layers:
    """Every layer placed exactly given its neighbours, over and over until that gains nothing or time is up."""
    groups, before, cost = list(groups), np.inf, crossings(chain, groups)
    while cost < before and not deadline.passed():
        for layer in range(len(groups)):
            groups[layer] = transport(_saved(chain, groups, layer, parts))
        before, cost = cost * (1 - 1e-9), crossings(chain, groups)
    return groups


def _saved(
    chain: Chain, groups: ilp.Layers, layer: int, parts: int, before: bool = True, after: bool = True
) -> NDArray[np.float64]:
    """Tokens to the layer before and after that would not cross if the expert were in the group, float64 `[E_l, parts]`."""
    saved = np.zeros((len(groups[layer]), parts))
    if before and layer > 0:
        saved += chain[layer - 1].T @ one_hot(groups[layer - 1], parts)
    if after and layer < len(chain):
        saved += chain[layer] @ one_hot(groups[layer + 1], parts)
    return saved


def transport(saved: NDArray[np.float64]) -> NDArray[np.int64]:
    """The best group of every expert, int64 `[E]`, group sizes floor or ceil of E / parts; saved `[E, parts]`, maximised."""
    experts, parts = saved.shape
    least, more = divmod(experts, parts)
    slots = np.concatenate([np.repeat(np.arange(parts), least), np.arange(parts if more else 0)])
    value = saved[:, slots]
    value[:, : parts * least] += np.ptp(saved) + 1 if experts else 0  # the slots that every group has are filled first
    return np.asarray(slots[linear_sum_assignment(value, maximize=True)[1]], dtype=np.int64)


def _window(chain: Chain, groups: ilp.Layers, parts: int, span: range, deadline: Deadline, threads: int) -> ilp.Layers | None:
    """The program for the layers of `span`, the others staying as in `groups`; None if the solver ended without a solution."""
    model = pulp.LpProblem("exflow", pulp.LpMaximize)
    x = ilp.equal_groups(model, groups, span, parts)
    start = {v.name: 1.0 for (layer, e, g), v in x.items() if groups[layer][e] == g}
    objective: list[tuple[pulp.LpVariable, float]] = []
    for layer in (span[0], span[-1]):
        edge = _saved(chain, groups, layer, parts, before=layer == span[0], after=layer == span[-1])
        objective += [(x[layer, e, g], float(edge[e, g])) for e, g in np.argwhere(edge > 0).tolist()]
        if span[0] == span[-1]:
            break
    if len(span) == len(groups) and len(groups[0]):
        model += x[0, 0, int(groups[0][0])] == 1  # groups have no names: one expert may keep its own
    for layer in span[:-1]:
        objective += _together(model, chain, groups, x, (layer, parts), start)
    model += pulp.LpAffineExpression(objective)
    if not ilp.run(model, start, deadline, threads, ilp.GAPS).found:
        return None
    return [*groups[: span[0]], *ilp.read_groups(x, groups, span, parts), *groups[span[-1] + 1 :]]


def _together(
    model: pulp.LpProblem, chain: Chain, groups: ilp.Layers, x: ilp.Cell, at: tuple[int, int], start: dict[str, float]
) -> list[tuple[pulp.LpVariable, float]]:
    """The terms of one layer and the next: tokens of expert e on g whose next expert is there too; adds to `start`."""
    layer, parts = at
    pairs, following = chain[layer], len(groups[layer + 1])
    most = np.sort(pairs, axis=1)[:, ::-1][:, : -(-following // parts)].sum(1)
    now = pairs @ one_hot(groups[layer + 1], parts) * one_hot(groups[layer], parts)
    terms = []
    for e in np.flatnonzero(most > 0).tolist():
        row = [(f, float(pairs[e, f])) for f in np.flatnonzero(pairs[e]).tolist()]
        for g in range(parts):
            kept = model.add_variable(f"t_{layer}_{e}_{g}", 0, float(most[e]))
            model += pulp.LpAffineExpression([(kept, 1.0), (x[layer, e, g], -float(most[e]))]) <= 0
            model += pulp.LpAffineExpression([(kept, 1.0), *((x[layer + 1, f, g], -t) for f, t in row)]) <= 0
            start[kept.name] = float(now[e, g])
            terms.append((kept, 1.0))
    return terms
