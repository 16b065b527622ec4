"""`coterie bench offload`: a model with room for a quarter of its experts, the rest on disk, beside accelerate's disk offload.

The model of `bench experts` (1.8 GB in bfloat16, random weights, so that its routing is nearly even and a cache is of least
use), one sequence, a cold page cache before every token (as root; otherwise a row says that it was warm). Three figures bound
ours: what the same steps take with all experts in memory, what the disk gives when it is read straight through, what was read.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from coterie.launch.bench import Row
from coterie.launch.bench_experts import SIZES, SMALL, random_model
from coterie.launch.quiet import quiet_transformers
from coterie.moe.collectives import Group
from coterie.moe.model import Model, assembled
from coterie.moe.prepare import prepare
from coterie.offload.store import Piece

SHARE = 0.25
NEW, REPEATS = 8, 5
DROP = Path("/proc/sys/vm/drop_caches")
AGAINST_ACCELERATE, BOUND, DISK_SHARE = 6.0, 1.15, 0.85
CHUNK = 4 << 20
PAGE_OUT = 21  # MADV_PAGEOUT


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """Seconds a token, ours and accelerate's, in turns; `quick`: a small model."""
    quiet_transformers()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory(prefix="coterie-offload-", dir=Path.cwd()) as name:  # /tmp may be memory
        folder = Path(name)
        random_model(SMALL if options.quick else SIZES, torch.bfloat16).save_pretrained(folder / "model")
        share = prepare(folder / "model", None, "bfloat16", 1)
        slots = max(share.shape.top_k, round(SHARE * share.shape.num_experts * len(share.shape.layer_ids)))
        resident = _made(share)
        ours = _made(replace(share, slots=slots))
        peer, why = _accelerate(folder)
        cold = os.access(DROP, os.W_OK)
        yield Row("page cache", "dropped before every token", "", float(cold), higher=True, why="" if cold else "needs root")
        yield from _measured(ours, resident, peer, why, 1 if options.quick else REPEATS)


def _measured(ours: Model, resident: Model, peer: Any, why: str, repeats: int) -> Iterator[Row]:
    assert ours.cache is not None
    cache, case = ours.cache, f"room for {ours.cache.slots} of {ours.cache.slot_of.size} experts"
    times: dict[str, list[float]] = {"ours": [], "resident": [], "accelerate": [], "disk": []}
    read, stalled, asked, transferred = [], [], [], []
    for turn in range(repeats):
        _drop()
        times["disk"].append(_disk_rate(ours))
        before = replace(cache.statistics), ours.checkpoint.counter.bytes
        times["ours"].append(_seconds_per_token(ours.transformers, turn, cold=True))
        now = cache.statistics
        read.append((ours.checkpoint.counter.bytes - before[1]) / NEW)
        stalled.append((now.stalled_seconds - before[0].stalled_seconds) / NEW)
        asked.append(now.requests - before[0].requests)
        transferred.append(now.transfers - before[0].transfers)
        times["resident"].append(_seconds_per_token(resident.transformers, turn))
        if peer is not None:
            times["accelerate"].append(_seconds_per_token(peer, turn, cold=True))
    found = {name: statistics.median(values) if values else None for name, values in times.items()}
    disk, mine, whole = (found[name] or 0.0 for name in ("disk", "ours", "resident"))
    bytes_read = statistics.median(read)
    yield Row(case, "disk, read straight through with O_DIRECT", "GB/s", disk / 1e9, higher=True)
    yield Row(case, "decode", "tokens/s", 1 / mine, None, {"all in memory": 1 / whole}, higher=True)
    theirs = None if found["accelerate"] is None else 1 / found["accelerate"]
    over = None if theirs is None else 1 / mine / theirs
    yield Row(case, "decode over accelerate's disk offload", "x", over, AGAINST_ACCELERATE, {}, higher=True, why=why)
    yield Row(case, "accelerate's disk offload", "tokens/s", theirs, higher=True, why=why)
    bound = max(whole, bytes_read / disk)
    yield Row(case, "time per token over the larger of computing and reading", "x", mine / bound, BOUND)
    yield Row(case, "read", "MB/token", bytes_read / 1e6)
    yield Row(case, "hit rate", "", 1 - statistics.median(transferred) / statistics.median(asked), higher=True)
    yield Row(case, "share of the time that reads were waited for", "", statistics.median(stalled) / mine)
    yield Row(case, "disk's rate while computing, of its rate straight through", "", bytes_read / mine / disk, higher=True)


def _made(share: Any) -> Model:
    return assembled(share, share.read(0), None, Group())


def _accelerate(folder: Path) -> tuple[Any, str]:
    """The same checkpoint with its experts on disk as accelerate has it; None and why if it cannot."""
    from transformers import AutoModelForCausalLM

    layers = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16).config.num_hidden_layers
    places: dict[str, str] = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        places |= dict.fromkeys((f"{at}.self_attn", f"{at}.input_layernorm", f"{at}.post_attention_layernorm"), "cpu")
        places |= {f"{at}.mlp.gate": "cpu", f"{at}.mlp.experts": "disk"}
    try:
        made = AutoModelForCausalLM.from_pretrained(
            folder / "model", dtype=torch.bfloat16, device_map=places, offload_folder=folder / "accelerate"
        )
    except (ValueError, RuntimeError, OSError, NotImplementedError) as error:
        return None, f"accelerate: {str(error).splitlines()[0][:160]}"
    return made.eval(), ""


def _drop() -> None:
    """Forget what the system has cached of files, where we may; mapped pages of files first, which it would keep."""
    if not os.access(DROP, os.W_OK):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "coterie-offload-" in line:
            first, last = (int(number, 16) for number in line.split()[0].split("-"))
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), PAGE_OUT)
    os.sync()
    DROP.write_text("1")


def _disk_rate(model: Model) -> float:
    """Bytes a second of the checkpoint's file, read from its beginning in large pieces by the store's own readers."""
    assert model.cache is not None
    store = model.cache.store
    file = next(iter(next(iter(store.records[0][0].values())).pieces)).file
    size = min(file.stat().st_size, 256 << 20)
    pieces = [Piece(file, offset, min(CHUNK, size - offset)) for offset in range(0, size, CHUNK)]
    read: Callable[[Piece], object] = lambda piece: store.staged(piece.file, piece.offset, piece.length)  # noqa: E731
    before, started = store.counter.bytes, time.perf_counter()
    list(store.readers.map(read, pieces))
    took = time.perf_counter() - started
    store.counter.bytes = before  # not the model's
    return size / took


@torch.no_grad()
def _seconds_per_token(model: Any, turn: int, cold: bool = False) -> float:
    """Decode of NEW tokens after a prompt of 8, which is not counted; others in each turn. cold: drop caches before each."""
    ids = torch.randint(100, 4000, (1, 8 + NEW), generator=torch.Generator().manual_seed(turn))
    cache, spent = model(ids[:, :8], use_cache=True).past_key_values, 0.0
    for step in range(NEW):
        if cold:
            _drop()
        started = time.perf_counter()
        model(ids[:, 8 + step : 9 + step], past_key_values=cache, use_cache=True)
        spent += time.perf_counter() - started
    return spent / NEW
