"""A layer's experts in Triton kernels: ordering, two products and a weighted sum, without asking the device anything."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from coterie.kernels.activations import Activation
from coterie.kernels.formats import GROUP, Weights
from coterie.kernels.grouped_gemm import CODES, FUNCTION_CODES, first_product, second_product, weighted_sum
from coterie.kernels.ordering import Order, order_picks
from coterie.kernels.tiles import GROUPED, Tile, Work, choose_tile, fitted

SUM_COLUMNS = 1024
SWIGLU = Activation()


@dataclass(frozen=True)
class FusedExperts:
    """Experts on one device. first: `[S, 2I, H]` (`[S, I, H]` without gate); second: `[S, H, I]`; biases `[S, 2I]`, `[S, H]`.

    activation: None for one that no kernel knows; `between` then makes `[N, I]` of the first product's rows. finish: applied to
    each pick's output `[N, H]` before the weighted sum, or None. table: int32 `[E]`, at which of the S places each of E experts
    is, for weights in a pool of slots; None where expert e is at place e.
    """

    first: Weights
    second: Weights
    activation: Activation | None = SWIGLU
    first_bias: torch.Tensor | None = None
    second_bias: torch.Tensor | None = None
    table: torch.Tensor | None = None
    between: Callable[[torch.Tensor], torch.Tensor] | None = None
    finish: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __post_init__(self) -> None:
        if (self.activation is None) == (self.between is None):
            raise ValueError("activation: expected one, or else `between`")
        if self.first.format != self.second.format:
            raise ValueError(f"format: found {self.first.format} and {self.second.format}, expected the same in both products")

    @property
    def experts(self) -> int:
        """E."""
        return self.first.shape[0] if self.table is None else len(self.table)

    def __call__(
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, tiles: tuple[Tile, Tile] | None = None
    ) -> torch.Tensor:
        """As `experts.grouped_experts`: x `[T, H]` with unit stride along H, ids `[T, K]` (-1: empty), weights `[T, K]`.

        tiles: of the two products, with equally many rows; by default the rules' and tables'. Nothing waits for the device.
        """
        if ids.numel() == 0:
            return torch.zeros_like(x)
        return self.summed(self.picked(x, ids, tiles=tiles), ids, weights, x.dtype)

    def room(self, x: torch.Tensor, ids: torch.Tensor, tiles: tuple[Tile, Tile] | None = None) -> torch.Tensor:
        """Where `picked` may write for these: `[parts, T * K, H]`, in x's dtype if there is one part, else float32."""
        _, second = tiles or self._tiles(x, *ids.shape)
        dtype = x.dtype if second.splits == 1 else torch.float32
        return x.new_empty(second.splits, ids.numel(), self.second.shape[1], dtype=dtype)

    def picked(
        self, x: torch.Tensor, ids: torch.Tensor, out: torch.Tensor | None = None, tiles: tuple[Tile, Tile] | None = None
    ) -> torch.Tensor:
        """The output of each pick as the sum of its parts, `[parts, T * K, H]`; rows of empty ones stay as they are.

        out: where to, of `room` for as many tokens and slots, by default new memory.
        """
        slots = ids.shape[1]
        x, ids = x if x.stride(1) == 1 else x.contiguous(), ids.contiguous()
        first_tile, second_tile = tiles or self._tiles(x, *ids.shape)
        self._check_tiles(first_tile, second_tile)
        y = self.room(x, ids, (first_tile, second_tile)) if out is None else out
        with _on(x.device):
            order = order_picks(ids, self.experts, first_tile.rows)
            self._second(self._first(x, order, slots, first_tile), order, second_tile, y)
        return y

    def summed(self, y: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The weighted sum of what was picked, `[T, H]`, in `dtype`."""
        y = y if self.finish is None else self.finish(y[0])[None]
        (tokens, slots), hidden = ids.shape, y.shape[2]
        out = y.new_empty(tokens, hidden, dtype=dtype)
        with _on(y.device):
            weighted_sum[(tokens, triton.cdiv(hidden, SUM_COLUMNS))](
                y, ids.contiguous(), weights.contiguous(), out, hidden, self.experts, y.stride(1), y.stride(0), slots, slots,
                out.stride(0), SLOTS=slots, SPLITS=len(y), BH=SUM_COLUMNS,
            )  # fmt: skip
        return out

    def _tiles(self, x: torch.Tensor, tokens: int, slots: int) -> tuple[Tile, Tile]:
        name, capability = _device(x.device.index or 0) if x.is_cuda else ("", 90)
        gated = self.activation is not None and self.activation.gated
        turned = self.activation is not None and self.activation.interleaved
        outputs = self.first.shape[1] // (2 if gated else 1)
        shape, width = self.first.shape, x.element_size()
        if self.first.format == "plain":
            width = max(width, self.first.data.element_size())
        works = (
            Work(self.experts, outputs, shape[2], slots, tokens, width, self.first.format, gated, turned),
            Work(self.experts, *self.second.shape[1:], slots, tokens, width, self.second.format, summed=self.finish is None),
        )  # fmt: skip
        first, second = (choose_tile(work, name, capability, triton.__version__) for work in works)
        second = fitted(replace(second, rows=first.rows), works[1], capability)
        return self._reachable(self.first, first), self._reachable(self.second, second)

    def _reachable(self, weights: Weights, tile: Tile) -> Tile:
        """With pointers where weights do not lie as the tensor memory accelerator wants them."""
        return replace(tile, tma=tile.tma and not untiled(weights, tile))

    def _check_tiles(self, first: Tile, second: Tile) -> None:
        if first.rows != second.rows:
            raise ValueError(f"tiles: found {first.rows} and {second.rows} rows, expected as many in both products")
        for tile in (first, second):
            if self.first.format in GROUPED and tile.inputs != GROUP:
                raise ValueError(
                    f"tiles: found {tile.inputs} inputs with format {self.first.format}, expected {GROUP}: they share a scale"
                )
        for weights, tile in ((self.first, first), (self.second, second)):
            if tile.tma and (why := untiled(weights, tile)):
                raise ValueError(f"tiles: found tma with {why}: expected pointers")
        act = self.activation or Activation("none", False)
        if second.fold or (first.fold and (first.tma or act.interleaved or not act.gated)):
            raise ValueError("tiles: found fold, expected it only by pointers, and where gates and ups lie one after the other")
        if first.splits > 1 or (second.splits > 1 and self.finish is not None):
            raise ValueError(
                f"tiles: found {first.splits} and {second.splits} splits, expected 1 where outputs are not only added up"
            )

    def _first(self, x: torch.Tensor, order: Order, slots: int, tile: Tile) -> torch.Tensor:
        act, (_, outputs, inputs) = self.activation or Activation("none", False), self.first.shape
        width = outputs // 2 if act.gated else outputs
        hidden = x.new_empty(len(order.picks), width)
        first_product[(_programs(order, width, tile),)](
            x, self.first.data, _descriptor(self.first, tile, 2 if act.interleaved else 1),
            *_given(x, self.first.scale, self.first_bias), hidden,
            order.picks, order.expert, order.start, order.count, *_given(order.picks, self.table),
            len(order.expert), inputs, width, x.stride(0), *_strides(self.first, self.first_bias), hidden.stride(0),
            act.limit or 0.0, act.alpha, act.offset,
            SLOTS=slots, GATED=act.gated, TURNS=act.interleaved, FOLD=tile.fold, FUNCTION=FUNCTION_CODES[act.function],
            LIMIT=act.limit is not None, **_constants(self.first, self.first_bias, self.table, x, inputs, tile),
        )  # fmt: skip
        return hidden if self.between is None else self.between(hidden)

    def _second(self, hidden: torch.Tensor, order: Order, tile: Tile, y: torch.Tensor) -> None:
        _, outputs, inputs = self.second.shape
        hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
        second_product[(_programs(order, outputs, tile), tile.splits)](
            hidden, self.second.data, _descriptor(self.second, tile), *_given(hidden, self.second.scale, self.second_bias), y,
            order.picks, order.expert, order.start, order.count, *_given(order.picks, self.table),
            len(order.expert), inputs, outputs, hidden.stride(0), *_strides(self.second, self.second_bias), y.stride(1),
            y.stride(0), SPLITS=tile.splits, **_constants(self.second, self.second_bias, self.table, hidden, inputs, tile),
        )  # fmt: skip


@lru_cache(maxsize=16)
def _device(index: int) -> tuple[str, int]:
    """A GPU's name, and ten times its compute capability."""
    major, minor = torch.cuda.get_device_capability(index)
    return torch.cuda.get_device_name(index), 10 * major + minor


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, whichever its arguments are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def untiled(weights: Weights, tile: Tile) -> str:
    """Why the tensor memory accelerator cannot fetch tiles of these; empty if it can. All it takes is a matter of layout.

    Inputs that are no multiple of the tile's are left to pointers: vLLM has seen products go wrong there (its `fused_moe.py`).
    """
    data, size = weights.data, weights.data.element_size()
    if len(data) == 0:
        return "no experts"
    if weights.format != "plain" or size != 2:
        return f"{weights.format} weights of {size} bytes"
    if data.stride(2) != 1 or data.stride(0) * size % 16 or data.stride(1) * size % 16 or data.data_ptr() % 16:
        return f"strides {data.stride()} at {data.data_ptr() % 16} bytes beyond a multiple of 16"
    return f"{weights.columns} inputs in steps of {tile.inputs}" if weights.columns % tile.inputs else ""


def _descriptor(weights: Weights, tile: Tile, turns: int = 1) -> TensorDescriptor | None:
    """Of all experts' weights, for tiles of one expert's; None with pointers. turns: rows of weights for each output of it."""
    if not tile.tma:
        return None
    data = weights.data
    return TensorDescriptor(data, list(data.shape), list(data.stride()), [1, turns * tile.outputs, tile.inputs])


def _programs(order: Order, outputs: int, tile: Tile) -> int:
    return len(order.expert) * -(-outputs // tile.outputs)


def _given(other: torch.Tensor, *tensors: torch.Tensor | None) -> list[torch.Tensor]:
    """Pointers for a kernel, which reads none that is not there: any other one stands in for it."""
    return [other if tensor is None else tensor for tensor in tensors]


def _strides(weights: Weights, bias: torch.Tensor | None) -> tuple[int, ...]:
    """Of the data, the scales (experts, outputs, inputs) and the bias, 0 for what is not there."""
    scale = weights.scale
    of_scale = (0, 0, 0) if scale is None else (*scale.stride(), 0)[:3]
    return (*weights.data.stride(), *of_scale, 0 if bias is None else bias.stride(0))


def _constants(
    weights: Weights, bias: torch.Tensor | None, table: torch.Tensor | None, x: torch.Tensor, inputs: int, tile: Tile
) -> dict[str, object]:
    return {
        "BIAS": bias is not None, "TABLE": table is not None, "FORMAT": CODES[weights.format],
        "SCALE_ROWS": GROUP if weights.format == "fp8" else 1, "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
        "BM": tile.rows, "BN": tile.outputs, "BK": tile.inputs, "EVEN": inputs % tile.inputs == 0, "SWAP": tile.swap,
        "TOGETHER": tile.together, "num_warps": tile.warps, "num_stages": tile.stages, "TMA": tile.tma,
    }  # fmt: skip
