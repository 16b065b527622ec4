"""Plans coterie-tiny's experts from its calibration prompts and judges the plans on its held-out ones.

    python bench/plan_tiny.py [--time-limit 60] [--json]

Prints the table of docs/planning.md: one row per number of ranks and objective, against contiguous placement.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import coterie
from coterie.launch.prompts import read_prompts
from coterie.launch.tables import table
from coterie.moe.families import EMBEDDED, EMBEDDED_FOLDER
from coterie.placement.planner import compare

FIELDS = ("ranks", "objective", "planned value", "gap", "seconds", "held-out contiguous", "held-out plan", "cut", "load", "was")
# load: of the plan on held-out text; was: contiguous placement's


def main() -> None:
    """Trace twice, plan for 2, 4 and 8 ranks, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--time-limit", type=float, default=60.0, help="seconds per plan (default: %(default)g)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seen, unseen = (_trace(name, Path(folder)) for name in ("calibration", "heldout"))
    rows = [_row(seen, unseen, r, o, options.time_limit) for r in (2, 4, 8) for o in ("hops", "dispatch")]
    if options.json:
        print(json.dumps([dict(zip(FIELDS, row, strict=True)) for row in rows]))
    else:
        print(table(FIELDS, rows))


def _trace(name: str, folder: Path) -> coterie.RoutingTrace:
    model = coterie.load(EMBEDDED, dtype="float32")
    model.record(read_prompts(EMBEDDED_FOLDER / "prompts" / f"{name}.jsonl"), folder / name)
    return coterie.read_trace(folder / name)


def _row(seen: Any, unseen: Any, ranks: int, objective: str, seconds: float) -> list[Any]:
    request = coterie.PlanRequest(coterie.Topology(1, ranks), objective=objective, time_limit=seconds)
    plan = coterie.plan(seen, request)
    plans = compare(plan, unseen)
    before, after = plans["contiguous"][objective], plans["plan"][objective]
    assert before is not None and after is not None
    o = plan.objective
    return [ranks, objective, o.value, o.gap, plan.seconds, before, after, 1 - after / before, plans["plan"]["load"],
            plans["contiguous"]["load"]]  # fmt: skip


if __name__ == "__main__":
    main()
