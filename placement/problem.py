"""One placement problem without copies: what the searches, the dynamic program, the integer programs and the bounds share.

Costs are in counts where they come from one trace, so that they stay integers in float64; `scale` turns them into what
`evaluate` prints. Several traces are mixed into one problem, each divided by its own size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from coterie.placement.baselines import Assignment
from coterie.routing.affinity import Patterns

if TYPE_CHECKING:
    from coterie.placement.prices import Prices


@dataclass(frozen=True)
class Limit:
    """Something that no rank may have too much of: load in one scenario, or bytes.

    weights: float64 `[L, E]`, non-negative; caps: float64 `[L, ranks]`, infinite where there is no limit.
    memory: weights are bytes, which copies do not share, as they do load.
    """

    weights: NDArray[np.float64]
    caps: NDArray[np.float64]
    memory: bool = False

    @property
    def even(self) -> bool:
        """Whether all ranks have the same caps, so that ranks may change names."""
        return bool((self.caps == self.caps[:, :1]).all())


@dataclass(frozen=True)
class Problem:
    """Place the E experts of each of L layers on `ranks` ranks, at most `slots` on each, within `limits`.

    transitions: float64 `[L-1, E, E]`, what is paid if the pair is apart (hops), else None.
    members: bool `[patterns, E]` and prices: float64 `[patterns, ranks]`, per layer: what is paid if the rank hosts any
    expert of the pattern (dispatch), else empty. node_prices: float64 `[patterns, nodes]`, per layer: what is paid besides if
    any rank of the node does, ranks / nodes consecutive ones each, else empty.
    integral: costs are whole numbers, so bounds may be rounded up.
    """

    layers: int
    experts: int
    ranks: int
    slots: int
    scale: float
    limits: tuple[Limit, ...] = ()
    transitions: NDArray[np.float64] | None = None
    members: tuple[NDArray[np.bool_], ...] = ()
    prices: tuple[NDArray[np.float64], ...] = ()
    node_prices: tuple[NDArray[np.float64], ...] = ()
    integral: bool = False

    @property
    def per_node(self) -> int:
        """Ranks of a node; all where nodes have no price."""
        return self.ranks // self.node_prices[0].shape[1] if self.node_prices else self.ranks

    def cost(self, assignment: Assignment) -> float:
        """The objective, in counts, of the rank of every expert `[L, E]`."""
        if self.transitions is not None:
            apart = assignment[:-1, :, None] != assignment[1:, None, :]
            return float((self.transitions * apart).sum())
        return float(sum(self.layer_cost(layer, assignment[layer]) for layer in range(self.layers)))

    def layer_cost(self, layer: int, ranks_of: NDArray[np.int64]) -> float:
        """The dispatch cost of one layer; ranks_of `[E]`."""
        hosts = self.held(layer, ranks_of) > 0
        paid = float((self.prices[layer] * hosts).sum())
        if self.node_prices:
            paid += float((self.node_prices[layer] * on_nodes(hosts, self.per_node)).sum())
        return paid

    def held(self, layer: int, ranks_of: NDArray[np.int64]) -> NDArray[np.float32]:
        """How many of each pattern's experts every rank hosts, float32 `[patterns, ranks]`; ranks_of `[E]`."""
        return self.members[layer].astype(np.float32) @ one_hot(ranks_of, self.ranks).astype(np.float32)

    def feasible(self, assignment: Assignment) -> bool:
        """Whether every rank keeps to its slots and to every limit."""
        if one_hot(assignment, self.ranks).sum(1).max() > self.slots:
            return False
        return all(self.keeps(layer, ranks_of) for layer, ranks_of in enumerate(assignment))

    def keeps(self, layer: int, ranks_of: NDArray[np.int64]) -> bool:
        """Whether every rank keeps to every limit in one layer; ranks_of `[E]`."""
        held = ((limit, held_by(ranks_of, limit.weights[layer], self.ranks)) for limit in self.limits)
        return all((weight <= limit.caps[layer] * (1 + 1e-9)).all() for limit, weight in held)

    def padded(self) -> Problem:
        """The same with an expert without traffic or weight for every empty slot: a move into one is a swap too."""
        extra = self.ranks * self.slots - self.experts
        if extra == 0:
            return self
        wide = ((0, 0), (0, extra))
        transitions = None if self.transitions is None else np.pad(self.transitions, ((0, 0), (0, extra), (0, extra)))
        return replace(
            self, experts=self.experts + extra, transitions=transitions,
            limits=tuple(replace(limit, weights=np.pad(limit.weights, wide)) for limit in self.limits),
            members=tuple(np.pad(m, wide) for m in self.members),
        )  # fmt: skip

    def of_layers(self, layers: NDArray[np.int64]) -> Problem:
        """The same of some layers, where layers are independent (dispatch)."""
        return replace(
            self, layers=len(layers),
            limits=tuple(replace(limit, weights=limit.weights[layers], caps=limit.caps[layers]) for limit in self.limits),
            members=tuple(self.members[n] for n in layers), prices=tuple(self.prices[n] for n in layers),
            node_prices=tuple(self.node_prices[n] for n in layers if self.node_prices),
        )  # fmt: skip

    @property
    def interchangeable(self) -> bool:
        """Whether ranks may change names without breaking a limit."""
        return all(limit.even for limit in self.limits)


def on_nodes(hosts: NDArray[np.bool_], per_node: int) -> NDArray[np.bool_]:
    """Which nodes have a rank that hosts any of a pattern's experts, bool `[patterns, nodes]`; hosts `[patterns, ranks]`."""
    return np.asarray(hosts.reshape(len(hosts), -1, per_node).any(2))


def carried(limit: Limit, assignment: Assignment, ranks: int) -> NDArray[np.float64]:
    """What each rank carries of a limited thing, float64 `[L, ranks]`."""
    return np.stack([held_by(a, w, ranks) for a, w in zip(assignment, limit.weights, strict=True)])


def held_by(here: NDArray[np.int64], weights: NDArray[np.float64], ranks: int) -> NDArray[np.float64]:
    """What the experts on each rank weigh, float64 `[ranks]`; here, weights `[E]`."""
    return np.asarray(np.bincount(here, weights=weights, minlength=ranks), dtype=np.float64)


def one_hot(assignment: NDArray[np.int64], ranks: int) -> NDArray[np.int64]:
    """int64 `[..., E, ranks]` from the rank of every expert `[..., E]`."""
    return np.asarray(assignment[..., None] == np.arange(ranks), dtype=np.int64)


def hops_problem(
    scenarios: Sequence[NDArray[np.float64]], weights: Sequence[float], ranks: int, slots: int, limits: tuple[Limit, ...]
) -> Problem:
    """Consecutive-layer pairs on different ranks (ExFlow), each scenario's share times its weight.

    scenarios: the transitions of each, float64 `[L-1, E, E]`.
    """
    single = len(scenarios) == 1
    totals = [float(counts.sum()) or 1.0 for counts in scenarios]
    mixed = scenarios[0]
    if not single:
        mixed = np.asarray(sum(w / total * c for c, w, total in zip(scenarios, weights, totals, strict=True)))
    layers, experts = len(mixed) + 1, mixed.shape[1]
    scale = 1 / totals[0] if single else 1.0
    return Problem(layers, experts, ranks, slots, scale, limits, transitions=mixed, integral=single)


def dispatch_problem(
    scenarios: Sequence[tuple[Patterns, ...]], weights: Sequence[float], ranks: int, slots: int, limits: tuple[Limit, ...],
    known_homes: bool, tolls: Prices | None = None,
) -> Problem:  # fmt: skip
    """Distinct destination ranks per token, home left out: every home equally likely, or the homes of the traces.

    scenarios: the patterns of each, by layer; with known homes they must carry `by_home`.
    Several scenarios' rows count by weight over tokens. tolls: what a row costs by where it goes; None: each row 1.
    """
    single = len(scenarios) == 1
    shares = [w / parts[0].tokens for parts, w in zip(scenarios, weights, strict=True)]
    members, prices, node_prices = [], [], []
    for parts in zip(*scenarios, strict=True):
        members.append(np.concatenate([p.experts for p in parts]))
        prices.append(_mixed([priced(p, ranks, known_homes, tolls) for p in parts], shares))
        if tolls is not None and tolls.tiered:
            node_prices.append(_mixed([_expected(p, known_homes, tolls.by_node) for p in parts], shares))
    layers, experts = len(members), scenarios[0][0].num_experts
    scale = 1 / layers / (scenarios[0][0].tokens if single else 1)
    return Problem(
        layers, experts, ranks, slots, scale, limits, members=tuple(members), prices=tuple(prices),
        node_prices=tuple(node_prices), integral=single and known_homes and (tolls is None or not tolls.matter),
    )  # fmt: skip


def _mixed(rows: Sequence[NDArray[np.float64]], shares: Sequence[float]) -> NDArray[np.float64]:
    """Of all scenarios' patterns; counts where there is one scenario, else shares of its tokens."""
    return rows[0] if len(rows) == 1 else np.concatenate([r * share for r, share in zip(rows, shares, strict=True)])


def priced(patterns: Patterns, ranks: int, known_homes: bool, tolls: Prices | None = None) -> NDArray[np.float64]:
    """What a pattern pays for each rank that hosts one of its experts, float64 `[patterns, ranks]`."""
    if tolls is not None and tolls.matter:
        return _expected(patterns, known_homes, tolls.by_rank)
    if known_homes:
        assert patterns.by_home is not None
        return np.asarray(patterns.weight[:, None] - patterns.by_home)
    return np.broadcast_to(patterns.weight[:, None] * (1 - 1 / ranks), (len(patterns.weight), ranks))


def _expected(patterns: Patterns, known_homes: bool, prices: NDArray[np.float64]) -> NDArray[np.float64]:
    """What a pattern pays for each place with one of its experts, `[patterns, places]`; prices `[ranks, places]`, by home."""
    if known_homes:
        assert patterns.by_home is not None
        return np.asarray(patterns.by_home @ prices)
    return np.asarray(patterns.weight[:, None] * prices.mean(0))
