"""The few collectives the strategies need, counted: rows and bytes as each rank sends them, and waiting time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from coterie.moe.dispatch import as_bytes, from_bytes
from coterie.moe.traffic import Traffic
from coterie.moe.transports import CountsInside, TorchTransport, Transport, Wait

FREE_BYTES = 1 << 16  # padding that costs less than an exchange of counts, until the links have been measured
COUNT_BYTES = 8


class Group:
    """Some ranks of the job. A group of one needs no transport and communicates with nobody.

    ranks_per_node: consecutive ranks that share a machine. members: their ranks in the whole job. free_bytes: messages up to
    this size per rank are sent padded, without exchanging counts first; the same on all ranks.
    """

    def __init__(
        self, transport: Transport | None = None, ranks_per_node: int | None = None, traffic: Traffic | None = None,
        members: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        self.transport = transport
        self._counting = transport if isinstance(transport, CountsInside) else None  # asked once: it takes 60 us
        self.rank = 0 if transport is None else transport.rank
        self.size = 1 if transport is None else transport.size
        self.ranks_per_node = ranks_per_node or self.size
        self.traffic = traffic or Traffic()
        self.members = tuple(range(self.size) if members is None else members)
        self.free_bytes = FREE_BYTES

    @classmethod
    def current(cls, ranks_per_node: int | None = None) -> Group:
        """The group of the running torch.distributed job, or a group of one."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            return cls(TorchTransport(), ranks_per_node)
        return cls()

    @property
    def transport_name(self) -> str:
        """`nccl`, `gloo`, `mpi`, or `none` for a group of one."""
        return "none" if self.transport is None else self.transport.name

    @property
    def counts_inside(self) -> bool:
        """Whether an exchange whose sizes the receiver does not know takes one collective and no padding."""
        return self._counting is not None

    @property
    def device(self) -> torch.device:
        """Where tensors that are sent must lie."""
        return torch.device("cpu") if self.transport is None else self.transport.device()

    def raw_all_to_all(self, out: torch.Tensor, rows: torch.Tensor, receive: Sequence[int], send: Sequence[int]) -> None:
        """An all-to-all that is not counted, for measuring."""
        self._swap(out, rows, receive, send)

    @property
    def nodes(self) -> int:
        """Machines the group spans."""
        return -(-self.size // self.ranks_per_node)

    def subgroup(self, groups: Sequence[Sequence[int]]) -> Group:
        """The group of the ranks in that one of `groups` that this rank is in; every rank must call it with the same groups."""
        mine = next(ranks for ranks in groups if self.rank in ranks)
        transport = None if self.transport is None else self.transport.subgroup(groups)
        made = Group(transport, min(self.ranks_per_node, len(mine)), self.traffic, [self.members[r] for r in mine])
        made.free_bytes = self.free_bytes  # as measured
        return made

    def exchange(
        self, rows: torch.Tensor, send: Sequence[int], bound: int, name: str = "dispatch", beside: bool = False
    ) -> tuple[torch.Tensor, tuple[int, ...]]:
        """All-to-all of rows where the receiver does not know how many come: (rows by source, how many from each).

        rows: `[sum(send), width]`, by destination. bound: the most rows that any rank sends to any other, at least 1,
        known to all alike. beside: these are not rows of tokens and are counted as overhead.
        """
        if self.size == 1:
            return rows, tuple(send)
        with self.traffic.span(name):
            out, receive, wait = self._begin(as_bytes(rows), send, bound, beside)
            wait()
        return from_bytes(out, rows.dtype), receive

    def start_counted(
        self, rows: torch.Tensor, send: Sequence[int], bound: int, name: str = "dispatch", beside: bool = False
    ) -> tuple[tuple[int, ...], Callable[[], torch.Tensor]]:
        """Begin an `exchange`: (how many rows come from each; what, called once, waits and returns them).

        Messages that are padded are here when it returns.
        """
        if self.size == 1:
            return tuple(send), lambda: rows
        with self.traffic.span(name):
            out, receive, wait = self._begin(as_bytes(rows), send, bound, beside)
        return receive, self._ending(out, rows.dtype, wait, name)

    def _begin(
        self, rows: torch.Tensor, send: Sequence[int], bound: int, beside: bool
    ) -> tuple[torch.Tensor, tuple[int, ...], Wait]:
        """As `CountsInside`, over any transport, and counted."""
        width = rows.shape[1]
        padded = not self.counts_inside and (self.size - 1) * bound * width <= self.free_bytes
        if self._counting is not None:
            out, receive, wait = self._counting.start_all_to_all_counted(rows, send)
        else:
            out, receive, wait = self._padded(rows, send, bound) if padded else self._counted(rows, send)
        filled = bound if padded else 0
        self._count(send, width, [COUNT_BYTES + max(filled - count, 0) * width for count in send], beside)
        return out, tuple(receive), wait

    def _ending(self, out: torch.Tensor, dtype: torch.dtype, wait: Wait, name: str) -> Callable[[], torch.Tensor]:
        """What waits for the bytes `out`, and returns them as rows of `dtype`."""

        def finish() -> torch.Tensor:
            with self.traffic.span(name):
                wait()
            return from_bytes(out, dtype)

        return finish

    def _padded(self, rows: torch.Tensor, send: Sequence[int], bound: int) -> tuple[torch.Tensor, tuple[int, ...], Wait]:
        """One collective: blocks of `bound` rows, each behind its number of rows."""
        width, block = rows.shape[1], COUNT_BYTES + bound * rows.shape[1]
        message = rows.new_zeros((self.size, block))
        counts = torch.tensor(send, dtype=torch.int64).view(torch.uint8).view(self.size, COUNT_BYTES)
        message[:, :COUNT_BYTES] = counts.to(rows.device)
        for to, part in enumerate(torch.split(rows, list(send))):
            message[to, COUNT_BYTES : COUNT_BYTES + part.numel()] = part.view(-1)
        out = torch.empty_like(message)
        self._swap(out, message, [1] * self.size, [1] * self.size)
        receive = out[:, :COUNT_BYTES].contiguous().view(torch.int64)[:, 0].tolist()
        came = [out[r, COUNT_BYTES : COUNT_BYTES + count * width] for r, count in enumerate(receive)]
        return torch.cat(came).view(sum(receive), width), tuple(receive), lambda: None

    def _counted(self, rows: torch.Tensor, send: Sequence[int]) -> tuple[torch.Tensor, tuple[int, ...], Wait]:
        """Counts first, then as many rows as there are."""
        ones = [1] * self.size
        mine = torch.tensor(send, dtype=torch.int64, device=rows.device).view(-1, 1)
        theirs = torch.empty_like(mine)
        self._swap(as_bytes(theirs), as_bytes(mine), ones, ones)
        receive = tuple(theirs[:, 0].tolist())
        out = rows.new_empty((sum(receive), rows.shape[1]))
        return out, receive, self._transport().start_all_to_all(out, rows, receive, send)

    def start_exchange(
        self, rows: torch.Tensor, send: Sequence[int], receive: Sequence[int], name: str = "combine", beside: bool = False
    ) -> Callable[[], torch.Tensor]:
        """Begin an all-to-all whose numbers of rows both sides know; the result, called once, waits and returns the rows."""
        if self.size == 1:
            return lambda: rows
        sent = as_bytes(rows)
        out = sent.new_empty((sum(receive), sent.shape[1]))
        self._count(send, sent.shape[1], [0] * self.size, beside)
        return self._ending(out, rows.dtype, self._transport().start_all_to_all(out, sent, receive, send), name)

    def exchange_known(
        self, rows: torch.Tensor, send: Sequence[int], receive: Sequence[int], name: str = "combine", beside: bool = False
    ) -> torch.Tensor:
        """All-to-all of rows whose numbers both sides know: `[sum(receive), width]`, by source."""
        return self.start_exchange(rows, send, receive, name, beside)()

    def gather_rows(
        self, rows: torch.Tensor, counts: Sequence[int], name: str = "dispatch", beside: bool = False
    ) -> torch.Tensor:
        """Every rank's rows on every rank, `[sum(counts), width]`, by rank. counts: rows of each rank, known to all alike."""
        if self.size == 1:
            return rows
        most, sent = max(counts), as_bytes(rows)
        mine = sent.new_zeros((most, sent.shape[1]))
        mine[: len(sent)] = sent
        with self.traffic.span(name):
            everything = self._transport().all_gather(mine)
        width = sent.shape[1]
        self._count([len(sent)] * self.size, width, [(most - len(sent)) * width] * self.size, beside)
        kept = [everything[r, :count] for r, count in enumerate(counts)]
        return from_bytes(torch.cat(kept), rows.dtype)

    def share_rows(self, rows: torch.Tensor, bound: int, name: str) -> tuple[torch.Tensor, tuple[int, ...]]:
        """Every rank's rows on every rank, by rank, and how many each has, where that is not known; all of it is overhead.

        bound: the most rows that any rank has, known to all alike.
        """
        return self.exchange(rows.repeat(self.size, 1), [len(rows)] * self.size, bound, name, beside=True)

    def agree(self, values: Sequence[int]) -> list[tuple[int, ...]]:
        """What each rank says, by rank: equally many integers from each. One small collective."""
        if self.size == 1:
            return [tuple(values)]
        mine = torch.tensor(values, dtype=torch.int64, device=self._transport().device())
        with self.traffic.span("agree"):
            said = self._transport().all_gather(mine)
        self._count([0] * self.size, 0, [8 * len(values)] * self.size)
        return [tuple(row) for row in said.tolist()]

    def meet(self) -> None:
        """Wait for all ranks as long as they live, where work beforehand may take one of them much longer than --timeout."""
        if (meet := getattr(self.transport, "meet", None)) is not None:
            meet()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank, by rank."""
        return [value] if self.size == 1 else self._transport().gather_objects(value)

    def _swap(self, out: torch.Tensor, rows: torch.Tensor, receive: Sequence[int], send: Sequence[int]) -> None:
        self._transport().start_all_to_all(out, rows, receive, send)()

    def _count(self, send: Sequence[int], row_bytes: int, overhead: Sequence[int], beside: bool = False) -> None:
        """Count what went to each other rank: rows, and bytes beside them; with `beside` the rows are such bytes, too."""
        for rank, (count, more) in enumerate(zip(send, overhead, strict=True)):
            if rank != self.rank:
                rows = 0 if beside else count
                self.traffic.sent(self.members[rank], rows, row_bytes, more + (count - rows) * row_bytes)

    def _transport(self) -> Transport:
        assert self.transport is not None  # the callers have returned already if the group is of one
        return self.transport
