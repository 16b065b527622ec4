"""`coterie bench offload`: models with room for a part of their experts, the rest on disk, beside accelerate and llama.cpp.

A model of 6.5 GB in bfloat16 with room for a quarter of its experts, random weights, its routing replayed from a recorded
trace; one sequence, a cold page cache before every token (as root; otherwise a row says that it was warm). llama.cpp maps its
file and routes by its own routers. Three figures bound ours: what the same steps take with all experts in memory, what the disk
gives when it is read straight through, what was read. Then the memory that whole processes take, and a model larger than this
machine's memory.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import coterie
from coterie.launch import offload_cases as cases
from coterie.launch.available import shared_out_bytes, usable_cores
from coterie.launch.bench import Row
from coterie.launch.memory import parse_bytes
from coterie.launch.packing import contents_of
from coterie.launch.quiet import quiet_transformers
from coterie.moe.model import Model
from coterie.offload.pack import pack
from coterie.routing.errors import CoterieError

SHARE = 0.25
NEW, PEERS_NEW, WARM, REPEATS = 16, 2, 48, 5
AGAINST_ACCELERATE, AGAINST_LLAMA, BOUND, DISK_SHARE, OVER_BUDGET = 6.0, 3.0, 1.15, 0.85, 1.03
HUGE_LAYERS, HUGE_BUDGET = 25, 3_000_000_000
SAMPLED = 0.1  # seconds between two looks at a process's memory
IN_MEMORY = "all in memory"


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """`quick`: a small model, and nothing that takes minutes to write."""
    quiet_transformers()
    with tempfile.TemporaryDirectory(prefix=cases.PREFIX, dir=Path.cwd()) as name:  # /tmp may be memory
        folder = Path(name)
        cold = os.access(cases.DROP, os.W_OK)
        yield Row("page cache", "dropped before every token", "", float(cold), higher=True, why="" if cold else "needs root")
        yield from _decoded(folder, options)
        yield from _within_budgets(folder / "model", options.quick)
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not options.quick:
            yield from _larger_than_memory(folder)


def _decoded(folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    model = folder / "model"
    no_llama = cases.write_model(cases.SMALL if options.quick else cases.LARGE, model)
    pack(contents_of(str(model)), folder / "packed")
    resident = cases.ours(model, None)
    slots = max(resident.shape.top_k, round(SHARE * resident.shape.num_experts * len(resident.shape.layer_ids)))
    made = {"in place": cases.ours(model, slots), "packed": cases.ours(model, slots, folder / "packed")}
    replay, routing = cases.replayed(options.traces)
    placed, no_accelerate = cases.accelerate(model, len(resident.shape.layer_ids))
    cores = usable_cores()
    peers: dict[str, cases.Sequence | cases.Llama] = {IN_MEMORY: cases.Sequence(resident.transformers, replace(replay))}
    if placed is not None:
        peers["accelerate"] = cases.Sequence(placed, replace(replay))
    if not no_llama:
        peers["llama.cpp"] = cases.Llama(model.with_suffix(".gguf"), cores)
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    case = f"{size / 1e9:.1f} GB, room for {slots} of {resident.shape.num_experts * len(resident.shape.layer_ids)} experts"
    yield Row(case, f"routing {routing}", "", float(replay.ids is not None), higher=True)
    found = {name: _Ours(one, cases.Sequence(one.transformers, replace(replay))) for name, one in made.items()}
    torch.set_num_threads(cores)
    for side in found.values():
        cases.seconds_per_token(side.sequence, cases.prompted(side.sequence, 0, WARM), cold=False)
    times: dict[str, list[float]] = {name: [] for name in (IN_MEMORY, "accelerate", "llama.cpp")}
    for turn in range(REPEATS):
        position = WARM + cases.PROMPT + turn * (NEW + cases.PROMPT)
        for side in found.values():
            side.measure(position)
        for name, peer in peers.items():
            tokens = cases.prompted(peer, position, PEERS_NEW)
            times[name].append(cases.seconds_per_token(peer, tokens, cold=True))
    speeds = {name: 1 / statistics.median(values) if values else None for name, values in times.items()}
    for name, side in found.items():
        yield from side.rows(f"{case}, {name}", speeds, {"accelerate": no_accelerate, "llama.cpp": no_llama})


class _Ours:
    """What was measured of one of our models, by turn."""

    def __init__(self, made: Model, sequence: cases.Sequence) -> None:
        self.made, self.sequence = made, sequence
        self.spare = cases.spare_slots(made)
        self.disk: list[float] = []
        self.into_slots: list[float] = []
        self.seconds: list[float] = []
        self.read: list[float] = []
        self.missed: list[float] = []
        self.stalled: list[float] = []
        self.hits: list[float] = []

    def measure(self, position: int) -> None:
        """One turn."""
        assert self.made.cache is not None
        cache, counter = self.made.cache, self.made.checkpoint.counter
        cases.drop()
        self.disk.append(cases.disk_rate(self.made))
        self.into_slots.append(cases.store_rate(self.made, self.spare))
        tokens = cases.prompted(self.sequence, position, NEW)
        before, read = replace(cache.statistics), counter.bytes
        self.seconds.append(cases.seconds_per_token(self.sequence, tokens, cold=True))
        now = cache.statistics
        self.read.append((counter.bytes - read) / NEW)
        useful = (now.missed - before.missed) / max(1, now.transfers - before.transfers)  # the rest was read for nothing
        self.missed.append(self.read[-1] * useful)
        self.stalled.append((now.stalled_seconds - before.stalled_seconds) / NEW)
        self.hits.append(1 - (now.transfers - before.transfers) / (now.requests - before.requests))

    def rows(self, case: str, peers: dict[str, float | None], missing: dict[str, str]) -> Iterator[Row]:
        """peers: tokens/s."""
        disk, mine, read, missed = (statistics.median(values) for values in (self.disk, self.seconds, self.read, self.missed))
        yield Row(case, "disk, read straight through with O_DIRECT", "GB/s", disk / 1e9, higher=True)
        into = statistics.median(self.into_slots) / 1e9
        yield Row(case, "experts read a few at a time into as much memory, nothing computed", "GB/s", into, higher=True)
        yield Row(case, "decode", "tokens/s", 1 / mine, None, peers, higher=True, why="; ".join(filter(None, missing.values())))
        for name, bar in (("accelerate", AGAINST_ACCELERATE), ("llama.cpp", AGAINST_LLAMA)):
            theirs, what = peers[name], "disk offload" if name == "accelerate" else "mapped file"
            over = None if theirs is None else 1 / mine / theirs
            yield Row(case, f"decode over {name}'s {what}", "x", over, bar, {}, higher=True, why=missing[name])
        whole = 1 / (peers[IN_MEMORY] or 1.0)
        bound = max(whole, missed / disk)
        yield Row(case, "time per token over the larger of computing and reading what is missed", "x", mine / bound, BOUND)
        share = read / mine / disk
        limited = read / disk > whole
        why = "" if limited else "the processor limits, not the disk"
        yield Row(case, "disk's rate while computing, of its rate straight through", "", share, DISK_SHARE if limited else None,
                  higher=True, why=why)  # fmt: skip
        yield Row(case, "read", "MB/token", read / 1e6)
        yield Row(case, "missed", "MB/token", missed / 1e6)
        yield Row(case, "hit rate", "", statistics.median(self.hits), higher=True)
        yield Row(case, "share of the time that reads were waited for", "", statistics.median(self.stalled) / mine)


def _within_budgets(model: Path, quick: bool) -> Iterator[Row]:
    """Whole processes of `coterie generate --memory`: the most memory that each had, over its budget."""
    refused = _generate(model, 1000, "").said
    said = re.search(r"expected ([0-9.]+ [GM]B) or more", refused)
    if said is None:
        raise CoterieError(f"generate --memory 1000: {refused.strip()[-300:]}")
    least = parse_bytes(said[1])
    for name, budget in (("the least", 1.01 * least), *(() if quick else (("1.5 times that", 1.5 * least), ("4 GB", 4e9)))):
        yield _peak(model, f"--memory of {name}", int(budget))


def _larger_than_memory(folder: Path) -> Iterator[Row]:
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free, case = shutil.disk_usage(folder).free, "a model larger than this machine's memory"
    needed = int(HUGE_LAYERS * 1.25e9)
    if needed < machine or free < needed + (4 << 30):
        why = f"it would have {needed / 1e9:.0f} GB; memory {machine / 1e9:.0f} GB, free on the disk {free / 1e9:.0f} GB"
        yield Row(case, "peak memory over the budget", "x", None, OVER_BUDGET, why=why)
        return
    size = cases.write_huge(folder / "huge", HUGE_LAYERS)
    yield Row(case, "weights", "GB", size / 1e9)
    yield _peak(folder / "huge", case, HUGE_BUDGET)


@dataclass(frozen=True)
class _Ended:
    """A process that has ended. shared_out: the most of `shared_out_bytes` that was seen of it."""

    status: int
    out: str
    said: str
    shared_out: int


def _peak(model: Path, case: str, budget: int) -> Row:
    ended = _generate(model, budget, "--json")
    if ended.status:
        return Row(case, "peak memory over the budget", "x", None, OVER_BUDGET, why=ended.said.strip().splitlines()[-1][:160])
    stats = json.loads(ended.out)["stats"]
    peak = max(stats["peak_memory_bytes"], ended.shared_out)  # by its own account, and seen from outside
    shown = {"tokens/s": stats["tokens_per_second"], "hit rate": stats["hit_rate"], "budget, GB": budget / 1e9}
    shown |= {"summed PSS over the budget": ended.shared_out / budget}
    why = ", ".join(f"{name} {value:.3g}" for name, value in shown.items() if value is not None)
    return Row(case, "peak memory over the budget", "x", peak / budget, OVER_BUDGET, why=why)


def _generate(model: Path, budget: int, *options: str) -> _Ended:
    prompts = model.with_suffix(".jsonl")
    prompts.write_text(json.dumps({"token_ids": list(range(100, 164))}) + "\n")
    command = [sys.executable, "-m", "coterie", "generate", str(model), "--prompts", str(prompts), "--max-new-tokens", "8"]
    command += ["--dtype", "bfloat16", "--memory", str(budget), *filter(None, options)]
    paths = os.pathsep.join(
        filter(None, [str(Path(coterie.__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")])
    )
    environment = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as said:
        run, most = subprocess.Popen(command, stdout=out, stderr=said, text=True, env=environment), 0
        while run.poll() is None:
            most = max(most, shared_out_bytes(run.pid) or 0)
            time.sleep(SAMPLED)
        for file in (out, said):
            file.seek(0)
        return _Ended(run.returncode, out.read(), said.read(), most)
