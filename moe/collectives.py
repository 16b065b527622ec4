"""The few collectives the strategies need, counted. The one place that talks to torch.distributed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass
class Traffic:
    """What this rank sent. rows: to other ranks, dispatch and combine together; bytes: of those rows, headers included."""

    rows: int = 0
    bytes: int = 0


class Group:
    """All ranks of the job. A group of one needs no torch.distributed and communicates with nobody."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size
        self.traffic = Traffic()

    @classmethod
    def current(cls) -> Group:
        """The group of the running torch.distributed job, or a group of one."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def exchange_counts(self, counts: Sequence[int], device: torch.device) -> list[int]:
        """How many rows each rank will send to this one, from how many this one sends to each."""
        mine = torch.tensor(counts, dtype=torch.int64, device=device)
        theirs = torch.empty_like(mine)
        dist.all_to_all_single(theirs, mine)
        return [int(n) for n in theirs.tolist()]

    def exchange_rows(self, rows: torch.Tensor, send: Sequence[int], receive: Sequence[int]) -> torch.Tensor:
        """All-to-all of rows `[sum(send), width]`, sorted by destination; returns `[sum(receive), width]` by source."""
        out = rows.new_empty((sum(receive), rows.shape[1]))
        dist.all_to_all_single(out, rows.contiguous(), list(receive), list(send))
        away = sum(send) - send[self.rank]
        self.traffic.rows += away
        self.traffic.bytes += away * rows.shape[1] * rows.element_size()
        return out

    def any(self, flag: bool) -> bool:
        """Whether any rank says so. Every rank must ask."""
        if self.size == 1:
            return flag
        value = torch.tensor([int(flag)], device=self._device())
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def maximum(self, value: int) -> int:
        """The largest value that any rank gives."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value], device=self._device())
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor.item())

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def _device(self) -> torch.device:
        return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
