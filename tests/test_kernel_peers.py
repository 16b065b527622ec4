"""Other packages' kernels: found in wheels, run without their package, given what they want. Real wheels: PEER_WHEELS=DIR."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT

pytest.importorskip("triton")

from coterie.kernels.formats import Weights
from coterie.kernels.fused import FusedExperts
from coterie.kernels.interpreter import interpreting, repair
from coterie.launch.bench_kernels import found_packages, gpu_rows, shape_rows
from coterie.launch.kernel_cases import TINY, Machine
from coterie.launch.kernel_peers import NAMES, load_peer, routed
from coterie.launch.wheel_files import PeerMissing
from coterie.routing.errors import InputError

if interpreting():
    repair()
DEVICE = "cpu" if interpreting() else "cuda"
TILES = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 16, "BLOCK_SIZE_K": 32, "GROUP_SIZE_M": 1}
REAL = Path(os.environ["PEER_WHEELS"]) if "PEER_WHEELS" in os.environ else None
PRODUCT = """
def {name}(A, B, C, A_scale, B_scale, topk_weights, sorted_token_ids, expert_ids, num_tokens_post_padded, mul_routed_weight,
           top_k, config, compute_type, use_fp8_w8a8, use_int8_w8a8, use_int8_w8a16, use_int4_w4a16, per_channel_quant{more}):
    rows, picks = config["BLOCK_SIZE_M"], len(A) * top_k
    flat = C.view(picks, -1)
    for block in range(int(num_tokens_post_padded) // rows):
        mine = [block] if sorted_token_ids is None else sorted_token_ids[block * rows :][:rows].tolist()
        for pick in mine:
            if pick < picks:
                y = B[int(expert_ids[block])].double() @ A[pick // top_k].double()
                flat[pick] = y * (topk_weights.reshape(-1)[pick] if mul_routed_weight else 1.0)
"""
VLLM = """
import torch
from conftest import ROOT
import vllm.envs as envs
import vllm.layers.modular_kernel as mk
from vllm import _custom_ops as ops
from vllm.activation import MoEActivation, apply
from vllm.triton_utils import tl, triton
from vllm.utils.torch_utils import direct_register_custom_op

def unused(a: MoEActivation | None = None, b: "int" = ops.number) -> mk.Kernel | None: ...
direct_register_custom_op(op_name="x", op_func=unused)
assert not envs.VLLM_BATCH_INVARIANT and tl.float32 is not None and triton.cdiv(3, 2) == 2
def get_default_config(M, E, N, K, topk, dtype): return {tiles}
"""
SGLANG = """
from sglang.srt.environ import envs
from sglang.srt.utils import is_cuda, is_hip
_use = envs.SGLANG_USE_AITER.get() and is_hip()
assert is_cuda() in (True, False) and not _use
def moe_sum_reduce_triton(made, out, factor): out.copy_(made.sum(1) * factor)
"""


def wheel(
    folder: Path, name: str, version: str = "1.2.0", text: str | None = None, tables: dict[str, object] | None = None
) -> None:
    """A package as a wheel whose kernels are plain torch."""
    made = VLLM.replace("{tiles}", str(TILES)) + PRODUCT.format(name="invoke_fused_moe_triton_kernel", more="")
    at = "vllm/model_executor/layers/fused_moe/fused_moe.py"
    if name == "sglang":
        made = SGLANG + PRODUCT.format(name="invoke_fused_moe_kernel", more=", bias, B_zp, topk_ids, filter_expert")
        at = "sglang/kernels/ops/moe/fused_moe_triton_kernels.py"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(at, made if text is None else text)
        archive.writestr(f"{name}/__init__.py", "raise ImportError('the package itself is not to be imported')")
        if name == "sglang":
            text = f"from sglang.srt.context import get\ndef get_default_config(M, E, N, K, topk, dtype, m): return {TILES}"
            archive.writestr("sglang/srt/fused_moe_triton_config.py", text)
        for place, table in (tables or {}).items():
            archive.writestr(place, json.dumps(table))


def layer(tokens: int, experts: int = 4, slots: int = 2, dtype: torch.dtype = torch.float32) -> tuple[FusedExperts, ...]:
    torch.manual_seed(tokens)
    first, second = (torch.randn(experts, *size, device=DEVICE).to(dtype) / 6 for size in ((32, 32), (32, 16)))
    ids = torch.rand(tokens, experts, device=DEVICE).topk(slots, 1).indices
    weights = torch.rand(tokens, slots, device=DEVICE)
    return FusedExperts(Weights(first), Weights(second)), torch.randn(tokens, 32, device=DEVICE).to(dtype), ids, weights


@pytest.mark.parametrize("name", list(NAMES))
@pytest.mark.parametrize(("tokens", "experts"), [(1, 4), (1, 16), (37, 4)])
def test_a_package_that_is_a_wheel_computes_the_same_layer(name: str, tokens: int, experts: int, tmp_path: Path) -> None:
    wheel(tmp_path, name)
    peer = load_peer(name, tmp_path, tmp_path / "room")
    assert peer.name == f"{NAMES[name]} 1.2.0" and name not in sys.modules
    ours, x, ids, weights = layer(tokens, experts)
    torch.testing.assert_close(peer.layer([ours], x, ids, weights)(0), ours(x, ids, weights), rtol=1e-4, atol=1e-5)


def test_the_newest_wheel_and_the_devices_own_tiles_are_taken(tmp_path: Path) -> None:
    import triton

    here, mine = f"triton_{triton.__version__.replace('.', '_')}", {"1": {"BLOCK_SIZE_M": 16}, "64": {"BLOCK_SIZE_M": 64}}
    other = {"1": {"BLOCK_SIZE_M": 128}}
    name = "E=4,N=16,device_name=none.json" if interpreting() else ""
    for version, tables in (
        ("0.9.0", {}),
        ("0.10.0rc1", {}),
        ("0.10.0", {f"sglang/configs/{v}/{name}": t for v, t in ((here, mine), ("triton_9_9_9", other))}),
    ):
        wheel(tmp_path, "sglang", version, tables=tables)
    peer = load_peer("sglang", tmp_path, tmp_path / "room")
    assert peer.package.version == "0.10.0"
    if interpreting():
        assert peer.tiles(50, 4, 16, 32, 2) == {"BLOCK_SIZE_M": 64} and peer.tiles(2, 4, 16, 32, 2) == {"BLOCK_SIZE_M": 16}
    assert peer.tiles(50, 5, 16, 32, 2) == TILES


def test_picks_are_filled_up_to_whole_blocks() -> None:
    ids = torch.tensor([[2, 0], [2, 1], [2, 0]], device=DEVICE)
    made = routed(ids, 4, 2)
    assert made.picks is not None
    real = int(made.filled)
    assert made.picks[:real].tolist() == [1, 5, 3, 6, 0, 2, 4, 6] and (made.picks[real:] == 6).all()
    assert made.experts[: real // 2].tolist() == [0, 1, 2, 2] and made.picks.dtype == made.experts.dtype == torch.int32


def test_what_cannot_be_had_says_why(tmp_path: Path) -> None:
    if not any(name in sys.modules for name in NAMES):
        with pytest.raises(PeerMissing, match=r"vllm is not installed, and there is no vllm-\*.whl in"):
            load_peer("vllm", tmp_path, tmp_path)
        with pytest.raises(PeerMissing, match=r"a folder given by --peers"):
            load_peer("sglang", None, tmp_path)
    wheel(tmp_path, "vllm", text="def invoke_fused_moe_triton_kernel(A, B): ...")
    with pytest.raises(PeerMissing, match=r"vllm 1.2.0: its invoke_fused_moe_triton_kernel does not take C, A_scale"):
        load_peer("vllm", tmp_path, tmp_path / "a")
    wheel(tmp_path, "vllm", text="import torch\ntorch.nothing_like_it")
    with pytest.raises(PeerMissing, match=r"fused_moe\.py does not run by itself"):
        load_peer("vllm", tmp_path, tmp_path / "b")
    with pytest.raises(InputError, match="--peers: found no folder"):
        list(gpu_rows(False, wheels=tmp_path / "none"))


def test_a_row_has_the_peers_figures_or_the_reason(tmp_path: Path) -> None:
    if not interpreting():
        pytest.skip("plain torch that reads counts cannot be captured in a graph")
    wheel(tmp_path, "vllm")
    packages = found_packages(tmp_path, tmp_path / "room")
    row = next(iter(shape_rows(TINY, "plain", (3,), Machine(1e9, 1e9), "cpu", packages)))
    assert row.value is not None and row.peers["vLLM 1.2.0"] is not None
    assert row.peers["SGLang"] is None and row.why.startswith("SGLang: sglang is not installed"), row
    assert row.to_json()["why"] == row.why


@pytest.mark.skipif(REAL is None, reason="PEER_WHEELS names no folder of wheels")
@pytest.mark.parametrize("name", list(NAMES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "experts"), [(1, 16), (5, 4)])
def test_real_wheels_compute_the_same_layer(name: str, dtype: torch.dtype, tokens: int, experts: int, tmp_path: Path) -> None:
    peer = load_peer(name, REAL, tmp_path)
    ours, x, ids, weights = layer(tokens, experts, dtype=dtype)
    made, right = peer.layer([ours], x, ids, weights)(0).double(), ours(x, ids, weights).double()
    assert (made - right).norm() / right.norm() < (1e-5 if dtype == torch.float32 else 2e-2)


def test_the_kernel_that_stands_in_for_theirs_compiles_for_a_gpu() -> None:
    """Triton's interpreter looks names up as Python does; its compiler takes no annotation that is not its own."""
    code = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from coterie.launch.kernel_peers import _silu_kernel

signature = {"both": "*bf16", "inner": "*bf16", "width": "i32", "COLUMNS": "constexpr"}
source = ASTSource(_silu_kernel, signature, {(3,): 1024})
assert "ld.global" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
