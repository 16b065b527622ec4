"""A model loaded under a plan, on this rank: the Python API that the command line itself uses."""

from __future__ import annotations

import resource
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from coterie.moe.batch import Request, Running
from coterie.moe.choose import Choice
from coterie.moe.collectives import Group
from coterie.moe.dispatcher import Dispatcher, check_strategy
from coterie.moe.families import ModelShape
from coterie.moe.faster import speed_up
from coterie.moe.generate import Generator, OnToken, Sampling
from coterie.moe.home_ranks import HomeRanks, find_home_ranks
from coterie.moe.invariant import BLOCK_ROWS, check_attention, make_invariant, varying
from coterie.moe.layer import attach
from coterie.moe.placement_map import layer_maps
from coterie.moe.prepare import Share, check_slots, known_prior, prepare
from coterie.moe.recording import record, recorded_phase
from coterie.moe.replanning import AutoReplan, Boundary, TakeOver
from coterie.moe.rotary import tell_apart
from coterie.moe.schedule import in_order
from coterie.moe.text import Output, Prompt, Text
from coterie.offload.cache import ExpertCache
from coterie.offload.checkpoint import Checkpoint
from coterie.offload.policies import DEFAULT
from coterie.placement.plan import PlacementPlan
from coterie.routing.errors import CoterieError, InputError, positive
from coterie.routing.record import Recorder, expert_modules, metadata_for
from coterie.routing.trace import RoutingTrace


@dataclass(frozen=True)
class Statistics:
    """Of one `generate` call over all ranks; seconds: with finding home ranks, measuring links and trying strategies.

    tokens_per_second, strategy: None if nothing ran. rows_sent: between ranks; bytes_read: from the checkpoint, by this call,
    those before it and loading; peak_memory_bytes: of the rank that used most (resident set, or CUDA's reserved memory);
    hit_rate: of the expert cache since it was made, None without one: experts that the host computes were not found.
    """

    prompt_tokens: int
    new_tokens: int
    seconds: float
    tokens_per_second: float | None
    strategy: str | None
    ranks: int
    bytes_read: int
    rows_sent: int
    peak_memory_bytes: int
    hit_rate: float | None = None


class Model:
    """One rank's share of a Mixture-of-Experts model. Made by `load`."""

    def __init__(
        self, shape: ModelShape, transformers_model: Any, checkpoint: Checkpoint, plan: PlacementPlan, group: Group,
        strategy: str | None, text: Text | None = None, one_copy: bool = False,
    ) -> None:  # fmt: skip
        self.shape = shape
        self.transformers = transformers_model
        self.checkpoint = checkpoint
        self.plan = plan
        self.group = group
        self.dispatcher = Dispatcher(shape, plan, group, strategy)
        maps = [layer.to(self.device) for layer in layer_maps(plan, group.rank, one_copy)]
        self.context = attach(transformers_model, maps, self.dispatcher.strategy(strategy))
        self.context.told = None if self.cache is None else self.cache.read
        self._running = threading.Lock()
        self.choice: Choice | None = None
        self.boundary: Boundary | None = None
        self.text = Text(shape) if text is None else text
        self.tokenizer = self.text.tokenizer

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return torch.device(next(self.transformers.parameters()).device)

    @property
    def cache(self) -> ExpertCache | None:
        """What holds the experts if they do not all fit; None if they do."""
        found = (getattr(module, "coterie_cache", None) for module in self.transformers.modules())
        return next((layer.cache for layer in found if layer is not None), None)

    def __enter__(self) -> Model:
        """`with coterie.load(...) as model`: closed at the end."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back the files, threads and pinned memory of experts that are not all in memory; nothing runs afterwards.

        Where they all are there is nothing to give back.
        """
        if self.cache is not None:
            self.cache.source.close()

    def generate(
        self, prompts: Sequence[Prompt | str], max_new_tokens: int = 64, sampling: Sampling | None = None, batch_size: int = 16,
        streamer: Any = None, on_token: OnToken | None = None,
    ) -> tuple[list[Output], Statistics]:  # fmt: skip
        """Continue every prompt; all ranks call this with the same prompts and all get the same outputs, in order.

        streamer: a transformers streamer, for a single prompt, fed on the rank that runs it: the prompt, as transformers'
        own `generate` does (`skip_prompt`), then each new token; its end on every rank, also of a run that fails. on_token: as
        the streamer, (prompt index, token id) of each new token.
        """
        asked = [Prompt(text=p) if isinstance(p, str) else p for p in prompts]
        if streamer is not None and len(asked) != 1:
            raise InputError(f"streamer: found {len(asked)} prompts, expected one")
        if max_new_tokens < 1:
            raise InputError(f"--max-new-tokens: found {max_new_tokens}, expected 1 or more")
        positive("--batch-size", batch_size)
        requests = self.scheduled(self.text.requests(asked, max_new_tokens), batch_size)
        watch = on_token if streamer is None else _streaming(streamer, requests[0], on_token)
        rows = self.group.traffic.rows
        started = time.perf_counter()
        try:
            choice, homes = self.settle(requests, batch_size)
            at = None if homes is None else homes.ranks
            mine = self.run(requests, batch_size, sampling or Sampling(), choice, watch, homes=at, boundary=self.boundary)
            finished = [r for part in self.group.gather(mine) for r in part]
        finally:
            if streamer is not None:
                streamer.end()
        seconds = time.perf_counter() - started
        ordered = sorted(finished, key=lambda r: r.request.index)
        outputs = [self._output(asked[r.request.index], r) for r in ordered]
        counts = sum(len(r.request.token_ids) for r in ordered), sum(len(r.new_tokens) for r in ordered)
        return outputs, self.statistics(*counts, seconds, self.group.traffic.rows - rows)

    def scheduled(self, requests: Sequence[Request], batch_size: int) -> list[Request]:
        """In the order to run them: as given, or alike ones side by side where experts are on disk (moe/schedule.py).

        The first rank's order is everyone's: processors that round differently would come to different ones.
        """
        layers = [getattr(module, "coterie_cache", None) for _, module in expert_modules(self.transformers).values()]
        routers = [layer.router for layer in layers if layer is not None and layer.router is not None]
        if not all(self.group.gather(len(routers) == len(layers))):
            return list(requests)
        made: Sequence[int] = []
        if self.group.rank == 0:
            ordered = in_order(requests, routers, self.transformers.get_input_embeddings(), batch_size)
            places = {request.index: place for place, request in enumerate(requests)}
            made = [places[request.index] for request in ordered]
        self.group.meet()
        return [requests[place] for place in self.group.gather(made)[0]]

    def _output(self, prompt: Prompt, run: Running) -> Output:
        return self.text.output(prompt, run.request, run.new_tokens, run.finish_reason or "length")

    def settle(self, requests: Sequence[Request], batch_size: int, use_homes: bool = True) -> tuple[Choice, HomeRanks | None]:
        """How and where the requests will run: the strategies, and what the plan's homes say of each request.

        None where the plan has no homes or they mean nothing: on one rank, or if every rank runs all requests.
        """
        if self.group.rank == 0:
            self.text.warn_of_length(requests)
        homes = self.plan.homes if use_homes and self.group.size > 1 else None
        found = None
        if homes is not None and homes.token_ids is not None:  # nothing has to run for it
            found = find_home_ranks(self, homes, requests, batch_size)
        at = None if found is None else found.ranks
        self.choice = choice = self.dispatcher.choice(requests, batch_size, self.transformers, self.context, at)
        if homes is None or choice.shared:
            return choice, None
        return choice, found or find_home_ranks(self, homes, requests, batch_size, choice.prefill)

    def follow(self, wish: PlacementPlan | str, say: Callable[[str], None]) -> None:
        """From the next run on, take over the plan `wish` while generating, or plan anew when the load drifts ("auto").

        Raises InputError if the experts are rounded or on disk: what moves between ranks is weights in memory, as stored; and
        while an earlier wish is being carried out.
        """
        if self.boundary is not None and self.boundary.moving:
            raise InputError("--replan: found a plan half taken over, expected none; generate until it has been taken over")
        if self.context.least_rows > 1:
            raise InputError("--replan: found it with --batch-invariant, expected one of them: sums follow where experts are")
        if self.cache is not None:
            raise InputError("--replan: found it with experts on disk, expected all in memory")
        if any(hasattr(module, "coterie_products") for module in self.transformers.modules()):
            raise InputError("--replan: found it with --quantise, expected one of them")

        def taken(plan: PlacementPlan) -> None:
            self.plan = plan
            self.dispatcher.changed(plan)
            say(f"the new plan has been taken over in step {self.group.traffic.step}")

        if isinstance(wish, PlacementPlan):
            self.boundary = TakeOver(self.transformers, self.group, self.plan, wish, lambda: taken(wish))
        else:
            self.boundary = AutoReplan(self.transformers, self.group, self.context, self.plan, say, taken)

    def run(
        self, requests: Sequence[Request], batch_size: int, sampling: Sampling, choice: Choice, on_token: OnToken | None = None,
        recorder: Recorder | None = None, homes: Sequence[int] | None = None,
        between: Callable[[list[Running]], None] | None = None, boundary: Boundary | None = None,
    ) -> list[Running]:  # fmt: skip
        """The loop beneath `generate`: as `Generator.run`, with the strategies of `choice`. Closes the boundary."""
        if not self._running.acquire(blocking=False):
            raise CoterieError("this model is generating already; one thread at a time, or a model for each")
        try:
            return self._run(requests, batch_size, sampling, choice, on_token, recorder, homes, between, boundary)
        finally:
            self._running.release()

    def _run(
        self, requests: Sequence[Request], batch_size: int, sampling: Sampling, choice: Choice, on_token: OnToken | None,
        recorder: Recorder | None, homes: Sequence[int] | None, between: Callable[[list[Running]], None] | None,
        boundary: Boundary | None,
    ) -> list[Running]:  # fmt: skip
        batch = self.dispatcher.executor(self.transformers, self.context, choice, recorder)
        enough = (lambda: False) if recorder is None else (lambda: recorder.full)
        generator = Generator(batch, self.group, self.transformers.generation_config, sampling, on_token, enough)
        try:
            ended = generator.run(requests, batch_size, homes, choice.shared, between, boundary)
            if boundary is not None:
                boundary.rest()
            return ended
        finally:
            if boundary is not None:
                boundary.close()
            self.context.live = self.context.tokens = None  # the transformers model stays usable by itself
            self.context.strategy = self.dispatcher.strategy(self.dispatcher.asked)

    def record(
        self, prompts: Sequence[Prompt | str], out: Path, max_new_tokens: int = 0, phase: str | None = None,
        max_tokens: int | None = None, scenario: str = "", batch_size: int = 16,
        on_tokens: Callable[[int], object] | None = None, token_ids: bool = False,
    ) -> int:  # fmt: skip
        """Run the prompts and write their routing to the trace file `out`; returns the number of tokens recorded.

        phase: `prefill`, `decode` (new tokens only) or `mixed`; by default whatever is run. on_tokens: told how many more
        tokens were recorded, now and then. On several ranks all call it, each runs its share of the prompts, and rank 0 writes.
        """
        asked = [Prompt(text=p) if isinstance(p, str) else p for p in prompts]
        phase = recorded_phase(phase, max_new_tokens, max_tokens, scenario)
        positive("--batch-size", batch_size)
        if phase == "prefill":
            asked = [replace(p, max_new_tokens=0) for p in asked]
        requests = self.text.requests(asked, max_new_tokens)
        metadata = metadata_for(self.shape.name, self.shape.num_experts, self.shape.layer_ids, scenario, phase)
        return record(self, requests, out, metadata, max_tokens, batch_size, on_tokens, token_ids)

    def statistics(self, prompt_tokens: int, new_tokens: int, seconds: float, rows: int) -> Statistics:
        """Figures of a run. seconds, rows: of this rank; every rank must ask."""
        cache = self.cache
        asked = (0, 0) if cache is None else (cache.statistics.requests, cache.statistics.transfers + cache.statistics.on_host)
        gathered = self.group.gather((self.checkpoint.counter.bytes, rows, peak_memory(self.device), seconds, *asked))
        requests, missed = (sum(g[i] for g in gathered) for i in (4, 5))
        longest = max(g[3] for g in gathered)
        return Statistics(
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            seconds=longest,
            tokens_per_second=new_tokens / longest if longest else None,
            strategy=None if self.choice is None else self.choice.name,
            ranks=self.group.size,
            bytes_read=sum(g[0] for g in gathered),
            rows_sent=sum(g[1] for g in gathered),
            peak_memory_bytes=max(g[2] for g in gathered),
            hit_rate=1 - missed / requests if requests else None,
        )


def load(
    model: str | Path, plan: PlacementPlan | None = None, dtype: str = "auto", strategy: str | None = None,
    device: str | torch.device | None = None, group: Group | None = None, batch_invariant: bool = False,
    quantise: str | None = None, slots: int | None = None, packed: str | Path | None = None, host_bytes: int | None = None,
    misses: str = "fetch", prior: str | Path | RoutingTrace | None = None, eviction: str = DEFAULT,
) -> Model:  # fmt: skip
    """Load this rank's share of MODEL: a folder, a hub id, or `coterie-tiny`.

    plan: where experts live; by default in order over the ranks of the running torch.distributed job (or all here).
    device: by default this process's GPU, or the CPU if there is none.
    dtype: `float32`, `bfloat16`, `float16`, or `auto`: the checkpoint's own on a GPU, float32 on a CPU.
    quantise: `int8`, `int4` or `fp8` rounds the experts (kernels/formats.py); text is then no longer the checkpoint's own.
    slots: how many experts to hold in memory at once, the others being read from disk when needed; by default all.
    packed: the folder that `coterie pack` made of MODEL; experts on disk are read from it.
    host_bytes, misses: with slots on a GPU, how much pinned memory is for experts that were read (by default for all of this
    rank's), and what is done about what the GPU lacks: `fetch`, `cpu`, `auto` (offload/tiers.py).
    prior: with slots, recorded routing of the model (`coterie trace`) that the cache begins with.
    eviction: with slots, the policy that says which expert gives way, as `cache-sim` names them.
    Raises InputError for a model, checkpoint or plan that is wrong or does not fit.
    """
    group = group or Group.current()
    share = prepare(model, plan, dtype, group.size, group.nodes, device, quantise, packed)
    share = replace(share, slots=slots, host_bytes=host_bytes, misses=misses, eviction=eviction)
    share = share if prior is None else known_prior(share, prior)
    check_slots(share)
    asked = asked_strategy(share, strategy, group)
    check_invariant(batch_invariant, asked, share)
    return assembled(share, share.read(group.rank), asked, group, batch_invariant=batch_invariant)


def asked_strategy(share: Share, name: str | None, group: Group) -> str | None:
    """The strategy asked for by `name` or else by the plan; None: to be chosen. Raises InputError if it cannot run here."""
    planned = share.plan.strategy if share.plan.strategy != "all_to_all" and group.size > 1 else None
    check_strategy(name or planned, group, share.shape)
    return name or planned


def assembled(
    share: Share, read: Any, strategy: str | None, group: Group, text: Text | None = None, batch_invariant: bool = False
) -> Model:
    """The model from what `share.read` returned on this rank. strategy: as `asked_strategy` says. Every rank must call it."""
    check_invariant(batch_invariant, strategy, share)
    group.ranks_per_node = share.plan.topology.ranks_per_node  # the plan says what its nodes are
    read.requires_grad_(False)  # our kernels have no gradients
    made = Model(share.shape, read, share.checkpoint, share.plan, group, strategy, text, one_copy=batch_invariant)
    tell_apart(read)
    if batch_invariant:
        make_invariant(read)
        made.context.least_rows = BLOCK_ROWS
    else:
        speed_up(read)
    return made


def check_invariant(wished: bool, strategy: str | None, share: Share) -> None:
    """Raises InputError for what cannot run batch-invariant. strategy: asked for, or the plan's."""
    if not wished:
        return
    scans = {name for name in (type(module).__name__ for module in share.empty.modules()) if "Mamba" in name}
    if scans:
        raise InputError(
            f"--batch-invariant: found {min(scans)}, whose scan follows the batch, expected a model without such layers"
        )
    if strategy in varying(share.plan.topology.nodes):
        raise InputError(
            f"--batch-invariant: found strategy {strategy}, asked for or the plan's, expected --strategy all_to_all"
        )
    if share.quantise is not None:
        raise InputError("--batch-invariant: found it with --quantise, expected one of them")
    check_attention(share.empty)
    if share.misses != "fetch":
        raise InputError(f"--batch-invariant: found it with --misses {share.misses}, expected fetch: the host rounds otherwise")


def _streaming(streamer: Any, request: Request, on_token: OnToken | None) -> OnToken:
    """Feeds the streamer as transformers' own `generate` would; only the rank that runs the request is told of tokens."""
    begun = False

    def put(index: int, token: int) -> None:
        nonlocal begun
        if not begun:
            streamer.put(torch.tensor([request.token_ids]))
            begun = True
        streamer.put(torch.tensor([token]))
        if on_token is not None:
            on_token(index, token)

    return put


def peak_memory(device: torch.device) -> int:
    """Most bytes this process has used: CUDA's reserved memory on a GPU, else the resident set."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage's figure is at first that of the process which started this one
        return 1024 * int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
