"""Bringing in routing that was recorded elsewhere.

npz: `expert_ids` or `topk_ids` `[tokens, layers, top_k]`, optionally `sequence_ids`, `positions`, `router_weights`,
`token_ids`, `num_experts`, `layer_ids`. JSON: `logical_count` `[layers][experts]` or `[scenarios or passes][layers][experts]`.
pt: dumps of SGLang's expert-distribution recorder (`routing/sglang.py`).
"""

from __future__ import annotations

import lzma
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coterie.routing.errors import InputError, first_line
from coterie.routing.files import read_json
from coterie.routing.imported import ImportOptions, as_load, as_trace, integers, recording
from coterie.routing.trace import LoadStatistics, RoutingTrace

NPZ_ARRAYS = {"expert_ids", "topk_ids", "sequence_ids", "positions", "router_weights", "num_experts", "layer_ids", "token_ids"}
SUFFIXES = (".json", ".npz", ".pt")
DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError)


def import_routing(files: Path | Sequence[Path], options: ImportOptions) -> RoutingTrace | LoadStatistics:
    """Read a recording by its suffix; several files are SGLang's, one of each rank.

    Raises InputError, naming the file and the field, if it is none of the known kinds.
    """
    paths = [files] if isinstance(files, Path) else list(files)
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        if path.suffix not in SUFFIXES:
            raise InputError(f"{path}: found suffix {path.suffix!r}, expected {', '.join(SUFFIXES)}")
        if len(paths) > 1 and path.suffix != ".pt":
            raise InputError(f"{path}: found {len(paths)} files, expected one, or SGLang's dumps (.pt), one of each rank")
    if paths[0].suffix == ".pt":
        from coterie.routing.sglang import read_dumps  # with torch

        return read_dumps(paths, options)
    return (_read_npz if paths[0].suffix == ".npz" else _read_counts)(paths[0], options)


def _read_npz(path: Path, options: ImportOptions) -> RoutingTrace:
    with recording(path):
        return _npz(path, options)


def _npz(path: Path, options: ImportOptions) -> RoutingTrace:
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
    ids = integers(arrays[name], name, 3)
    tokens = len(ids)
    sequence = integers(arrays.get("sequence_ids", np.zeros(tokens, np.int64)), "sequence_ids", 1)
    positions = integers(arrays.get("positions", np.arange(tokens)), "positions", 1)
    stated = _stated_experts(arrays)
    layer_ids = integers(arrays.get("layer_ids", np.arange(ids.shape[1])), "layer_ids", 1)
    read = None if "token_ids" not in arrays else integers(arrays["token_ids"], "token_ids", 1)
    layers = tuple(int(i) for i in layer_ids)
    return as_trace(ids, sequence, positions, options, stated, layers, arrays.get("router_weights"), read)


def _stated_experts(arrays: dict[str, NDArray[Any]]) -> int | None:
    found = arrays.get("num_experts")
    if found is None:
        return None
    if found.size != 1 or found.dtype.kind not in "iu":
        raise InputError(f"num_experts: found {found.dtype} with {found.size} values, expected one integer")
    return int(found.reshape(-1)[0])


def _read_counts(path: Path, options: ImportOptions) -> LoadStatistics:
    found = read_json(path)
    with recording(path):
        return _counts(found, options)


def _counts(found: Any, options: ImportOptions) -> LoadStatistics:
    if not isinstance(found, dict) or "logical_count" not in found:
        raise InputError("found no field logical_count, expected [layers][experts] or [scenarios][layers][experts]")
    try:
        plain = np.array(found["logical_count"])
        if plain.dtype.kind not in "iuf":
            raise InputError(f"logical_count: found {plain.dtype}, expected numbers")
        counts = plain.astype(np.float64)
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(f"logical_count: is no regular array of numbers ({str(error)[:60]})") from error
    return as_load(counts, options)
