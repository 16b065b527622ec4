"""How tokens reach their experts: strategy objects with one contract.

`dispatch` takes this rank's tokens to the ranks of their experts and returns the rows to compute here; `combine` takes the
computed rows back and sums them. What `dispatch` returns is opaque to the caller but for `rows`, `ids` and `weights`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch

from coterie.moe.collectives import Group
from coterie.moe.dispatch import (
    DispatchPlan,
    combine_rows,
    gateways,
    looked_up,
    merge_sources,
    pack_rows,
    plan_dispatch,
    plan_rows,
    split_sources,
    unpack_rows,
)
from coterie.moe.placement_map import LayerMap


@dataclass(frozen=True)
class Dispatched:
    """Rows for this rank's experts. rows `[R, H]`; ids int64 `[R, K]`, positions in the stack, -1 for none; weights `[R, K]`.

    state: what the strategy's own `combine` needs.
    """

    rows: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    state: Any = None


CHUNKS = 2
BESIDE = 20  # times what a link carries in a collective's latency: with fewer bytes of a rank's tokens, two more exchanges
# inside the node cost more than is saved (bench/hierarchical.py)
Compute = Callable[[Dispatched], torch.Tensor]


class Strategy(Protocol):
    """The contract. Every rank calls both methods for every layer of every step, with zero tokens if it has none.

    every_rank_has_all: each rank is given the tokens of all, instead of its own.
    """

    name: str
    group: Group
    every_rank_has_all: bool

    def dispatch(
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, layer: LayerMap, tokens: tuple[int, ...]
    ) -> Dispatched:
        """x `[T, H]`; ids int `[T, K]`, logical experts, -1 for none; weights `[T, K]`; tokens: T of every rank, not all 0."""
        ...

    def combine(self, y: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        """y `[R, H]`, weighted sums over the experts here; returns `[T, H]`."""
        ...


class _OfGroup:
    """What strategies have in common: tokens stay apart unless said otherwise."""

    every_rank_has_all = False

    def __init__(self, group: Group) -> None:
        self.group = group


class Local(_OfGroup):
    """Every expert is on this rank."""

    name = "local"

    def __init__(self, group: Group | None = None) -> None:
        super().__init__(group or Group())

    def dispatch(
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, layer: LayerMap, tokens: tuple[int, ...]
    ) -> Dispatched:
        """Nothing moves; logical ids become positions in the stack."""
        return Dispatched(x, torch.where(ids >= 0, layer.here[ids.clamp(min=0)], -1), weights)

    def combine(self, y: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        """The rows are home already."""
        return y


class Replicated(_OfGroup):
    """Every rank has every token and computes its own experts' part; the parts are summed by reduce-scatter and all-gather.

    For batches so small that latency rules: nothing is dispatched. Tensor-parallel engines run their experts this way.
    """

    name = "replicated"
    every_rank_has_all = True

    def dispatch(
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, layer: LayerMap, tokens: tuple[int, ...]
    ) -> Dispatched:
        """Nothing moves; of several copies of an expert another one computes for every token in turn."""
        source = torch.arange(len(x), device=x.device) % self.group.size
        return Dispatched(x, _computed_here(ids, source, layer, self.group.rank), weights)

    def combine(self, y: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        """Each rank sums a share of the tokens in the order of ranks; small batches are summed whole on every rank."""
        ranks, tokens = self.group.size, len(y)
        if (ranks - 1) * y.numel() * y.element_size() <= self.group.free_bytes:
            parts = self.group.gather_rows(y, [tokens] * ranks, "combine")
            return _summed(parts, ranks)
        share = [tokens * (r + 1) // ranks - tokens * r // ranks for r in range(ranks)]
        parts = self.group.exchange_known(y, share, [share[self.group.rank]] * ranks)
        return self.group.gather_rows(_summed(parts, ranks), share, "combine")


class AllGather(_OfGroup):
    """Every rank gets every token with its routing, and sends each token's home a partial sum (gather and reduce-scatter).

    Two collectives whose sizes all ranks know, for batches in which most tokens need most ranks anyway.
    """

    name = "all_gather"

    def dispatch(
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, layer: LayerMap, tokens: tuple[int, ...]
    ) -> Dispatched:
        """Gathers rows with their logical ids, and keeps the slots that are computed here."""
        message = self.group.gather_rows(pack_rows(x, ids, weights), tokens)
        rows, row_ids, row_weights = unpack_rows(message, ids.shape[1], x.dtype)
        source = torch.repeat_interleave(torch.tensor(tokens)).to(x.device)
        return Dispatched(rows, _computed_here(row_ids, source, layer, self.group.rank), row_weights, tokens)

    def combine(self, y: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        """One partial sum of each rank for each token, summed in the order of ranks."""
        tokens = dispatched.state
        parts = self.group.exchange_known(y, tokens, [tokens[self.group.rank]] * self.group.size)
        return _summed(parts, self.group.size)


class AllToAll(_OfGroup):
    """One row per token and destination rank, weighted partial sums reduced there, one row back."""

    name = "all_to_all"

    def dispatch(
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, layer: LayerMap, tokens: tuple[int, ...]
    ) -> Dispatched:
        """Exchanges rows with their slots packed in."""
        plan = plan_dispatch(ids, weights, layer.destination, layer.position, self.group.size)
        message = pack_rows(x[plan.token_of_row], plan.ids, plan.weights)
        came, receive = self.group.exchange(message, plan.counts, max(tokens))
        return Dispatched(*unpack_rows(came, ids.shape[1], x.dtype), (plan, receive))

    def combine(self, y: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        """The same exchange backwards, then the sum in the order of ranks."""
        plan, receive = dispatched.state
        return combine_rows(plan, self.group.exchange_known(y, receive, plan.counts)).to(y.dtype)


class Overlapped(AllToAll):
    """`AllToAll` in chunks of tokens: while one chunk's experts compute, the next one's rows and the last one's sums travel.

    As in Tutel and FSMoE. The chunks' counts go round together, ahead of the rows. Sums are those of `AllToAll` to the bit
    where the experts' products do not depend on how many rows they are given.
    """

    name = "overlapped"

    def __init__(self, group: Group, chunks: int = CHUNKS) -> None:
        super().__init__(group)
        self.chunks = chunks

    def run(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, layer: LayerMap, experts: Compute) -> torch.Tensor:
        """All three steps; experts: computes `Dispatched.rows`."""
        group, slots = self.group, ids.shape[1]
        cuts = [len(x) * i // self.chunks for i in range(self.chunks + 1)]
        parts = [slice(a, b) for a, b in pairwise(cuts)]
        plans = [plan_dispatch(ids[p], weights[p], layer.destination, layer.position, group.size) for p in parts]
        receive = self._counts([plan.counts for plan in plans])

        def send(number: int) -> Callable[[], torch.Tensor]:
            plan, part = plans[number], parts[number]
            message = pack_rows(x[part][plan.token_of_row], plan.ids, plan.weights)
            return group.start_exchange(message, plan.counts, receive[number], "dispatch")

        coming, returning = send(0), []
        for number, plan in enumerate(plans):
            came = coming()
            if number + 1 < self.chunks:
                coming = send(number + 1)
            y = experts(Dispatched(*unpack_rows(came, slots, x.dtype)))
            returning.append(group.start_exchange(y, receive[number], plan.counts))
        return torch.cat([combine_rows(plan, back()) for plan, back in zip(plans, returning, strict=True)]).to(x.dtype)

    def _counts(self, mine: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """How many rows come from each rank in each chunk."""
        said = torch.tensor(mine, dtype=torch.int64, device=self.group.device).T.contiguous()
        ones = [1] * self.group.size
        told = self.group.exchange_known(said, ones, ones, "counts", beside=True)
        return [tuple(column) for column in told.T.tolist()]


class Coherent(AllToAll):
    """`AllToAll` for prefill; tokens that are decoded stay with their experts (`moe/coherent.py`)."""

    name = "coherent"


@dataclass(frozen=True)
class _Inside:
    """One exchange inside the node. plan: what this rank sent; came: how many rows from each rank."""

    plan: DispatchPlan
    came: tuple[int, ...]


@dataclass(frozen=True)
class _Stages:
    """between: rows to other nodes; came: how many from each rank; inside: what went on inside this rank's node.

    That is one exchange of this rank's own tokens and, behind them, of the rows that came; or one of each.
    """

    between: DispatchPlan
    came: tuple[int, ...]
    inside: tuple[_Inside, ...]


class Hierarchical(_OfGroup):
    """One row per token and remote node, forwarded there to the other ranks that need it; one row back per node.

    As in DeepEP's internode kernels. The rank that takes a node's row is one that needs it anyway, so the number of rows is
    that of `AllToAll`, and only those between nodes become fewer. Where there is enough to send, what this rank's node needs
    of its own tokens travels inside it while rows travel between nodes, both ways (as in FSMoE); the sums are the same bits.
    """

    name = "hierarchical"

    def __init__(self, group: Group, beside_bytes: int | None = None) -> None:
        super().__init__(group)
        width = group.ranks_per_node
        self.node = group.subgroup([list(range(i, i + width)) for i in range(0, group.size, width)])
        self.beside_bytes = beside_bytes

    def dispatch(
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, layer: LayerMap, tokens: tuple[int, ...]
    ) -> Dispatched:
        """Between nodes first; a slot travels as its rank in the node times the number of experts, plus its position."""
        slots, experts, size = ids.shape[1], len(layer.destination), self.node.size
        target, position = looked_up(ids, layer.destination, layer.position)
        code = torch.where(ids >= 0, target % size * experts + position, -1)
        gateway = gateways(target, self.group.rank, self.group.size, size)
        between = plan_rows(gateway, code, weights, self.group.size)
        message = pack_rows(x[between.token_of_row], between.ids, between.weights)
        came, arriving = self.group.start_counted(message, between.counts, max(tokens), "dispatch between nodes")
        own = (x, torch.where(gateway < 0, code, -1), weights.float())
        inside: tuple[_Inside, ...]
        least = BESIDE * self.group.free_bytes if self.beside_bytes is None else self.beside_bytes
        if goes_beside(max(tokens), message.shape[1], self.group.nodes, size, least):
            first, mine = self._hand_out(*own, experts, max(tokens))
            second, theirs = self._hand_out(*unpack_rows(arriving(), slots, x.dtype), experts, sum(tokens))
            arrived, inside = merge_sources((first, second), (mine.came, theirs.came)), (mine, theirs)
        else:
            x, code, weights = map(torch.cat, zip(own, unpack_rows(arriving(), slots, x.dtype), strict=True))
            arrived, all_rows = self._hand_out(x, code, weights, experts, sum(tokens))
            inside = (all_rows,)
        return Dispatched(*unpack_rows(arrived, slots, x.dtype), _Stages(between, came, inside))

    def _hand_out(
        self, x: torch.Tensor, code: torch.Tensor, weights: torch.Tensor, experts: int, bound: int
    ) -> tuple[torch.Tensor, _Inside]:
        """The rows that this node's ranks need of `x`, exchanged inside it: messages as they came."""
        rank, where = (torch.where(code >= 0, part, -1) for part in (code // experts, code % experts))
        plan = plan_rows(rank, where, weights, self.node.size)
        message = pack_rows(x[plan.token_of_row], plan.ids, plan.weights)
        arrived, came = self.node.exchange(message, plan.counts, bound)
        return arrived, _Inside(plan, came)

    def combine(self, y: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        """Inside the node first, then between nodes: sums in the order of ranks, this node's before the others'."""
        stages: _Stages = dispatched.state
        *mine, last = zip(split_sources(y, [i.came for i in stages.inside]), stages.inside, strict=True)
        back = self._summed_inside(*last)
        tokens = 0 if mine else stages.between.tokens
        sums = back[tokens:].to(y.dtype)
        coming = self.group.start_exchange(sums, stages.came, stages.between.counts, "combine between nodes")
        own = self._summed_inside(*mine[0]) if mine else back[:tokens]
        return (own + combine_rows(stages.between, coming())).to(y.dtype)

    def _summed_inside(self, y: torch.Tensor, inside: _Inside) -> torch.Tensor:
        """Partial sums back to the rank that handed the rows out, and their sums there, float32."""
        return combine_rows(inside.plan, self.node.exchange_known(y, inside.came, inside.plan.counts))


def goes_beside(tokens: int, row_bytes: int, nodes: int, ranks_per_node: int, least_bytes: int) -> bool:
    """Whether rows inside nodes travel beside those between nodes: the same on all ranks. tokens: of the rank with most."""
    return nodes > 1 and ranks_per_node > 1 and tokens * row_bytes >= least_bytes


def _summed(parts: torch.Tensor, ranks: int) -> torch.Tensor:
    """`[ranks * T, H]`, a part of each rank one after another, to their sums `[T, H]`, taken in float32."""
    return parts.view(ranks, len(parts) // ranks, parts.shape[1]).float().sum(0).to(parts.dtype)


def _computed_here(ids: torch.Tensor, source: torch.Tensor, layer: LayerMap, rank: int) -> torch.Tensor:
    """Positions in this rank's stack, -1 where another rank computes: int64 `[T, K]`; source: rank of each token `[T]`."""
    known = ids.clamp(min=0)
    return torch.where((ids >= 0) & (layer.routes[source[:, None], known] == rank), layer.here[known], -1)
