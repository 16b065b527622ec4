"""How many bytes each rank will need, before any is allocated: arithmetic over a model's sizes, a plan and prompt lengths.

Weights and states (keys and values) are exact but for the allocator's rounding; `buffers` is what a step needs beside them,
the largest of a few known tensors, and an estimate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import numpy as np

from coterie.moe.kv import SLACK
from coterie.moe.queue import PREFILL_TOKENS
from coterie.offload.cache import remembered_bytes
from coterie.offload.reader import STAGES
from coterie.offload.store import AHEAD_READERS, READERS
from coterie.offload.transfer import STAGE_BYTES
from coterie.placement.plan import PlacementPlan
from coterie.routing.errors import InputError

HIDDEN_COPIES = 12  # of a step's hidden states: residual, normalised, queries, keys, values, shared experts, messages
FLOAT32 = 4
READING_BYTES = (READERS + AHEAD_READERS + STAGES) * STAGE_BYTES + 44_000_000  # their own memory, and what threads, libraries
# and large pages take
RECORD_BYTES = 6_000  # of an expert of a layer: its places on disk, as Python's objects
BEYOND = 1.25  # times the estimate: the most seen of a process that has all experts (docs/running.md)


@dataclass(frozen=True)
class LayerState:
    """What one decoder layer keeps of a sequence, bytes: fixed, and by token, of the last `window` tokens where that is set."""

    fixed: int
    token: int
    window: int | None = None

    def bytes(self, tokens: int) -> int:
        """Of a sequence of `tokens`."""
        return self.fixed + self.token * (tokens if self.window is None else min(tokens, self.window))


@dataclass(frozen=True)
class ModelSizes:
    """Of a model in a dtype of `value` bytes. dense: all but experts, bytes; expert: one of each layer with experts, bytes.

    eager_heads: attention heads whose scores are held, 0 where attention is fused. process: what running takes at any size.
    rounding: what rounding an expert takes beside it, while they are loaded; 0 where experts stay as stored. casting: what is
    held as stored while the dense part is loaded and cast. widened: weights of a product, to float32 on a CPU (kernels/cpu.py);
    widened_rows: for each row that dense layers multiply by such, and the most for all (many_rows.py).
    room: of a slot around its expert, where experts come and go.
    Where a budget is a GPU's, what the host takes is 0: process, widened, widened_rows, room.
    """

    value: int
    dense: int
    expert: tuple[int, ...]
    states: tuple[LayerState, ...]
    hidden: int
    vocabulary: int
    top_k: int
    eager_heads: int
    process: int = 0
    rounding: int = 0
    casting: int = 0
    widened: int = 0
    widened_rows: tuple[int, int] = (0, 0)
    room: int = 0

    @property
    def slot(self) -> int:
        """Bytes of a slot, which any layer's expert may come to."""
        return max(self.expert) + self.room


@dataclass(frozen=True)
class Workload:
    """What is to be run. batch_size: sequences at once on a rank; prompts: how many; prompt_tokens: of the longest prompt;
    tokens: of the longest one with its text.
    """

    batch_size: int
    prompts: int
    prompt_tokens: int
    tokens: int

    @property
    def rows(self) -> int:
        """Sequences that a rank may run at once."""
        return min(self.batch_size, self.prompts)

    @property
    def step_tokens(self) -> int:
        """The most tokens a rank prefills in one step, padding included."""
        return max(self.prompt_tokens, min(self.rows * self.prompt_tokens, PREFILL_TOKENS))


def workload(requests: Any, batch_size: int) -> Workload:
    """Of `batch.Request`s. The last new token of a sequence is never run, so it has no keys and values."""
    longest = max(len(r.token_ids) for r in requests)
    return Workload(batch_size, len(requests), longest, max(len(r.token_ids) + max(r.max_new_tokens - 1, 0) for r in requests))


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank. states: keys and values (and other state) of its sequences; buffers: what a step needs beside them."""

    dense: int
    experts: int
    states: int
    buffers: int

    @property
    def total(self) -> int:
        """All together."""
        return self.dense + self.experts + self.states + self.buffers

    @property
    def peak(self) -> float:
        """With what loading all experts and running them takes beyond that."""
        return BEYOND * self.total

    def to_json(self) -> dict[str, int]:
        """As `--dry-run --json` prints it."""
        return {
            "dense": self.dense, "experts": self.experts, "states": self.states, "buffers": self.buffers, "total": self.total
        }  # fmt: skip


def estimate(
    sizes: ModelSizes, plan: PlacementPlan, strategy: str, work: Workload, slots: int | None = None
) -> list[RankMemory]:
    """What each rank of the plan needs. strategy: its name; slots: experts that a rank holds at once, None for all."""
    if slots is not None:
        states, buffers = state_bytes(sizes, strategy, work, plan.ranks), buffer_bytes(sizes, strategy, work, plan.ranks)
        layers, experts = len(plan.layer_ids), plan.num_experts
        kept = READING_BYTES + layers * experts * RECORD_BYTES + remembered_bytes(layers, experts, sizes.top_k)
        if not sizes.process:  # then it is the host's, and the budget a GPU's
            kept = 0
        held = slots * sizes.slot
        loading = sizes.casting - held - states  # which come afterwards
        return [RankMemory(sizes.dense, held, states, max(buffers + kept, loading) + sizes.process)] * plan.ranks
    held = plan.holds().sum(1)  # [layers, ranks]
    experts = np.array(sizes.expert, dtype=np.int64) @ held.astype(np.int64)
    states, buffers = state_bytes(sizes, strategy, work, plan.ranks), buffer_bytes(sizes, strategy, work, plan.ranks)
    stacking = 2 * (np.array(sizes.expert, dtype=np.int64)[:, None] * held).max(0)  # while a layer's experts are read
    if sizes.rounding:  # which happens one by one
        stacking = np.full_like(stacking, sizes.rounding)
    return [
        RankMemory(sizes.dense, int(here), states, max(buffers, max(int(reading), sizes.casting) - states) + sizes.process)
        for here, reading in zip(experts, stacking, strict=True)
    ]


def most_slots(sizes: ModelSizes, plan: PlacementPlan, strategy: str, work: Workload, budget: int, taken: int) -> int | None:
    """How many experts fit in `budget` bytes of a process that has `taken` so many already; None if all of every rank's do,
    with what loading and running them takes beyond the estimate. Slots are allocated to the byte, so that these need no more.

    Raises InputError, saying the least that works, if one token's experts of a layer do not fit.
    """
    if all(need.peak + taken <= budget for need in estimate(sizes, plan, strategy, work)):
        return None
    least = taken + estimate(sizes, plan, strategy, work, sizes.top_k)[0].total
    if budget < least:
        raise InputError(
            f"--memory: found {told(budget)}, expected {told(least, up=True)} or more: "
            f"{told(taken)} that the process has taken, "
            f"{told(sizes.dense)} for all but the experts, room for {sizes.top_k} experts, cache and buffers"
        )
    return int(min(sizes.top_k + (budget - least) // sizes.slot, most_held(plan)))


def most_held(plan: PlacementPlan) -> int:
    """Experts of the rank that has most, all layers together."""
    return int(plan.holds().sum((0, 1)).max())


def state_bytes(sizes: ModelSizes, strategy: str, work: Workload, ranks: int) -> int:
    """Keys and values, and other state, of one rank's sequences; with the coherent strategy those of all ranks."""
    if strategy == "coherent":
        whole = sum(state.bytes(work.tokens + SLACK) for state in sizes.states)
        return whole * min(work.rows * ranks, work.prompts)
    return work.rows * sum(state.bytes(work.tokens) for state in sizes.states)


def buffer_bytes(sizes: ModelSizes, strategy: str, work: Workload, ranks: int) -> int:
    """The larger of a prefill's tensors and a growing cache's, and the logits."""
    tokens, length = work.step_tokens, work.prompt_tokens
    rows = max(tokens // length, 1)
    hidden = HIDDEN_COPIES * tokens * sizes.hidden * sizes.value
    scores = rows * length * length * (1 + sizes.value + sizes.eager_heads * 3 * (sizes.value + FLOAT32))
    here = _expert_rows(strategy, tokens, sizes.top_k, ranks)
    experts = here * sizes.hidden * (sizes.top_k * FLOAT32 + 3 * sizes.value)
    growing = 2 * work.rows * max((state.bytes(work.tokens) for state in sizes.states), default=0)
    logits = work.rows * sizes.vocabulary * (sizes.value + 2 * FLOAT32)
    beside = min(tokens * sizes.widened_rows[0], sizes.widened_rows[1])
    return max(hidden + max(scores, experts), growing) + logits + sizes.widened + beside


def _expert_rows(strategy: str, tokens: int, top_k: int, ranks: int) -> int:
    """Rows that a rank's experts are given in one layer if all ranks prefill as much and are chosen evenly."""
    if strategy in ("local", "replicated"):
        return tokens
    return tokens * (ranks if strategy == "all_gather" else min(top_k, ranks))


@dataclass(frozen=True)
class Room:
    """A plan on ranks with so much memory. free: bytes by rank, of the ranks of which it is known."""

    plan: PlacementPlan
    free: dict[int, float]

    def fits(self, sizes: ModelSizes, strategy: str, work: Workload) -> bool:
        """Whether every rank has what it needs."""
        needed = estimate(sizes, self.plan, strategy, work)
        return all(needed[rank].total <= most for rank, most in self.free.items())

    def largest_batch(self, sizes: ModelSizes, strategy: str, work: Workload) -> int:
        """The largest batch size up to `work`'s that fits, 0 if none does."""
        low, high = 0, work.batch_size
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.fits(sizes, strategy, replace(work, batch_size=middle))
            low, high = (middle, high) if fits else (low, middle - 1)
        return low


def check_fits(sizes: ModelSizes, strategy: str, work: Workload, room: Room) -> None:
    """Raises InputError, saying what would fit, if a rank needs more than it has."""
    if room.fits(sizes, strategy, work):
        return
    needed = estimate(sizes, room.plan, strategy, work)
    rank = max(room.free, key=lambda r: needed[r].total - room.free[r])
    ways = " or ".join(_ways_out(sizes, strategy, work, room)) or "more memory: no smaller batch, nor bfloat16, would fit"
    wanted, found = told(needed[rank].total), told(room.free[rank])
    raise InputError(f"memory: rank {rank} needs {wanted}, found {found} free, expected {ways}")


def _ways_out(sizes: ModelSizes, strategy: str, work: Workload, room: Room) -> list[str]:
    ways = []
    if batch := room.largest_batch(sizes, strategy, work):
        ways.append(f"--batch-size {batch} (or less)")
    if strategy == "coherent" and room.fits(sizes, "all_to_all", work):
        ways.append("--strategy all_to_all, which keeps a sequence on one rank only")
    if sizes.value == FLOAT32 and room.fits(_halved(sizes), strategy, work):
        ways.append("--dtype bfloat16")
    one = estimate(sizes, room.plan, strategy, replace(work, batch_size=1))[0]
    left = int(min(room.free.values())) - (one.total - one.experts)
    ranks = -(-room.plan.num_experts * sum(sizes.expert) // left) if left > 0 else 0
    if room.plan.ranks < ranks <= room.plan.num_experts:
        ways.append(f"about {ranks} ranks with as much each")
    return ways


def _halved(sizes: ModelSizes) -> ModelSizes:
    """In a dtype of half the bytes."""
    states = tuple(LayerState(s.fixed // 2, s.token // 2, s.window) for s in sizes.states)
    expert = sizes.expert if sizes.rounding else tuple(one // 2 for one in sizes.expert)
    return replace(sizes, value=sizes.value // 2, dense=sizes.dense // 2, expert=expert, states=states)


def told(count: float, up: bool = False) -> str:
    """Bytes for people, with one decimal; up: never less than they are, so that it can be asked for."""
    unit, size = next(((unit, size) for unit, size in (("GB", 1e9), ("MB", 1e6)) if count >= size), ("KB", 1e3))
    return f"{ceil(10 * count / size) / 10 if up else count / size:.1f} {unit}"
