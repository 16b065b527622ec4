"""Experts' weights as they are stored: plain, or in 8 or 4 bits with scales. Quantisers round to nearest.

| format | stored | scale | error of one weight |
|---|---|---|---|
| `plain` | float32, bfloat16 or float16 | none | none |
| `int8` | int8 | one a row (output channel), its largest magnitude / 127 | at most half a step: 0.4% of the row's largest |
| `int4` | two in a byte | one for 128 weights of a row, their largest magnitude / 7 | at most 7.2% of the group's largest |
| `fp8` | float8 e4m3 | one for 128 x 128, their largest magnitude / 448 | at most 6.3% of the weight, or 2^-10 steps |

`int4`: byte j of a group of 128 holds weight j in its low half and weight 64 + j in its high half, each plus 8, so that both
halves of a group are runs of 64 that a kernel multiplies as they come. `fp8` is DeepSeek-V3's format.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

GROUP = 128  # weights that share a scale along a row (int4, fp8); fp8 also along a column
HALF = GROUP // 2
LARGEST = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}
FORMATS = ("plain", *LARGEST)


@dataclass(frozen=True)
class Weights:
    """One product of S experts, y = W x: data `[S, N, K]`, or as the format packs it.

    scale: float32; int8 `[S, N]`, int4 `[S, N, ceil(K / 128)]`, fp8 `[S, ceil(N / 128), ceil(K / 128)]`. The data may be a view
    with other strides, so stacks that transformers keeps as `[S, K, N]` need not be copied.
    """

    data: torch.Tensor
    format: str = "plain"
    scale: torch.Tensor | None = None
    columns: int = -1

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format: found {self.format!r}, expected one of {', '.join(FORMATS)}")
        if (self.scale is None) != (self.format == "plain"):
            raise ValueError(f"scale: found {'none' if self.scale is None else 'one'} with format {self.format}")
        if self.columns < 0:
            object.__setattr__(self, "columns", self.data.shape[2])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(S, N, K): experts, outputs, inputs."""
        return self.data.shape[0], self.data.shape[1], self.columns

    @property
    def bytes(self) -> int:
        """Of data and scales."""
        return sum(t.numel() * t.element_size() for t in (self.data, self.scale) if t is not None)

    def expert(self, number: int) -> Weights:
        """One of them, as a stack of one."""
        one = slice(number, number + 1)
        return Weights(self.data[one], self.format, None if self.scale is None else self.scale[one], self.columns)

    def rows(self, first: int, last: int) -> Weights:
        """Some outputs of all of them; first: a multiple of GROUP."""
        scale = self.scale
        if scale is not None:
            scale = scale[:, first // GROUP : -(-last // GROUP)] if self.format == "fp8" else scale[:, first:last]
        return Weights(self.data[:, first:last], self.format, scale, self.columns)

    def dequantised(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """The weights that are computed with, `[S, N, K]`."""
        if self.scale is None:
            return self.data.to(dtype)
        values = unpacked(self.data, self.columns) if self.format == "int4" else self.data
        return values.to(dtype) * self._spread().to(dtype)

    def _spread(self) -> torch.Tensor:
        """The scale of each weight, `[S, N, K]` or broadcast to it."""
        assert self.scale is not None
        if self.format == "int8":
            return self.scale[..., None]
        rows = self.scale.repeat_interleave(GROUP, 1)[:, : self.data.shape[1]] if self.format == "fp8" else self.scale
        return rows.repeat_interleave(GROUP, 2)[..., : self.columns]


def quantise(weights: torch.Tensor, format: str) -> Weights:
    """weights: floating `[S, N, K]`. Raises ValueError for an unknown format, or weights that are not finite."""
    if format == "plain":
        return Weights(weights)
    if format not in LARGEST:
        raise ValueError(f"format: found {format!r}, expected one of {', '.join(FORMATS)}")
    if not torch.isfinite(weights).all():
        raise ValueError("weights: found values that are not finite, expected finite ones")
    columns, values = weights.shape[2], weights.float()
    if format == "int8":
        scale = _step(values.abs().amax(2), LARGEST[format])
        return Weights((values / scale[..., None]).round().to(torch.int8), format, scale)
    padded = F.pad(values, (0, -columns % GROUP))
    groups = padded.reshape(*padded.shape[:2], -1, GROUP)
    if format == "int4":
        scale = _step(groups.abs().amax(3), LARGEST[format])
        return Weights(_packed((groups / scale[..., None]).round().flatten(2)), format, scale, columns)
    rows = weights.shape[1]
    blocks = F.pad(groups, (0, 0, 0, 0, 0, -rows % GROUP))
    blocks = blocks.reshape(len(blocks), -1, GROUP, *blocks.shape[2:])
    scale = _step(blocks.abs().amax((2, 4)), LARGEST[format])
    data = (blocks / scale[:, :, None, :, None]).flatten(3).flatten(1, 2)[:, :rows, :columns]
    return Weights(data.to(torch.float8_e4m3fn), format, scale)


def _step(largest: torch.Tensor, levels: float) -> torch.Tensor:
    """The scale that brings `largest` to `levels`; 1 where all weights are zero."""
    return torch.where(largest > 0, largest / levels, torch.ones_like(largest))


def _packed(values: torch.Tensor) -> torch.Tensor:
    """-8 to 7, `[S, N, K]` with K a multiple of 128, to uint8 `[S, N, K / 2]`."""
    halves = (values + 8).to(torch.uint8).reshape(*values.shape[:2], -1, 2, HALF)
    packed = halves[..., 0, :] | halves[..., 1, :] << 4
    return packed.flatten(2)


def unpacked(data: torch.Tensor, columns: int) -> torch.Tensor:
    """The integers -8 to 7 of packed `int4` data: int8 `[S, N, columns]`."""
    groups = data.reshape(*data.shape[:2], -1, HALF)
    return (torch.stack([groups & 15, groups >> 4], 3).to(torch.int8) - 8).flatten(2)[..., :columns]
