"""What the verbs do: read files, call the library, print. Each takes the parsed options and returns its JSON object."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coterie.launch.tables import table
from coterie.placement.plan import read_plan
from coterie.routing.errors import InputError, naming, positive
from coterie.routing.files import check_writable, looks_like_json
from coterie.routing.trace import LoadStatistics, RoutingTrace, check_scenario, read_routing, save_load, save_trace

if TYPE_CHECKING:
    from coterie.launch.timeline import Sums


def say(text: str) -> None:
    """A line for people, on standard error: standard output belongs to the result."""
    print(text, file=sys.stderr, flush=True)


def import_(options: argparse.Namespace) -> dict[str, Any]:
    """Bring in a recording made elsewhere."""
    from coterie.routing.imported import ImportOptions
    from coterie.routing.imports import import_routing

    check_writable(options.out, *options.files)
    check_scenario(options.scenario)
    if options.num_experts is not None:
        positive("--num-experts", options.num_experts)
    if options.placement is not None:
        return _placement(options)
    for name in ("like", "topology"):
        if getattr(options, name) is not None:
            raise InputError(f"--{name}: found it without --placement, expected them together")
    settings = ImportOptions(options.model, options.num_experts, options.scenario, options.phase)
    found = import_routing(options.files, settings)
    if isinstance(found, RoutingTrace):
        save_trace(found, options.out)
        size = {"tokens": found.tokens, "layers": found.layers}
    else:
        save_load(found, options.out)
        size = {"scenarios": len(found.scenarios), "layers": len(found.layer_ids)}
    say(f"{options.out}: " + ", ".join(f"{v} {k}" for k, v in size.items()) + f", {found.num_experts} experts")
    return {"trace": str(options.out), **size, "num_experts": found.num_experts}


def _placement(options: argparse.Namespace) -> dict[str, Any]:
    """A placement that an engine has, as a plan."""
    from coterie.placement.in_use import placement_in_use
    from coterie.placement.plan import save_plan
    from coterie.placement.topology import parse_topology

    for name, value in {"--like": options.like, "--topology": options.topology}.items():
        if value is None:
            raise InputError(f"{name}: found none with --placement, expected it: what layers, and what ranks")
    if len(options.files) != 1:
        raise InputError(f"FILE: found {len(options.files)} with --placement, expected one")
    for name in ("model", "scenario", "num_experts", "phase"):
        if getattr(options, name):
            raise InputError(f"--{name.replace('_', '-')}: found it with --placement, expected --like to say so")
    check_writable(options.out, options.like, options.topology)
    like = read_routing(options.like)
    made = placement_in_use(options.files[0], options.placement, like, parse_topology(options.topology))
    save_plan(made, options.out)
    slots, copies = made.slots_per_rank, int((made.physical_to_logical >= 0).sum()) - len(made.layer_ids) * made.num_experts
    say(f"{options.out}: {len(made.layer_ids)} layers, {made.ranks} ranks of {slots} slots, {copies} copies")
    return {
        "plan": str(options.out),
        "layers": len(made.layer_ids),
        "ranks": made.ranks,
        "slots_per_rank": slots,
        "copies": copies,
    }


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """What a plan does to traces."""
    from coterie.placement.planner import compare

    _check_distinct(options.traces)
    made = read_plan(options.plan)
    results: dict[str, dict[str, Any]] = {}
    for path in options.traces:
        for name, routing, scenario in _scenarios(path, read_routing(path)):
            with naming(path):
                plans = compare(made, routing, scenario)
            tokens = routing.tokens if isinstance(routing, RoutingTrace) else None
            results[name] = {"plans": plans, "tokens": tokens, "layers": len(routing.layer_ids)}
            if not options.json:
                print(f"{name}\n{comparison(plans)}")
    return next(iter(results.values())) if len(results) == 1 else {"scenarios": results}


def _check_distinct(paths: Sequence[Path]) -> None:
    """Raises InputError for a recording that is given twice: results are told by its name."""
    for path in paths:
        if paths.count(path) > 1:
            raise InputError(f"{path}: found {paths.count(path)} times, expected different recordings")


def _scenarios(path: Path, routing: RoutingTrace | LoadStatistics) -> list[tuple[str, RoutingTrace | LoadStatistics, int]]:
    if isinstance(routing, RoutingTrace) or len(routing.scenarios) == 1:
        return [(str(path), routing, 0)]
    return [(f"{path}:{name}", routing, i) for i, name in enumerate(routing.scenarios)]


def comparison(plans: dict[str, dict[str, float | None]], known_only: bool = False) -> str:
    """What `planner.compare` returns as a table, a plan a line; known_only: without the fields that no plan has."""
    fields = [f for f in next(iter(plans.values())) if not known_only or any(p[f] is not None for p in plans.values())]
    return table(["plan", *fields], [[name, *(values[f] for f in fields)] for name, values in plans.items()])


def show(options: argparse.Namespace) -> dict[str, Any]:
    """Draw a trace, a plan, or a plan on a trace."""
    from coterie.launch.show import write_report
    from coterie.launch.show_timeline import write_traffic_report

    check_writable(options.out, *options.files)
    if len(options.files) == 1 and (sums := _traffic(options.files[0])) is not None:
        write_traffic_report(options.out, sums, options.files[0].name)
        say(f"{options.out}: open it in a browser")
        return {"report": str(options.out)}
    plans = [read_plan(p) for p in options.files if _is_plan(p)]
    check_writable(options.out, *(file for plan in plans for entry in plan.inputs if (file := _there(entry)) is not None))
    given = [p for p in options.files if not _is_plan(p)]
    if len(plans) > 1 or len(given) > 1:
        raise InputError(f"show: found {len(plans)} plans and {len(given)} traces, expected at most one of each")
    traces = [read_routing(p) for p in given]
    recorded = traces[0] if traces else None
    if recorded is None and plans:
        recorded = _planned_trace(plans[0].inputs)
    if isinstance(recorded, LoadStatistics) and len(recorded.scenarios) > 1:
        say(f"{len(recorded.scenarios)} scenarios: drawing their sum")
        recorded = recorded.summed()
    drawn = given or (options.files if recorded is not None else [])
    with naming(*drawn, "model", "num_experts", "layer_ids", "homes") if drawn else nullcontext():
        write_report(options.out, plans[0] if plans else None, recorded)
    say(f"{options.out}: open it in a browser")
    return {"report": str(options.out)}


def _traffic(path: Path) -> Sums | None:
    from coterie.launch.timeline import read

    return read(path) if _is_plan(path) else None


def _is_plan(path: Path) -> bool:
    """Plans are JSON."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    return looks_like_json(path)


def _there(entry: dict[str, str]) -> Path | None:
    """A recording that a plan was made from, if it is there and may be read."""
    path = Path(entry.get("file", ""))
    return path if os.access(path, os.R_OK) and path.is_file() else None


def _planned_trace(inputs: tuple[dict[str, str], ...]) -> RoutingTrace | LoadStatistics | None:
    """The trace a plan was made from, if it is still where it was and still the same."""
    from coterie.routing.files import sha256

    for entry in inputs:
        path = _there(entry)
        if path is not None and sha256(path) == entry.get("sha256"):
            if len(inputs) > 1:
                say(f"the plan was made from {len(inputs)} recordings: drawing it on {path}")
            return read_routing(path)
    say("the trace that the plan was made from is not there (any more): drawing the plan alone; give the trace to draw both")
    return None
