"""`coterie plan`: progress while it searches, the plan beside those that need no planning, and whether it will pay."""

from __future__ import annotations

import argparse
import os
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coterie.launch.available import system_bytes, usable_cores
from coterie.launch.commands import comparison, say
from coterie.launch.distributed import launched_rank, launched_size, same_on_all, together
from coterie.launch.launched import find_launch
from coterie.placement.baselines import BASELINES
from coterie.placement.plan import read_plan, save_plan
from coterie.placement.topology import parse_topology
from coterie.routing.errors import InputError, naming, require
from coterie.routing.files import check_writable, sha256
from coterie.routing.trace import LoadStatistics, RoutingTrace, read_routing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coterie.placement.plan import PlacementPlan
    from coterie.placement.planner import PlanRequest
    from coterie.placement.task import Progress

MOST_WORKERS = 8
PREDICTING = 0.1  # of the time limit: a quick plan of half the sequences, judged on the others


def plan(options: argparse.Namespace) -> dict[str, Any] | None:
    """Place the experts of a traced model. Under mpirun every process searches and the first one writes."""
    from coterie.placement.planner import plan as make_plan
    from coterie.placement.spread import world

    here = world()
    request, routings = together(here, lambda: _read(options))
    if here.size > 1:
        files = [*options.traces, *filter(None, [options.previous])]
        same_on_all(here, {str(path): sha256(path)[:16] for path in files})
    if launched_rank() == 0:
        for note in _beforehand(request, routings):
            say(f"note: {note}")
    about_topology = naming(options.topology, "topology") if Path(options.topology).is_file() else nullcontext()
    with about_topology, _shown(request) as progress:
        first = replace(request, time_limit=(1 - PREDICTING) * request.time_limit)
        made = make_plan(routings, first, options.traces, progress)
    if launched_rank() != 0:
        return None
    save_plan(made, options.out)
    try:
        return _told(made, routings, request, options)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {options.out} is written") from None


def _read(options: argparse.Namespace) -> tuple[PlanRequest, list[RoutingTrace | LoadStatistics]]:
    if launched_rank() == 0:  # `--from` may be replaced by what follows it
        check_writable(options.out, *options.traces, options.topology)
    routings = [read_routing(path) for path in options.traces]
    for path, routing in zip(options.traces, routings, strict=True):
        if isinstance(routing, RoutingTrace) and options.objective != "load" and options.method not in BASELINES:
            with naming(path):
                _check_room(routing)
    return _request(options), routings


def _check_room(trace: RoutingTrace) -> None:
    """Raises InputError where not even what follows what fits into memory, as of a trace that names far too many experts."""
    needed, free = 8 * (trace.layers - 1) * trace.num_experts**2, system_bytes()
    if free is not None and needed > free:
        room = f"transitions take {needed / 1e9:.0f} GB, {free / 1e9:.0f} are free"
        wanted = f"fewer (the largest id is {int(trace.expert_ids.max())}), or more memory: {room}"
        raise InputError(f"num_experts: found {trace.num_experts} in {trace.layers} layers, expected {wanted}")


def _beforehand(request: PlanRequest, routings: list[RoutingTrace | LoadStatistics]) -> Iterator[str]:
    """What has no effect, what other methods than our own do not know, and what homes will be told by."""
    scenarios = sum(len(r.scenarios) if isinstance(r, LoadStatistics) else 1 for r in routings)
    if request.robust == "worst" and scenarios == 1:
        yield "--robust worst has no effect: there is one recording, with one scenario"
    if request.homes and any(isinstance(r, RoutingTrace) and r.token_ids is None for r in routings):
        yield (
            "homes will be told by the first tokens of every prompt, which are run for it; from traces with token ids "
            "(coterie trace --token-ids) they are told before anything runs, and better"
        )
    if request.method != "auto":
        if request.robust == "worst" and len(routings) > 1:
            yield f"--method {request.method} plans for the mean of the recordings, whatever --robust says"
        if request.slots_per_rank is not None and request.method != "packed":
            yield f"--method {request.method} makes no copies: slots beyond the experts stay empty"
        if request.iterations is not None:
            yield f"--method {request.method} has no iterations: --iterations has no effect"


def _told(
    made: PlacementPlan, routings: list[RoutingTrace | LoadStatistics], request: PlanRequest, options: argparse.Namespace
) -> dict[str, Any]:
    """Of a plan that is written: what it does, and what to expect of it."""
    if not options.json:
        print(_comparisons(made, routings))
    o = made.objective
    bound = "" if o.gap is None else f", bound {o.lower_bound:.4g}, gap {o.gap:.2%}"
    say(f"{options.out}: {o.name} {o.value:.4g}{bound}, in {made.seconds:.1f} s")
    result = {"plan": str(options.out), "objective": o.to_json(), "seconds": made.seconds, "iterations": made.iterations}
    if request.previous is not None:
        from coterie.placement.replan import moves

        result["moves"] = moves(request.previous, made)
        say(f"{result['moves']} expert moves from {options.previous}")
    return result | _predicted(made, routings, request)


def _predicted(made: PlacementPlan, routings: list[RoutingTrace | LoadStatistics], request: PlanRequest) -> dict[str, Any]:
    """What to expect of the plan, said and returned; nothing under mpirun, whose other processes have left."""
    from coterie.placement.advice import predict
    from coterie.placement.prices import minimised_name

    if launched_size() > 1:
        return {}
    prediction = predict(made, routings, request, PREDICTING / 2 * request.time_limit)
    if prediction.unseen_gain is not None:
        name = minimised_name(request)
        gain = prediction.unseen_gain
        where = "above" if gain < 0 else "below"
        say(f"predicted on text it did not see: {name} {abs(gain):.1%} {where} contiguous placement")
    for note in prediction.notes:
        say(f"note: {note}")
    return {"predicted": {"unseen_gain": prediction.unseen_gain, "notes": list(prediction.notes)}}


def _checked_workers(workers: int) -> int:
    """Processes that search; many more than cores only wait for each other."""
    most = max(16, 4 * usable_cores())
    require(1 <= workers <= most, "--workers", workers, f"1 to {most} here: 16, or four for each core if that is more")
    return workers


def _request(options: argparse.Namespace) -> PlanRequest:
    from coterie.placement.planner import PlanRequest

    workers = min(MOST_WORKERS, usable_cores()) if options.workers is None else options.workers
    if launched_size() > 1 and options.workers is None:
        workers = 1
    return PlanRequest(
        topology=parse_topology(options.topology), strategy=options.strategy, objective=options.objective,
        method=options.method, max_load=options.max_load, slots_per_rank=options.slots_per_rank, robust=options.robust,
        time_limit=options.time_limit, iterations=options.iterations, exact=options.exact, seed=options.seed,
        workers=_checked_workers(workers), homes=options.homes, max_moves=options.max_moves,
        previous=None if options.previous is None else read_plan(options.previous),
    )  # fmt: skip


@contextmanager
def _shown(request: PlanRequest) -> Iterator[Progress]:
    """A bar over the time limit with the incumbent, its bound and the gap; on a terminal only, and by the first process."""
    from tqdm import tqdm

    form = "plan |{bar}| {elapsed} of " + f"{request.time_limit:g} s{{postfix}}"
    hidden = True if launched_rank() != 0 else None
    started, last = time.monotonic(), 0.0
    with tqdm(total=request.time_limit, bar_format=form, disable=hidden, leave=False) as bar:

        def progress(value: float | None, bound: float | None, iterations: int) -> None:
            nonlocal last
            spent = time.monotonic() - started
            if spent - last < 0.2:
                return
            last = spent
            bar.n = min(spent, request.time_limit)
            parts = [] if value is None else [f"{request.objective_name} {value:.4g}"]
            parts += [] if not bound else [f"bound {bound:.4g}"]
            parts += [] if not bound or not value else [f"gap {max(0.0, 1 - bound / value):.2%}"]
            bar.set_postfix_str(", ".join([*parts, f"{iterations} iterations (ctrl-C keeps the best)"]))

        yield progress


def _comparisons(made: PlacementPlan, routings: list[RoutingTrace | LoadStatistics]) -> str:
    from coterie.placement.planner import compare

    blocks = []
    for routing in routings:
        count = 1 if isinstance(routing, RoutingTrace) else len(routing.scenarios)
        for scenario in range(count):
            plans = compare(replace(made, model=routing.model), routing, scenario)
            name = routing.scenario if isinstance(routing, RoutingTrace) else routing.scenarios[scenario]
            title = f"{name}\n" if name and (count > 1 or len(routings) > 1) else ""
            blocks.append(title + comparison(plans, known_only=True))
    return "\n\n".join(blocks)


def check_launch(verb: str) -> None:
    """Raises InputError where a verb runs on one process only; `plan` runs on several under mpirun alone."""
    size = find_launch(os.environ).size
    if size == 1 or verb in ("generate", "trace"):
        return
    if verb == "plan":
        if "OMPI_COMM_WORLD_SIZE" in os.environ or "PMI_SIZE" in os.environ:
            return
        raise InputError(f"plan: found {size} processes, expected one, or mpirun -n {size} coterie plan ...")
    raise InputError(f"{verb}: found {size} processes, expected one; generate, trace and plan run on several")
