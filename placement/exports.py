"""A plan in the formats of other engines, and those formats read back by the rules the engines apply to them.

None of the engines knows an empty slot: -1 would be taken for the last expert, or refused. Empty slots are therefore filled
with copies. Formats and how to start each engine: docs/formats.md, "Other engines".
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coterie.placement.plan import MAX_SLOTS, PlacementPlan, holders
from coterie.routing.errors import CoterieError, InputError, require


@dataclass(frozen=True)
class Layout:
    """What an engine is told.

    experts: int32 `[rows, slots]`, none empty, slot s on rank s // (slots / ranks); layer_ids: the decoder layer of each
    row; filled: slots that are empty in the plan; unplanned: rows of layers that the plan does not have.
    """

    experts: NDArray[np.int32]
    layer_ids: tuple[int, ...]
    num_experts: int
    ranks: int
    filled: int = 0
    unplanned: int = 0

    @property
    def slots(self) -> int:
        """Slots of a layer over all ranks."""
        return int(self.experts.shape[1])


@dataclass(frozen=True)
class Engine:
    """One engine's format.

    write: a layout as text; read: the text as int32 `[rows, slots]`, given the layout for the shape of model and cluster
    that the engine would know, InputError where the engine would refuse or misread it; start: the engine's own options,
    with {file}, {ranks} and {redundant} (slots beyond one for each expert) to fill in; every_layer: rows for dense layers
    too; by_position: rows are counted, not named; once_per_rank: a rank must not hold an expert twice; suffix: how the
    file's name must end, if that matters.
    """

    write: Callable[[Layout], str]
    read: Callable[[str, Layout], NDArray[np.int32]]
    start: str
    every_layer: bool = False
    by_position: bool = False
    once_per_rank: bool = False
    minimum_ranks: int = 1
    suffix: str = ""


def layout(plan: PlacementPlan, to: str, num_layers: int | None = None) -> Layout:
    """The plan as engine `to` is told it. num_layers: decoder layers of the model, where the engine wants all of them.

    Raises InputError for what the engine cannot take.
    """
    engine = engine_named(to)
    require(plan.ranks >= engine.minimum_ranks, "ranks", plan.ranks, f"{engine.minimum_ranks} or more: {to} reads no map below")
    if engine.once_per_rank:
        allowed = f"at most {plan.num_experts}, the experts: {to} misroutes if a rank has one twice; plan with fewer slots"
        require(plan.slots_per_rank <= plan.num_experts, "slots_per_rank", plan.slots_per_rank, allowed)
    experts, filled = fill_empty(plan.physical_to_logical, plan.num_experts, plan.ranks)
    made = Layout(experts, plan.layer_ids, plan.num_experts, plan.ranks, filled)
    if engine.every_layer:
        return with_every_layer(made, num_layers)
    require(num_layers is None, "--num-layers", num_layers, f"none: {to} is told of the layers with experts only; leave it out")
    return made


def engine_named(to: str) -> Engine:
    """The engine; raises InputError if there is none of that name."""
    require(to in EXPORTS, "--to", repr(to), " or ".join(EXPORTS))
    return EXPORTS[to]


def fill_empty(slots: NDArray[np.int32], num_experts: int, ranks: int) -> tuple[NDArray[np.int32], int]:
    """A slot map without -1, and how many there were. slots: int32 `[layers, slots]`.

    An empty slot takes the expert with the fewest copies, of those that its rank does not hold yet if there is one; the
    lowest id of equals. What was placed stays where it is.
    """
    filled = slots.copy()
    held = holders(slots, num_experts, ranks)
    copies = held.sum(2)
    per_rank = slots.shape[1] // ranks
    empty = np.argwhere(slots < 0)
    for layer, slot in empty:
        on_rank = held[layer, :, slot // per_rank]
        expert = np.lexsort((copies[layer], on_rank))[0]
        filled[layer, slot] = expert
        copies[layer, expert] += 1
        on_rank[expert] = True
    return filled, len(empty)


def with_every_layer(made: Layout, num_layers: int | None) -> Layout:
    """Rows for all decoder layers, 0 to num_layers - 1; those the plan lacks hold expert slot % num_experts."""
    needed = made.layer_ids[-1] + 1
    rows = needed if num_layers is None else num_layers
    require(rows >= needed, "--num-layers", rows, f"{needed} or more: the plan has layer {needed - 1}")
    require(rows * made.slots <= MAX_SLOTS, "--num-layers", rows, f"at most {MAX_SLOTS // made.slots} with {made.slots} slots")
    trivial = np.arange(made.slots, dtype=np.int32) % made.num_experts
    experts = np.tile(trivial, (rows, 1))
    experts[list(made.layer_ids)] = made.experts
    unplanned = rows - len(made.layer_ids)
    return Layout(experts, tuple(range(rows)), made.num_experts, made.ranks, made.filled, unplanned)


def verify(text: str, to: str, made: Layout) -> None:
    """Raises CoterieError unless engine `to` would read from `text` exactly what `made` says."""
    try:
        found = engine_named(to).read(text, made)
    except InputError as error:
        raise CoterieError(f"{to} would not take what was written: {error} (this is a defect of coterie)") from error
    if not np.array_equal(found, made.experts):
        row, slot = np.argwhere(found != made.experts)[0]
        what = f"layer {made.layer_ids[row]}, slot {slot}: read back {found[row, slot]}, expected {made.experts[row, slot]}"
        raise CoterieError(f"{to}: {what} (this is a defect of coterie)")


def _checked(rows: Any, made: Layout, field: str) -> NDArray[np.int32]:
    """Rows of expert ids as an array; what all engines ask: the model's shape, known experts, each at least once."""
    require(isinstance(rows, list) and len(rows) == len(made.layer_ids), field, _size(rows), f"{len(made.layer_ids)} layers")
    for layer, row in zip(made.layer_ids, rows, strict=True):
        name = f"{field}, layer {layer}"
        require(isinstance(row, list) and len(row) == made.slots, name, f"{_size(row)} slots", str(made.slots))
        known = all(type(e) is int and 0 <= e < made.num_experts for e in row)
        require(known, name, str(row)[:60], f"expert ids from 0 to {made.num_experts - 1}")
        missing = sorted(set(range(made.num_experts)) - set(row))
        require(not missing, name, f"no slot with expert {missing[:1]}", "each expert at least once")
    require(made.slots % made.ranks == 0, field, f"{made.slots} slots", f"a multiple of {made.ranks} ranks")
    return np.array(rows, dtype=np.int32)


def _size(found: Any) -> object:
    return len(found) if isinstance(found, list) else type(found).__name__


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"is not valid JSON: {str(error)[:100]}") from error


def _with_keys(found: Any, keys: set[str], field: str) -> dict[str, Any]:
    have = sorted(found) if isinstance(found, dict) else type(found).__name__
    require(isinstance(found, dict) and set(found) == keys, field, str(have)[:80], f"exactly {sorted(keys)}")
    return dict(found)


def write_sglang(made: Layout) -> str:
    """`--init-expert-location`: the keys are passed on as arguments, so there is exactly one."""
    return json.dumps({"physical_to_logical_map": made.experts.tolist()}) + "\n"


def read_sglang(text: str, made: Layout) -> NDArray[np.int32]:
    """Row i is decoder layer i. Expert ids index a list there, so a -1 would be taken for the last expert."""
    found = _with_keys(_json(text), {"physical_to_logical_map"}, "keys")
    return _checked(found["physical_to_logical_map"], made, "physical_to_logical_map")


def write_vllm(made: Layout) -> str:
    """A list of rows, as vLLM's open `initial_expert_map_path` (#49572) and the plugin of docs/formats.md take it."""
    return json.dumps(made.experts.tolist()) + "\n"


def read_vllm(text: str, made: Layout) -> NDArray[np.int32]:
    """Row i is the i-th layer with experts."""
    return _checked(_json(text), made, "expert map")


def write_trtllm(made: Layout) -> str:
    """YAML of the MoE load balancer; no layer updates, so that the placement stays."""
    rows = [f"  {layer}: {row}\n" for layer, row in zip(made.layer_ids, made.experts.tolist(), strict=True)]
    return f"num_slots: {made.slots}\nlayer_updates_per_iter: 0\ninitial_global_assignments:\n{''.join(rows)}"


def read_trtllm(text: str, made: Layout) -> NDArray[np.int32]:
    """A strict reader of the YAML that is written here: decoder layers by number, as many experts as num_slots says."""
    shape = re.fullmatch(
        r"num_slots: (\d+)\nlayer_updates_per_iter: 0\ninitial_global_assignments:\n((?:  \d+: \[\d+(?:, \d+)*\]\n)+)", text
    )
    if shape is None:
        raise InputError("load balancer: found other lines, expected num_slots, layer_updates_per_iter: 0 and the assignments")
    require(int(shape[1]) == made.slots, "num_slots", int(shape[1]), str(made.slots))
    pairs = [line.split(":") for line in shape[2].splitlines()]
    layers = tuple(int(layer) for layer, _ in pairs)
    require(layers == made.layer_ids, "initial_global_assignments", f"layers {layers}"[:80], f"{made.layer_ids}"[:80])
    return _checked([json.loads(row) for _, row in pairs], made, "initial_global_assignments")


def write_ascend(made: Layout) -> str:
    """vllm-ascend's `expert_map_path`."""
    layers = []
    for position, row in enumerate(made.experts.reshape(len(made.layer_ids), made.ranks, -1).tolist()):
        devices = [{"device_id": rank, "device_expert": experts} for rank, experts in enumerate(row)]
        layers.append({"layer_id": position, "device_count": made.ranks, "device_list": devices})
    return json.dumps({"moe_layer_count": len(layers), "layer_list": layers}) + "\n"


def read_ascend(text: str, made: Layout) -> NDArray[np.int32]:
    """Entry i of the list is the i-th layer with experts, entry r of a device list rank r; the ids only repeat that.

    The engine counts a rank's slots by its distinct experts, so one that stands twice on a rank shifts all ranks behind it.
    """
    found = _with_keys(_json(text), {"moe_layer_count", "layer_list"}, "keys")
    layers, count = found["layer_list"], found["moe_layer_count"]
    require(isinstance(layers, list) and count == len(layers), "moe_layer_count", count, f"{_size(layers)}, as layer_list has")
    rows = [_devices(entry, position, made.ranks) for position, entry in enumerate(layers)]
    return _checked(rows, made, "layer_list")


def _devices(entry: Any, position: int, ranks: int) -> list[Any]:
    """The experts of a layer's devices in a row."""
    name = f"layer_list[{position}]"
    found = _with_keys(entry, {"layer_id", "device_count", "device_list"}, name)
    require(found["layer_id"] == position, f"{name}.layer_id", found["layer_id"], str(position))
    devices = found["device_list"]
    counts = (found["device_count"], _size(devices))
    require(counts == (ranks, ranks), f"{name}.device_count, device_list", counts, f"{ranks} ranks in both")
    held = []
    for rank, device in enumerate(devices):
        value = _with_keys(device, {"device_id", "device_expert"}, f"{name}.device_list[{rank}]")
        require(value["device_id"] == rank, f"{name}.device_id", value["device_id"], str(rank))
        require(isinstance(value["device_expert"], list), f"{name}.device_expert", _size(value["device_expert"]), "a list")
        held.append(value["device_expert"])
    require(all(len(a) == len(b) for a, b in pairwise(held)), name, "uneven devices", "as many experts on each device")
    twice = [rank for rank, experts in enumerate(held) if len(set(map(str, experts))) < len(experts)]
    require(not twice, name, f"an expert twice on device {twice[:1]}", "each at most once on a device")
    return [expert for experts in held for expert in experts]


EXPORTS = {
    "sglang": Engine(
        write_sglang, read_sglang, suffix=".json", every_layer=True,
        start="--init-expert-location {file} --ep-size {ranks} --ep-num-redundant-experts {redundant}",
    ),
    "vllm": Engine(
        write_vllm, read_vllm, by_position=True,
        start="COTERIE_EXPERT_MAP={file}, --enable-expert-parallel --enable-eplb --eplb-config "
        '\'{{"num_redundant_experts": {redundant}}}\' on {ranks} ranks, with the plugin in docs/formats.md',
    ),
    "trtllm": Engine(
        write_trtllm, read_trtllm, start="moe_expert_parallel_size: {ranks}, moe_config: {{load_balancer: {file}}}"
    ),
    "ascend": Engine(
        write_ascend, read_ascend, by_position=True, once_per_rank=True, minimum_ranks=2,
        start='--additional-config \'{{"eplb_config": {{"expert_map_path": "{file}"}}}}\' on {ranks} ranks',
    ),
}  # fmt: skip
"""Engines by the name that `coterie export --to` takes."""
