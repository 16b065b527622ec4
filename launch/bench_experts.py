"""`coterie bench experts`: a model of 1.8 GB with random weights on the CPU, decode and prefill, beside transformers' own.

Decode is of one sequence, after a few tokens and after many.

8 layers, 64 experts, top-8, in the shape of Qwen3-MoE. All sides are one model in one process, taking turns; medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from coterie.kernels.cpu import multiplies_bfloat16
from coterie.launch.available import usable_cores
from coterie.launch.bench import Row
from coterie.launch.llama_peer import KINDS, LlamaModel, missing, quantised, write_gguf
from coterie.launch.quiet import quiet_transformers
from coterie.moe.faster import slow_down, speed_up
from coterie.moe.kv import GrowingCache
from coterie.moe.layer import IMPLEMENTATION
from coterie.moe.quantise import quantise_experts

SIZES = {"hidden_size": 1024, "moe_intermediate_size": 512, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 8}
SMALL = SIZES | {"hidden_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 2}
PROMPT, NEW, REPEATS = 512, 32, 5
LONG = 2048  # tokens before those of a long text that are measured
DECODE, AFTER, PREFILL = "decode", "decode after a long text", "prefill"
PEERS = ("eager", "batched_mm", "grouped_mm")
PLAIN, ROUNDED = (torch.float32, torch.bfloat16), {"int8": ("Q8_0", 0.7), "int4": ("Q4_K_M", 0.6)}
LLAMA_SHARE = 0.9  # of llama.cpp's decode in bfloat16: its loops are written by hand for the processor
Speeds = dict[str, float | None]


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """Tokens per second of one sequence: `NEW` new ones after 8 and after `LONG`, a prompt of 512. `quick`: a small model."""
    quiet_transformers()
    torch.set_num_threads(usable_cores())
    models: dict[str, Any] = {_name(dtype): random_model(SMALL if options.quick else SIZES, dtype) for dtype in PLAIN}
    for format in ROUNDED:
        models[format] = _model_like(models["bfloat16"])
        quantise_experts(models[format], format)
    with tempfile.TemporaryDirectory(prefix="coterie-experts-") as folder:
        llamas, why = _llamas(models["bfloat16"], Path(folder))
        for phase in (DECODE, AFTER, PREFILL):
            speeds = _in_turns(_sides(models, llamas, phase), REPEATS)
            yield from _phase_rows(phase, speeds, why)


def _phase_rows(phase: str, speeds: Speeds, why: str) -> Iterator[Row]:
    has = "with" if multiplies_bfloat16() else "without"
    case = f"CPU {has} bfloat16 instructions, {torch.get_num_threads()} threads, {phase}"
    theirs = {n: s for n, s in speeds.items() if n.startswith("transformers")}
    for name in map(_name, PLAIN):
        peers = {n: s for n, s in theirs.items() if name == "bfloat16" or n.endswith(name)}
        against = theirs if phase == DECODE else {n: s for n, s in theirs.items() if n.endswith("float32")}
        bar = max(s for n, s in against.items() if n in peers and s is not None)
        if name == "bfloat16":
            peers["llama.cpp BF16"] = speeds["llama.cpp BF16"]
            if phase == DECODE:
                bar = max(bar, LLAMA_SHARE * (speeds["llama.cpp BF16"] or 0.0))
        yield Row(
            f"{case}, {name}", "coterie", "tokens/s", speeds[f"coterie {name}"],
            bar if name == "bfloat16" and phase != AFTER else None, peers, higher=True, why=why,
        )  # fmt: skip
    for format, (kind, share) in ROUNDED.items():
        peer = speeds[f"llama.cpp {kind}"]
        rounded_bar = share * peer if peer is not None and phase == DECODE else None
        yield Row(
            f"{case}, {format}", "coterie", "tokens/s", speeds[f"coterie {format}"], rounded_bar, {f"llama.cpp {kind}": peer},
            higher=True, why=why,
        )  # fmt: skip


def _llamas(model: Any, folder: Path) -> tuple[dict[str, LlamaModel | None], str]:
    """llama.cpp by kind of weights, all None with the reason if it is not there."""
    if why := missing():
        return dict.fromkeys(KINDS), why
    write_gguf(model, folder / "BF16.gguf")
    threads = torch.get_num_threads()
    return {kind: LlamaModel(quantised(folder / "BF16.gguf", kind, threads), threads) for kind in KINDS}, ""


def _sides(models: dict[str, Any], llamas: dict[str, LlamaModel | None], phase: str) -> dict[str, Callable[[], float] | None]:
    """What each side does in its turn; None where it is not there."""

    run = {DECODE: _decode, AFTER: _decode_after, PREFILL: _prefill}[phase]

    def ours(model: Any, implementation: str) -> Callable[[], float]:
        def turn() -> float:
            model.set_experts_implementation(implementation)
            (speed_up if implementation == IMPLEMENTATION else slow_down)(model)  # as `coterie.load` does
            return run(model)

        return turn

    sides: dict[str, Callable[[], float] | None] = {f"coterie {n}": ours(m, IMPLEMENTATION) for n, m in models.items()}
    for name in map(_name, PLAIN):
        for peer in PEERS:
            if phase != PREFILL or peer != "batched_mm":  # which copies the weights for each token: minutes
                sides[f"transformers {peer}, {name}"] = ours(models[name], peer)
    for kind, llama in llamas.items():
        sides[f"llama.cpp {kind}"] = None if llama is None else _llama_turn(llama, phase)
    return sides


def _llama_turn(llama: LlamaModel, phase: str) -> Callable[[], float]:
    if phase == PREFILL:
        return partial(llama.prefill, PROMPT)
    return partial(llama.decode, NEW) if phase == DECODE else partial(llama.decode, NEW, LONG)


def _in_turns(sides: dict[str, Callable[[], float] | None], repeats: int) -> Speeds:
    """Tokens per second of each side, medians; the first round is not counted."""
    found: dict[str, list[float]] = {name: [] for name, turn in sides.items() if turn is not None}
    for number in range(repeats + 1):
        for name, turn in sides.items():
            speed = turn() if turn is not None else 0.0
            if number and turn is not None:
                found[name].append(speed)
    return {name: statistics.median(found[name]) if name in found else None for name in sides}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def random_model(sizes: dict[str, int], dtype: torch.dtype) -> Any:
    """Qwen3-MoE of these sizes with random weights."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=4096, num_attention_heads=8, num_key_value_heads=4, head_dim=sizes["hidden_size"] // 8,
        intermediate_size=2 * sizes["hidden_size"], max_position_embeddings=4096, norm_topk_prob=True, **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def _model_like(model: Any) -> Any:
    from transformers import AutoModelForCausalLM

    made = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype).eval()
    made.load_state_dict(model.state_dict())
    return made


@torch.inference_mode()
def _decode(model: Any) -> float:
    ids = torch.arange(8)[None] + 100
    out = model(ids, use_cache=True)
    cache, started = out.past_key_values, time.perf_counter()
    for step in range(NEW):
        model(ids[:, step % 8 : step % 8 + 1], past_key_values=cache, use_cache=True)
    return NEW / (time.perf_counter() - started)


@torch.inference_mode()
def _decode_after(model: Any) -> float:
    """Keys and values of the text before are random: who computed them changes nothing."""
    config, ours = model.config, model.config._experts_implementation == IMPLEMENTATION
    cache = GrowingCache(LONG + NEW) if ours else DynamicCache()  # as `coterie generate` has it
    shape = (1, config.num_key_value_heads, LONG, config.head_dim)
    for layer in range(config.num_hidden_layers):
        cache.update(*(torch.randn(shape).to(model.dtype) for _ in range(2)), layer)
    ids = torch.arange(8)[None] + 100
    started = time.perf_counter()
    for step in range(NEW):
        model(ids[:, step % 8 : step % 8 + 1], past_key_values=cache, use_cache=True)
    return NEW / (time.perf_counter() - started)


@torch.inference_mode()
def _prefill(model: Any) -> float:
    ids = torch.arange(PROMPT)[None] % model.config.vocab_size
    started = time.perf_counter()
    model(ids, use_cache=True)
    return PROMPT / (time.perf_counter() - started)
