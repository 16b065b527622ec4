"""Recorded routing: which experts each token visited in each layer, and the files it is kept in.

Formats `coterie.trace.v1` and `coterie.load.v1` (docs/formats.md). No torch here: planning works on a laptop.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from coterie.routing.errors import InputError, first_line, naming, require
from coterie.routing.files import atomic_output, looks_like_json

CODES = {"int16": "I16", "int32": "I32", "int64": "I64", "float16": "F16"}
TRACE_FORMAT = "coterie.trace.v1"
LOAD_FORMAT = "coterie.load.v1"
PHASES = ("prefill", "decode", "mixed")
MOST_LAYERS = 1 << 20  # layer numbers
MOST_COUNTS = 1 << 44  # of an expert: sums over all experts and layers must not overflow
CHECKED_AT_ONCE = 1 << 20  # expert ids: a few times the size of a core's cache at most


@dataclass(frozen=True)
class RoutingTrace:
    """The experts that tokens visited.

    expert_ids: int16 `[tokens, layers, top_k]`, -1 where a slot is unused; order within top_k carries no meaning.
    sequence_ids, positions: int32 `[tokens]`: the sequence a token belongs to and its place in it.
    router_weights: float16 like expert_ids, or None; the largest marks the top-1.
    token_ids: int32 `[tokens]`, what was read, by the model's vocabulary, or None.
    layer_ids: the decoder layers traced, ascending.
    """

    expert_ids: NDArray[np.int16]
    sequence_ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    model: str
    num_experts: int
    layer_ids: tuple[int, ...]
    scenario: str = ""
    phase: str = "mixed"
    router_weights: NDArray[np.float16] | None = None
    token_ids: NDArray[np.int32] | None = None

    def __post_init__(self) -> None:
        _check_trace(self)

    @property
    def tokens(self) -> int:
        """How many tokens were recorded."""
        return int(self.expert_ids.shape[0])

    @property
    def layers(self) -> int:
        """How many layers were recorded."""
        return int(self.expert_ids.shape[1])

    @property
    def top_k(self) -> int:
        """Slots per token and layer."""
        return int(self.expert_ids.shape[2])

    def select(self, tokens: NDArray[Any]) -> RoutingTrace:
        """The same trace with only the tokens that a boolean mask or an index array picks."""
        weights = None if self.router_weights is None else self.router_weights[tokens]
        read = None if self.token_ids is None else self.token_ids[tokens]
        return replace(
            self,
            expert_ids=self.expert_ids[tokens],
            sequence_ids=self.sequence_ids[tokens],
            positions=self.positions[tokens],
            router_weights=weights,
            token_ids=read,
        )


@dataclass(frozen=True)
class LoadStatistics:
    """How many tokens each expert got, by scenario, where single tokens were not recorded.

    expert_load: int64 `[scenarios, layers, experts]`, token counts.
    """

    expert_load: NDArray[np.int64]
    model: str
    layer_ids: tuple[int, ...]
    scenarios: tuple[str, ...]

    def __post_init__(self) -> None:
        _check_load(self)

    @property
    def num_experts(self) -> int:
        """Experts per layer."""
        return int(self.expert_load.shape[2])

    def summed(self) -> LoadStatistics:
        """All scenarios added up into one."""
        return replace(self, expert_load=self.expert_load.sum(0, keepdims=True), scenarios=("+".join(self.scenarios),))


def _check_trace(t: RoutingTrace) -> None:
    ids = t.expert_ids
    require(ids.ndim == 3, "expert_ids", f"{ids.ndim} dimensions", "[tokens, layers, top_k]")
    require(ids.shape[0] > 0, "expert_ids", "0 tokens", "at least one: record again with a longer prompt")
    require(ids.shape[1] > 0 and ids.shape[2] > 0, "expert_ids", f"shape {ids.shape}", "layers and top_k of at least 1")
    require(ids.dtype == np.int16, "expert_ids", ids.dtype, "int16")
    require(0 < t.num_experts <= 32767, "num_experts", t.num_experts, "1 to 32767")
    _check_layers(t.layer_ids, ids.shape[1])
    known = () if t.token_ids is None else (("token_ids", t.token_ids),)
    for name, values in (("sequence_ids", t.sequence_ids), ("positions", t.positions), *known):
        require(values.shape == ids.shape[:1], name, f"shape {values.shape}", f"[tokens] = {list(ids.shape[:1])}")
        require(values.dtype == np.int32, name, values.dtype, "int32")
        require(int(values.min()) >= 0, name, int(values.min()), "0 or more")
    low, high = int(ids.min()), int(ids.max())
    allowed = f"-1 (unused) to {t.num_experts - 1} (num_experts - 1)"
    require(low >= -1 and high < t.num_experts, "expert_ids", low if low < -1 else high, allowed)
    require(t.phase in PHASES, "phase", repr(t.phase), " or ".join(PHASES))
    if t.router_weights is not None:
        w = t.router_weights
        require(w.shape == ids.shape, "router_weights", f"shape {w.shape}", f"{ids.shape} like expert_ids")
        require(w.dtype == np.float16, "router_weights", w.dtype, "float16")
        require(bool(np.isfinite(w).all()), "router_weights", "nan or infinity", "numbers")
    if (twice := _repeat(ids)) is not None:
        token, layer = twice
        found = f"one twice by token {token} in layer {t.layer_ids[layer]}: {ids[token, layer].tolist()}"
        raise InputError(f"expert_ids: found {found}, expected distinct experts")


def _repeat(ids: NDArray[np.int16]) -> tuple[int, int] | None:
    """The first token, and layer, in which an expert is picked twice; ids `[tokens, layers, top_k]`."""
    top_k = ids.shape[2]
    unused = -1 - np.arange(top_k, dtype=np.int16)[:, None]  # another number in every slot
    step = max(1, CHECKED_AT_ONCE // (ids.shape[1] * top_k))
    for start in range(0, len(ids), step):
        slots = np.ascontiguousarray(ids[start : start + step].reshape(-1, top_k).T)
        slots = np.where(slots < 0, unused, slots)
        for apart in range(1, top_k):
            if (alike := (slots[apart:] == slots[:-apart]).any(0)).any():
                token, layer = divmod(int(alike.argmax()), ids.shape[1])
                return start + token, layer
    return None


def _check_load(s: LoadStatistics) -> None:
    load = s.expert_load
    require(load.ndim == 3 and min(load.shape) > 0, "expert_load", f"shape {load.shape}", "[scenarios, layers, experts]")
    require(load.dtype == np.int64, "expert_load", load.dtype, "int64")
    require(int(load.min()) >= 0, "expert_load", int(load.min()), "0 or more")
    require(int(load.max()) <= MOST_COUNTS, "expert_load", int(load.max()), f"at most {MOST_COUNTS}")
    require(len(s.scenarios) == load.shape[0], "scenarios", f"{len(s.scenarios)} names", f"{load.shape[0]}")
    twice = next((name for at, name in enumerate(s.scenarios) if name in s.scenarios[:at]), None)
    require(twice is None, "scenarios", f"{twice!r} twice", "names that differ")
    _check_layers(s.layer_ids, load.shape[1])


def _check_layers(layer_ids: tuple[int, ...], layers: int) -> None:
    require(len(layer_ids) == layers, "layer_ids", f"{len(layer_ids)} entries", f"{layers}, one per layer recorded")
    increasing = all(0 <= a < MOST_LAYERS for a in layer_ids) and all(a < b for a, b in pairwise(layer_ids))
    wanted = f"layer numbers from 0 to {MOST_LAYERS - 1} in increasing order"
    require(increasing, "layer_ids", _shortened(layer_ids), wanted)


def _shortened(layer_ids: tuple[int, ...]) -> str:
    return str(list(layer_ids[:4] + layer_ids[-4:] if len(layer_ids) > 8 else layer_ids))[:80]


def save_trace(trace: RoutingTrace, path: Path) -> None:
    """Write a trace file, atomically."""
    tensors: dict[str, NDArray[Any]] = {
        "expert_ids": trace.expert_ids, "sequence_ids": trace.sequence_ids, "positions": trace.positions,
    }  # fmt: skip
    if trace.router_weights is not None:
        tensors["router_weights"] = trace.router_weights
    if trace.token_ids is not None:
        tensors["token_ids"] = trace.token_ids
    _save(path, tensors, trace_metadata(trace))


def trace_metadata(trace: RoutingTrace) -> dict[str, str]:
    """The metadata strings of a trace file."""
    return {
        "format": TRACE_FORMAT,
        "model": trace.model,
        "num_experts": str(trace.num_experts),
        "layer_ids": json.dumps(list(trace.layer_ids)),
        "scenario": trace.scenario,
        "phase": trace.phase,
    }


def save_load(statistics: LoadStatistics, path: Path) -> None:
    """Write a load-statistics file, atomically."""
    metadata = {
        "format": LOAD_FORMAT,
        "model": statistics.model,
        "num_experts": str(statistics.num_experts),
        "layer_ids": json.dumps(list(statistics.layer_ids)),
        "scenarios": json.dumps(list(statistics.scenarios)),
    }
    _save(path, {"expert_load": statistics.expert_load}, metadata)


def _save(path: Path, tensors: dict[str, NDArray[Any]], metadata: dict[str, str]) -> None:
    """A safetensors file, atomically; the same bytes for the same contents."""
    columns = [(name, CODES[values.dtype.name], values.shape, values.nbytes) for name, values in sorted(tensors.items())]
    with atomic_output(path) as temporary, temporary.open("wb") as file:
        file.write(safetensors_header(columns, metadata))
        for _, values in sorted(tensors.items()):
            file.write(np.ascontiguousarray(values).data)


def safetensors_header(columns: Sequence[tuple[str, str, Sequence[int], int]], metadata: dict[str, str]) -> bytes:
    """What a safetensors file begins with. columns: name, type code, shape and bytes of each tensor, in their order."""
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, code, shape, length in columns:
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, offset + length]}
        offset += length
    try:
        text = json.dumps(header, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"model or scenario: found {metadata}, expected text that UTF-8 can write") from error
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_routing(path: Path) -> RoutingTrace | LoadStatistics:
    """Read either kind of file. Raises InputError, naming the file and the field, for anything else."""
    metadata, tensors = _read_safetensors(path)
    with naming(path):
        kind = metadata.get("format")
        if kind == TRACE_FORMAT:
            return _to_trace(metadata, tensors)
        if kind == LOAD_FORMAT:
            return _to_load(metadata, tensors)
        raise InputError(
            f"format: found {kind!r}, expected {TRACE_FORMAT!r} or {LOAD_FORMAT!r}; "
            f"recordings of other programs come in with `coterie import`"
        )


def check_scenario(name: str) -> None:
    """Raises InputError for a name that no file can hold, as arguments in another encoding arrive."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"--scenario: found {name!r}, expected text that UTF-8 can write") from error


def read_trace(path: Path) -> RoutingTrace:
    """Read a trace; InputError if the file holds load statistics only."""
    found = read_routing(path)
    if not isinstance(found, RoutingTrace):
        raise InputError(f"{path}: format: found {LOAD_FORMAT!r}, expected {TRACE_FORMAT!r}: single tokens are needed here")
    return found


def _read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is no regular file" if path.exists() else "no such file"
        raise InputError(f"{path}: {what}{', expected a file' if path.exists() else ''}")
    if looks_like_json(path):
        raise InputError(f"{path}: is JSON (a plan?), expected a trace or load statistics (safetensors)")
    try:
        with safe_open(path, framework="np") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except TypeError as error:  # of a type that numpy has not
        raise InputError(
            f"{path}: holds tensors of another type ({first_line(error, 80)}), expected {', '.join(CODES)}"
        ) from error
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise InputError(f"{path}: is not a readable safetensors file ({first_line(error, 200)}); is it truncated?") from error


def _tensor(tensors: dict[str, NDArray[Any]], name: str) -> NDArray[Any]:
    if name not in tensors:
        raise InputError(f"{name}: found no such tensor, expected it beside {sorted(tensors)}")
    return tensors[name]


def _to_trace(metadata: dict[str, str], tensors: dict[str, NDArray[Any]]) -> RoutingTrace:
    return RoutingTrace(
        expert_ids=_tensor(tensors, "expert_ids"),
        sequence_ids=_tensor(tensors, "sequence_ids"),
        positions=_tensor(tensors, "positions"),
        router_weights=tensors.get("router_weights"),
        token_ids=tensors.get("token_ids"),
        model=metadata.get("model", ""),
        num_experts=_integer(metadata, "num_experts"),
        layer_ids=_integers(metadata, "layer_ids"),
        scenario=metadata.get("scenario", ""),
        phase=metadata.get("phase", ""),
    )


def _to_load(metadata: dict[str, str], tensors: dict[str, NDArray[Any]]) -> LoadStatistics:
    statistics = LoadStatistics(
        expert_load=_tensor(tensors, "expert_load"),
        model=metadata.get("model", ""),
        layer_ids=_integers(metadata, "layer_ids"),
        scenarios=_names(metadata, "scenarios"),
    )
    stated = _integer(metadata, "num_experts")
    require(stated == statistics.num_experts, "num_experts", stated, f"{statistics.num_experts}, as expert_load has")
    return statistics


def _integer(metadata: dict[str, str], field: str) -> int:
    text = metadata.get(field, "")
    require(text.isascii() and text.isdigit() and len(text) < 10, field, repr(text[:40]), "an integer")
    return int(text)


def _json_list(metadata: dict[str, str], field: str) -> list[Any]:
    text = metadata.get(field, "")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, list):
        raise InputError(f"{field}: found {text[:60]!r}, expected a JSON list")
    return value


def _names(metadata: dict[str, str], field: str) -> tuple[str, ...]:
    values = _json_list(metadata, field)
    require(all(isinstance(v, str) for v in values), field, str(values)[:60], "a JSON list of names")
    return tuple(values)


def _integers(metadata: dict[str, str], field: str) -> tuple[int, ...]:
    values = _json_list(metadata, field)
    require(all(type(v) is int for v in values), field, str(values)[:60], "a JSON list of integers")
    return tuple(values)
