"""Rounded weights of one product as they are kept, an expert at a time: in stacks, in slots that change hands, and on disk.

What a kernel multiplies is not always the format as `formats.py` states it: torch's int4 product on a CPU wants an order of its
own, and both of its products want scales in the rows' dtype. Bringing an expert into that order costs more than reading it, so
what is written to disk is what is multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from coterie.kernels.cpu import Int4, Int8, Panels, Product, int4_order, kind_for, scaled_in
from coterie.kernels.formats import GROUP, Weights, quantise


@dataclass(frozen=True)
class Kept:
    """y = W x with W `[rows, columns]` in `format`. cpu: where it is multiplied; a GPU's kernels take the format as stated."""

    format: str
    rows: int
    columns: int
    cpu: bool

    @property
    def kind(self) -> type[Int8] | type[Int4] | type[Panels] | type[Weights]:
        """What multiplies."""
        return kind_for(self.format, self.rows, self.columns) if self.cpu else Weights

    @property
    def order(self) -> str:
        """Names the order of the weights where it is this processor's own; empty where it is the format's."""
        return int4_order() if self.kind is Int4 else ""

    @property
    def data(self) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of the weights."""
        groups = -(-self.columns // GROUP)
        if self.format == "int4":
            return (self.rows, groups * GROUP // 2), torch.uint8
        return (self.rows, self.columns), torch.int8 if self.format == "int8" else torch.float8_e4m3fn

    @property
    def scale(self) -> tuple[int, ...]:
        """Shape of the scales, which are float32 when they are made."""
        groups = -(-self.columns // GROUP)
        if self.format == "int8":
            return (self.rows,)
        if self.format == "fp8":
            return (-(-self.rows // GROUP), groups)
        return (groups, self.rows, 2) if self.kind is Int4 else (self.rows, groups)

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """In which scales are multiplied, for rows of `dtype`."""
        return scaled_in(dtype) if self.kind in (Int4, Int8) else torch.float32

    def bytes(self, dtype: torch.dtype) -> int:
        """Of data and scales in memory, for rows of `dtype`."""
        shape, stored = self.data
        return torch.Size(shape).numel() * stored.itemsize + torch.Size(self.scale).numel() * self.scale_dtype(dtype).itemsize

    def made(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(data, float32 scale) of weights, floating `[rows, columns]`. Raises ValueError if some are not finite."""
        rounded = quantise(weights[None], self.format)
        if self.kind is Int4:
            packed = Int4.pack(rounded)
            return packed.data[0], packed.scales[0]
        assert rounded.scale is not None
        return rounded.data[0], rounded.scale[0]

    def scales_of(self, scale: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """Those of some outputs. first: a multiple of GROUP; last: too, or the last of all."""
        if self.format == "fp8":
            return scale[first // GROUP : -(-last // GROUP)]
        return scale[:, first:last] if self.kind is Int4 else scale[first:last]

    def over(self, data: torch.Tensor, scale: torch.Tensor) -> Product | Weights:
        """What multiplies the weights that lie in stacks `[S, ...]` now and whenever it is asked. scale: in `scale_dtype`."""
        if self.kind is Int4:
            return Int4(data, scale, None)
        weights = Weights(data, self.format, scale, self.columns)
        if self.kind is Int8:
            return Int8(weights, None)
        return Panels(weights) if self.cpu else weights
