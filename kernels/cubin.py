"""What a kernel becomes on a GPU that is not there: compiled to machine code and looked into.

Triton brings NVIDIA's assembler and disassembler with it, so registers, spills, shared memory and the kind of tensor-core
instruction are known on any machine.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from coterie.kernels import ordering
from coterie.kernels.grouped_gemm import CODES, FUNCTION_CODES, first_product, second_product, weighted_sum
from coterie.kernels.tiles import SHARED_BYTES, Tile, Work, rule

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}  # tensor cores by Ampere's, Hopper's, Blackwell's own instruction
SMALL = {
    "_order_at_once": 1,
    "_count": 1,
    "_place": 1,
    "_map_blocks": 1,
    "weighted_sum": 1,
    "weighted_sum, 8 parts": 8,
}  # parts
POINTERS = {"plain": "*bf16", "int8": "*i8", "int4": "*u8", "fp8": "*fp8e4nv"}
ALIGNED = (
    "x", "w", "scale", "bias", "h", "y", "picks", "block_expert", "block_start", "block_count",
    "stride_x", "stride_e", "stride_n", "stride_k", "stride_h", "stride_y", "hidden", "inner",
)  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """registers: of a thread; spilled: instructions that move registers to memory and back; shared: bytes of a program.

    matrix: tensor-core instructions, by name; copies: loads that go to shared memory while the program computes, by threads;
    fetches: those of whole tiles, by the tensor memory accelerator. pending: products of earlier steps that may still be under
    way where one takes its left operand from registers, which the next step writes; 0 where both come from shared memory.
    """

    registers: int
    spilled: int
    shared: int
    matrix: dict[str, int]
    copies: int
    fetches: int
    pending: int


def compile_product(work: Work, arch: int, first: bool = True, tile: Tile | None = None, table: bool = False) -> Compiled:
    """`first_product` or `second_product` of bfloat16 rows for compute capability `arch` / 10, by default with the rule's tile.

    table: of experts in a pool of slots. The first is SwiGLU, or, turned, gpt-oss's form: biased, clamped, gate and up in
    turns, weights `[S, H, 2I]`.
    """
    tile, turned = tile or rule(work, arch), work.turned
    kernel = first_product if first else second_product
    constants: dict[str, Any] = {
        "BIAS": turned, "TABLE": table, "FORMAT": CODES[work.format], "SCALE_ROWS": 128 if work.format == "fp8" else 1,
        "PRECISION": "tf32", "BM": tile.rows, "BN": tile.outputs, "BK": tile.inputs, "EVEN": work.inputs % tile.inputs == 0,
        "SWAP": tile.swap, "TOGETHER": tile.together, "TMA": tile.tma, "stride_n" if turned else "stride_k": 1,
    }  # fmt: skip
    if first:
        constants |= {
            "SLOTS": work.top_k, "GATED": work.doubled, "TURNS": turned, "FOLD": tile.fold,
            "FUNCTION": FUNCTION_CODES["silu"], "LIMIT": turned,
        }  # fmt: skip
    else:
        constants["SPLITS"] = tile.splits
    types = {"w": POINTERS[work.format], "scale": "*fp32", "bias": "*bf16", "x": "*bf16", "h": "*bf16"}
    types["y"] = "*bf16" if tile.splits == 1 else "*fp32"
    if tile.tma:
        types["descriptor"] = f"tensordesc<bf16[1, {tile.outputs * (2 if turned else 1)}, {tile.inputs}]>"
    else:
        constants["descriptor"] = None
    types |= dict.fromkeys(("picks", "block_expert", "block_start", "block_count", "table"), "*i32")
    types |= dict.fromkeys(("limit", "alpha", "offset"), "fp32")
    types = {name: types.get(name, "i32") for name in kernel.arg_names}
    return compile_kernel(kernel, types, constants, arch, tile.warps, tile.stages)


def compile_small(name: str, arch: int, experts: int = 256, top_k: int = 8) -> Compiled:
    """A kernel around the products, one of SMALL, for its largest case."""
    kernel = weighted_sum if name.startswith("weighted_sum") else getattr(ordering, name)
    given = {
        "ALL": ordering.AT_ONCE, "EXPERTS": 2 * experts, "ROWS": 16, "PLACED": ordering.PLACED, "PART": ordering.PART,
        "SLOTS": top_k, "SPLITS": SMALL[name], "BH": 1024,
    }  # fmt: skip
    constants = {n: value for n, value in given.items() if n in kernel.arg_names}
    pointers = {"ids": "*i64", "weights": "*fp32", "y": "*bf16" if SMALL[name] == 1 else "*fp32", "out": "*bf16"}
    pointers |= dict.fromkeys(("picks", "expert", "start", "count", "found", "ends"), "*i32")
    types = {n: pointers.get(n, "i32") for n in kernel.arg_names}
    return compile_kernel(kernel, types, constants, arch, 8 if name == "_place" else 4, 3)


def compile_kernel(
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], arch: int, warps: int, stages: int
) -> Compiled:
    """types: of all arguments, as Triton writes them; those in `constants` are compiled in. arch: 80, 90 or 100."""
    names = list(kernel.arg_names)
    source = ASTSource(
        kernel, signature={n: "constexpr" if n in constants else types[n] for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in names if n in ALIGNED and n not in constants},
    )  # fmt: skip
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps, "num_stages": stages})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage, code = _tool("cuobjdump", "--dump-resource-usage", file.name), _tool("nvdisasm", file.name)
    registers = int(re.findall(r"REG:(\d+)", usage)[0])
    found = re.findall(r"\b(HMMA|HGMMA|QGMMA|UTCHMMA|IMMA)\b", code)
    spilled = len(re.findall(r"\b(?:STL|LDL)\b", code))
    copies, fetches = (len(re.findall(rf"\b{name}\b", code)) for name in ("LDGSTS", "UTMALDG"))
    matrix = {n: found.count(n) for n in sorted(set(found))}
    return Compiled(registers, spilled, made.metadata.shared, matrix, copies, fetches, pending(made.asm["ptx"]))


def pending(ptx: str) -> int:
    """The most products that a kernel for Hopper lets run on over a wait, if one has its left operand in registers."""
    waits = re.findall(r"wgmma\.wait_group\.sync\.aligned\s+(\d+)", ptx)
    from_registers = re.search(r"wgmma\.mma_async[^;{]*\{[^}]*\},\s*\{", ptx)
    return max(map(int, waits), default=0) if from_registers else 0


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True, check=True).stdout


MODELS = {  # experts, hidden size, inner size, picks a token, turned
    "Qwen3": (128, 2048, 768, 8, False),
    "Mixtral": (8, 4096, 14336, 2, False),
    "gpt-oss": (128, 2880, 2880, 4, True),
}
TOKENS = (1, 4, 16, 64, 256, 512, 1024, 4096, 16384)
POOLED = (4, 4096)  # tokens for which products out of a pool of slots are compiled, too


def survey(every: int = 1) -> dict[str, Any]:
    """Every kernel that the rules come to (docs/kernels.md) for MODELS and TOKENS: the first case of each distinct one.

    every: only each so-manieth of them.
    """
    return {"triton": triton.__version__, "kernels": [make() for make in _cases()[::every]]}


def _cases() -> list[Callable[[], dict[str, Any]]]:
    found: list[Callable[[], dict[str, Any]]] = []
    for arch in MATRIX:
        made: dict[Any, Callable[[], dict[str, Any]]] = {}
        for format, (model, sizes), tokens, first in product(POINTERS, MODELS.items(), TOKENS, (True, False)):
            if format == "fp8" and arch < 89:  # the chip has no such numbers, and Triton does not make them
                continue
            if sizes[4] and format != "plain":  # no format keeps gates and ups in turns
                continue
            work = work_of(sizes, tokens, format, first)
            made.setdefault(kernel_of(work, arch, first), partial(_surveyed, arch, model, work, first))
        found += made.values()
        pooled = (partial(_surveyed, arch, "Qwen3", work_of(MODELS["Qwen3"], tokens, "plain", first), first, True)
                  for tokens, first in product(POOLED, (True, False)))  # fmt: skip
        found += [*pooled, *(partial(_small, arch, name) for name in SMALL)]
    return found


def work_of(sizes: tuple[int, int, int, int, bool], tokens: int, format: str, first: bool) -> Work:
    """One of the two products of a model of these sizes."""
    experts, hidden, inner, top_k, turned = sizes
    if first:
        return Work(experts, inner, hidden, top_k, tokens, 2, format, True, turned)
    return Work(experts, hidden, inner, top_k, tokens, 2, format, summed=True)


def kernel_of(work: Work, arch: int, first: bool) -> Any:
    """What is compiled for it by the rule, but for constants that decide nothing: equal where the machine code is."""
    tile = rule(work, arch)
    return arch, first, work.format, work.turned, tile, work.inputs % tile.inputs == 0


def _small(arch: int, name: str) -> dict[str, Any]:
    common = {"case": name, "arch": arch, "tile": {}, "expected": "", "fetched": False, "limit": SHARED_BYTES[arch]}
    return common | asdict(compile_small(name, arch))


def _surveyed(arch: int, model: str, work: Work, first: bool, table: bool = False) -> dict[str, Any]:
    name = f"{model}, {work.format}, {work.tokens} tokens, {'first' if first else 'second'} product{', pool' * table}"
    made = asdict(compile_product(work, arch, first, table=table))
    return {
        "case": name,
        "arch": arch,
        "tile": asdict(rule(work, arch)),
        "expected": MATRIX[arch],
        "fetched": rule(work, arch).tma,
        "limit": SHARED_BYTES[arch],
    } | made


if __name__ == "__main__":
    print(json.dumps(survey(*map(int, sys.argv[1:]))))
