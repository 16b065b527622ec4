"""The verb `export`: a plan as a file for another engine."""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path
from typing import Any

from coterie.launch.commands import say
from coterie.placement.exports import EXPORTS, Engine, Layout, layout, verify
from coterie.placement.plan import PlacementPlan, read_plan
from coterie.routing.errors import naming, positive, require
from coterie.routing.files import atomic_output, check_writable


def export(options: argparse.Namespace) -> dict[str, Any]:
    """Write a plan in another engine's format; it takes its name only once it has been read back and found right."""
    check_writable(options.out, options.plan)
    engine = EXPORTS[options.to]
    ending = options.out.name.endswith(engine.suffix)
    require(ending, "--out", f"{options.out}", f"a name that ends in {engine.suffix}, as {options.to} wants it")
    if options.num_layers is not None:
        positive("--num-layers", options.num_layers)
    plan = read_plan(options.plan)
    with naming(options.plan):
        made = layout(plan, options.to, options.num_layers)
    with atomic_output(options.out) as temporary:
        temporary.write_text(engine.write(made), encoding="utf-8")
        verify(temporary.read_text(encoding="utf-8"), options.to, made)
    _report(options.out, options.to, engine, plan, made)
    layers = len(made.layer_ids)
    return {"export": str(options.out), "to": options.to, "layers": layers, "slots": made.slots, "filled": made.filled}


def _report(out: Path, to: str, engine: Engine, plan: PlacementPlan, made: Layout) -> None:
    say(f"{out}: {len(made.layer_ids)} layers of {made.slots} slots on {made.ranks} ranks, read back as {to} reads it")
    if made.filled:
        say(f"{made.filled} empty slots are filled with copies of experts: {to} has no empty slots and will use the copies")
    if made.unplanned:
        say(f"{made.unplanned} layers are not in the plan (without experts, or not traced) and have the default placement")
    if engine.by_position and any(b - a > 1 for a, b in pairwise(plan.layer_ids)):
        say(f"the plan skips layers: {to} counts the layers with experts, so those skipped must be without")
    if getattr(plan, "homes", None):
        say(f"the plan's homes are lost: {to} does not place sequences")
    redundant = made.slots - made.num_experts
    say(f"start {to} with: {engine.start.format(file=out, ranks=made.ranks, redundant=redundant)}")
