"""coterie: Mixture-of-Experts inference that knows which experts keep company.

The public names, loaded when first used: `import coterie` imports neither torch nor transformers.

    model = coterie.load("coterie-tiny")                      # or a checkpoint folder, or a hub id
    outputs, statistics = model.generate(["def main("])
    model.record(prompts, Path("trace.safetensors"))
    plan = coterie.plan(coterie.read_trace(path), coterie.PlanRequest(coterie.parse_topology("2x4")))
    report = coterie.evaluate(plan, coterie.read_trace(held_out))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "load": "moe.model",
    "register": "moe.layer",
    "Model": "moe.model",
    "Prompt": "moe.text",
    "Output": "moe.text",
    "Statistics": "moe.model",
    "Sampling": "moe.generate",
    "RoutingTrace": "routing.trace",
    "LoadStatistics": "routing.trace",
    "read_trace": "routing.trace",
    "read_routing": "routing.trace",
    "save_trace": "routing.trace",
    "Affinity": "routing.affinity",
    "measure": "routing.affinity",
    "Topology": "placement.topology",
    "parse_topology": "placement.topology",
    "PlacementPlan": "placement.plan",
    "read_plan": "placement.plan",
    "save_plan": "placement.plan",
    "PlanRequest": "placement.planner",
    "plan": "placement.planner",
    "CostReport": "placement.cost",
    "evaluate": "placement.cost",
    "CoterieError": "routing.errors",
    "InputError": "routing.errors",
}
__all__ = sorted(_NAMES)

if TYPE_CHECKING:
    from coterie.moe.generate import Sampling as Sampling
    from coterie.moe.layer import register as register
    from coterie.moe.model import Model as Model
    from coterie.moe.model import Statistics as Statistics
    from coterie.moe.model import load as load
    from coterie.moe.text import Output as Output
    from coterie.moe.text import Prompt as Prompt
    from coterie.placement.cost import CostReport as CostReport
    from coterie.placement.cost import evaluate as evaluate
    from coterie.placement.plan import PlacementPlan as PlacementPlan
    from coterie.placement.plan import read_plan as read_plan
    from coterie.placement.plan import save_plan as save_plan
    from coterie.placement.planner import PlanRequest as PlanRequest
    from coterie.placement.planner import plan as plan
    from coterie.placement.topology import Topology as Topology
    from coterie.placement.topology import parse_topology as parse_topology
    from coterie.routing.affinity import Affinity as Affinity
    from coterie.routing.affinity import measure as measure
    from coterie.routing.errors import CoterieError as CoterieError
    from coterie.routing.errors import InputError as InputError
    from coterie.routing.trace import LoadStatistics as LoadStatistics
    from coterie.routing.trace import RoutingTrace as RoutingTrace
    from coterie.routing.trace import read_routing as read_routing
    from coterie.routing.trace import read_trace as read_trace
    from coterie.routing.trace import save_trace as save_trace


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'coterie' has no attribute {name!r}")
    return getattr(importlib.import_module(f"coterie.{_NAMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
