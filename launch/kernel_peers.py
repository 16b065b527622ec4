"""vLLM's and SGLang's Triton kernels for experts as peers of ours, from an installed package or a wheel (`wheel_files.py`).

Their two grouped products are what they ship, with the tiles that they ship for the device, or else their default ones.
What they do in CUDA libraries of their own is stood in for, to their favour: the order of picks is made beforehand and not in
their time, silu-and-multiply is one Triton kernel, the sum one of torch (vLLM) or their own Triton kernel (SGLang).
Seen with vllm 0.33.0 and sglang 0.5.23.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl

from coterie.kernels.fused import FusedExperts
from coterie.kernels.ordering import order_picks
from coterie.launch.wheel_files import Package, PeerMissing, find_package, load_file

Call = Callable[[int], torch.Tensor]
Tiles = dict[str, int]
KINDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
NAMES = {"vllm": "vLLM", "sglang": "SGLang"}
PLAIN: dict[str, Any] = dict.fromkeys(
    ("use_fp8_w8a8", "use_int8_w8a8", "use_int8_w8a16", "use_int4_w4a16", "per_channel_quant"), False
)
SILU_COLUMNS = 1024
SPARSE = 4  # vLLM orders nothing while that many times the picks are at most the experts


@dataclass(frozen=True)
class Routed:
    """Picks in the order of experts, as both packages want them: each expert's run filled up to whole blocks.

    picks int32 `[blocks * rows]`, the number of picks where it is filled up, or None if each pick is a block of its own;
    experts int32 `[blocks]`; filled int32 `[1]`: how many of `picks` are in blocks that there are.
    """

    picks: torch.Tensor | None
    experts: torch.Tensor
    filled: torch.Tensor


def routed(ids: torch.Tensor, experts: int, rows: int) -> Routed:
    """ids: `[T, K]`. rows: of a block."""
    order = order_picks(ids.contiguous(), experts, rows)
    within = torch.arange(rows, device=ids.device)
    at = (order.start[:, None] + within).clamp(max=ids.numel() - 1)
    picks = torch.where(within < order.count[:, None], order.picks[at.long()], ids.numel())
    filled = (order.count > 0).sum(dtype=torch.int32).reshape(1) * rows
    return Routed(picks.int().flatten(), order.expert.clamp(min=0), filled)


def unordered(ids: torch.Tensor, rows: int) -> Routed:
    """Each pick a block of its own, of which one row is used."""
    return Routed(None, ids.flatten().int(), torch.full((1,), ids.numel() * rows, dtype=torch.int32, device=ids.device))


@dataclass(frozen=True)
class Peer:
    """One package's kernels, ready to be given layers. module: its file; device: as its tables of tiles name it."""

    package: Package
    module: ModuleType
    device: str

    @property
    def name(self) -> str:
        """With its version."""
        return f"{NAMES[self.package.name]} {self.package.version}"

    def layer(self, experts: Sequence[FusedExperts], x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Call:
        """SwiGLU experts with plain weights as stacked by transformers; the call is given which of `experts` is meant."""
        run = _vllm if self.package.name == "vllm" else _sglang
        _, width, hidden = experts[0].first.shape
        tiles = self.tiles(len(x), experts[0].experts, width // 2, hidden, ids.shape[1])
        return run(self.module, tiles, experts, x, ids, weights)

    def tiles(self, tokens: int, experts: int, inner: int, hidden: int, top_k: int) -> Tiles:
        """The package's own for this device and number of tokens (the nearest measured), else its default."""
        table = self._table(f"E={experts},N={inner},device_name={self.device}.json")
        if table is not None:
            measured = {int(count): found for count, found in json.loads(table.read_text()).items() if count.isdigit()}
            return dict(measured[min(measured, key=lambda count: abs(count - tokens))])
        if self.package.name == "vllm":
            return dict(self.module.get_default_config(tokens, experts, inner, hidden, top_k, None))
        own = load_file(self.package, self.package.find("fused_moe_triton_config.py"), _known())
        return dict(own.get_default_config(tokens, experts, inner, hidden, top_k, None, False))

    def _table(self, name: str) -> Path | None:
        """Of the Triton version that runs, else of the newest; vLLM has one for all."""
        found = sorted((self.package.root / self.package.name).rglob(name))
        wanted = f"triton_{triton.__version__.replace('.', '_')}"
        same = [path for path in found if path.parent.name == wanted] or found
        return same[-1] if same else None


def load_peer(name: str, wheels: Path | None, room: Path) -> Peer:
    """name: vllm or sglang. wheels: a folder of wheels, or None; room: where one may be unpacked.

    Raises PeerMissing with the reason if its kernels cannot be had, or take other arguments than those of the versions above.
    """
    package = find_package(name, wheels, room)
    file = "fused_moe.py" if name == "vllm" else "fused_moe_triton_kernels.py"
    module = load_file(package, package.find(f"*fused_moe*/{file}" if name == "vllm" else file), _known())
    product, wanted = _asked(name)
    given = inspect.signature(getattr(module, product)).parameters if hasattr(module, product) else {}
    if missing := [argument for argument in wanted if argument not in given]:
        raise PeerMissing(f"{name} {package.version}: its {product} does not take {', '.join(missing)}")
    return Peer(package, module, _device())


def _device() -> str:
    name = torch.cuda.get_device_name().replace(" ", "_") if torch.cuda.is_available() else "none"
    return "NVIDIA_H200" if "H200" in name.split("_") else name


def _known() -> dict[str, Any]:
    """What the files import from their packages and need; all else is asked for only where something else is run."""
    major = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0
    return {
        "tl": tl, "triton": triton, "next_power_of_2": triton.next_power_of_2, "resolve_moe_use_td": lambda: False,
        "is_cuda": torch.cuda.is_available, "is_sm90_supported": lambda: major == 9, "is_arch_support_pdl": lambda: major >= 9,
    }  # fmt: skip


def _asked(name: str) -> tuple[str, tuple[str, ...]]:
    """The function that makes a grouped product, and the arguments that it is given."""
    common = (
        "A", "B", "C", "A_scale", "B_scale", "topk_weights", "sorted_token_ids", "expert_ids", "num_tokens_post_padded",
        "mul_routed_weight", "top_k", "config", "compute_type", *PLAIN,
    )  # fmt: skip
    if name == "vllm":
        return "invoke_fused_moe_triton_kernel", common
    return "invoke_fused_moe_kernel", (*common, "bias", "B_zp", "topk_ids", "filter_expert")


def _vllm(
    module: ModuleType, tiles: Tiles, experts: Sequence[FusedExperts], x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> Call:
    """As its `fused_experts_impl`."""
    (tokens, slots), (count, width, hidden) = ids.shape, experts[0].first.shape
    rows = tiles["BLOCK_SIZE_M"]
    order = unordered(ids, rows) if ids.numel() * SPARSE <= count else routed(ids, count, rows)
    both, made = x.new_empty(tokens, slots, width), x.new_empty(tokens, slots, hidden)
    inner, out = x.new_empty(tokens * slots, width // 2), torch.empty_like(x)
    common = _common(order, tiles, x)

    def call(turn: int) -> torch.Tensor:
        own, product = experts[turn % len(experts)], module.invoke_fused_moe_triton_kernel
        product(A=x, B=own.first.data, C=both, topk_weights=None, mul_routed_weight=False, top_k=slots, **common)
        _multiply_silu(both.flatten(0, 1), inner)
        product(A=inner, B=own.second.data, C=made, topk_weights=weights, mul_routed_weight=True, top_k=1, **common)
        return torch.sum(made, 1, out=out)

    return call


def _sglang(
    module: ModuleType, tiles: Tiles, experts: Sequence[FusedExperts], x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> Call:
    """As its `fused_experts_impl`, without tiles of their own for the second product."""
    (tokens, slots), (count, width, hidden) = ids.shape, experts[0].first.shape
    both, made = x.new_empty(tokens * slots, width), x.new_empty(tokens, slots, hidden)
    inner, out = x.new_empty(tokens * slots, width // 2), torch.empty_like(x)
    common = _common(routed(ids, count, tiles["BLOCK_SIZE_M"]), tiles, x)
    common |= {"bias": None, "B_zp": None, "topk_weights": weights, "topk_ids": ids, "filter_expert": False}

    def call(turn: int) -> torch.Tensor:
        own, product = experts[turn % len(experts)], module.invoke_fused_moe_kernel
        product(A=x, B=own.first.data, C=both, mul_routed_weight=False, top_k=slots, **common)
        _multiply_silu(both, inner)
        product(A=inner, B=own.second.data, C=made, mul_routed_weight=True, top_k=1, **common)
        module.moe_sum_reduce_triton(made, out, 1.0)
        return out

    return call


def _common(order: Routed, tiles: Tiles, x: torch.Tensor) -> dict[str, Any]:
    """What both products are given, in either package."""
    return PLAIN | {
        "A_scale": None, "B_scale": None, "sorted_token_ids": order.picks, "expert_ids": order.experts,
        "num_tokens_post_padded": order.filled, "config": tiles, "compute_type": KINDS[x.dtype],
    }  # fmt: skip


def _multiply_silu(both: torch.Tensor, inner: torch.Tensor) -> None:
    """inner `[N, I]` = silu(gate) * up of `[N, 2I]`, in one launch, where both packages have one of CUDA."""
    width = inner.shape[1]
    _silu_kernel[(len(inner), triton.cdiv(width, SILU_COLUMNS))](both, inner, width, COLUMNS=SILU_COLUMNS)


@triton.jit  # type: ignore[untyped-decorator]
def _silu_kernel(both, inner, width, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton looks names up
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    gate = tl.load(both + row * 2 * width + at, mask=at < width, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * width + width + at, mask=at < width, other=0.0).to(tl.float32)
    made = gate * tl.sigmoid(gate) * up
    tl.store(inner + row * width + at, made.to(inner.dtype.element_ty), mask=at < width)
