"""Memory for experts that come and go: slots at fixed places, each with room for the blocks that its expert's bytes lie in.

Whole blocks are read from disk, and fastest into memory that begins with a page (docs/offload.md). So a slot does, and the
expert's bytes begin in it as far behind as they do behind a block of their file: another file's expert in the same slot may
lie a few bytes elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from coterie.offload.transfer import BLOCK, Record, Slot, aligned_empty, usual_shift

LEAST_DIRECT = 16  # blocks from which on a parameter is read right into its place


def slot_bytes(length: int, dtype: torch.dtype) -> int:
    """From one slot of a parameter of `length` bytes to the next: what is read right into it has a block's room.

    Small ones are copied to their places, and so is float32: products might be summed otherwise where it begins elsewhere.
    """
    if length < LEAST_DIRECT * BLOCK or dtype == torch.float32:
        return length
    return -(-length // BLOCK) * BLOCK + BLOCK


class SlotStack:
    """`count` tensors of one shape on the CPU; that of a slot is `self[slot]`, until it is moved.

    shift: bytes that they begin behind a page at first, if they have room.
    """

    def __init__(self, count: int, shape: tuple[int, ...], dtype: torch.dtype, shift: int) -> None:
        self.shape, self.dtype = (count, *shape), dtype
        self.length = torch.Size(shape).numel() * dtype.itemsize
        self.stride = slot_bytes(self.length, dtype)
        self.has_room = self.stride > self.length
        self.memory = aligned_empty((count * self.stride,), torch.uint8)
        self.shifts = [self.possible(shift)] * count
        self._tensors = [self._at(slot) for slot in range(count)]

    @property
    def nbytes(self) -> int:
        """Of all tensors, without the room around them."""
        return self.shape[0] * self.length

    def possible(self, shift: int) -> int:
        """The same, or 0 where tensors have no room or their values could not lie so."""
        return shift if self.has_room and shift % self.dtype.itemsize == 0 else 0

    def _at(self, slot: int) -> torch.Tensor:
        begin = slot * self.stride + self.shifts[slot]
        with torch.inference_mode(False):  # what is made in that mode could not be written to outside of it
            return self.memory[begin : begin + self.length].view(self.dtype).view(self.shape[1:])

    def __getitem__(self, slot: int) -> torch.Tensor:
        return self._tensors[slot]

    def move(self, slot: int, shift: int) -> None:
        """Let a slot's tensor begin so many bytes behind a page, if that is possible; what it held is gone."""
        self.shifts[slot] = self.possible(shift)
        self._tensors[slot] = self._at(slot)

    def stacked(self) -> torch.Tensor:
        """All of them as one, `[count, ...]`; before any was moved."""
        first = self._tensors[0]
        with torch.inference_mode(False):
            return first.as_strided(self.shape, (self.stride // self.dtype.itemsize, *first.stride()))


class Slots:
    """`count` slots of experts. pools: their tensors by parameter, each a stack on a GPU, or where they do not move.

    shapes, dtypes: of one expert's, by parameter; records: of all that may come; block: of their files. moving: on a CPU a
    slot's tensors begin for each expert as its file has them.
    """

    def __init__(
        self, count: int, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype], device: torch.device,
        records: Sequence[Sequence[Record]], block: int, moving: bool,
    ) -> None:  # fmt: skip
        self.moving = moving and device.type == "cpu"
        self.stacks: dict[str, SlotStack] = {}
        self.stacked: dict[str, torch.Tensor] = {}  # `[count, ...]`; of slots that do not move
        shifts = {name: usual_shift(records, name, block) for name in shapes}
        self._shifts = [tuple(shifts.values())] * count
        for name, shape in shapes.items():
            if device.type == "cpu":
                self.stacks[name] = SlotStack(count, shape, dtypes[name], shifts[name])
            if not self.moving:
                self.stacked[name] = self._stacked(name, (count, *shape), dtypes[name], device)
        self.pools: Mapping[str, torch.Tensor | SlotStack] = self.stacks if self.moving else self.stacked
        self._slots = [self._slot(slot) for slot in range(count)]

    def _stacked(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        if name in self.stacks:
            return self.stacks[name].stacked()
        with torch.inference_mode(False):
            return torch.empty(shape, dtype=dtype, device=device)

    def _slot(self, slot: int) -> Slot:
        shifts = {name: stack.shifts[slot] for name, stack in self.stacks.items() if stack.has_room}
        return Slot({name: pool[slot] for name, pool in self.pools.items()}, shifts)

    def __len__(self) -> int:
        return len(self._slots)

    def place(self, slot: int, shifts: tuple[int, ...]) -> Slot:
        """The tensors of a slot, free now, for an expert whose parts begin so many bytes behind blocks of their file."""
        if self.moving and self._shifts[slot] != shifts:
            for stack, shift in zip(self.stacks.values(), shifts, strict=True):
                stack.move(slot, shift)
            self._shifts[slot] = shifts
            self._slots[slot] = self._slot(slot)
        return self._slots[slot]
