"""The arithmetic of sending tokens to the ranks of their experts: which rows, in which order, and how they come home.

Pure functions over tensors; no process group. One row goes to each rank that hosts any of a token's experts, however many
of them live there (as in DeepEP and SGLang); the rank returns one weighted partial sum.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    used = ids >= 0
    target = torch.where(used, destination[ids.clamp(min=0)], -1)
    where = torch.where(used, position[ids.clamp(min=0)], -1)
    needed = (target[:, :, None] == torch.arange(ranks, device=ids.device)).any(1)  # [T, ranks]
    rank_of_row, token_of_row = needed.T.nonzero(as_tuple=True)
    mine = target[token_of_row] == rank_of_row[:, None]
    nth = needed.cumsum(1) - 1
    width = max(1, int(needed.sum(1).max())) if len(ids) else 1
    return DispatchPlan(
        token_of_row=token_of_row,
        counts=tuple(needed.sum(0).tolist()),
        ids=torch.where(mine, where[token_of_row], -1),
        weights=torch.where(mine, weights[token_of_row].float(), 0.0),
        place=token_of_row * width + nth[token_of_row, rank_of_row],
        tokens=len(ids),
        width=width,
    )


def combine_rows(plan: DispatchPlan, partial: torch.Tensor) -> torch.Tensor:
    """Sum each token's partial results in the order of ranks, in fp32. partial: `[rows, H]` as sent; returns `[T, H]`."""
    parts = torch.zeros(plan.tokens * plan.width, partial.shape[1], dtype=torch.float32, device=partial.device)
    parts[plan.place] = partial.float()
    return parts.view(plan.tokens, plan.width, partial.shape[1]).sum(1).to(partial.dtype)


def pack_rows(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """One message of bytes per row, uint8 `[rows, row_bytes]`: fp32 weights, int32 positions, then the hidden state.

    Bytes go through every backend, whatever dtypes it knows.
    """
    rows = len(x)
    parts = (weights.float(), ids.to(torch.int32), x)
    return torch.cat([p.contiguous().view(torch.uint8).view(rows, -1) if rows else _no_bytes(p) for p in parts], dim=1)


def _no_bytes(part: torch.Tensor) -> torch.Tensor:
    return torch.empty((0, part.shape[1] * part.element_size()), dtype=torch.uint8, device=part.device)


def unpack_rows(message: torch.Tensor, slots: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x `[rows, H]` in dtype, ids int64 `[rows, slots]`, weights float32 `[rows, slots]`) from `pack_rows`' bytes."""
    weights, ids, x = torch.split(message, [4 * slots, 4 * slots, message.shape[1] - 8 * slots], dim=1)
    if not len(message):
        hidden = x.shape[1] // dtype.itemsize
        empty = message.new_empty
        return (
            empty((0, hidden), dtype=dtype),
            empty((0, slots), dtype=torch.int64),
            empty((0, slots), dtype=torch.float32),
        )
    return (
        x.contiguous().view(dtype),
        ids.contiguous().view(torch.int32).long(),
        weights.contiguous().view(torch.float32),
    )


def row_bytes(hidden: int, slots: int, dtype: torch.dtype) -> int:
    """Bytes of one dispatched row: the hidden state and 8 bytes of header per slot."""
    return hidden * dtype.itemsize + 8 * slots
