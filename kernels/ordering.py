"""Which rows each expert computes, worked out on the device: nothing is asked of the host, so it can be captured in a graph.

A pick is one slot of one token, numbered `token * K + slot`. Picks are ordered by expert, stably, and each expert's run is cut
into blocks of at most `rows` picks; the number of blocks is bounded by what the shapes allow, and blocks too many are marked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

AT_ONCE = 1024  # picks that one launch orders by comparing each with all; more are counted first
PLACED = 16  # picks, or blocks of the map, that one program places: few, so that what it compares stays in registers
PART = 128  # picks that are counted together where there are more
ALIGNED = 4  # int32 to 16 bytes: Triton compiles a kernel anew for pointers that are no such multiples


@dataclass(frozen=True)
class Order:
    """picks int32 `[N]`: by expert; empty ones (id -1) last. A block's picks are `picks[start : start + count]`.

    expert, start, count: int32 `[blocks]`, by block; expert -1 where there is no such block. rows: the most picks of a block.
    """

    picks: torch.Tensor
    expert: torch.Tensor
    start: torch.Tensor
    count: torch.Tensor
    rows: int


def most_blocks(picks: int, experts: int, rows: int) -> int:
    """How many blocks `picks` picks of `experts` experts can need: one for each that is hit, and one for each `rows` more."""
    hit = min(picks, experts)
    return hit + (picks - hit) // rows


def order_picks(ids: torch.Tensor, experts: int, rows: int) -> Order:
    """ids: integer `[T, K]` on the device, contiguous, 0 to experts - 1, or -1 for an empty slot."""
    count = ids.numel()
    blocks = most_blocks(count, experts, rows)
    sizes = [count, blocks, blocks, blocks]
    room = [-(-size // ALIGNED) * ALIGNED for size in sizes]
    made = torch.empty(sum(room), dtype=torch.int32, device=ids.device)
    picks, expert, start, counts = (part[:size] for part, size in zip(made.split(room), sizes, strict=True))
    if count == 0:
        return Order(picks, expert, start, counts, rows)
    wide = triton.next_power_of_2(experts + 1)
    if count <= AT_ONCE:
        programs = max(triton.cdiv(count, PLACED), triton.cdiv(blocks, PLACED))
        _order_at_once[(programs,)](
            ids, picks, expert, start, counts, count, blocks, experts,
            ALL=max(16, triton.next_power_of_2(count)), EXPERTS=wide, ROWS=rows, PLACED=PLACED,
        )  # fmt: skip
        return Order(picks, expert, start, counts, rows)
    parts = triton.cdiv(count, PART)
    found = torch.empty(experts + 1, parts, dtype=torch.int32, device=ids.device)
    _count[(parts,)](ids, found, count, experts, parts, EXPERTS=wide, PART=PART)
    ends = found.view(-1).cumsum(0, dtype=torch.int32)
    _place[(parts,)](ids, picks, found, ends, count, experts, parts, PART=PART, num_warps=8)
    _map_blocks[(triton.cdiv(blocks, PLACED),)](
        expert, start, counts, ends, blocks, experts, parts, EXPERTS=wide, ROWS=rows, PLACED=PLACED
    )
    return Order(picks, expert, start, counts, rows)


@triton.jit
def _keys(ids, at, count, experts):
    """The expert of each pick; `experts` for empty slots, so that these come last; beyond that for no picks at all."""
    found = tl.load(ids + at, mask=at < count, other=0).to(tl.int32)
    return tl.where(at < count, tl.where((found < 0) | (found >= experts), experts, found), experts + 1)


@triton.jit
def _store_blocks(expert, start, count, held, blocks, at, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """The map's entries `at`, from how many picks each expert has. held: `[EXPERTS]`, 0 beyond the experts."""
    last = tl.cumsum((held + ROWS - 1) // ROWS, 0)
    number = tl.sum((last[None, :] <= at[:, None]).to(tl.int32), 1)
    mine = number[:, None] == tl.arange(0, EXPERTS)[None, :]
    before = tl.sum(tl.where(mine, (last - (held + ROWS - 1) // ROWS)[None, :], 0), 1)
    first = tl.sum(tl.where(mine, (tl.cumsum(held, 0) - held)[None, :], 0), 1)
    picks = tl.sum(tl.where(mine, held[None, :], 0), 1)
    done = (at - before) * ROWS
    real = number < EXPERTS
    tl.store(expert + at, tl.where(real, number, -1), mask=at < blocks)
    tl.store(start + at, tl.where(real, first + done, 0), mask=at < blocks)
    tl.store(count + at, tl.where(real, tl.minimum(picks - done, ROWS), 0), mask=at < blocks)


@triton.jit(do_not_specialize=["N", "blocks"])
def _order_at_once(
    ids, picks, expert, start, count, N, blocks, experts,
    ALL: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    """Each program compares its picks with all: a pick's place is how many come before it."""
    every = tl.arange(0, ALL)
    keys = _keys(ids, every, N, experts)
    at = tl.program_id(0) * PLACED + tl.arange(0, PLACED)
    mine = _keys(ids, at, N, experts)
    before = (keys[None, :] < mine[:, None]) | ((keys[None, :] == mine[:, None]) & (every[None, :] < at[:, None]))
    tl.store(picks + tl.sum(before.to(tl.int32), 1), at, mask=at < N)
    each = tl.arange(0, EXPERTS)
    held = tl.histogram(keys, EXPERTS, mask=every < N)
    _store_blocks(expert, start, count, tl.where(each < experts, held, 0), blocks, at, EXPERTS, ROWS)


@triton.jit(do_not_specialize=["N", "parts"])
def _count(ids, found, N, experts, parts, EXPERTS: tl.constexpr, PART: tl.constexpr):
    """How many picks of each expert are in each part of PART picks: `[experts + 1, parts]`."""
    part = tl.program_id(0)
    at = part * PART + tl.arange(0, PART)
    each = tl.arange(0, EXPERTS)
    held = tl.histogram(_keys(ids, at, N, experts), EXPERTS, mask=at < N)
    tl.store(found + each * parts + part, held, mask=each <= experts)


@triton.jit(do_not_specialize=["N", "parts"])
def _place(ids, picks, found, ends, N, experts, parts, PART: tl.constexpr):
    """Each pick's place: behind those of lower experts, of earlier parts, and of earlier ones in its part."""
    part = tl.program_id(0)
    local = tl.arange(0, PART)
    at = part * PART + local
    keys = _keys(ids, at, N, experts)
    cell = tl.minimum(keys, experts) * parts + part
    base = tl.load(ends + cell) - tl.load(found + cell)
    earlier = (keys[None, :] == keys[:, None]) & (local[None, :] < local[:, None])
    tl.store(picks + base + tl.sum(earlier.to(tl.int32), 1), at, mask=at < N)


@triton.jit(do_not_specialize=["blocks", "parts"])
def _map_blocks(
    expert, start, count, ends, blocks, experts, parts, EXPERTS: tl.constexpr, ROWS: tl.constexpr, PLACED: tl.constexpr
):
    each = tl.arange(0, EXPERTS)
    last = tl.load(ends + (each + 1) * parts - 1, mask=each < experts, other=0)
    first = tl.load(ends + each * parts - 1, mask=(each > 0) & (each < experts), other=0)
    at = tl.program_id(0) * PLACED + tl.arange(0, PLACED)
    _store_blocks(expert, start, count, tl.where(each < experts, last - first, 0), blocks, at, EXPERTS, ROWS)
