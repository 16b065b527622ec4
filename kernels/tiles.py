"""Which tile sizes a product gets: a rule that can be read, and tables of what was measured, where it was.

Nothing is tuned while serving. A table is a file `tiles/*.json` made by `coterie bench kernels --tune`; it counts only for the
device and the Triton version that it names.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from coterie.kernels.formats import GROUP

TABLES = Path(__file__).parent / "tiles"
GROUPED = ("int4", "fp8")
PROCESSORS = {80: 108, 90: 132, 100: 148}  # multiprocessors of a chip, by compute capability
SPLITS = (1, 2, 4, 8)
SHARED_BYTES = {  # that one program may use, by compute capability; of others as little as any from 8.0 on has
    80: 166_912, 86: 101_376, 87: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448, 120: 101_376,
}  # fmt: skip


@dataclass(frozen=True)
class Tile:
    """rows, outputs, inputs: of one step of one program; warps of it; stages: steps whose operands are on their way.

    swap: weights are the left operand; together: blocks of rows that go over the outputs side by side; splits: parts of all
    inputs that programs of their own compute; tma: weights are fetched as tiles by the tensor memory accelerator; fold: gates
    and ups share one accumulator of twice the outputs.
    """

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int
    swap: bool = False
    together: int = 1
    splits: int = 1
    tma: bool = False
    fold: bool = False


@dataclass(frozen=True)
class Work:
    """One layer's product: experts E, outputs N, inputs K, picks a token, tokens; widths in bytes; format of the weights.

    doubled: a tile of outputs is a tile of gates and one of ups; turned: these alternate; summed: outputs are only added up
    afterwards, so that there may be several parts of each.
    """

    experts: int
    outputs: int
    inputs: int
    top_k: int
    tokens: int
    bytes: int = 2
    format: str = "plain"
    doubled: bool = False
    turned: bool = False
    summed: bool = False

    @property
    def hit(self) -> float:
        """Experts that are hit, if all are equally likely; 1 at least."""
        hit = self.experts * (1 - (1 - self.top_k / self.experts) ** self.tokens) if self.experts > self.top_k else self.experts
        return max(1.0, min(hit, self.tokens * self.top_k))

    @property
    def rows(self) -> float:
        """Of an expert that is hit, on average."""
        return self.tokens * self.top_k / self.hit


@lru_cache(maxsize=4096)
def choose_tile(work: Work, device: str = "", capability: int = 90, triton: str = "") -> Tile:
    """From a table if there is one for this shape, device and Triton, else by rule."""
    for entry in _tables().get((device, triton), ()):
        if entry["shape"] == _shape(work) and entry["tokens"][0] <= work.tokens <= entry["tokens"][1]:
            return Tile(**entry["tile"])
    return rule(work, capability)


def rule(work: Work, capability: int = 90) -> Tile:
    """Rows: the power of two that holds an average expert's, 16 to 128. Up to 64 weights rule: they go first, in long steps.

    The stages are as many as shared memory holds, at most 4 (5 where weights rule). From Hopper on plain weights of large tiles
    are fetched by the tensor memory accelerator, where they lie so that it can (`fused.py` knows). Programs too few to occupy
    the chip become more: of half the gates and ups each (fold), or of a part of the inputs (splits).
    """
    rows = next((r for r in (16, 32, 64) if work.rows <= r), 128)
    if work.bytes == 4:  # float32 without tensor cores: small tiles, in registers
        tile = Tile(min(rows, 32), 32, GROUP if work.format in GROUPED else 32, 4, 2)
    elif work.format in GROUPED and capability < 90 and rows > 32:  # sums of a step beside those of all need registers
        tile = Tile(64, 32, GROUP, 4, 3, together=8)
    elif work.format in GROUPED:  # a step is a group that shares its scale
        tile = Tile(rows, 64, GROUP, 4 if rows <= 32 else 8, 4, True) if rows <= 64 else Tile(128, 32, GROUP, 8, 3, together=8)
    elif rows <= 64:
        tile = Tile(rows, 64, 128 if rows <= 32 else 64, 4, 5, True)
    else:  # without the larger chips' tensor memory two accumulators of 128 x 128 leave no registers to widen weights in
        roomy = 90 <= capability < 120  # Hopper's and the large Blackwells'
        narrow = work.doubled and (not roomy or work.format != "plain" or work.turned)
        fetched = capability >= 90 and work.format == "plain" and not work.turned and work.inputs % 64 == 0
        tile = Tile(128, 64 if narrow else 128, 64, 8, 4, together=8, tma=fetched)
    if work.doubled and not work.turned and tile.swap and rows == 16 and _waves(work, tile.outputs, capability) < 2:
        tile = replace(tile, outputs=tile.outputs // 2, fold=True)
    tile = fitted(tile, work, capability)
    return replace(tile, splits=_splits(work, tile, capability))


def fitted(tile: Tile, work: Work, capability: int) -> Tile:
    """With as many of its stages as shared memory holds."""
    limit = SHARED_BYTES.get(capability, min(SHARED_BYTES.values()))
    return replace(tile, stages=next((s for s in range(tile.stages, 1, -1) if shared_bytes(tile, work, s) <= limit), 1))


def _waves(work: Work, outputs: int, capability: int) -> float:
    """Programs for each multiprocessor, if no expert has more than a block of rows."""
    return work.hit * -(-work.outputs // outputs) / PROCESSORS.get(capability, max(PROCESSORS.values()))


def _splits(work: Work, tile: Tile, capability: int) -> int:
    """For an expert's few rows: the parts that are done soonest if every multiprocessor runs one program at a time.

    That is as many waves of programs as there are, and half of one for the last, which seldom is full; a program takes its
    steps, and as many more as its pipeline is deep, to fill it.
    """
    if not (work.summed and tile.swap and tile.rows == 16):
        return 1
    waves = _waves(work, tile.outputs, capability)
    steps = -(-work.inputs // tile.inputs)
    return min(SPLITS, key=lambda splits: (waves * splits + 0.5) * (-(-steps // splits) + tile.stages))


def shared_bytes(tile: Tile, work: Work, stages: int) -> int:
    """What the operands of `stages` steps take, about."""
    stored = {"plain": work.bytes, "int8": 1, "int4": 1, "fp8": 1}[work.format]
    weights = tile.outputs * (2 if work.doubled else 1) * tile.inputs * stored // (2 if work.format == "int4" else 1)
    return stages * (tile.rows * tile.inputs * work.bytes + weights)


def _shape(work: Work) -> dict[str, Any]:
    return {name: value for name, value in asdict(work).items() if name != "tokens"}


@lru_cache(maxsize=1)
def _tables() -> dict[tuple[str, str], list[dict[str, Any]]]:
    """By device and Triton version: `{shape, tokens: [least, most], tile}`."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted(TABLES.glob("*.json")):
        table = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault((table["device"], table["triton"]), []).extend(table["entries"])
    return found


def table_text(device: str, triton: str, entries: list[tuple[Work, tuple[int, int], Tile]]) -> str:
    """What `choose_tile` reads in TABLES: for each work, from how many tokens to how many, the tile that was fastest."""
    rows = [{"shape": _shape(work), "tokens": list(span), "tile": asdict(tile)} for work, span, tile in entries]
    return json.dumps({"device": device, "triton": triton, "entries": rows}, indent=1) + "\n"
