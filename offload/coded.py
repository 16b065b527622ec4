"""Checkpoints published in fewer bits: which of their tensors stand for weights, and what values those have.

| `quant_method` of config.json | stored | a weight is |
|---|---|---|
| `fp8` | `NAME`, float8 e4m3 `[..., N, K]`; `NAME_scale_inv`, one for a block of 128 x 128, or for all | value x scale |
| `mxfp4` | `NAME_blocks`, two e2m1 in a byte `[E, N, K / 32, 16]`; `NAME_scales`, one for 32 | value x 2^(scale - 127) |

`fp8` is DeepSeek-V3's and that of models named -FP8, `mxfp4` gpt-oss's. Both are computed in float32 and rounded to bfloat16
once, as their publishers' own converters do; what is in `mxfp4` is exact there. Its products are `[E, K, N]` as weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from coterie.kernels.formats import GROUP
from coterie.routing.errors import InputError

if TYPE_CHECKING:
    from coterie.offload.checkpoint import TensorPlace, TensorSlice

METHODS = ("fp8", "mxfp4")
FLOAT8, SCALE = (torch.float8_e4m3fn, torch.float8_e5m2), "_scale_inv"
DTYPE = torch.bfloat16  # of the weights that codes stand for
SCALES = {dtype: dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)}
SCALES[torch.uint8] = torch.float8_e8m0fnu  # of fp8, by dtype of the file: exponents as plain bytes
BLOCK = 128  # of fp8 where the configuration does not say it
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # Open Compute Project, Microscaling Formats 1.0
SMALLEST = torch.tensor(1 << 6, dtype=torch.int16)  # bits of 2^-127
PER_SCALE = 32  # e2m1 values


@dataclass(frozen=True)
class Code:
    """How the bytes of a tensor stand for weights. dtype, shape: as stored; scales: where those are.

    block: rows and columns that share one, None where all do.
    """

    method: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    scales: TensorPlace
    block: tuple[int, int] | None = None

    def decoded(self, data: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The weights of stored values, or of one or more rows of a stack, with their scales; contiguous."""
        if self.method == "fp8" and (data.ndim < 3 or scales.numel() == 1):
            return from_fp8(data, scales, self.block)
        shape = data.shape if self.method == "fp8" else (len(data), data.shape[2] * PER_SCALE, data.shape[1])
        made = torch.empty(shape, dtype=DTYPE)
        for out, one, its in zip(made, data, scales, strict=True):  # at once they would be in memory twice
            out.copy_(from_mxfp4(one, its) if self.method == "mxfp4" else from_fp8(one, its, self.block))
        return made


def from_fp8(data: torch.Tensor, scales: torch.Tensor, block: tuple[int, int] | None) -> torch.Tensor:
    """bfloat16 `[N, K]` of float8 e4m3 `[N, K]`. scales: `[ceil(N / rows), ceil(K / columns)]` of `block`, or one of all."""
    wide = scales.float()
    if wide.numel() == 1:
        return (data.float() * wide.reshape(())).to(DTYPE)
    assert block is not None
    rows, columns = block
    made, spread = torch.empty(data.shape, dtype=DTYPE), wide.repeat_interleave(columns, 1)[:, : data.shape[1]]
    together = max(1, BLOCK // rows)  # rows of blocks at a time
    for number in range(0, len(wide), together):
        some = slice(number * rows, (number + together) * rows)
        made[some] = data[some].float() * spread[number : number + together].repeat_interleave(rows, 0)[: len(data[some])]
    return made


def from_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """bfloat16 `[K, N]` of uint8 `[N, K / 32, 16]` and `[N, K / 32]`; of two values in a byte the first is the low half."""
    pairs = torch.from_numpy(_pairs()[blocks.contiguous().numpy()]).view(DTYPE)  # [N, K / 32, 32]
    powers = (scales.to(torch.int16) << 7).where(scales > 0, SMALLEST).view(DTYPE)  # bfloat16's own exponents
    return (pairs * powers[..., None]).flatten(1).T.contiguous()


@lru_cache(maxsize=1)
def _pairs() -> np.ndarray:
    """By byte, both values in bfloat16 as one number of 32 bits."""
    signed = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=DTYPE)
    both = torch.stack([signed.repeat(16), signed.repeat_interleave(16)], 1).contiguous()
    found: np.ndarray = both.view(torch.int32)[:, 0].numpy()
    return found


def kept_as_fp8(parts: Sequence[TensorSlice]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Values and float32 scales `[ceil(N / 128), ceil(K / 128)]` of an expert's product, its parts one below another as stored.

    None where the kernels' fp8 has not the same blocks.
    """
    if not _has_blocks(parts):
        return None
    stored = [part.stored() for part in parts]
    values = [data.view(torch.uint8).flatten(0, -2) for data, _ in stored]  # of a stack there is one
    return torch.cat(values).view(torch.float8_e4m3fn), torch.cat([scales.float().flatten(0, -2) for _, scales in stored])


def fp8_in_place(parts: Sequence[TensorSlice]) -> tuple[list[TensorSlice], list[TensorSlice]] | None:
    """Where these values and scales lie, the latter in a dtype of their own; None as there."""
    if not _has_blocks(parts) or len({part.scales().dtype for part in parts}) > 1:
        return None
    return [part.values() for part in parts], [part.scales() for part in parts]


def _has_blocks(parts: Sequence[TensorSlice]) -> bool:
    codes = [part.place.code for part in parts]
    alike = all(code is not None and (code.method, code.block) == ("fp8", (GROUP, GROUP)) for code in codes)
    return bool(parts) and alike and not any(part.shape[-2] % GROUP for part in parts[:-1])


def check_method(file: Path, found: Any) -> None:
    """Raises InputError for weights in a code that is not read. found: the `quantization_config` of config.json, or None."""
    if found is None:
        return
    method = found.get("quant_method") if isinstance(found, Mapping) else getattr(found, "quant_method", None)
    name = str(getattr(method, "value", method))
    way = "convert the checkpoint to bfloat16 first"
    if name not in METHODS:
        raise InputError(
            f"{file}: quantization_config.quant_method: found {name!r}, expected none, {' or '.join(METHODS)}: {way}"
        )
    kind = found.get("expert_dtype", "fp8") if isinstance(found, Mapping) else getattr(found, "expert_dtype", "fp8")
    if name == "fp8" and kind != "fp8":
        raise InputError(f"{file}: quantization_config.expert_dtype: found {kind!r}, expected fp8: {way}")


def check_known(name: str, place: TensorPlace) -> None:
    """Raises InputError for a tensor in float8 that stands for no weights: without scales, or of another kind."""
    if place.dtype in FLOAT8:
        raise InputError(
            f"{place.file}: tensor {name!r}: found {place.dtype}, expected float8_e4m3fn with {name + SCALE!r} beside it, and "
            f"quantization_config with quant_method fp8 in config.json"
        )


def decoded_places(folder: Path, stored: Mapping[str, TensorPlace]) -> dict[str, TensorPlace]:
    """The checkpoint's tensors by the names and shapes of the weights that they stand for; without a code as they are.

    Raises InputError, naming the tensor, for scales that do not fit.
    """
    config = _quantisation(folder)
    made = _of_mxfp4(stored) if config.get("quant_method") == "mxfp4" else dict(stored)
    if config.get("quant_method") == "fp8":
        made = _of_fp8(stored, _block(folder, config.get("weight_block_size", [BLOCK, BLOCK])))
    return made


def _block(folder: Path, found: Any) -> tuple[int, int] | None:
    if found is None:
        return None
    if not (isinstance(found, list) and len(found) == 2 and all(type(size) is int and size > 0 for size in found)):
        raise InputError(
            f"{folder / 'config.json'}: quantization_config.weight_block_size: found {str(found)[:60]}, "
            f"expected two numbers or null"
        )
    return found[0], found[1]


def _quantisation(folder: Path) -> Mapping[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # said where the configuration is read
        return {}
    config = found.get("quantization_config") if isinstance(found, dict) else None
    return config if isinstance(config, dict) else {}


def _of_fp8(stored: Mapping[str, TensorPlace], block: tuple[int, int] | None) -> dict[str, TensorPlace]:
    made: dict[str, TensorPlace] = {}
    for name, place in stored.items():
        if name.endswith(SCALE) and name.removesuffix(SCALE) in stored:
            continue
        scales = stored.get(name + SCALE)
        if scales is None or place.dtype != torch.float8_e4m3fn:
            made[name] = place
            continue
        if scales.dtype not in SCALES:
            raise InputError(
                f"{scales.file}: tensor {name + SCALE!r}: found {scales.dtype}, expected one of {', '.join(map(str, SCALES))}"
            )
        scales = replace(scales, dtype=SCALES[scales.dtype])
        flat = block is None or len(place.shape) < 2
        grid = () if flat else tuple(-(-size // by) for size, by in zip(place.shape[-2:], block or (), strict=True))
        expected = (*place.shape[:-2], *grid)
        each = len(place.shape) == 3 and scales.shape[:1] == place.shape[:1] and prod(scales.shape) == place.shape[0]
        fits = not flat and scales.shape == expected
        if not (fits or each or prod(scales.shape) == 1):
            by = "all" if block is None else f"{block[0]} x {block[1]}"
            raise InputError(
                f"{scales.file}: tensor {name + SCALE!r}: found shape {list(scales.shape)}, expected {list(expected)}, "
                f"one for {by} of {name!r}"
            )
        code = Code("fp8", place.dtype, place.shape, scales, block if fits else None)
        made[name] = replace(place, dtype=DTYPE, code=code)
    return made


def _of_mxfp4(stored: Mapping[str, TensorPlace]) -> dict[str, TensorPlace]:
    made: dict[str, TensorPlace] = {}
    for name, place in stored.items():
        base = name.removesuffix("_blocks")
        scales = stored.get(f"{base}_scales")
        if name.endswith("_scales") and f"{name.removesuffix('_scales')}_blocks" in stored:
            continue
        if base == name or scales is None:
            made[name] = place
            continue
        right = len(place.shape) == 4 and scales.shape == place.shape[:3] and place.shape[3] == PER_SCALE // 2
        if not right or {place.dtype, scales.dtype} != {torch.uint8}:
            raise InputError(
                f"{place.file}: tensors {name!r}, {base + '_scales'!r}: found {place.dtype} {list(place.shape)} and "
                f"{scales.dtype} {list(scales.shape)}, expected uint8 [E, N, K / 32, 16] and [E, N, K / 32]"
            )
        experts, rows, groups, _ = place.shape
        code = Code("mxfp4", place.dtype, place.shape, scales)
        made[base] = replace(place, dtype=DTYPE, shape=(experts, groups * PER_SCALE, rows), code=code)
    return made
