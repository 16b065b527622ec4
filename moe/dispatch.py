"""The arithmetic of sending tokens to the ranks of their experts: which rows, in which order, and how they come home.

Pure functions over tensors; no process group. One row goes to each rank that hosts any of a token's experts, however many
of them live there (as in DeepEP and SGLang); the rank returns one weighted partial sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class DispatchPlan:
    """What one rank sends in one layer of one step.

    token_of_row: int64 `[rows]`, sorted by destination rank, then by token; counts: rows per destination rank, `ranks` long.
    ids: int64 `[rows, K]`, positions in the destination's stack, -1 where the slot's expert lives elsewhere.
    weights: float32 `[rows, K]`, 0 where ids is -1.
    place: int64 `[rows]`, where each returned row goes in `[tokens * width]`; width: most ranks that a token needs.
    """

    token_of_row: torch.Tensor
    counts: tuple[int, ...]
    ids: torch.Tensor
    weights: torch.Tensor
    place: torch.Tensor
    tokens: int
    width: int


def plan_dispatch(
    ids: torch.Tensor, weights: torch.Tensor, destination: torch.Tensor, position: torch.Tensor, ranks: int
) -> DispatchPlan:
    """ids: int `[T, K]`, logical experts, -1 for none; weights `[T, K]`; destination, position: int64 `[E]` (`LayerMap`)."""
    return plan_rows(*looked_up(ids, destination, position), weights, ranks)


def looked_up(ids: torch.Tensor, destination: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rank, position there) of each slot, int64 `[T, K]`, -1 for unused slots."""
    if ids.device.type == "cpu":
        slots = ids.numpy()
        found = (np.where(slots >= 0, table.numpy()[slots], -1) for table in (destination, position))
        return torch.from_numpy(next(found)), torch.from_numpy(next(found))
    used, known = ids >= 0, ids.clamp(min=0).long()
    return torch.where(used, destination[known], -1), torch.where(used, position[known], -1)


def plan_rows(target: torch.Tensor, where: torch.Tensor, weights: torch.Tensor, ranks: int) -> DispatchPlan:
    """target: the rank of each slot, int64 `[T, K]`, -1 for none; where: what that rank is told of it; weights `[T, K]`."""
    if target.device.type == "cpu":
        return _planned_on_cpu(target, where, weights, ranks)
    return planned(target, where, weights, ranks)


def planned(target: torch.Tensor, where: torch.Tensor, weights: torch.Tensor, ranks: int) -> DispatchPlan:
    """`plan_rows` on any device."""
    needed = needed_ranks(target, ranks)
    rank_of_row, token_of_row = needed.T.nonzero(as_tuple=True)
    mine = target[token_of_row] == rank_of_row[:, None]
    nth = needed.cumsum(1) - 1
    width = max(1, int(needed.sum(1).max())) if len(target) else 1
    return DispatchPlan(
        token_of_row=token_of_row,
        counts=tuple(needed.sum(0).tolist()),
        ids=torch.where(mine, where[token_of_row], -1),
        weights=torch.where(mine, weights[token_of_row].float(), 0.0),
        place=token_of_row * width + nth[token_of_row, rank_of_row],
        tokens=len(target),
        width=width,
    )


def _planned_on_cpu(target: torch.Tensor, where: torch.Tensor, weights: torch.Tensor, ranks: int) -> DispatchPlan:
    """As `planned`, in numpy, whose calls take a third of the time of torch's: steps that decode are made of small ones."""
    slots, tokens = target.numpy(), np.arange(len(target))
    marked = np.zeros((len(slots), ranks + 1), dtype=bool)
    marked[tokens[:, None], slots] = True  # -1 falls into the column that is cut off
    needed = marked[:, :ranks]
    rank_of_row, token_of_row = needed.T.nonzero()
    mine = slots[token_of_row] == rank_of_row[:, None]
    nth = needed.cumsum(1)
    width = max(1, int(nth[:, -1].max(initial=0)))
    given = weights.float().numpy()[token_of_row]
    return DispatchPlan(
        token_of_row=torch.from_numpy(token_of_row),
        counts=tuple(needed.sum(0).tolist()),
        ids=torch.from_numpy(np.where(mine, where.numpy()[token_of_row], -1)),
        weights=torch.from_numpy(np.where(mine, given, np.float32(0))),
        place=torch.from_numpy(token_of_row * width + nth[token_of_row, rank_of_row] - 1),
        tokens=len(slots),
        width=width,
    )


def needed_ranks(target: torch.Tensor, ranks: int) -> torch.Tensor:
    """bool `[T, ranks]`: the ranks that host a slot of the token; target as in `plan_rows`."""
    return (target[:, :, None] == torch.arange(ranks, device=target.device)).any(1)


def gateways(target: torch.Tensor, here: int, ranks: int, ranks_per_node: int) -> torch.Tensor:
    """The rank to which a node's slots of a token are sent together: int64 `[T, K]` by slot, -1 for slots of this node.

    It is one of those that host an expert of the token, so that no row is sent twice: the first at or after `here`'s place
    in its node, cyclically, which spreads the rows over the node's ranks.
    """
    node, place = here // ranks_per_node, here % ranks_per_node
    wanted = needed_ranks(target, ranks).view(len(target), ranks // ranks_per_node, ranks_per_node)
    turned = wanted.roll(-place, dims=2).int().argmax(2)  # [T, nodes]
    first = (turned + place) % ranks_per_node
    node_of_slot = torch.where(target >= 0, target // ranks_per_node, node)
    chosen = node_of_slot * ranks_per_node + first.gather(1, node_of_slot)
    return torch.where(node_of_slot == node, -1, chosen)


def combine_rows(plan: DispatchPlan, partial: torch.Tensor) -> torch.Tensor:
    """Sum each token's partial results in the order of ranks. partial: `[rows, H]` as sent; returns float32 `[T, H]`."""
    parts = torch.zeros(plan.tokens * plan.width, partial.shape[1], dtype=torch.float32, device=partial.device)
    parts[plan.place] = partial.float()
    return parts.view(plan.tokens, plan.width, partial.shape[1]).sum(1)


def merge_sources(parts: Sequence[torch.Tensor], counts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Rows of several exchanges, each by source rank, as those of one: by source rank, then by exchange.

    parts: `[rows, width]` of each exchange; counts: its rows from each source. So the rows that one exchange of
    `plan_rows` over all tokens would bring come from one exchange of each part of the tokens.
    """
    pieces = (torch.split(part, list(count)) for part, count in zip(parts, counts, strict=True))
    return torch.cat([piece for source in zip(*pieces, strict=True) for piece in source])


def split_sources(rows: torch.Tensor, counts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """`merge_sources` undone: the rows of each exchange."""
    if len(counts) == 1:
        return [rows]
    pieces = torch.split(rows, [count for source in zip(*counts, strict=True) for count in source])
    return [torch.cat(pieces[number :: len(counts)]) for number in range(len(counts))]


def pack_rows(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """One message of bytes per row, uint8 `[rows, row_bytes]`: fp32 weights, int32 positions, then the hidden state."""
    return torch.cat([as_bytes(part) for part in (weights.float(), ids.to(torch.int32), x)], dim=1)


def unpack_rows(message: torch.Tensor, slots: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x `[rows, H]` in dtype, ids int64 `[rows, slots]`, weights float32 `[rows, slots]`) from `pack_rows`' bytes."""
    weights, ids, x = torch.split(message, [4 * slots, 4 * slots, message.shape[1] - 8 * slots], dim=1)
    return from_bytes(x, dtype), from_bytes(ids, torch.int32).long(), from_bytes(weights, torch.float32)


def as_bytes(rows: torch.Tensor) -> torch.Tensor:
    """uint8 `[rows, bytes of a row]`, the same memory where it is contiguous: what every backend takes."""
    if not rows.shape[0]:
        return torch.empty((0, rows.shape[1] * rows.element_size()), dtype=torch.uint8, device=rows.device)
    return rows.contiguous().view(-1).view(torch.uint8).view(rows.shape[0], -1)


def from_bytes(message: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`as_bytes` undone: rows `[rows, width]` of `dtype`."""
    width = message.shape[1] // dtype.itemsize
    if not message.shape[0]:
        return torch.empty((0, width), dtype=dtype, device=message.device)
    return message.contiguous().view(-1).view(dtype).view(message.shape[0], width)


def row_bytes(hidden: int, slots: int, dtype: torch.dtype) -> int:
    """Bytes of one dispatched row: the hidden state and 8 bytes of header per slot."""
    return hidden * dtype.itemsize + 8 * slots
