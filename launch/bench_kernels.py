"""`coterie bench kernels`: a layer's experts on a GPU beside the physical floor and others' kernels. On a CPU: `bench experts`.

The whole layer in a CUDA graph, weights rotated past the L2 cache, random data, medians. The floor is what reading
the weights of the experts hit once, or the products, take at the rates measured in the same run. Without a GPU one row says
so. `--compile F` needs none: it looks into the machine code (`kernels/cubin.py`). `--tune F` makes a table of tiles.
`--peers DIR`: wheels of vLLM and SGLang, whose kernels are then timed too (`kernel_peers.py`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch

from coterie.kernels import tiles
from coterie.launch.bench import Row, named
from coterie.routing.errors import CoterieError, InputError, first_line
from coterie.routing.files import check_writable, write_text

TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
QUICK_TOKENS = (1, 64, 4096)
QUICK_TILES = 12  # pairs that are tried of one cell
FORMATS = ("plain", "int8", "int4", "fp8")
DECODE = 16  # tokens up to which launches rule
REPEATS = 15
OURS = "ours"
FIXED, SHARE = 15e-6, 0.85  # a layer of few tokens: its floor / SHARE + FIXED
STREAMING, DENSE, DENSEST = 0.88, 440e12, 530e12
LARGEST_BYTES = 60e9  # of one shape's weights


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """All cells; `quick`: two shapes, three sizes of batch, plain weights."""
    _check_together(options)
    if options.compile is not None:
        check_writable(options.compile)
        yield from compiled_rows(options.compile)
        return
    if options.tune is not None:
        check_writable(options.tune)
        yield from _tuned(options)
        return
    yield from gpu_rows(options.quick, options.only, options.peers)


def _check_together(options: argparse.Namespace) -> None:
    """Raises InputError if an option would be without effect beside another."""
    given = {name: getattr(options, name) for name in ("compile", "tune", "only", "peers", "quick")}
    for one, others in {"compile": ("tune", "only", "peers", "quick"), "tune": ("peers",)}.items():
        for other in others:
            if given[one] is not None and given[other]:
                raise InputError(f"--{other}: found it with --{one}, expected one of them: --{one} takes all shapes")


def gpu_rows(quick: bool, only: str = "", wheels: Path | None = None) -> Iterator[Row]:
    """Microseconds of one layer, by shape, format and number of tokens; without a GPU one row that says so.

    only: shapes whose name contains it. wheels: a folder with vLLM's and SGLang's, where they are not installed.
    """
    shapes = chosen_shapes(quick, only)
    if wheels is not None and not wheels.is_dir():
        raise InputError(f"--peers: found no folder {wheels}, expected one with vllm-*.whl or sglang-*.whl in it")
    if not torch.cuda.is_available():
        yield Row("GPU", "layer", "us", None, why="needs a GPU")
        return
    from coterie.launch.kernel_cases import measure_machine

    machine = measure_machine("cuda")
    yield Row("GPU", "copy, read and written", "TB/s", machine.bandwidth / 1e12, higher=True)
    yield Row("GPU", "bfloat16 product of 8192 x 8192", "TFLOP/s", machine.rate / 1e12, higher=True)
    with tempfile.TemporaryDirectory() as room:
        packages = found_packages(wheels, Path(room))
        for shape, format in product(shapes, FORMATS[:1] if quick else FORMATS):
            yield from shape_rows(shape, format, QUICK_TOKENS if quick else TOKENS, machine, "cuda", packages)


def found_packages(wheels: Path | None, room: Path) -> dict[str, Any]:
    """Other packages' kernels by name, each a `kernel_peers.Peer`, or the reason why it cannot be had."""
    from coterie.launch.kernel_peers import NAMES, load_peer
    from coterie.launch.wheel_files import PeerMissing

    found: dict[str, Any] = {}
    for package, name in NAMES.items():
        try:
            peer = load_peer(package, wheels, room)
            found[peer.name] = peer
        except PeerMissing as error:
            found[name] = str(error)
    return found


def chosen_shapes(quick: bool, only: str) -> list[Any]:
    """Those whose name contains `only`. Raises InputError if there is none."""
    from coterie.launch.kernel_cases import SHAPES

    shapes = {shape.name: shape for shape in (SHAPES[1:3] if quick else SHAPES)}
    return [shapes[name] for name in named(shapes, only)]


def too_large(shape: Any, format: str) -> bool:
    """Whether a shape's weights are more than a device is given."""
    from coterie.launch.kernel_cases import STORED

    return bool(shape.experts * shape.weights * STORED[format] > LARGEST_BYTES)


def shape_rows(
    shape: Any, format: str, tokens: tuple[int, ...], machine: Any, device: str, packages: dict[str, Any] | None = None
) -> Iterator[Row]:
    """One shape's rows. Where a kernel fails the row says how, and the others are still measured.

    packages: as `found_packages`.
    """
    from coterie.launch.kernel_cases import Layer

    case = f"{shape.name}, {format}"
    if too_large(shape, format):
        yield Row(case, "layer", "us", None, why="its weights do not fit")
        return
    try:
        layer = Layer(shape, format, device)
    except torch.cuda.OutOfMemoryError as error:
        yield Row(case, "layer", "us", None, why=f"its weights do not fit ({first_line(error)})")
        return
    for count in tokens:
        inputs = layer.inputs(count)
        hit = len(set(inputs[1].flatten().tolist()))
        floor = machine.floor(shape, count, format, hit)
        found, failures = _in_turns(layer, count, packages or {})
        seconds = found.pop(OURS)
        if seconds is not None:
            try:
                layer.check(layer.ours(inputs)(0), inputs)
            except Exception as error:  # wrong, or no room to find out
                failures.append(f"{OURS}: {first_line(error, 200)}")
                seconds = None
        peers = {name: None if took is None else 1e6 * took for name, took in found.items()}
        why = "; ".join(failures)
        if seconds is None:
            yield Row(case, f"layer, {count} tokens", "us", None, None, peers, why=why)
            continue
        most = allowed(shape, count, format, machine, min((p for p in peers.values() if p is not None), default=None), hit)
        bar = None if most is None else 1e6 * most
        yield Row(case, f"layer, {count} tokens", "us", 1e6 * seconds, bar, peers, why=why)
        yield Row(case, f"share of the floor, {count} tokens", "", floor / seconds, higher=True)


def _in_turns(layer: Any, tokens: int, packages: dict[str, Any]) -> tuple[dict[str, float | None], list[str]]:
    """Median seconds of ours and of each peer on the same inputs, taking turns; None for what failed, and how it did.

    A kernel, others' or one tile of ours, may fail as it likes: that must not cost all other figures.
    """
    from coterie.launch.kernel_cases import median, prepared, shared_pool

    inputs, pool = layer.inputs(tokens), shared_pool(layer.device)
    asked = [(OURS, lambda: layer.ours(inputs)), *layer.peers(inputs, packages)]
    ready: dict[str, Callable[[], float]] = {}
    failures = [f"{name}: {made}" for name, made in asked if isinstance(made, str)]
    for name, made in asked:
        try:
            if not isinstance(made, str):
                ready[name] = prepared(made(), layer.copies, layer.device, pool)
        except Exception as error:
            failures.append(f"{name}: {first_line(error, 200)}")
    taken: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(REPEATS):
        for name in list(ready):
            try:
                taken[name].append(ready[name]())
            except Exception as error:
                failures.append(f"{name}: {first_line(error, 200)}")
                del ready[name]
    return {name: median(taken[name]) if name in ready else None for name, _ in asked}, failures


def allowed(shape: Any, tokens: int, format: str, machine: Any, peer: float | None, hit: float | None = None) -> float | None:
    """Seconds that a layer may take, None where no bar is stated; peer: microseconds of the fastest other kernel, or None.

    hit: experts, None for as many as `tokens` visit on average.

    Up to 16 tokens the floor / .85 + 15 us; where memory rules the floor / .88; where the products rule at the rates named
    above; in between, where neither bar is stated, the peer's time. Never more than the peer's, of which at most 64 tokens
    must take at most 1 / 1.15 unless they reach 95% of the floor.
    """
    limits, floor = [], machine.floor(shape, tokens, format, hit)
    per_expert = tokens * shape.top_k / max(shape.hit(tokens), 1e-9)
    if tokens <= DECODE:
        limits.append(floor / SHARE + FIXED)
    elif 64 <= tokens <= 1024 and floor > shape.flops(tokens) / machine.rate:
        limits.append(floor / STREAMING)
    if format == "plain" and (tokens >= 16384 or (tokens >= 4096 and per_expert >= 1024)):
        limits.append(shape.flops(tokens) / DENSEST)
    elif format == "plain" and tokens >= 4096 and per_expert >= 200:
        limits.append(shape.flops(tokens) / DENSE)
    if peer is not None:
        limits.append(max(peer / 1.15e6, floor / 0.95) if tokens <= 64 else peer / 1e6)
    return min(limits, default=None)


def sources_digest() -> str:
    """Of all that decides what kernels are compiled, but for Triton."""
    folder = Path(tiles.__file__).parent
    made = hashlib.sha256()
    for name in ("activations", "cubin", "formats", "grouped_gemm", "ordering", "tiles"):
        made.update((folder / f"{name}.py").read_bytes())
    return made.hexdigest()


def compiled_rows(out: Path, every: int = 1) -> Iterator[Row]:
    """Every product by the rules' tiles for three generations of GPUs, compiled and looked into; written to `out`.

    every: only each so-manieth of them.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ended = subprocess.run(
        [sys.executable, "-m", "coterie.kernels.cubin", str(every)], env=environment, capture_output=True, text=True
    )  # in a process of its own: kernels are compiled or interpreted for good
    if ended.returncode:
        raise CoterieError(f"bench kernels --compile: {(ended.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    found = {"sources": sources_digest()} | json.loads(ended.stdout)
    write_text(out, json.dumps(found, indent=1) + "\n")
    for entry in found["kernels"]:
        case = f"sm_{entry['arch']}, {entry['case']}"
        yield Row(case, "spilled registers", "instructions", entry["spilled"], 0)
        yield Row(case, "shared memory", "bytes", entry["shared"], entry["limit"])
        yield Row(case, "products pending whose registers the next step writes", "", entry["pending"], 0)
        if entry["expected"]:
            yield Row(case, f"{entry['expected']} instructions", "", entry["matrix"].get(entry["expected"], 0), 1, higher=True)
        if entry["fetched"]:
            yield Row(case, "tiles fetched by UTMALDG", "instructions", entry["fetches"], 1, higher=True)


def _tuned(options: argparse.Namespace) -> Iterator[Row]:
    """Tries tiles around the rule's for every shape and number of tokens; the fastest go to the table."""
    if not torch.cuda.is_available():
        raise InputError("--tune: found no GPU, expected one: a table holds what was measured on it")
    import triton

    from coterie.kernels.tiles import table_text
    from coterie.launch.kernel_cases import Layer, median, timed

    shapes, counts = chosen_shapes(options.quick, options.only), QUICK_TOKENS if options.quick else TOKENS
    entries = []
    for shape, format in product(shapes, FORMATS[:1] if options.quick else FORMATS):
        layer = Layer(shape, format, "cuda")
        for count in counts:
            works, inputs, best = _works(shape, format, count), layer.inputs(count), None
            for pair in islice(_candidates(works), QUICK_TILES if options.quick else None):
                try:
                    call = layer.ours(inputs, pair)
                    seconds = median(timed(call, layer.copies, "cuda", 5))
                    if best is None or seconds < best[0]:
                        layer.check(call(0), inputs)
                        best = seconds, pair
                except Exception as error:  # a tile that does not compile or fit is no candidate
                    print(f"{shape.name}, {format}, {count} tokens, {pair}: {first_line(error, 80)}", file=sys.stderr)
            if best is None:
                raise CoterieError(f"{shape.name}, {format}, {count} tokens: no tile runs")
            span = (count // 2 + 1 if count > 1 else 1, 2 * count)  # elsewhere the rule knows more than a table
            entries += [(work, span, tile) for work, tile in zip(works, best[1], strict=True)]
            made = table_text(torch.cuda.get_device_name(), triton.__version__, entries)
            write_text(options.tune, made)  # a day may end at any time
            yield Row(f"{shape.name}, {format}", f"layer, {count} tokens, best tiles {best[1]}", "us", 1e6 * best[0])


def _works(shape: Any, format: str, tokens: int) -> tuple[Any, Any]:
    from coterie.kernels.tiles import Work

    common = {"top_k": shape.top_k, "tokens": tokens, "format": format}
    return (
        Work(shape.experts, shape.inner, shape.hidden, doubled=True, turned=shape.turned, **common),
        Work(shape.experts, shape.hidden, shape.inner, summed=True, **common),
    )


def _candidates(works: tuple[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """Pairs of tiles with equally many rows: the rule's, others around it, and what each way of loading and parts come to."""
    from coterie.kernels.tiles import SHARED_BYTES, SPLITS, rule, shared_bytes

    by_rule = (rule(works[0]), rule(works[1]))
    yield by_rule
    if (
        works[0].format == "plain"
        and not works[0].turned
        and not works[0].inputs % by_rule[0].inputs
        and not works[1].inputs % by_rule[1].inputs
    ):
        yield replace(by_rule[0], tma=not by_rule[0].tma), replace(by_rule[1], tma=not by_rule[1].tma)
    if by_rule[0].swap and not works[0].turned:
        other = 64 if by_rule[0].outputs == 32 else 32
        yield replace(by_rule[0], outputs=other, fold=other == 32), by_rule[1]
    if by_rule[0].swap:
        yield from ((by_rule[0], replace(by_rule[1], splits=n)) for n in SPLITS if n != by_rule[1].splits)
    rows = sorted({max(16, by_rule[0].rows // 2), by_rule[0].rows, min(128, by_rule[0].rows * 2)})
    for count, outputs, warps, stages, swap in product(rows, (32, 64, 128), (4, 8), (3, 4, 5), (False, True)):
        if swap and outputs < 64:
            continue
        tried: dict[str, Any] = {"rows": count, "outputs": outputs, "warps": warps, "stages": stages, "swap": swap}
        pair = (replace(by_rule[0], fold=False, **tried), replace(by_rule[1], **tried))
        if all(shared_bytes(t, w, stages) <= SHARED_BYTES[90] for t, w in zip(pair, works, strict=True)) and pair != by_rule:
            yield pair
