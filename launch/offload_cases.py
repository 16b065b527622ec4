"""The models of `coterie bench offload`, and its sides: ours, accelerate's and llama.cpp's, as far as they can be had here."""

from __future__ import annotations

import ctypes
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from coterie.launch.bench_experts import random_model
from coterie.launch.llama_peer import LlamaModel, missing, write_gguf
from coterie.launch.replay import Replay
from coterie.moe.collectives import Group
from coterie.moe.model import Model, assembled
from coterie.moe.prepare import prepare
from coterie.offload.slots import Slots
from coterie.offload.transfer import STAGE_BYTES, Request
from coterie.routing.errors import first_line
from coterie.routing.trace import read_trace

PREFIX = "coterie-offload-"  # of the folder that all files are in: what is mapped from there is paged out
RECORDED = "deepseek-v2-lite-intent.safetensors"
LARGE = {
    "hidden_size": 1024,
    "moe_intermediate_size": 640,
    "num_experts": 64,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 26,
}
SMALL = LARGE | {"hidden_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 2}
HUGE = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
DROP = Path("/proc/sys/vm/drop_caches")
PROMPT = 8
STRAIGHT = 512 << 20
AT_ONCE = 4  # experts
SETTLED = 0.05  # seconds after which the system has done with what it dropped
PAGE_OUT = 21  # MADV_PAGEOUT


def write_model(sizes: dict[str, int], folder: Path) -> str:
    """Random weights in bfloat16 as transformers writes them, and beside them for llama.cpp; why the latter is missing."""
    made, why = random_model(sizes, torch.bfloat16), missing()
    made.save_pretrained(folder)
    if not why:
        write_gguf(made, folder.with_suffix(".gguf"))
    return why


def write_huge(folder: Path, layers: int) -> int:
    """A model in the shape of Qwen3-30B-A3B of so many layers, a file each, cut from one block of random values; its bytes."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=4096, num_attention_heads=32, num_key_value_heads=4, head_dim=128, norm_topk_prob=True,
        num_hidden_layers=layers, dtype="bfloat16", **HUGE,
    )  # fmt: skip
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in AutoModelForCausalLM.from_config(config).state_dict().items()}
    files: dict[str, str] = {}
    for number in range(-1, layers):
        mine = {n: s for n, s in shapes.items() if (f".layers.{number}." in n if number >= 0 else ".layers." not in n)}
        part = dict(_random_values(mine, number + 1))
        file = f"model-{number + 2:05d}-of-{layers + 1:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(part, file)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


def _random_values(shapes: dict[str, tuple[int, ...]], seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of these names and shapes; stacked experts by name of their own, as checkpoints have them."""
    draw, block = np.random.default_rng(seed), torch.randn(1 << 25).mul_(0.02).to(torch.bfloat16)

    def values(*shape: int) -> torch.Tensor:
        count = torch.Size(shape).numel()
        first = int(draw.integers(0, len(block) - count))
        return block[first : first + count].view(shape).clone()

    for name, shape in shapes.items():
        at, _, parameter = name.rpartition(".")
        if not at.endswith(".experts"):
            yield name, torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1 else values(*shape)
            continue
        for expert in range(shape[0]):
            if parameter == "down_proj":
                yield f"{at}.{expert}.down_proj.weight", values(*shape[1:])
            else:
                for half in ("gate_proj", "up_proj"):
                    yield f"{at}.{expert}.{half}.weight", values(shape[1] // 2, shape[2])


def replayed(traces: Path) -> tuple[Replay, str]:
    """The routing of a recorded trace, one token after another, and where it is from; the routers' own without one."""
    file = traces / RECORDED
    if not file.is_file():
        return Replay(None), f"{file} is not there: the random routers' own, nearly even"
    ids = torch.from_numpy(read_trace(file).expert_ids.astype(np.int64))
    return Replay(ids[None]), f"replayed from {RECORDED}"


class Sequence:
    """A transformers model that runs on from token to token, its routing replayed where there is any."""

    def __init__(self, model: Any, replay: Replay) -> None:
        self.model, self.replay, self.at = model, replay, 0
        if replay.ids is not None:
            replay.attach(model)

    def begin(self, position: int) -> None:
        """A new sequence whose tokens are routed as those of the trace from `position` on."""
        self.at, self.past = position, None

    @torch.no_grad()
    def __call__(self, tokens: list[int]) -> None:
        """The next tokens."""
        self.replay.at([0], self.at, len(tokens))
        out = self.model(torch.tensor([tokens]), past_key_values=self.past, use_cache=True)
        self.past, self.at = out.past_key_values, self.at + len(tokens)


class Llama:
    """llama.cpp on the mapped file, by its own routing."""

    def __init__(self, file: Path, threads: int) -> None:
        self.model = LlamaModel(file, threads, mapped=True)

    def begin(self, position: int) -> None:
        """As `Sequence`."""
        self.model.forget()

    def __call__(self, tokens: list[int]) -> None:
        """As `Sequence`."""
        self.model.feed(tokens)


def ours(folder: Path, slots: int | None, packed: Path | None = None) -> Model:
    """Our model with so many experts in memory, None for all; packed: where they are read from."""
    share = prepare(folder, None, "bfloat16", 1, device="cpu", packed=packed)
    share = replace(share, slots=slots)
    return assembled(share, share.read(0), None, Group())


def accelerate(folder: Path, layers: int) -> tuple[Any, str]:
    """The same checkpoint with its experts on disk as accelerate has it; None and why if it cannot."""
    from transformers import AutoModelForCausalLM

    places: dict[str, str] = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        places |= dict.fromkeys((f"{at}.self_attn", f"{at}.input_layernorm", f"{at}.post_attention_layernorm"), "cpu")
        places |= {f"{at}.mlp.gate": "cpu", f"{at}.mlp.experts": "disk"}
    try:
        made = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, device_map=places, offload_folder=folder.with_suffix(".accelerate")
        )
    except (ValueError, RuntimeError, OSError, NotImplementedError) as error:
        return None, f"accelerate: {first_line(error)}"
    return made.eval(), ""


def drop() -> None:
    """Forget what the system has cached of files, where we may; mapped pages of files first, which it would keep."""
    if not os.access(DROP, os.W_OK):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    for line in Path("/proc/self/maps").read_text().splitlines():
        if PREFIX in line:
            first, last = (int(number, 16) for number in line.split()[0].split("-"))
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), PAGE_OUT)
    os.sync()
    DROP.write_text("1")
    time.sleep(SETTLED)


def disk_rate(model: Model) -> float:
    """Bytes a second of the model's experts, read straight through in large pieces by the store's own readers."""
    assert model.cache is not None
    store = model.cache.store
    file = next(iter(store.records[0][0].values())).pieces[0].file
    size = min(file.stat().st_size, STRAIGHT) // STAGE_BYTES * STAGE_BYTES
    read: Callable[[int], None] = lambda at: store.files.fill(Request(file, at, STAGE_BYTES, False), [store.stage().bytes])  # noqa: E731
    list(store.readers.map(read, range(0, size // 8, STAGE_BYTES)))  # their memory is there once it was used
    started = time.perf_counter()
    list(store.readers.map(read, range(0, size, STAGE_BYTES)))
    return size / (time.perf_counter() - started)


def spare_slots(model: Model) -> Slots:
    """As many more slots as STRAIGHT bytes of experts want: too many for the processor's caches."""
    assert model.cache is not None
    store, pools = model.cache.store, model.cache.pools
    shapes = {name: tuple(pool.shape[1:]) for name, pool in pools.items()}
    count = STRAIGHT // sum(part.length for part in store.records[0][0].values())
    dtypes = {name: pool.dtype for name, pool in pools.items()}
    return Slots(count, shapes, dtypes, torch.device("cpu"), store.records, store.files.block, moving=True)


def store_rate(model: Model, slots: Slots) -> float:
    """Bytes a second of experts read one after another, a few at a time, as the cache reads them."""
    assert model.cache is not None
    store, before = model.cache.store, model.cache.store.counter.bytes
    layers, experts = len(store.records), len(store.records[0])
    started = time.perf_counter()
    under_way: deque[Future[None]] = deque()
    for number in range(len(slots)):
        layer, expert = divmod(number % (layers * experts), experts)
        under_way.append(store.start(layer, expert, slots.place(number, store.shifts(layer, expert))))
        if len(under_way) > AT_ONCE:
            under_way.popleft().result()
    for future in under_way:
        future.result()
    return (store.counter.bytes - before) / (time.perf_counter() - started)


def prompted(side: Sequence | Llama, position: int, tokens: int) -> list[int]:
    """Begin a sequence with a prompt; the `tokens` that are to follow."""
    draw = torch.Generator().manual_seed(position)
    ids: list[int] = torch.randint(100, 4000, (PROMPT + tokens,), generator=draw).tolist()
    side.begin(position)
    side(ids[:PROMPT])
    return ids[PROMPT:]


def seconds_per_token(side: Sequence | Llama, tokens: list[int], cold: bool) -> float:
    """Of the next tokens, one by one. cold: what the system cached is dropped before each."""
    spent = 0.0
    for token in tokens:
        if cold:
            drop()
        started = time.perf_counter()
        side([token])
        spent += time.perf_counter() - started
    return spent / len(tokens)
