"""Experts in pinned host memory behind a GPU's slots: `python bench/gpu_offload.py FOLDER [--layers N]`, a JSON object a line.

A model in the shape of Qwen3-30B-A3B with fewer layers and random weights is written to FOLDER, unless it is there already.
Beside each other, decode of one sequence: all experts on the GPU; room there for a half and for a quarter of them, all in host
memory. The bound is the larger of the resident time and of the bytes of missed experts over the rate measured of the link.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import astuple, fields, replace
from pathlib import Path

import torch

from coterie.launch.offload_cases import write_huge
from coterie.moe.collectives import Group
from coterie.moe.model import Model, assembled
from coterie.moe.prepare import prepare
from coterie.offload.cache import CacheStatistics

PROMPT, NEW, REPEATS = 16, 24, 5


def link_rate(size: int = 1 << 28) -> float:
    """Bytes a second from pinned memory, best of 5."""
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    there, took = torch.empty(size, dtype=torch.uint8, device="cuda"), []
    for _ in range(5):
        torch.cuda.synchronize()
        started = time.perf_counter()
        there.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        took.append(time.perf_counter() - started)
    return size / min(took)


def made(folder: Path, slots: int | None, misses: str = "fetch") -> Model:
    """The model on the GPU with so many experts there, None for all."""
    share = replace(prepare(folder, None, "bfloat16", 1), slots=slots, misses=misses)
    return assembled(share, share.read(0), None, Group())


@torch.no_grad()
def decode(model: Model, turn: int) -> tuple[float, CacheStatistics]:
    """Seconds of NEW tokens after a prompt that is not counted, and what the cache did for them."""
    ids = torch.randint(100, 4000, (1, PROMPT + NEW), generator=torch.Generator().manual_seed(turn)).to(model.device)
    past = model.transformers(ids[:, :PROMPT], use_cache=True).past_key_values
    before = CacheStatistics() if model.cache is None else replace(model.cache.statistics)
    _synchronise(model)
    started = time.perf_counter()
    for step in range(PROMPT, PROMPT + NEW):
        model.transformers(ids[:, step : step + 1], past_key_values=past, use_cache=True)
    _synchronise(model)
    took = time.perf_counter() - started
    now = CacheStatistics() if model.cache is None else model.cache.statistics
    return took, CacheStatistics(*(a - b for a, b in zip(astuple(now), astuple(before), strict=True)))


def _synchronise(model: Model) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def turns(model: Model) -> tuple[float, dict[str, float]]:
    """The median time of a token, and what the cache did for it."""
    decode(model, 99)
    found = [decode(model, turn) for turn in range(REPEATS)]
    seconds = statistics.median(took for took, _ in found) / NEW
    if model.cache is None:
        return seconds, {}
    middle = {field.name: statistics.median(getattr(did, field.name) for _, did in found) for field in fields(CacheStatistics)}
    found_there = 1 - (middle["transfers"] + middle["on_host"]) / middle["requests"]
    return seconds, {"hit_rate": found_there, **{f"{name}_per_token": value / NEW for name, value in middle.items()}}


def main(folder: Path, layers: int, say: Callable[[dict[str, object]], None]) -> None:
    """One line a case."""
    if not (folder / "model.safetensors.index.json").is_file():
        write_huge(folder, layers)
    rate = link_rate() if torch.cuda.is_available() else None
    say({"case": "link", "bytes_per_second": rate, "device": torch.cuda.get_device_name() if rate else "none"})
    resident = made(folder, None)
    whole, _ = turns(resident)
    say({"case": "all on the device", "seconds_per_token": whole})
    experts = resident.shape.num_experts * len(resident.shape.layer_ids)
    del resident
    for share in (0.5, 0.25):
        for misses in ("fetch", "auto") if rate else ("fetch",):
            model = made(folder, round(share * experts), misses)
            assert model.cache is not None
            took, did = turns(model)
            one = sum(pool[0].nbytes for pool in model.cache.pools.values())
            bound = None if rate is None else max(whole, did["missed_per_token"] * one / rate)
            over = None if bound is None else took / bound
            say({"case": f"{share:.0%} there", "misses": misses, "seconds_per_token": took, "over_bound": over, **did})
            model.close()
            del model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=12)
    options = parser.parse_args()
    main(options.folder, options.layers, lambda row: print(json.dumps(row), flush=True))
