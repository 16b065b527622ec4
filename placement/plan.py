"""The placement plan and its file, `coterie.plan.v1` (docs/formats.md).

One map, used by the loader, the dispatcher, the evaluation and the exports.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coterie.placement.homes import Homes
from coterie.placement.homes import from_json as homes_from_json
from coterie.placement.topology import Topology, from_json
from coterie.routing.errors import InputError, naming, require
from coterie.routing.files import read_json, write_text
from coterie.routing.trace import MOST_LAYERS

PLAN_FORMAT = "coterie.plan.v1"
STRATEGIES = ("all_to_all", "hierarchical", "coherent", "all_gather", "replicated")
OBJECTIVES = ("time", "dispatch", "hops", "coherent", "load")
MOST = 1 << 20  # of what is counted, and of experts
LARGEST = 1e18  # value of an objective
MAX_SLOTS = 1 << 24  # layers x ranks x slots: what a file may ask for before it is called a mistake


@dataclass(frozen=True)
class Objective:
    """What was minimised. value: what `evaluate` prints for it on the planned traces; lower_bound: no plan of the same
    shape does better; gap: (value - lower_bound) / value, 0 if both are 0. All None where nothing was optimised.
    """

    name: str
    value: float | None = None
    lower_bound: float | None = None

    @property
    def gap(self) -> float | None:
        """Relative distance to the bound, 0 when proven optimal."""
        if self.value is None or self.lower_bound is None:
            return None
        return 0.0 if self.value == self.lower_bound else (self.value - self.lower_bound) / self.value

    def to_json(self) -> dict[str, Any]:
        """As it stands in a plan file."""
        return {**asdict(self), "gap": self.gap}

    def __post_init__(self) -> None:
        if self.value is not None and self.lower_bound is not None:
            fine = 0 <= self.lower_bound <= self.value
            require(fine, "objective.lower_bound", self.lower_bound, f"0 to the value {self.value}")


@dataclass(frozen=True)
class PlacementPlan:
    """Which expert lives in which slot.

    physical_to_logical: int32 `[layers, ranks * slots_per_rank]`, expert ids, -1 for an empty slot; slot s lives on rank
    s // slots_per_rank. Every expert of a layer stands at least once, never twice on one rank.
    inputs: the files it was planned from with their SHA-256; seconds: planning time; iterations: of the search, made in all,
    by `workers` processes. homes: which sequences are at home on which rank, None where nothing is said about it.
    """

    physical_to_logical: NDArray[np.int32]
    num_experts: int
    layer_ids: tuple[int, ...]
    topology: Topology
    model: str = ""
    strategy: str = "all_to_all"
    objective: Objective = Objective("hops")
    seconds: float = 0.0
    seed: int = 0
    iterations: int = 0
    workers: int = 1
    inputs: tuple[dict[str, str], ...] = field(default=())
    homes: Homes | None = None

    def __post_init__(self) -> None:
        _check_plan(self)

    @property
    def ranks(self) -> int:
        """Ranks over all nodes."""
        return self.topology.ranks

    @property
    def slots_per_rank(self) -> int:
        """Expert slots on each rank, in each layer."""
        return int(self.physical_to_logical.shape[1]) // self.ranks

    def experts_on(self, layer: int, rank: int) -> list[int]:
        """Ascending ids of the experts that `rank` holds in the plan's `layer`-th layer."""
        slots = self.physical_to_logical[layer].reshape(self.ranks, -1)[rank]
        return sorted(int(e) for e in slots if e >= 0)

    def holds(self) -> NDArray[np.bool_]:
        """bool `[layers, E, ranks]`: whether the rank has a copy of the expert."""
        return holders(self.physical_to_logical, self.num_experts, self.ranks)


def holders(physical_to_logical: NDArray[np.integer], num_experts: int, ranks: int) -> NDArray[np.bool_]:
    """bool `[layers, E, ranks]` from a slot map `[layers, ranks * slots]` or `[layers, ranks, slots]`."""
    flat = physical_to_logical.reshape(len(physical_to_logical), -1)
    layers, slots = flat.shape
    held = np.zeros((layers, num_experts + 1, ranks), dtype=bool)  # the last row takes the empty slots
    rank_of_slot = np.arange(slots) // (slots // ranks)
    held[np.arange(layers)[:, None], flat, rank_of_slot[None, :]] = True
    return held[:, :num_experts]


def slots_from_assignment(assignment: NDArray[np.integer], ranks: int, slots_per_rank: int) -> NDArray[np.int32]:
    """A slot map from the rank of every expert, `[layers, E]`; experts ascend within a rank."""
    return slots_from_holders(assignment[:, :, None] == np.arange(ranks), slots_per_rank)


def slots_from_holders(holds: NDArray[np.bool_], slots_per_rank: int) -> NDArray[np.int32]:
    """A slot map from bool `[L, E, ranks]`; experts ascend within a rank, empty slots come last."""
    layers, experts, ranks = holds.shape
    order = np.where(holds, np.arange(experts)[None, :, None], experts).transpose(0, 2, 1)  # [L, ranks, E]
    slots = np.sort(order, axis=2)[:, :, :slots_per_rank]
    if slots.shape[2] < slots_per_rank:
        slots = np.pad(slots, ((0, 0), (0, 0), (0, slots_per_rank - slots.shape[2])), constant_values=experts)
    return np.where(slots == experts, -1, slots).astype(np.int32).reshape(layers, ranks * slots_per_rank)


def _check_plan(p: PlacementPlan) -> None:
    slots = p.physical_to_logical
    require(slots.ndim == 2, "physical_to_logical", f"{slots.ndim} dimensions", "[layers][ranks*slots_per_rank]")
    layers, width = slots.shape
    require(layers == len(p.layer_ids) > 0, "physical_to_logical", f"{layers} layers", f"{len(p.layer_ids)}, as layer_ids")
    require(width > 0 and width % p.ranks == 0, "physical_to_logical", f"{width} slots", f"a multiple of {p.ranks} ranks")
    low, high = int(slots.min()), int(slots.max())
    require(low >= -1 and high < p.num_experts, "physical_to_logical", low if low < -1 else high,
             f"-1 (empty) to {p.num_experts - 1}")  # fmt: skip
    held = holders(slots, p.num_experts, p.ranks)
    if (missing := np.argwhere(~held.any(2))).size:
        layer, expert = missing[0]
        raise InputError(f"physical_to_logical: layer {p.layer_ids[layer]} lacks expert {expert}, expected each at least once")
    copies = (slots >= 0).sum(1)
    if (twice := np.flatnonzero(held.sum((1, 2)) != copies)).size:
        raise InputError(f"physical_to_logical: layer {p.layer_ids[twice[0]]} has an expert twice on one rank, expected once")
    p.topology.bytes_of_experts(layers)  # raises where they are of another number of layers
    require(p.strategy in STRATEGIES, "strategy", repr(p.strategy), " or ".join(STRATEGIES))
    require(p.objective.name in OBJECTIVES, "objective.name", repr(p.objective.name), " or ".join(OBJECTIVES))
    if p.homes is not None:
        p.homes.check(p.layer_ids, p.num_experts, p.ranks)


def save_plan(plan: PlacementPlan, path: Path) -> None:
    """Write a plan file, atomically."""
    value = {
        "format": PLAN_FORMAT,
        "model": plan.model,
        "num_experts": plan.num_experts,
        "layer_ids": list(plan.layer_ids),
        "nodes": plan.topology.nodes,
        "ranks": plan.ranks,
        "slots_per_rank": plan.slots_per_rank,
        "physical_to_logical": plan.physical_to_logical.tolist(),
        "strategy": plan.strategy,
        "objective": plan.objective.to_json(),
        "seconds": plan.seconds,
        "seed": plan.seed,
        "iterations": plan.iterations,
        "workers": plan.workers,
        "inputs": list(plan.inputs),
        "topology": plan.topology.to_json(),
    }
    if plan.homes is not None:
        value["homes"] = plan.homes.to_json()
    write_text(path, json.dumps(value) + "\n")


def read_plan(path: Path) -> PlacementPlan:
    """Read a plan file. Raises InputError, naming the file and the field, for anything that is not a valid plan."""
    value = read_json(path)
    with naming(path):
        return _from_json(value)


def _from_json(value: Any) -> PlacementPlan:
    require(isinstance(value, dict), "plan", type(value).__name__, "a JSON object")
    found = value.get("format")
    require(found == PLAN_FORMAT, "format", repr(found)[:60], repr(PLAN_FORMAT))
    counts = {name: _count(value, name) for name in ("num_experts", "nodes", "ranks", "slots_per_rank")}
    topology = _topology(value, counts["nodes"], counts["ranks"])
    layer_ids = _integers(value.get("layer_ids"), "layer_ids")
    slots = _slot_map(value.get("physical_to_logical"), len(layer_ids), counts["ranks"] * counts["slots_per_rank"])
    plan = PlacementPlan(
        physical_to_logical=slots,
        num_experts=counts["num_experts"],
        layer_ids=tuple(layer_ids),
        topology=topology,
        model=_text(value, "model"),
        strategy=_text(value, "strategy"),
        objective=_objective(value.get("objective")),
        seconds=_seconds(value.get("seconds", 0.0)),
        seed=_whole(value.get("seed", 0), "seed"),
        iterations=_whole(value.get("iterations", 0), "iterations"),
        workers=_whole(value.get("workers", 1), "workers"),
        inputs=tuple(_inputs(value.get("inputs", []))),
        homes=homes_from_json(value.get("homes")),
    )
    _check_gap(value["objective"].get("gap"), plan.objective.gap)
    return plan


def _check_gap(stated: Any, computed: float | None) -> None:
    number = None if stated is None else _number(stated, "objective.gap")
    same = number == computed or (number is not None and computed is not None and abs(number - computed) < 1e-6)
    require(same, "objective.gap", stated, f"{computed} = (value - lower_bound) / value")


def _count(value: dict[str, Any], name: str) -> int:
    found = value.get(name)
    require(type(found) is int and 0 < found <= MOST, name, repr(found)[:40], f"an integer from 1 to {MOST}")
    return int(found)  # type: ignore[arg-type]


def _text(value: dict[str, Any], name: str) -> str:
    found = value.get(name)
    require(isinstance(found, str), name, repr(found)[:40], "a string")
    return str(found)


def _number(found: Any, name: str) -> float:
    ok = isinstance(found, int | float) and not isinstance(found, bool) and abs(found) < LARGEST
    require(ok, name, repr(found)[:40], f"a number within {LARGEST:g}")
    return float(found)


def _seconds(found: Any) -> float:
    number = _number(found, "seconds")
    require(number >= 0, "seconds", number, "0 or more")
    return number


def _whole(found: Any, name: str) -> int:
    require(type(found) is int and 0 <= found < 1 << 63, name, repr(found)[:40], "an integer of 0 or more, below 2^63")
    return int(found)


def _integers(found: Any, name: str) -> list[int]:
    ok = isinstance(found, list) and len(found) > 0 and all(type(v) is int and 0 <= v < MOST_LAYERS for v in found)
    require(ok, name, str(found)[:60], f"a list of layer numbers from 0 to {MOST_LAYERS - 1}")
    require(all(a < b for a, b in pairwise(found)), name, str(found)[:60], "increasing layer numbers")
    return list(found)


def _slot_map(found: Any, layers: int, width: int) -> NDArray[np.int32]:
    name = "physical_to_logical"
    require(layers * width <= MAX_SLOTS, name, f"{layers} x {width} slots", f"at most {MAX_SLOTS} in all")
    require(isinstance(found, list) and len(found) == layers, name, f"{_size(found)} layers", f"{layers}, as layer_ids has")
    for i, row in enumerate(found):
        require(isinstance(row, list) and len(row) == width, f"{name}[{i}]", f"{_size(row)} slots",
                 f"{width} = ranks x slots_per_rank")  # fmt: skip
        require(all(type(v) is int and -1 <= v < MOST for v in row), f"{name}[{i}]", str(row)[:60], "expert ids or -1")
    return np.array(found, dtype=np.int32)


def _size(found: Any) -> object:
    return len(found) if isinstance(found, list) else type(found).__name__


def _objective(found: Any) -> Objective:
    require(isinstance(found, dict), "objective", type(found).__name__, "an object with name, value, lower_bound, gap")
    numbers = [found.get("value"), found.get("lower_bound")]
    names = ("objective.value", "objective.lower_bound")
    value, bound = (None if n is None else _number(n, name) for n, name in zip(numbers, names, strict=True))
    require(value is None or value >= 0, "objective.value", value, "0 or more")
    require(isinstance(found.get("name"), str), "objective.name", repr(found.get("name")), " or ".join(OBJECTIVES))
    return Objective(found["name"], value, bound)


def _topology(value: dict[str, Any], nodes: int, ranks: int) -> Topology:
    topology = from_json(value.get("topology"))
    require(ranks % nodes == 0, "ranks", ranks, f"a multiple of nodes = {nodes}")
    same = (topology.nodes, topology.ranks) == (nodes, ranks)
    require(
        same,
        "topology",
        f"{topology.nodes} nodes, {topology.ranks} ranks",
        f"{nodes} nodes and {ranks} ranks, as above it",
    )
    return topology


def _inputs(found: Any) -> Sequence[dict[str, str]]:
    ok = isinstance(found, list) and all(isinstance(i, dict) and {"file", "sha256"} <= set(i) for i in found)
    require(ok, "inputs", str(found)[:60], "a list of {file, sha256}")
    return [{str(k): str(v) for k, v in i.items()} for i in found]
