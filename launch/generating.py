"""`coterie generate`: what is asked is settled and checked, then loaded, then run; only rank 0 prints and writes."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coterie.launch import timeline
from coterie.launch.commands import say
from coterie.launch.distributed import job, same_on_all, together
from coterie.launch.inputs import found_here
from coterie.launch.prompts import asked_prompts
from coterie.launch.quiet import quiet_transformers
from coterie.placement.plan import PlacementPlan, read_plan
from coterie.routing.errors import InputError, naming, positive
from coterie.routing.files import atomic_output, check_writable, files_of

if TYPE_CHECKING:
    from coterie.launch.resuming import Resuming
    from coterie.moe.batch import Request
    from coterie.moe.collectives import Group
    from coterie.moe.generate import Sampling
    from coterie.moe.home_ranks import HomeRanks
    from coterie.moe.journal import Journal
    from coterie.moe.memory import ModelSizes
    from coterie.moe.model import Model, Statistics
    from coterie.moe.offline import Held, Totals
    from coterie.moe.prepare import Share
    from coterie.moe.text import Prompt, Text


@dataclass(frozen=True)
class Asked:
    """What a command line asks for, settled before anything is loaded. strategy: None is chosen later."""

    share: Share
    strategy: str | None
    text: Text
    prompts: list[Prompt]
    requests: list[Request]
    sampling: Sampling
    batch_invariant: bool
    replan: PlacementPlan | str | None = None

    def rows(self, kept: Journal | Held) -> Iterator[dict[str, Any]]:
        """Finished prompts in order, as `--out` and `--json` show them."""
        for request in self.requests:
            entry = kept.entry(request.index)
            yield self.row(request.index, entry.token_ids, entry.finish_reason)

    def row(self, index: int, token_ids: tuple[int, ...], finish_reason: str) -> dict[str, Any]:
        """One of them."""
        made = self.text.output(self.prompts[index], self.requests[index], token_ids, finish_reason)
        return {**asdict(made), "token_ids": list(made.token_ids)}


@contextmanager
def begun(
    options: argparse.Namespace, settled: Callable[[argparse.Namespace, Group], Asked]
) -> Iterator[tuple[Group, Asked, ModelSizes]]:
    """The launched processes, what is asked of them, which all have found alike, and the sizes of the model.

    settled: reads and checks all but the weights, without communicating.
    """
    with job(options.timeout, options.transport) as group:
        quiet_transformers()
        if group.size > 1:
            same_on_all(group, together(group, lambda: found_here(options)))
        asked = together(group, lambda: settled(options, group))
        from coterie.launch.memory import sizes_on_device

        yield group, asked, sizes_on_device(asked.share)


def generate(options: argparse.Namespace) -> dict[str, Any] | None:
    """Continue prompts on all launched processes; only rank 0 prints."""
    with begun(options, settle) as (group, asked, sizes):
        from coterie.launch.memory import check_memory, within_budget
        from coterie.launch.resuming import Resuming

        if group.rank == 0 and group.nodes > 1 and group.ranks_per_node != asked.share.plan.topology.ranks_per_node:
            planned = asked.share.plan.topology
            say(
                f"plan: it is for {planned.nodes} node(s) of {planned.ranks_per_node} ranks and is run as such, but found "
                f"{group.nodes} of {group.ranks_per_node}: links between nodes are taken for others; plan with "
                f"--topology {group.nodes}x{group.ranks_per_node}"
            )
        asked = within_budget(asked, sizes, options, group)
        if options.dry_run:
            told = check_memory(asked, sizes, options, group).told
            return told if group.rank == 0 else None
        resuming = together(group, lambda: Resuming(options, asked))
        complete = together(group, lambda: group.rank == 0 and resuming.complete())
        if group.gather(complete)[0]:
            return resuming.outputs(group.size) if group.rank == 0 else None
        too_large = check_memory(asked, sizes, options, group).too_large
        model = load_model(asked, group)
        model.dispatcher.without = too_large
        if asked.replan is not None:
            model.follow(asked.replan, say if group.rank == 0 else lambda text: None)
        if options.trace_events is not None:
            timeline.begin(group, model.cache)
        result = _run(model, asked, options, resuming)
        if options.trace_events is not None:
            _write_timeline(model, options.trace_events)
        return result


def _new_plan(wish: str | None, share: Share, ranks: int) -> PlacementPlan | str | None:
    """What --replan asks for: `auto`, or a plan of this model for as many ranks."""
    if wish is None:
        return None
    if ranks == 1:
        raise InputError(f"--replan: found {wish!r} on one process, expected several (torchrun, mpirun)")
    if share.quantise is not None:
        raise InputError("--replan: found it with --quantise, expected one of them")
    if wish == "auto":
        return wish
    if not Path(wish).is_file():
        raise InputError(f"--replan: found {wish!r}, expected auto or a plan file")
    from coterie.moe.placement_map import check_plan
    from coterie.moe.relocate import transfers

    plan = read_plan(Path(wish))
    try:
        check_plan(plan, share.shape, ranks)
    except InputError as error:
        raise InputError(f"--replan {wish}: {error}") from error
    transfers(share.plan, plan)  # raises where the plans do not go together
    return plan


def _write_timeline(model: Model, path: Path) -> None:
    started = model.group.traffic.events
    seconds = max((e.start + e.seconds for e in started or []), default=0.0) - min(
        (e.start for e in started or []), default=0.0
    )
    sums = timeline.write(path, model.group, len(model.shape.layer_ids), model.cache)
    if sums is not None:
        say(timeline.describe(sums, max(seconds, 1e-9)))
        say(f"{path}: open it in chrome://tracing or ui.perfetto.dev, or with coterie show")


def settle(options: argparse.Namespace, group: Group) -> Asked:
    """Read and check all but the weights. Does not communicate."""
    from coterie.launch.memory import check_memory_options
    from coterie.moe.generate import Sampling
    from coterie.moe.model import asked_strategy, check_invariant
    from coterie.moe.placement_map import OF_MODEL
    from coterie.moe.prepare import known_prior, prepare
    from coterie.moe.text import Text

    positive("--max-new-tokens", options.max_new_tokens)
    positive("--batch-size", options.batch_size)
    if options.resume and options.out is None:
        raise InputError("--resume: found no --out, expected the one of the stopped run")
    if options.memory is not None and options.replan is not None:
        raise InputError("--memory: found it with --replan, expected one of them: what moves between ranks is in memory")
    if options.out is not None and options.trace_events is not None and options.out.resolve() == options.trace_events.resolve():
        raise InputError(f"--trace-events: found {str(options.trace_events)!r}, expected another file than --out")
    check_memory_options(options)
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    for path in (options.out, options.trace_events):
        if path is not None and group.rank == 0 and not options.dry_run:
            check_writable(
                path,
                options.prompts,
                options.plan,
                options.replan,
                options.prior,
                *files_of(options.model),
                *files_of(options.packed),
            )
    prompts = asked_prompts(options)
    plan = None if options.plan is None else read_plan(options.plan)
    to_come = _group_to_come(plan, group, options.dry_run)
    with nullcontext() if plan is None else naming(options.plan, "ranks", *OF_MODEL):
        share = prepare(options.model, plan, options.dtype, to_come.size, to_come.nodes, None, options.quantise, options.packed)
    strategy = asked_strategy(share, options.strategy, to_come)
    check_invariant(options.batch_invariant, strategy, replace(share, misses=options.misses))
    share = share if options.prior is None else known_prior(share, options.prior)
    if options.batch_invariant and options.replan is not None:
        raise InputError("--replan: found it with --batch-invariant, expected one of them: sums follow where experts are")
    replan, text = _new_plan(options.replan, share, to_come.size), Text(share.shape)
    with naming(options.prompts or "--prompt"):
        requests = text.requests(prompts, options.max_new_tokens)
    return Asked(share, strategy, text, prompts, requests, sampling, options.batch_invariant, replan)


def _group_to_come(plan: PlacementPlan | None, group: Group, dry_run: bool) -> Group:
    """The group that will run this; for a dry run on one process, one of the plan's ranks, which never communicates."""
    from coterie.moe.collectives import Group

    if not dry_run or group.size > 1 or plan is None:
        return group
    made = Group()
    made.size, made.ranks_per_node = plan.ranks, plan.topology.ranks_per_node
    return made


def load_model(asked: Asked, group: Group) -> Model:
    """Every rank reads its share, all at once; rank 0 shows its own progress."""
    from tqdm import tqdm

    from coterie.moe.model import assembled

    of = f" (rank 0 of {group.size})" if group.size > 1 else ""
    with tqdm(desc=f"load{of}", unit="B", unit_scale=True, disable=True if group.rank else None) as bar:

        def on_bytes(count: int, whole: int) -> None:
            bar.total = whole
            bar.update(count)

        read = together(group, lambda: asked.share.read(group.rank, on_bytes))
    model = assembled(asked.share, read, asked.strategy, group, asked.text, asked.batch_invariant)
    if asked.batch_invariant and model.device.type != "cpu" and group.rank == 0:
        say("experts: one after another, without the GPU's kernels, whose tiles follow the batch (--batch-invariant)")
    cache = model.cache if group.rank == 0 and model.device.type == "cpu" else None
    if cache is not None and cache.store.asynchronous is None:
        say("experts: read by threads, which is slower: no asynchronous reads here, or files that have no O_DIRECT")
    return model


def _run(model: Model, asked: Asked, options: argparse.Namespace, resuming: Resuming) -> dict[str, Any] | None:
    from coterie.moe.offline import Held, fingerprint

    group = model.group
    journal = together(group, lambda: resuming.open(fingerprint(model)) if group.rank == 0 else None)
    kept = journal or Held()
    finished = set(group.gather([] if journal is None else list(journal.finished))[0])
    left = [request for request in asked.requests if request.index not in finished]
    try:
        statistics = _continue(model, left, kept if group.rank == 0 else None, options, asked)
        return _finish(asked, kept, statistics, model, options) if group.rank == 0 else None
    except KeyboardInterrupt:
        if journal is None:
            raise
        if not journal.path.exists():
            raise KeyboardInterrupt(f"interrupted; {options.out} is complete") from None
        raise KeyboardInterrupt(f"interrupted; {journal.way_on()}") from None
    finally:
        if journal is not None:
            journal.close()


def _continue(
    model: Model, left: list[Request], kept: Journal | Held | None, options: argparse.Namespace, asked: Asked
) -> Statistics:
    from coterie.moe.generate import not_sampled
    from coterie.moe.offline import Collector, run

    if not left:
        return model.statistics(0, 0, 0.0, 0)

    def settled(homes: HomeRanks | None) -> None:
        if model.group.rank == 0 and model.choice is not None:
            say(model.choice.describe())
        if model.group.rank == 0 and (left_out := not_sampled(model.transformers.generation_config, asked.sampling)):
            said = ", ".join(f"{name} {value}" for name, value in left_out.items())
            say(f"sampling: as the command line says; the checkpoint's own generation_config.json has {said}")
        if model.group.rank == 0 and model.group.size > 1 and model.plan.homes is not None:
            say(f"homes: {_homes(homes, options)}")

    if options.prompt is not None:
        put, end = _streamer(model, options)
        try:
            return run(model, left, options.batch_size, asked.sampling, Collector(model.group, kept), put, False, settled)
        finally:
            end()
    with _progress(len(asked.requests), len(left), model.group) as told:
        collector = Collector(model.group, kept, told)
        return run(model, left, options.batch_size, asked.sampling, collector, settled=settled)


def _homes(homes: HomeRanks | None, options: argparse.Namespace) -> str:
    if homes is not None and not homes.tokens:
        return "told by the prompts' token ids"
    if homes is not None:
        return f"told by {homes.tokens} prompt tokens, run beforehand in {homes.seconds:.2f} s"
    if options.prompt is not None:
        return "not carried out for a single prompt"
    return "not carried out: with strategy replicated every rank runs all prompts"


@contextmanager
def _progress(prompts: int, left: int, group: Group) -> Iterator[Callable[[Totals], None]]:
    """A bar of finished prompts on rank 0, with the new tokens per second of all ranks."""
    from tqdm import tqdm

    started = time.perf_counter()
    hidden = True if group.rank else None
    with tqdm(desc="generate", total=prompts, initial=prompts - left, unit=" prompts", disable=hidden) as bar:

        def told(totals: Totals) -> None:
            bar.set_postfix_str(f"{totals.new_tokens / (time.perf_counter() - started):.0f} tokens/s", refresh=False)
            bar.update(prompts - left + totals.prompts - bar.n)

        yield told


def _streamer(model: Model, options: argparse.Namespace) -> tuple[Callable[[int, int], None] | None, Callable[[], None]]:
    """What prints tokens as they come on rank 0, and what ends that."""
    if options.json or model.group.rank != 0 or model.tokenizer is None:
        return None, lambda: None
    import torch
    from transformers import TextStreamer

    print("" if options.chat else options.prompt, end="", flush=True)
    streamer = TextStreamer(model.tokenizer, skip_special_tokens=True)
    return lambda index, token: streamer.put(torch.tensor([token])), streamer.end


def _finish(
    asked: Asked, kept: Journal | Held, statistics: Statistics, model: Model, options: argparse.Namespace
) -> dict[str, Any]:
    """Write and print what is complete now."""
    from coterie.moe.journal import Journal

    if options.out is not None:
        with atomic_output(options.out) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in asked.rows(kept))
        say(f"{options.out}: {len(asked.requests)} outputs")
    elif options.prompts and not options.json:
        between = "\n" if options.chat else ""
        for row in asked.rows(kept):
            print(f"[{row['id']}] {row['prompt']}{between}{row['text']}\n")
    result = {"outputs": list(asked.rows(kept)) if options.json else [], "stats": asdict(statistics)}
    if isinstance(kept, Journal):
        kept.remove()
    if model.cache is not None:
        c = model.cache.statistics
        read = f"{c.transfers} read, {c.prefetched} of them before they were asked for"
        say(
            f"experts: {c.requests} asked for, {read}; {c.stalled_seconds:.2f} s waited for reads, {c.policy_seconds:.2f} s in "
            "policy and guesses"
        )
    s = statistics
    if s.strategy is None or s.tokens_per_second is None:
        say("every prompt was finished before")
        return result
    say(
        f"{s.new_tokens} tokens in {s.seconds:.2f} s ({s.tokens_per_second:.1f} tokens/s), {s.strategy} on {s.ranks} rank(s), "
        f"{s.bytes_read / 1e6:.1f} MB read, {s.rows_sent} rows sent"
    )
    return result
