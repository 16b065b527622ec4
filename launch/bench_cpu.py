"""The CPU part of `coterie bench kernels`: a model of 1.8 GB with random weights, decode and prefill, beside transformers' own.

8 layers, 64 experts, top-8, in the shape of Qwen3-MoE. All sides are one model in one process, taking turns; medians.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from coterie.kernels.cpu import multiplies_bfloat16
from coterie.launch.bench import Row
from coterie.launch.quiet import quiet_transformers

SIZES = {"hidden_size": 1024, "moe_intermediate_size": 512, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 8}
SMALL = SIZES | {"hidden_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 2}
PROMPT, NEW, REPEATS = 512, 32, 5
PEERS = ("eager", "batched_mm", "grouped_mm")


def cpu_rows(quick: bool) -> Iterator[Row]:
    """Tokens per second: one sequence, `NEW` new tokens after a short prompt; and a prompt of 512."""
    quiet_transformers()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    has = "with" if multiplies_bfloat16() else "without"
    case = f"CPU {has} bfloat16 instructions, {torch.get_num_threads()} threads"
    models: dict[torch.dtype, Any] = {
        dtype: _model(SMALL if quick else SIZES, dtype) for dtype in (torch.float32, torch.bfloat16)
    }
    repeats = 2 if quick else REPEATS
    peers: dict[tuple[torch.dtype, str], dict[str, float | None]] = {}
    for dtype, model in models.items():
        sides = {name: _with(model, name) for name in (*PEERS, "coterie")}
        for phase, run in (("decode", _decode), ("prefill", _prefill)):
            skip = {"batched_mm"} if phase == "prefill" else set()  # a copy of the weights for each token: minutes
            speeds = _in_turns({n: use for n, use in sides.items() if n not in skip}, model, run, repeats)
            peers[dtype, phase] = {f"transformers {n}, {_name(dtype)}": s for n, s in speeds.items() if n != "coterie"}
            against = peers[dtype, phase]
            if dtype == torch.bfloat16:
                against = against | peers[torch.float32, phase]
            bar = max(speed for speed in against.values() if speed is not None)
            yield Row(f"{case}, {phase}, {_name(dtype)}", "coterie", "tokens/s", speeds["coterie"], bar, against, higher=True)
    yield from _quantised(models[torch.bfloat16], case, repeats)


def _quantised(model: Any, case: str, repeats: int) -> Iterator[Row]:
    from coterie.moe.quantise import quantise_experts

    for format in ("int8", "int4"):
        made = _model_like(model)
        quantise_experts(made, format)
        for phase, run in (("decode", _decode), ("prefill", _prefill)):
            speed = _in_turns({"coterie": _with(made, "coterie")}, made, run, repeats)["coterie"]
            yield Row(f"{case}, {phase}, {format}", "coterie", "tokens/s", speed, higher=True)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _model(sizes: dict[str, int], dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=4096, num_attention_heads=8, num_key_value_heads=4, head_dim=sizes["hidden_size"] // 8,
        intermediate_size=2 * sizes["hidden_size"], max_position_embeddings=4096, **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def _model_like(model: Any) -> Any:
    from transformers import AutoModelForCausalLM

    made = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype).eval()
    made.load_state_dict(model.state_dict())
    return made


def _with(model: Any, implementation: str) -> Callable[[], None]:
    return lambda: model.set_experts_implementation(implementation)


def _in_turns(sides: dict[str, Callable[[], None]], model: Any, run: Callable[[Any], float], repeats: int) -> dict[str, float]:
    """Tokens per second of each side; the first round is not counted."""
    import coterie.moe.layer  # noqa: F401  registers the implementation

    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, use in sides.items():
            use()
            speed = run(model)
            found[name] += [speed] if turn else []
    return {name: statistics.median(speeds) for name, speeds in found.items()}


@torch.no_grad()
def _decode(model: Any) -> float:
    ids = torch.arange(8)[None] + 100
    out = model(ids, use_cache=True)
    cache, started = out.past_key_values, time.perf_counter()
    for step in range(NEW):
        model(ids[:, step % 8 : step % 8 + 1], past_key_values=cache, use_cache=True)
    return NEW / (time.perf_counter() - started)


@torch.no_grad()
def _prefill(model: Any) -> float:
    ids = torch.arange(PROMPT)[None] % model.config.vocab_size
    started = time.perf_counter()
    model(ids, use_cache=True)
    return PROMPT / (time.perf_counter() - started)
