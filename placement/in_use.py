"""A placement that an engine runs with now, read as a plan: to be judged, and to be changed within a few moves.

What engines take as files (`exports.py` has the formats), and the map that SGLang's recorder writes into its dumps.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coterie.placement.exports import EXPORTS, Layout
from coterie.placement.plan import PlacementPlan
from coterie.placement.topology import Topology
from coterie.routing.errors import InputError, naming, require
from coterie.routing.trace import LoadStatistics, RoutingTrace


def placement_in_use(path: Path, engine: str, like: RoutingTrace | LoadStatistics, topology: Topology) -> PlacementPlan:
    """The plan of `like`'s layers that is in the file. engine: of `EXPORTS`; a `.pt` of sglang is a dump of its recorder.

    like: routing of the model, which says the layers with experts and how many there are. A second copy of an expert on one
    rank, which computes nothing that the first does not, is left out. Raises InputError, naming file and field.
    """
    require(engine in EXPORTS, "--placement", repr(engine), " or ".join(EXPORTS))
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with naming(path):
        slots = _of_dump(path, like) if path.suffix == ".pt" and engine == "sglang" else _of_text(path, engine, like, topology)
        slots_of_all = f"a multiple of {topology.ranks} ranks (--topology)"
        require(slots.shape[1] % topology.ranks == 0, "slots", slots.shape[1], slots_of_all)
        by_rank = slots.reshape(len(slots), topology.ranks, -1)
        for layer, rank in np.ndindex(by_rank.shape[:2]):
            here = by_rank[layer, rank]
            _, first = np.unique(here, return_index=True)
            here[np.setdiff1d(np.arange(len(here)), first)] = -1
        return PlacementPlan(slots, like.num_experts, like.layer_ids, topology, model=like.model)


def _of_text(path: Path, engine: str, like: RoutingTrace | LoadStatistics, topology: Topology) -> NDArray[np.int32]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"byte {error.start}: is not UTF-8, expected a map as {engine} takes it") from error
    rows, slots = _size(text, engine)
    layer_ids = tuple(range(rows)) if EXPORTS[engine].every_layer else like.layer_ids
    shape = Layout(np.zeros((len(layer_ids), slots), np.int32), layer_ids, like.num_experts, topology.ranks)
    found = EXPORTS[engine].read(text, shape)
    if not EXPORTS[engine].every_layer:
        return found.copy()
    require(rows > like.layer_ids[-1], "layers", rows, f"{like.layer_ids[-1] + 1} or more, as --like has")
    return found[list(like.layer_ids)]  # the others are dense


def _size(text: str, engine: str) -> tuple[int, int]:
    """Layers and slots of a layer, as far as they can be told; what is wrong with the rest the engine's own reader says."""
    if engine == "trtllm":
        said = re.search(r"^num_slots: (\d{1,7})$", text, re.MULTILINE)
        return 0, int(said[1]) if said else 0
    try:
        found: Any = json.loads(text)
        rows = {"sglang": lambda: found["physical_to_logical_map"], "vllm": lambda: found}.get(engine)
        if rows is None:
            devices = found["layer_list"][0]["device_list"]
            return 0, sum(len(device["device_expert"]) for device in devices)
        return len(rows()), len(rows()[0])
    except (ValueError, RecursionError, TypeError, KeyError, IndexError):
        return 0, 0


def _of_dump(path: Path, like: RoutingTrace | LoadStatistics) -> NDArray[np.int32]:
    from coterie.routing.sglang import slot_map  # with torch

    table = slot_map(path)
    require(
        len(table) > like.layer_ids[-1], "last_physical_to_logical_map", f"{len(table)} layers", f"layer {like.layer_ids[-1]}"
    )
    return table[list(like.layer_ids)].astype(np.int32)
