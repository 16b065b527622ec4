"""Dumps of SGLang's expert-distribution recorder (`/dump_expert_distribution_record`): one file, or one of each rank.

`--expert-distribution-recorder-mode per_token`: which experts each token picked, with positions and token ids: a trace.
`per_pass`: how often each slot was picked in a forward pass; `stat` and `stat_approx`: how often each expert was: load
statistics. Slots (SGLang's physical experts) are translated by the map in the file.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from coterie.routing.errors import InputError, first_line
from coterie.routing.imported import ImportOptions, as_load, as_trace, integers, recording
from coterie.routing.trace import LoadStatistics, RoutingTrace

Ids = NDArray[np.int64]
TOKENS = "single tokens (mode per_token)"
KINDS = {
    TOKENS: "topk_ids_of_layer",
    "counts of slots (mode per_pass)": "global_physical_count",
    "counts of experts (mode stat)": "logical_count",
}


@dataclass(frozen=True)
class Dump:
    """One file: its kind (of KINDS), and what it holds."""

    path: Path
    kind: str
    found: dict[str, Any]


@dataclass(frozen=True)
class Pass:
    """One forward pass of a rank.

    experts: `[tokens, layers, slots]`, logical, -1 where unused; positions `[tokens]`; lengths: of each request's tokens in a
    prefill, None in decode; token_ids `[tokens]` or None.
    """

    experts: Ids
    positions: Ids
    lengths: list[int] | None
    token_ids: Ids | None


def read_dumps(paths: Sequence[Path], options: ImportOptions) -> RoutingTrace | LoadStatistics:
    """A trace of single tokens, or the sum of counts. Raises InputError, naming the file and the field."""
    dumps = [_opened(path) for path in paths]
    for dump in dumps[1:]:
        if dump.kind != dumps[0].kind:
            raise InputError(f"{dump.path}: found {dump.kind}, expected {dumps[0].kind}, as {dumps[0].path} has")
    if dumps[0].kind == TOKENS:
        return _tokens(dumps, options)
    with recording(paths[0]):
        return as_load(_counts(dumps), options)


def slot_map(path: Path) -> Ids:
    """The placement that the engine had, `[layers, slots]`: which expert each slot held when the file was written."""
    found = _loaded(path)
    table = _table(found) if isinstance(found, dict) else None
    if table is None:
        held = sorted(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise InputError(f"found {held}, expected last_physical_to_logical_map, as modes per_token and per_pass write it")
    return table


def _loaded(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of how others have pickled it
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is not its own
        raise InputError(f"is not a readable .pt file ({first_line(error, 80)})") from error


def _opened(path: Path) -> Dump:
    with recording(path):
        found = _loaded(path)
        if isinstance(found, dict) and "records" in found:
            records = found["records"]
            if not isinstance(records, list) or not records:
                raise InputError("records: found none, expected at least one forward pass")
            held = records[0] if isinstance(records[0], dict) else {}
        else:
            held = found if isinstance(found, dict) else {}
        kind = next((kind for kind, name in KINDS.items() if name in held), None)
        if kind is None:
            names = sorted(map(str, held)) or type(found).__name__
            wanted = "an SGLang recorder dump with records (of topk_ids_of_layer or global_physical_count) or logical_count"
            raise InputError(f"found {names}, expected {wanted}")
        return Dump(path, kind, found)


def _counts(dumps: list[Dump]) -> NDArray[np.float64]:
    """`[layers, experts]`, added up over passes and ranks."""
    total: NDArray[np.float64] | None = None
    for dump in dumps:
        with recording(dump.path):
            counts = _passes_summed(dump.found)
            if total is not None and total.shape != counts.shape:
                raise InputError(f"found {list(counts.shape)} layers and experts, expected {list(total.shape)}, as the others")
            total = counts if total is None else total + counts
    assert total is not None
    return total


def _passes_summed(found: dict[str, Any]) -> NDArray[np.float64]:
    if "logical_count" in found:
        counts = np.asarray(torch.as_tensor(found["logical_count"]).double())
        return counts.sum(0) if counts.ndim == 3 else counts
    table = _table(found)
    if table is None:
        raise InputError("last_physical_to_logical_map: found none, expected [layers, slots], as the recorder writes it")
    slots = np.zeros(table.shape)
    for record in found["records"]:
        counts = np.asarray(torch.as_tensor(record["global_physical_count"]).double())
        if counts.shape != table.shape:
            wanted = f"{list(table.shape)}, as last_physical_to_logical_map has"
            raise InputError(f"records: global_physical_count: found shape {list(counts.shape)}, expected {wanted}")
        slots += counts
    made = np.zeros((len(table), int(table.max()) + 1))
    np.add.at(made, (np.arange(len(table))[:, None], table), slots)
    return made


def _table(found: dict[str, Any]) -> Ids | None:
    """`last_physical_to_logical_map` `[layers, slots]`, or None where there is none: ids are then taken as they are."""
    if found.get("last_physical_to_logical_map") is None:
        return None
    table = integers(np.asarray(found["last_physical_to_logical_map"]), "last_physical_to_logical_map", 2)
    if not table.size or table.min() < 0:
        lowest = table.min(initial=-1)
        raise InputError(f"last_physical_to_logical_map: found {lowest}, expected experts from 0 on in every slot")
    return table


def _tokens(dumps: list[Dump], options: ImportOptions) -> RoutingTrace:
    passes: list[list[Pass]] = []
    experts: set[int] = set()
    for dump in dumps:
        with recording(dump.path):
            table = _table(dump.found)
            experts |= set() if table is None else {int(table.max()) + 1}
            read = [_pass(record, table) for record in dump.found["records"]]
        if not any(_same(read, other) for other in passes):  # ranks that share their tokens' attention record the same
            passes.append(read)
    with recording(dumps[0].path):
        return _joined(passes, max(experts, default=None), options)


def _pass(record: dict[str, Any], table: Ids | None) -> Pass:
    try:
        ids = np.asarray(record["topk_ids_of_layer"]).astype(np.int64)  # [layers, tokens, slots], physical
        positions = np.asarray(record["positions"], dtype=np.int64)
        lengths = record.get("extend_seq_lens")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError("records: expected topk_ids_of_layer and positions, as mode per_token writes") from error
    if ids.ndim != 3 or ids.shape[1] != len(positions):
        wanted = f"[layers, {len(positions)}, top_k]"
        raise InputError(f"records: topk_ids_of_layer: found shape {list(ids.shape)}, expected {wanted}")
    if table is not None:
        if ids.max(initial=-1) >= table.shape[1]:
            raise InputError(
                f"records: topk_ids_of_layer: found {ids.max()}, expected less than {table.shape[1]}, the slots of "
                "last_physical_to_logical_map: the map is of another run, or shared experts are recorded as routed ones"
            )
        ids = np.where(ids < 0, ids, table[np.arange(len(ids))[:, None, None], ids.clip(min=0)])
    if lengths is not None and sum(lengths) != len(positions):
        wanted = f"{len(positions)}, as positions has"
        raise InputError(f"records: extend_seq_lens: found {sum(lengths)} tokens together, expected {wanted}")
    read = record.get("input_ids")
    if read is not None and len(read) != len(positions):
        raise InputError(f"records: input_ids: found {len(read)}, expected {len(positions)}, as positions has")
    token_ids = None if read is None else np.asarray(read, dtype=np.int64)
    return Pass(integers(ids.transpose(1, 0, 2), "expert_ids", 3), integers(positions, "positions", 1), lengths, token_ids)


def _same(one: list[Pass], other: list[Pass]) -> bool:
    def alike(a: Pass, b: Pass) -> bool:
        return np.array_equal(a.positions, b.positions) and np.array_equal(a.experts, b.experts)

    return len(one) == len(other) and all(alike(a, b) for a, b in zip(one, other, strict=True))


def _joined(ranks: list[list[Pass]], stated: int | None, options: ImportOptions) -> RoutingTrace:
    """One trace of all: a rank's passes in their order, rank after rank."""
    requests, sequences = Requests(), []
    for passes in ranks:
        requests.another_rank()
        sequences += [requests.rows(made.positions.tolist(), made.lengths) for made in passes]
    made = [entry for passes in ranks for entry in passes]
    if len({entry.experts.shape[1:] for entry in made}) > 1:
        shapes = sorted({entry.experts.shape[1:] for entry in made})
        raise InputError(f"records: topk_ids_of_layer: found layers and slots {shapes}, expected the same in every pass")
    experts = np.concatenate([entry.experts for entry in made])
    routed = np.flatnonzero((experts >= 0).any((0, 2)))
    slots = np.flatnonzero((experts >= 0).any((0, 1)))
    kept = experts[:, routed][:, :, : int(slots.max()) + 1 if slots.size else 0]
    kinds = {"decode" if entry.lengths is None else "prefill" for entry in made if len(entry.positions)}
    return as_trace(
        kept, np.array([s for rows in sequences for s in rows]), np.concatenate([entry.positions for entry in made]), options,
        stated, tuple(int(i) for i in routed), token_ids=_token_ids(made), phase=kinds.pop() if len(kinds) == 1 else "mixed",
    )  # fmt: skip


def _token_ids(made: list[Pass]) -> Ids | None:
    """What was read, if all passes tell; ids that are none of a vocabulary's (SGLang's of images) cannot be kept."""
    parts = [entry.token_ids for entry in made if entry.token_ids is not None]
    if len(parts) < len(made):
        return None
    ids = np.concatenate(parts)
    return ids if ids.min(initial=0) >= 0 and ids.max(initial=0) < 2**31 else None


@dataclass
class Requests:
    """Tells requests apart, which the recorder does not name, by where their tokens stand.

    A prefill lists its requests with their lengths. Those that begin behind position 0 have a prefix in the engine's cache,
    unless the first of them goes on where the last prompt of the prefill just before ended: a long prompt in pieces. Requests
    of one token may be decoding beside others' prompts. A decode pass has a row for each request that runs, in the order in
    which they came; a row is the next one in that order that stands at this position. What does not go on has ended. Two
    requests of the same length, of which one has ended, cannot be told apart.
    """

    opened: int = 0
    running: list[tuple[int, int]] = field(default_factory=list)  # sequence and next position, in the order of the batch
    cut: tuple[int, int] | None = None  # the last prompt of the prefill just before, which may go on

    def another_rank(self) -> None:
        """Nothing goes on from here."""
        self.running, self.cut = [], None

    def rows(self, positions: list[int], lengths: list[int] | None) -> list[int]:
        """The sequence of every token of a pass."""
        return self._decode(positions) if lengths is None else self._prefill(positions, lengths)

    def _prefill(self, positions: list[int], lengths: list[int]) -> list[int]:
        made: list[int] = []
        goes_on, self.cut = self.cut, None
        for length in filter(None, lengths):
            first = positions[len(made)]
            alike = [one for one in self.running if one[1] == first and one != goes_on]
            row = alike[0] if alike and first and length == 1 else None
            if first and goes_on is not None and goes_on[1] == first:
                self.running.remove(goes_on)
                sequence, row = goes_on[0], None
            elif row is not None:  # one token more, in the same pass as others' prompts
                self.running.remove(row)
                sequence = row[0]
            else:
                sequence = self._new()
            goes_on = None
            made += [sequence] * length
            self.running.append((sequence, first + length))
            self.cut = self.running[-1] if row is None else self.cut
        return made

    def _decode(self, positions: list[int]) -> list[int]:
        waiting, self.cut = list(self.running), None
        going: list[tuple[int, int]] = []
        at = 0
        for position in positions:
            found = next((i for i in range(at, len(waiting)) if waiting[i][1] == position), None)
            at = at if found is None else found + 1
            going.append((self._new() if found is None else waiting[found][0], position + 1))
        self.running = going
        return [sequence for sequence, _ in going]

    def _new(self) -> int:
        self.opened += 1
        return self.opened - 1
