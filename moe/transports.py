"""How bytes get from rank to rank: torch.distributed (NCCL, gloo) or MPI; over plain TCP: `moe/sockets.py`.

A transport moves tensors and counts nothing; `collectives.Group` counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist

from coterie.routing.errors import CoterieError

Wait = Callable[[], None]
SPIN_SECONDS, NAP_SECONDS = 300e-6, 30e-6  # polling of MPI requests: at first without pause, for ranks that share cores with


class Transport(Protocol):
    """All ranks of a group call the same method in the same order."""

    name: str
    rank: int
    size: int

    def start_all_to_all(self, out: torch.Tensor, rows: torch.Tensor, receive: Sequence[int], send: Sequence[int]) -> Wait:
        """Begin to send `rows` (uint8 `[sum(send), width]`, by destination) and to fill `out` (`[sum(receive), width]`).

        Neither may be touched before the returned function has been called and has returned.
        """
        ...

    def all_gather(self, mine: torch.Tensor) -> torch.Tensor:
        """Equally shaped tensors of all ranks, `[size, *mine.shape]`."""
        ...

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        ...

    def device(self) -> torch.device:
        """Where small tensors for this transport must lie."""
        ...

    def subgroup(self, groups: Sequence[Sequence[int]]) -> Transport:
        """The transport among the ranks of that one of `groups`, disjoint and covering all ranks, that this rank is in."""
        ...


@runtime_checkable
class CountsInside(Protocol):
    """A transport that can send blocks whose sizes the receiver does not know."""

    def start_all_to_all_counted(self, rows: torch.Tensor, send: Sequence[int]) -> tuple[torch.Tensor, Sequence[int], Wait]:
        """Begin to send rows (uint8 `[sum(send), width]`, by destination); returns once it is known how many come.

        Returned: where they will be, by source; how many from each; what waits for them. Until that has returned, neither
        they nor `rows` may be touched.
        """
        ...


@runtime_checkable
class TellsProgress(Protocol):
    """A transport that notices when bytes move."""

    def on_progress(self, told: Callable[[], object]) -> None:
        """Call `told` whenever, in a collective that is waited for, some have."""
        ...


class TorchTransport:
    """torch.distributed with whatever backend the job was started with. timeout: seconds, of the subgroups."""

    def __init__(self, group: Any = None, timeout: float | None = None) -> None:
        self.group = group
        self.timeout = timeout
        self.name = str(dist.get_backend(group))
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def start_all_to_all(self, out: torch.Tensor, rows: torch.Tensor, receive: Sequence[int], send: Sequence[int]) -> Wait:
        """As `Transport`."""
        work = dist.all_to_all_single(out, rows, list(receive), list(send), group=self.group, async_op=True)
        return work.wait  # type: ignore[no-any-return]

    def all_gather(self, mine: torch.Tensor) -> torch.Tensor:
        """As `Transport`."""
        out = mine.new_empty((self.size, *mine.shape))
        dist.all_gather(list(out.unbind()), mine.contiguous(), group=self.group)
        return out

    def gather_objects(self, value: Any) -> list[Any]:
        """As `Transport`."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def device(self) -> torch.device:
        """As `Transport`."""
        return torch.device("cuda", torch.cuda.current_device()) if self.name == "nccl" else torch.device("cpu")

    def subgroup(self, groups: Sequence[Sequence[int]]) -> TorchTransport:
        """As `Transport`."""
        limit = None if self.timeout is None else timedelta(seconds=self.timeout)
        made = [dist.new_group(list(ranks), timeout=limit) for ranks in groups]
        return next(TorchTransport(g, self.timeout) for g, ranks in zip(made, groups, strict=True) if dist.get_rank() in ranks)


class MpiTransport:
    """mpi4py, for CPU clusters: some 100 times faster than gloo for small messages on one machine."""

    name = "mpi"

    def __init__(self, communicator: Any, timeout: float) -> None:
        from mpi4py import MPI

        self.byte = MPI.BYTE
        self.communicator = communicator
        self.timeout = timeout
        self.rank = communicator.Get_rank()
        self.size = communicator.Get_size()

    def start_all_to_all(self, out: torch.Tensor, rows: torch.Tensor, receive: Sequence[int], send: Sequence[int]) -> Wait:
        """As `Transport`."""
        width = rows.shape[1]
        request = self.communicator.Ialltoallv(
            [rows.numpy(), [n * width for n in send], self.byte], [out.numpy(), [n * width for n in receive], self.byte]
        )
        return lambda: self._wait(request)

    def all_gather(self, mine: torch.Tensor) -> torch.Tensor:
        """As `Transport`."""
        sent = mine.contiguous()
        out = sent.new_empty((self.size, *sent.shape))
        self._wait(self.communicator.Iallgather([_bytes(sent), self.byte], [_bytes(out), self.byte]))
        return out

    def gather_objects(self, value: Any) -> list[Any]:
        """As `Transport`."""
        self._wait(self.communicator.Ibarrier())  # the gathering itself cannot be given up
        return self.communicator.allgather(value)  # type: ignore[no-any-return]

    def device(self) -> torch.device:
        """As `Transport`."""
        return torch.device("cpu")

    def subgroup(self, groups: Sequence[Sequence[int]]) -> MpiTransport:
        """As `Transport`."""
        mine = next(i for i, ranks in enumerate(groups) if self.rank in ranks)
        return MpiTransport(self.communicator.Split(mine, list(groups[mine]).index(self.rank)), self.timeout)

    def _wait(self, request: Any) -> None:
        started = time.perf_counter()
        while not request.Test():
            waited = time.perf_counter() - started
            if waited > self.timeout:
                raise CoterieError(f"waited {self.timeout:g} s for other ranks")
            if waited > SPIN_SECONDS:
                time.sleep(NAP_SECONDS)


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.view(-1).view(torch.uint8).numpy()
