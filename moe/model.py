"""A model loaded under a plan, on this rank: the Python API that the command line itself uses."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from coterie.moe.batch import Request, Running
from coterie.moe.choose import Choice
from coterie.moe.collectives import Group
from coterie.moe.dispatcher import Dispatcher, check_strategy
from coterie.moe.families import ModelShape, inspect
from coterie.moe.generate import Generator, OnToken, Sampling
from coterie.moe.invariant import BLOCK_ROWS, make_invariant
from coterie.moe.layer import IMPLEMENTATION, attach
from coterie.moe.load import load_share
from coterie.moe.placement_map import check_plan, contiguous_plan, layer_maps
from coterie.offload.checkpoint import Checkpoint
from coterie.placement.plan import PlacementPlan
from coterie.routing.errors import InputError, first_line, positive
from coterie.routing.files import check_writable
from coterie.routing.record import Recorder, TraceWriter, metadata_for

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Prompt:
    """What to continue: `text`, or `token_ids` for checkpoints without a tokenizer; one of the two is set.

    id: the caller's name for it, echoed in the output; max_new_tokens: None takes the call's.
    """

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    max_new_tokens: int | None = None
    id: str | int | None = None


@dataclass(frozen=True)
class Output:
    """A finished prompt. token_ids: new tokens only; finish_reason: `stop` (end token) or `length`."""

    id: str | int
    prompt: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str


@dataclass(frozen=True)
class Statistics:
    """Of one `generate` call over all ranks. bytes_read: from the checkpoint since loading; rows_sent: between ranks;
    peak_memory_bytes: of the rank that used most (resident set, or CUDA's reserved memory); hit_rate: of the expert cache,
    None without one.
    """

    prompt_tokens: int
    new_tokens: int
    seconds: float
    tokens_per_second: float
    strategy: str
    ranks: int
    bytes_read: int
    rows_sent: int
    peak_memory_bytes: int
    hit_rate: float | None = None


class Model:
    """One rank's share of a Mixture-of-Experts model. Made by `load`."""

    def __init__(
        self, shape: ModelShape, transformers_model: Any, checkpoint: Checkpoint, plan: PlacementPlan, group: Group,
        strategy: str | None,
    ) -> None:  # fmt: skip
        self.shape = shape
        self.transformers = transformers_model
        self.checkpoint = checkpoint
        self.plan = plan
        self.group = group
        self.dispatcher = Dispatcher(shape, plan, group, strategy)
        maps = _maps_on(plan, group.rank, self.device)
        self.context = attach(transformers_model, maps, self.dispatcher.strategy(strategy))
        self.choice: Choice | None = None
        self.tokenizer = _tokenizer(shape.folder)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return torch.device(next(self.transformers.parameters()).device)

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt. Raises InputError if it is empty, out of the vocabulary, or needs a tokenizer not there."""
        if prompt.token_ids is None and self.tokenizer is None:
            raise InputError(f"{self.shape.folder}: has no tokenizer, expected prompts with token_ids")
        ids = prompt.token_ids if prompt.token_ids is not None else self.tokenizer(prompt.text or "")["input_ids"]
        vocabulary = self.transformers.config.get_text_config().vocab_size
        if not len(ids):
            raise InputError("prompt: found no token, expected at least one")
        if min(ids) < 0 or max(ids) >= vocabulary:
            raise InputError(f"prompt: found token id {max(ids)}, expected 0 to {vocabulary - 1}")
        return tuple(int(i) for i in ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out; empty without a tokenizer."""
        return "" if self.tokenizer is None else str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def generate(
        self, prompts: Sequence[Prompt | str], max_new_tokens: int = 64, sampling: Sampling | None = None, batch_size: int = 16,
        streamer: Any = None, on_token: OnToken | None = None,
    ) -> tuple[list[Output], Statistics]:  # fmt: skip
        """Continue every prompt; all ranks call this with the same prompts and all get the same outputs, in order.

        streamer: a transformers streamer, for a single prompt, fed on the rank that runs it.
        """
        asked = [Prompt(text=p) if isinstance(p, str) else p for p in prompts]
        if streamer is not None and len(asked) != 1:
            raise InputError(f"streamer: found {len(asked)} prompts, expected one")
        if max_new_tokens < 1:
            raise InputError(f"--max-new-tokens: found {max_new_tokens}, expected 1 or more")
        positive("--batch-size", batch_size)
        requests = self._requests(asked, max_new_tokens)
        watch = _streaming(streamer, on_token)
        rows = self.group.traffic.rows
        started = time.perf_counter()
        mine = self._run(requests, batch_size, sampling or Sampling(), watch)
        finished = [r for part in self.group.gather(mine) for r in part]
        seconds = time.perf_counter() - started
        if streamer is not None:
            streamer.end()
        ordered = sorted(finished, key=lambda r: r.request.index)
        outputs = [self._output(asked[r.request.index], r) for r in ordered]
        return outputs, self._statistics(ordered, seconds, self.group.traffic.rows - rows)

    def _run(
        self, requests: list[Request], batch_size: int, sampling: Sampling, on_token: OnToken | None,
        recorder: Recorder | None = None,
    ) -> list[Running]:  # fmt: skip
        self.choice = self.dispatcher.choice(requests, batch_size, self.transformers)
        batch = self.dispatcher.executor(self.transformers, self.context, self.choice, recorder)
        shared = self.choice.decode == "replicated"
        enough = (lambda: False) if recorder is None else (lambda: recorder.full)
        generator = Generator(batch, self.group, self.transformers.generation_config, sampling, on_token, enough)
        try:
            return generator.run(requests, batch_size, shared=shared)
        finally:
            self.context.live = self.context.tokens = None  # the transformers model stays usable by itself
            self.context.strategy = self.dispatcher.strategy(self.dispatcher.asked)

    def record(
        self, prompts: Sequence[Prompt | str], out: Path, max_new_tokens: int = 0, phase: str | None = None,
        max_tokens: int | None = None, scenario: str = "", batch_size: int = 16,
        on_tokens: Callable[[int], object] | None = None,
    ) -> int:  # fmt: skip
        """Run the prompts and write their routing to the trace file `out`; returns the number of tokens recorded.

        phase: `prefill`, `decode` (new tokens only) or `mixed`; by default whatever is run. on_tokens: told how many more
        tokens were recorded, now and then. Works on one process.
        """
        if self.group.size > 1:
            raise InputError(f"trace: found {self.group.size} processes, expected one")
        if max_new_tokens < 0 or max_new_tokens == 1:
            raise InputError(
                f"--max-new-tokens: found {max_new_tokens}, expected 0 or 2 and more: the last token is not routed"
            )
        phase = phase or ("mixed" if max_new_tokens else "prefill")
        if phase in ("decode", "mixed") and max_new_tokens < 2:
            raise InputError(
                f"--phase: found {phase!r} with {max_new_tokens} new tokens, expected --max-new-tokens of 2 or more"
            )
        if max_tokens is not None and max_tokens < 1:
            raise InputError(f"--max-tokens: found {max_tokens}, expected 1 or more")
        check_writable(out)
        metadata = metadata_for(self.shape.name, self.shape.num_experts, self.shape.layer_ids, scenario, phase)
        asked = [Prompt(text=p) if isinstance(p, str) else p for p in prompts]
        if phase == "prefill":
            asked = [replace(p, max_new_tokens=0) for p in asked]
        positive("--batch-size", batch_size)
        requests = self._requests(asked, max_new_tokens)
        writer = TraceWriter(out, metadata, len(self.shape.layer_ids), self.shape.top_k)
        recorder = Recorder(self.transformers, writer, self.shape.num_experts, phase, max_tokens)
        try:
            with recorder.attached():
                for first in range(0, len(requests), batch_size):
                    before = writer.tokens
                    self._run(requests[first : first + batch_size], batch_size, Sampling(), None, recorder)
                    if on_tokens is not None:
                        on_tokens(writer.tokens - before)
                    if recorder.full:
                        break
            writer.close()
        finally:
            writer.discard()
        return writer.tokens

    def _requests(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Request]:
        if not prompts:
            raise InputError("prompts: found none, expected at least one")
        limits = [max_new_tokens if p.max_new_tokens is None else p.max_new_tokens for p in prompts]
        return [Request(i, self.encode(p), n) for i, (p, n) in enumerate(zip(prompts, limits, strict=True))]

    def _output(self, prompt: Prompt, run: Running) -> Output:
        text = prompt.text if prompt.text is not None else self.decode(run.request.token_ids)
        name = run.request.index if prompt.id is None else prompt.id
        return Output(name, text, self.decode(run.new_tokens), tuple(run.new_tokens), run.finish_reason or "length")

    def _statistics(self, finished: list[Running], seconds: float, rows: int) -> Statistics:
        gathered = self.group.gather((self.checkpoint.counter.bytes, rows, peak_memory(self.device), seconds))
        new = sum(len(r.new_tokens) for r in finished)
        longest = max(g[3] for g in gathered)
        return Statistics(
            prompt_tokens=sum(len(r.request.token_ids) for r in finished),
            new_tokens=new,
            seconds=longest,
            tokens_per_second=new / longest,
            strategy="" if self.choice is None else self.choice.name,
            ranks=self.group.size,
            bytes_read=sum(g[0] for g in gathered),
            rows_sent=sum(g[1] for g in gathered),
            peak_memory_bytes=max(g[2] for g in gathered),
        )


def load(
    model: str | Path, plan: PlacementPlan | None = None, dtype: str = "auto", strategy: str | None = None,
    device: str | torch.device | None = None, group: Group | None = None, batch_invariant: bool = False,
) -> Model:  # fmt: skip
    """Load this rank's share of MODEL: a folder, a hub id, or `coterie-tiny`.

    plan: where experts live; by default in order over the ranks of the running torch.distributed job (or all here).
    device: by default this process's GPU, or the CPU if there is none.
    dtype: `float32`, `bfloat16`, `float16`, or `auto`: the checkpoint's own on a GPU, float32 on a CPU.
    Raises InputError for a model, checkpoint or plan that is wrong or does not fit.
    """
    group = group or Group.current()
    shape, empty = inspect(str(model))
    if plan is None:
        plan = contiguous_plan(shape, group.size, group.nodes)
    check_plan(plan, shape, group.size)
    group.ranks_per_node = plan.topology.ranks_per_node  # the plan says what its nodes are
    planned = plan.strategy if plan.strategy != "all_to_all" and group.size > 1 else None
    asked = strategy or planned
    check_strategy(asked, group, shape)
    target = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = Checkpoint.open(shape.folder)
    experts = {layer: tuple(plan.experts_on(i, group.rank)) for i, layer in enumerate(shape.layer_ids)}
    loaded = load_share(shape, empty, checkpoint, experts, _dtype(dtype, shape.config, target), target, IMPLEMENTATION)
    made = Model(shape, loaded, checkpoint, plan, group, asked)
    if batch_invariant:
        if asked == "coherent":
            raise InputError("--batch-invariant: found it with --strategy coherent, expected another strategy")
        make_invariant(loaded)
        made.context.least_rows = BLOCK_ROWS
    return made


def _dtype(name: str, config: Any, device: torch.device) -> torch.dtype:
    if name == "auto":
        stored = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
        return torch.float32 if device.type == "cpu" or stored is None else stored
    if name not in DTYPES:
        raise InputError(f"--dtype: found {name!r}, expected auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def _maps_on(plan: PlacementPlan, rank: int, device: torch.device) -> list[Any]:
    maps = layer_maps(plan, rank)
    return [m.to(device) for m in maps]


def _tokenizer(folder: Path) -> Any:
    """The checkpoint's tokenizer, or None if it brings none."""
    if not any(
        (folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    ):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # many kinds; each means that the tokenizer's files are wrong
        raise InputError(f"{folder}: the tokenizer cannot be loaded ({first_line(error)})") from error


def _streaming(streamer: Any, on_token: OnToken | None) -> OnToken | None:
    if streamer is None:
        return on_token

    def put(index: int, token: int) -> None:
        streamer.put(torch.tensor([token]))
        if on_token is not None:
            on_token(index, token)

    return put


def peak_memory(device: torch.device) -> int:
    """Most bytes this process has used: CUDA's reserved memory on a GPU, else the resident set."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
