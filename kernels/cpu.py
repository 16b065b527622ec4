"""Products on the CPU by what the processor has and how the weights are stored; torch's own operators, nothing is compiled.

| weights | rows | product |
|---|---|---|
| float32 | one, on AMD's processors | oneDNN's linear layer: torch's own, MKL, takes one thread there |
| float32 | any | torch |
| bfloat16, float16 | one | torch's own matrix times vector (`multiply_each`) |
| bfloat16, float16 | few, or a processor with instructions for that dtype | torch, on the weights as they are |
| bfloat16, float16 | many, without such instructions | float32, on a panel of some widened weights that is used again |
| int8 | to 16 | `_weight_int8pack_mm` |
| int8 | more | torch, on integers in bfloat16 for such rows and with such instructions, else on the panel; the sums scaled |
| int4 | any | `_weight_int4pack_mm_for_cpu`, its groups packed anew, its scales rounded to the rows' dtype |
| fp8, and shapes that the last two do not take | any | the float32 panel |

Widening is exact, so the panel's products are those of the stored weights, summed in float32.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch

from coterie.kernels.formats import GROUP, HALF, Weights, unpacked

FEW_ROWS = 4
PANEL_ROWS = 16
WIDENED = 1 << 21  # float32 values that are widened at once, about
LEAST_OUTPUTS = 256  # of a product; with fewer the library is slow


@lru_cache(maxsize=1)
def multiplies_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself (AMX, AVX512_BF16)."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


@lru_cache(maxsize=1)
def multiplies_float16() -> bool:
    """Whether it multiplies float16 itself (AMX_FP16, AVX512_FP16): many that know bfloat16 do not."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    except (AttributeError, RuntimeError):  # torch without oneDNN
        return False


@lru_cache(maxsize=1)
def one_row_by_onednn() -> bool:
    """Whether one row of float32 goes to oneDNN: MKL multiplies it on one thread on AMD's processors (docs/kernels.md)."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    except OSError:  # not Linux
        return False


def slow(dtype: torch.dtype) -> bool:
    """Whether many rows are better multiplied by weights of this dtype once these are widened."""
    if dtype == torch.bfloat16:
        return not multiplies_bfloat16()
    return dtype == torch.float16 and not multiplies_float16()


def widens(weight: torch.Tensor, rows: int) -> bool:
    """Whether this many rows are better multiplied by widened weights."""
    return weight.device.type == "cpu" and rows > FEW_ROWS and slow(weight.dtype)


class _Scratch(threading.local):
    """Each thread's own, so that two models can compute at once."""

    def __init__(self) -> None:
        self.panels: dict[torch.device, torch.Tensor] = {}


_scratch = _Scratch()


def panel(count: int, device: torch.device) -> torch.Tensor:
    """Float32 `[count]` to be overwritten: the same memory each time in one thread, as large as the largest asked for."""
    found = _scratch.panels.get(device)
    if found is None or found.numel() < count:
        with torch.inference_mode(False):  # an inference tensor could not be written to where that mode is off
            found = _scratch.panels[device] = torch.empty(count, dtype=torch.float32, device=device)
    return found[:count]


def widened(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix in the panel, in its own order in memory."""
    if matrix.stride(0) < matrix.stride(1):
        return widened(matrix.T).T
    return panel(matrix.numel(), matrix.device).view(matrix.shape).copy_(matrix)


def widened_outputs(outputs: int, inputs: int) -> int:
    """Of how many outputs of a product the weights are widened at once."""
    return min(outputs, max(LEAST_OUTPUTS, WIDENED // inputs))


def multiply_widened(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """rows `[R, K]` times matrix `[K, N]`, summed in float32 `[R, N]`; the weights of some outputs after another."""
    rows, (inputs, outputs) = rows.float(), matrix.shape
    block = widened_outputs(outputs, inputs)
    if block == outputs:
        return rows @ widened(matrix)
    out = rows.new_empty(len(rows), outputs)
    for first in range(0, outputs, block):
        torch.mm(rows, widened(matrix[:, first : first + block]), out=out[:, first : first + block])
    return out


class _OwnProducts:
    """While it lasts, torch multiplies one row of bfloat16 itself, which it else leaves to oneDNN.

    That is a switch of the whole process: what other threads multiply in bfloat16 meanwhile goes the other way, too, and may be
    rounded otherwise. One thread at a time, which may enter it again.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._before: list[bool] = []

    def __enter__(self) -> None:
        self._lock.acquire()
        self._before.append(torch._C._get_mkldnn_enabled())
        torch._C._set_mkldnn_enabled(False)

    def __exit__(self, *error: object) -> None:
        torch._C._set_mkldnn_enabled(self._before.pop())
        self._lock.release()


own_products = _OwnProducts()


def takes_vectors(dtype: torch.dtype) -> bool:
    """Whether single rows of this dtype are best multiplied by `multiply_each`."""
    return dtype != torch.float32 or one_row_by_onednn()


def multiply_each(matrices: Iterable[torch.Tensor], rows: Iterable[torch.Tensor], outs: Iterable[torch.Tensor]) -> None:
    """Each matrix `[N, K]` times its row `[K]` to its out `[N]`, where `takes_vectors`: by the fastest of torch's ways.

    bfloat16 by torch's own product of a matrix and a vector (`own_products`), which streams weights two to three times as fast
    as oneDNN's (docs/kernels.md) and sums in float32 as well. bfloat16 stored transposed as a product of two matrices, float16
    as a vector, whichever way it is stored.
    """
    as_vectors = []
    for matrix, row, out in zip(matrices, rows, outs, strict=True):
        if row.dtype == torch.float32 and matrix.stride(1) == 1:
            out.copy_(torch.ops.mkldnn._linear_pointwise(row[None], matrix, None, "none", [], "")[0])
        elif row.dtype != torch.bfloat16:
            torch.mv(matrix, row, out=out)
        elif matrix.stride(1) != 1:
            torch.mm(row[None], matrix.T, out=out[None])
        else:
            as_vectors.append((matrix, row, out))
    if as_vectors:
        with own_products:
            for matrix, row, out in as_vectors:
                torch.mv(matrix, row, out=out)


def multiply_row(matrix: torch.Tensor, row: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The same of one; out: None for new memory."""
    out = row.new_empty(matrix.shape[0]) if out is None else out
    multiply_each([matrix], [row], [out])
    return out


@dataclass(frozen=True)
class Panels:
    """Any stored weights, one expert at a time widened to float32."""

    weights: Weights

    @property
    def shape(self) -> tuple[int, int, int]:
        """(S, N, K)."""
        return self.weights.shape

    def multiply(self, expert: int, x: torch.Tensor, out: torch.Tensor) -> None:
        """In float32, on the panel."""
        out.copy_(x.float() @ self._widened(expert).T)

    def _widened(self, expert: int) -> torch.Tensor:
        """As `Weights.dequantised` has it, GROUP rows at a time: float32 `[N, K]`."""
        _, rows, columns = self.shape
        wide = panel(rows * columns, self.weights.data.device).view(rows, columns)
        one = self.weights.expert(expert)
        for first in range(0, rows, GROUP):
            wide[first : first + GROUP] = one.rows(first, first + GROUP).dequantised(torch.float32)[0]
        return wide

    def vectors(self, experts: list[int], x: torch.Tensor) -> torch.Tensor:
        """One at a time."""
        out = x.new_empty(len(x), self.shape[1])
        for row, expert in enumerate(experts):
            self.multiply(expert, x[row : row + 1], out[row : row + 1])
        return out


@dataclass(frozen=True)
class Int8:
    """`int8` weights by torch's operator. _rounded: None where the weights come and go (`_scales`)."""

    weights: Weights
    _rounded: dict[torch.dtype, torch.Tensor] | None = field(default_factory=dict, compare=False)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(S, N, K)."""
        return self.weights.shape

    def multiply(self, expert: int, x: torch.Tensor, out: torch.Tensor) -> None:
        """Few rows by torch's operator, in the dtype of `scaled_in`. Many are multiplied by the integers, which any float dtype
        holds: in bfloat16 if they are of it and the processor multiplies it, else in float32.
        """
        assert self.weights.scale is not None
        rows = x.to(scaled_in(x.dtype))
        data, scale = self.weights.data[expert], _scales(self.weights.scale, self._rounded, rows.dtype)[expert]
        if len(x) <= PANEL_ROWS:
            out.copy_(torch._weight_int8pack_mm(rows, data, scale))
        elif x.dtype == torch.bfloat16 and multiplies_bfloat16():
            torch.mm(x, data.to(x.dtype).T, out=out)
            out.mul_(scale)
        else:
            out.copy_(multiply_widened(rows, data.T).mul_(scale))

    def vectors(self, experts: list[int], x: torch.Tensor) -> torch.Tensor:
        """By torch's operator."""
        assert self.weights.scale is not None
        wide = x.to(scaled_in(x.dtype))
        data, scales = self.weights.data, _scales(self.weights.scale, self._rounded, wide.dtype)
        rows = zip(experts, torch.split(wide, 1), strict=True)
        return torch.cat([torch._weight_int8pack_mm(row, data[expert], scales[expert]) for expert, row in rows]).to(x.dtype)


@dataclass(frozen=True)
class Int4:
    """`int4` weights as torch's operator wants them. data: uint8 `[S, N, K / 2]`; scales: `[S, K / 128, N, 2]`, zeros of 0.

    _rounded: None where the weights come and go (`_scales`).
    """

    data: torch.Tensor
    scales: torch.Tensor
    _rounded: dict[torch.dtype, torch.Tensor] | None = field(default_factory=dict, compare=False)

    @classmethod
    def pack(cls, weights: Weights) -> Int4:
        """From the project's own format, an expert at a time."""
        assert weights.scale is not None
        experts, rows, columns = weights.shape
        data = torch.empty(experts, rows, columns // 2, dtype=torch.uint8)
        for e in range(experts):
            values = unpacked(weights.data[e : e + 1], columns)[0].to(torch.int32) + 8
            data[e] = torch._convert_weight_to_int4pack_for_cpu(values, 1)
        scales = weights.scale.transpose(1, 2)
        return cls(data, torch.stack([scales, torch.zeros_like(scales)], 3).contiguous())

    @property
    def shape(self) -> tuple[int, int, int]:
        """(S, N, K)."""
        return self.data.shape[0], self.data.shape[1], 2 * self.data.shape[2]

    def multiply(self, expert: int, x: torch.Tensor, out: torch.Tensor) -> None:
        """The scales are rounded to the dtype of `scaled_in`, once."""
        rows = x.to(scaled_in(x.dtype))
        scales = _scales(self.scales, self._rounded, rows.dtype)[expert]
        out.copy_(torch._weight_int4pack_mm_for_cpu(rows, self.data[expert], GROUP, scales))

    def vectors(self, experts: list[int], x: torch.Tensor) -> torch.Tensor:
        """By torch's operator."""
        wide = x.to(scaled_in(x.dtype))
        data, scales = self.data, _scales(self.scales, self._rounded, wide.dtype)
        rows = zip(experts, torch.split(wide, 1), strict=True)
        return torch.cat([torch._weight_int4pack_mm_for_cpu(row, data[e], GROUP, scales[e]) for e, row in rows]).to(x.dtype)


# y = W x of S experts that are not plain tensors
Product = Panels | Int8 | Int4


def scaled_in(dtype: torch.dtype) -> torch.dtype:
    """In which integers are multiplied and scaled for rows of `dtype`: float16 holds neither large sums nor small scales."""
    return torch.float32 if dtype == torch.float16 else dtype


def _scales(scales: torch.Tensor, rounded: dict[torch.dtype, torch.Tensor] | None, dtype: torch.dtype) -> torch.Tensor:
    """The scales in a dtype, kept in `rounded` once they were asked for; without it they must be there in that dtype.

    Raises ValueError otherwise: what is kept would be that of weights which have gone since.
    """
    if scales.dtype == dtype:
        return scales
    if rounded is None:
        raise ValueError(f"x: found {dtype}, expected {scales.dtype}, as the scales are kept")
    if dtype not in rounded:
        rounded[dtype] = scales.to(dtype)
    return rounded[dtype]


@lru_cache(maxsize=1)
def int4_order() -> str:
    """Names the order in which this processor's `Int4` keeps weights, by what it makes of weights that all differ."""
    values = (torch.arange(4 * HALF * GROUP, dtype=torch.int32) * 40503 >> 7) % 16
    data = torch._convert_weight_to_int4pack_for_cpu(values.view(4 * HALF, GROUP), 1)
    return "cpu-" + hashlib.sha256(data.numpy().tobytes()).hexdigest()[:8]


def kind_for(format: str, rows: int, columns: int) -> type[Int8] | type[Int4] | type[Panels]:
    """The fastest product of this format and shape. Raises ValueError for plain weights: torch takes those as they are."""
    if format == "plain":
        raise ValueError("format: found plain, expected int8, int4 or fp8")
    if format == "int8" and columns % 32 == 0 and rows % 4 == 0:
        return Int8
    return Int4 if format == "int4" and columns % GROUP == 0 and rows % HALF == 0 else Panels


def for_cpu(weights: Weights) -> Product:
    """The fastest way that takes this format and shape; as `kind_for`."""
    kind = kind_for(weights.format, *weights.shape[1:])
    return Int4.pack(weights) if kind is Int4 else kind(weights)  # type: ignore[call-arg, arg-type]
