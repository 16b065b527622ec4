"""How tokens reach their experts: strategy objects with one contract.

`dispatch` takes this rank's tokens to the ranks of their experts and returns the rows to compute here; `combine` takes the
computed rows back and sums them. What `dispatch` returns is opaque to the caller but for `rows`, `ids` and `weights`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from coterie.moe.collectives import Group
from coterie.moe.dispatch import DispatchPlan, combine_rows, pack_rows, plan_dispatch, unpack_rows
from coterie.moe.placement_map import LayerMap
from coterie.routing.errors import InputError


@dataclass(frozen=True)
class Dispatched:
    """Rows for this rank's experts. rows `[R, H]`; ids int64 `[R, K]`, positions in the stack, -1 for none; weights `[R, K]`.

    state: what the strategy's own `combine` needs.
    """

    rows: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    state: Any


class Strategy(Protocol):
    """The contract. Every rank calls both methods for every layer of every step, with zero tokens if it has none."""

    name: str

    def dispatch(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, layer: LayerMap) -> Dispatched:
        """x `[T, H]`; ids int `[T, K]`, logical experts, -1 for none; weights `[T, K]`."""
        ...

    def combine(self, y: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        """y `[R, H]`, weighted sums over the experts here; returns `[T, H]`."""
        ...


class Local:
    """Every expert is on this rank."""

    name = "local"

    def dispatch(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, layer: LayerMap) -> Dispatched:
        """Nothing moves; logical ids become positions in the stack."""
        positions = torch.where(ids >= 0, layer.position[ids.clamp(min=0)], -1)
        return Dispatched(x, positions, weights, None)

    def combine(self, y: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        """The rows are home already."""
        return y


class AllToAll:
    """One row per token and destination rank, weighted partial sums reduced there, one row back."""

    name = "all_to_all"

    def __init__(self, group: Group) -> None:
        self.group = group

    def dispatch(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, layer: LayerMap) -> Dispatched:
        """Exchanges counts, then rows with their slots packed in."""
        plan = plan_dispatch(ids, weights, layer.destination, layer.position, self.group.size)
        receive = self.group.exchange_counts(plan.counts, x.device)
        message = pack_rows(x[plan.token_of_row], plan.ids, plan.weights)
        rows, row_ids, row_weights = unpack_rows(self.group.exchange_rows(message, plan.counts, receive), ids.shape[1], x.dtype)
        return Dispatched(rows, row_ids, row_weights, (plan, receive))

    def combine(self, y: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        """The same exchange backwards, then the sum in the order of ranks."""
        plan, receive = _state(dispatched)
        return combine_rows(plan, self.group.exchange_rows(y, receive, plan.counts))


def _state(dispatched: Dispatched) -> tuple[DispatchPlan, list[int]]:
    return dispatched.state  # type: ignore[no-any-return]


STRATEGIES = ("local", "all_to_all")


def make_strategy(name: str | None, group: Group) -> Strategy:
    """The strategy called `name`, or for None the one that fits the group. Raises InputError if it cannot run on it."""
    chosen = name or ("local" if group.size == 1 else "all_to_all")
    if chosen not in STRATEGIES:
        raise InputError(f"--strategy: found {chosen!r}, expected {' or '.join(STRATEGIES)}")
    if (chosen == "local") != (group.size == 1):
        wanted = "all_to_all, or one process" if group.size > 1 else "local, or several processes (torchrun)"
        raise InputError(f"--strategy: found {chosen!r} on {group.size} process(es), expected {wanted}")
    return Local() if chosen == "local" else AllToAll(group)
