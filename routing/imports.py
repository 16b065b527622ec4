"""Bringing in routing that was recorded elsewhere.

npz: `expert_ids` or `topk_ids` `[tokens, layers, top_k]`, optionally `sequence_ids`, `positions`, `router_weights`,
`num_experts`, `layer_ids`. JSON: `logical_count` `[layers][experts]` or `[scenarios or passes][layers][experts]`.
SGLang's expert-distribution recorder (`.pt`): `records` (modes per_token, per_pass) or `logical_count` (mode stat).
"""

from __future__ import annotations

import lzma
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coterie.routing.errors import InputError, first_line
from coterie.routing.files import read_json
from coterie.routing.trace import LoadStatistics, RoutingTrace

MAX_EXPERTS = 32767
NPZ_ARRAYS = {"expert_ids", "topk_ids", "sequence_ids", "positions", "router_weights", "num_experts", "layer_ids"}
DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError)


@dataclass(frozen=True)
class ImportOptions:
    """What the foreign file does not say. num_experts: None takes the file's, or the largest id seen plus one.

    phase: None is mixed; counts have none.
    """

    model: str = ""
    num_experts: int | None = None
    scenario: str = ""
    phase: str | None = None


def import_routing(path: Path, options: ImportOptions) -> RoutingTrace | LoadStatistics:
    """Read `path` by its suffix. Raises InputError, naming the file and the field, if it is none of the known kinds."""
    readers: dict[str, Callable[[Path, ImportOptions], RoutingTrace | LoadStatistics]] = {
        ".npz": _read_npz,
        ".json": _read_counts,
        ".pt": _read_sglang,
    }
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.suffix not in readers:
        raise InputError(f"{path}: found suffix {path.suffix!r}, expected {', '.join(sorted(readers))}")
    try:
        return readers[path.suffix](path, options)
    except InputError as error:
        raise error if str(error).startswith(str(path)) else InputError(f"{path}: {error}") from error
    except (ValueError, TypeError, IndexError, KeyError, OverflowError, AttributeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {first_line(error, 100)}"
        raise InputError(f"{path}: is not what its kind of recording holds ({reason})") from error


def _read_npz(path: Path, options: ImportOptions) -> RoutingTrace:
    arrays: dict[str, NDArray[Any]] = {}
    at = ""
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = list(archive.files)
            for at in NPZ_ARRAYS & set(names):  # others may be large, or objects
                arrays[at] = archive[at]
    except (OSError, ValueError, EOFError, KeyError, NotImplementedError, MemoryError, *DAMAGED) as error:
        what = f"{at}: cannot be read from the npz file" if at else "is not a readable npz file"
        raise InputError(f"{what} ({first_line(error, 80)})") from error
    name = next((n for n in ("expert_ids", "topk_ids") if n in arrays), None)
    if name is None:
        raise InputError(f"found arrays {sorted(names)}, expected expert_ids or topk_ids [tokens, layers, top_k]")
    ids = _integers(arrays[name], name, 3)
    tokens = len(ids)
    sequence = _integers(arrays.get("sequence_ids", np.zeros(tokens, np.int64)), "sequence_ids", 1)
    positions = _integers(arrays.get("positions", np.arange(tokens)), "positions", 1)
    stated = _stated_experts(arrays)
    layer_ids = _integers(arrays.get("layer_ids", np.arange(ids.shape[1])), "layer_ids", 1)
    weights = arrays.get("router_weights")
    return _trace(ids, sequence, positions, options, stated, tuple(int(i) for i in layer_ids), weights)


def _stated_experts(arrays: dict[str, NDArray[Any]]) -> int | None:
    found = arrays.get("num_experts")
    if found is None:
        return None
    if found.size != 1 or found.dtype.kind not in "iu":
        raise InputError(f"num_experts: found {found.dtype} with {found.size} values, expected one integer")
    return int(found.reshape(-1)[0])


def _integers(values: NDArray[Any], name: str, dimensions: int) -> NDArray[np.int64]:
    if values.dtype.kind not in "iu" or values.ndim != dimensions:
        found = f"{values.dtype} with {values.ndim} dimensions"
        raise InputError(f"{name}: found {found}, expected integers with {dimensions}")
    if values.size and (values.min() < -1 or values.max() > 2**31 - 1):
        raise InputError(f"{name}: found {values.min()} to {values.max()}, expected -1 to {2**31 - 1}")
    return values.astype(np.int64)


def _trace(
    ids: NDArray[np.int64], sequence: NDArray[np.int64], positions: NDArray[np.int64], options: ImportOptions,
    stated: int | None, layer_ids: tuple[int, ...], weights: NDArray[Any] | None = None,
) -> RoutingTrace:  # fmt: skip
    if ids.size == 0:
        raise InputError(f"expert_ids: found shape {list(ids.shape)}, expected at least one token")
    known = stated if options.num_experts is None else options.num_experts
    experts = int(ids.max()) + 1 if known is None else known
    if not 1 <= experts <= MAX_EXPERTS:
        raise InputError(f"num_experts: found {experts}, expected 1 to {MAX_EXPERTS}")
    if ids.max() >= experts:
        raise InputError(f"expert_ids: found {ids.max()}, expected less than num_experts = {experts}")
    return RoutingTrace(
        expert_ids=ids.astype(np.int16),
        sequence_ids=sequence.astype(np.int32),
        positions=positions.astype(np.int32),
        model=options.model,
        num_experts=experts,
        layer_ids=layer_ids,
        scenario=options.scenario,
        phase=options.phase or "mixed",
        router_weights=None if weights is None else _finite(weights),
    )


def _finite(weights: NDArray[Any]) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        found = weights.astype(np.float16)
    if not np.isfinite(found).all():
        wrong = weights[~np.isfinite(found)].flat[0]
        raise InputError(f"router_weights: found {wrong}, expected numbers within float16")
    return found


def _read_counts(path: Path, options: ImportOptions) -> LoadStatistics:
    found = read_json(path)
    if not isinstance(found, dict) or "logical_count" not in found:
        raise InputError("found no field logical_count, expected [layers][experts] or [scenarios][layers][experts]")
    try:
        plain = np.array(found["logical_count"])
        if plain.dtype.kind not in "iuf":
            raise InputError(f"logical_count: found {plain.dtype}, expected numbers")
        counts = plain.astype(np.float64)
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(f"logical_count: is no regular array of numbers ({str(error)[:60]})") from error
    return _load(counts, options)


def _load(counts: NDArray[np.float64], options: ImportOptions) -> LoadStatistics:
    if options.phase is not None:
        raise InputError(f"--phase: found {options.phase} for counts, expected none: they have no phase")
    if counts.ndim == 2:
        counts = counts[None]
    if counts.ndim != 3 or not counts.size:
        raise InputError(
            f"logical_count: found shape {list(counts.shape)}, expected [layers][experts], with or without scenarios"
        )
    if not np.isfinite(counts).all() or counts.min() < 0 or counts.max() > 2**53 or (counts % 1).any():
        raise InputError("logical_count: found a value that is negative, not finite or not whole, expected counts")
    routed = counts.sum((0, 2)) > 0  # dense layers are listed with zero counts
    if not routed.any():
        raise InputError("logical_count: found only zeros, expected counts")
    names = [options.scenario] if len(counts) == 1 else [f"{options.scenario}{i}" for i in range(len(counts))]
    if options.num_experts not in (None, counts.shape[2]):
        raise InputError(f"--num-experts: found {options.num_experts}, expected {counts.shape[2]}, as logical_count has")
    layer_ids = tuple(int(i) for i in np.flatnonzero(routed))
    return LoadStatistics(counts[:, routed].round().astype(np.int64), options.model, layer_ids, tuple(names))


def _read_sglang(path: Path, options: ImportOptions) -> RoutingTrace | LoadStatistics:
    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is not its own
        raise InputError(f"is not a readable .pt file ({first_line(error, 80)})") from error
    if isinstance(found, dict) and "records" in found:
        return _sglang_records(found, options)
    if isinstance(found, dict) and "logical_count" in found:
        counts = torch.as_tensor(found["logical_count"]).double().numpy()
        passes_summed = counts.sum(0) if counts.ndim == 3 else counts
        return _load(passes_summed, options)
    names = sorted(map(str, found)) if isinstance(found, dict) else type(found).__name__
    raise InputError(f"found {names}, expected an SGLang recorder dump with records or logical_count")


def _sglang_records(found: dict[str, Any], options: ImportOptions) -> RoutingTrace:
    """Prompts become sequences of their own; in decode passes, where requests are not named, rows of the batch do."""
    to_logical = found.get("last_physical_to_logical_map")
    ids_parts, sequence_parts, position_parts = [], [], []
    opened = 0
    for record in found["records"]:
        try:
            ids = np.asarray(record["topk_ids_of_layer"]).astype(np.int64)  # [layers, tokens, top_k], physical
            positions = np.asarray(record["positions"], dtype=np.int64)
            lengths = record.get("extend_seq_lens")
        except (KeyError, TypeError, ValueError) as error:
            raise InputError("records: expected topk_ids_of_layer and positions, as mode per_token writes") from error
        if ids.ndim != 3 or ids.shape[1] != len(positions):
            raise InputError(
                f"records: topk_ids_of_layer: found shape {list(ids.shape)}, expected [layers, {len(positions)}, top_k]"
            )
        if to_logical is not None:
            table = np.asarray(to_logical).astype(np.int64)
            if ids.max(initial=-1) >= table.shape[1]:
                raise InputError(
                    f"records: topk_ids_of_layer: found {ids.max()}, expected less than {table.shape[1]}, the slots of "
                    "last_physical_to_logical_map: the map is of another run, or shared experts are recorded as routed ones"
                )
            ids = np.where(ids < 0, -1, table[np.arange(len(ids))[:, None, None], ids.clip(min=0)])
        if lengths is not None and sum(lengths) != len(positions):
            raise InputError(
                f"records: extend_seq_lens: found {sum(lengths)} tokens together, expected {len(positions)}, as positions has"
            )
        rows = np.arange(len(positions)) if lengths is None else np.repeat(np.arange(len(lengths)), lengths) + opened
        opened += 0 if lengths is None else len(lengths)
        ids_parts.append(ids.transpose(1, 0, 2))
        sequence_parts.append(rows)
        position_parts.append(positions)
    if not ids_parts:
        raise InputError("records: found none, expected at least one forward pass")
    ids = np.concatenate(ids_parts)
    routed = np.flatnonzero((ids >= 0).any((0, 2)))
    slots = np.flatnonzero((ids >= 0).any((0, 1)))
    ids = ids[:, routed][:, :, : int(slots.max()) + 1 if slots.size else 0]
    layer_ids = tuple(int(i) for i in routed)
    stated = None if to_logical is None else int(np.asarray(to_logical).max()) + 1
    sequence, positions = np.concatenate(sequence_parts), np.concatenate(position_parts)
    ids, sequence = _integers(ids, "expert_ids", 3), _integers(sequence, "sequence_ids", 1)
    return _trace(ids, sequence, _integers(positions, "positions", 1), options, stated, layer_ids)
