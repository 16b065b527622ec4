"""The machines a plan is for: nodes, ranks, links, memory."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coterie.routing.errors import InputError
from coterie.routing.files import read_json

MAX_RANKS = 4096


@dataclass(frozen=True)
class Link:
    """bytes_per_second: one direction, unidirectional; latency_seconds: of one message."""

    bytes_per_second: float
    latency_seconds: float


@dataclass(frozen=True)
class Topology:
    """Nodes of equally many ranks. Who sets the fields: a `NODESxRANKS` string, a preset's name or a JSON file.

    nodes, ranks_per_node: counts; rank r lives on node r // ranks_per_node.
    within: the link of one rank inside its node; between: the link of one node to the others, shared by its ranks.
    memory_bytes: of one rank, for expert weights (what else it must hold taken off), or a list with one entry per rank.
    memory_bytes_per_second: what one rank reads from it.
    row_bytes: of one token's hidden state (model dependent: hidden size x bytes per value).
    pairs_per_second: (token, expert) pairs that one rank computes per second (model dependent).
    expert_bytes: of one expert's weights (model dependent), or a list with one entry per layer of the trace; 0: not known,
    then memory limits nothing and decoding is timed by pairs.
    """

    nodes: int
    ranks_per_node: int
    within: Link = Link(450e9, 5e-6)
    between: Link = Link(400e9, 10e-6)
    memory_bytes: float | tuple[float, ...] = 80e9
    memory_bytes_per_second: float = 3.35e12
    row_bytes: float = 8192.0
    pairs_per_second: float = 1e7
    expert_bytes: float | tuple[float, ...] = 0.0

    def __post_init__(self) -> None:
        for name in ("nodes", "ranks_per_node"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InputError(f"topology: {name}: found {value!r}, expected an integer of at least 1")
        if self.ranks > MAX_RANKS:
            raise InputError(f"topology: found {self.ranks} ranks, expected at most {MAX_RANKS}")
        for name in ("memory_bytes_per_second", "row_bytes", "pairs_per_second"):
            _require_positive(name, getattr(self, name))
        for name, zero in (("memory_bytes", False), ("expert_bytes", True)):
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else (value,):
                _require_positive(name, number, zero)
        if isinstance(self.expert_bytes, tuple) and 0 in self.expert_bytes and any(self.expert_bytes):
            layer = self.expert_bytes.index(0)
            raise InputError(f"topology: expert_bytes: found 0 for layer {layer} of the list; give every layer's, or none: 0")
        if isinstance(self.memory_bytes, tuple) and len(self.memory_bytes) != self.ranks:
            found = f"{len(self.memory_bytes)} entries"
            raise InputError(f"topology: memory_bytes: found {found}, expected {self.ranks}, one per rank, or one number")
        for name in ("within", "between"):
            link = getattr(self, name)
            _require_positive(f"{name}.bytes_per_second", link.bytes_per_second)
            _require_positive(f"{name}.latency_seconds", link.latency_seconds, zero=True)

    @property
    def ranks(self) -> int:
        """Ranks over all nodes."""
        return self.nodes * self.ranks_per_node

    def bytes_of_experts(self, layers: int) -> NDArray[np.float64]:
        """Of one expert of each layer, `[layers]`. Raises InputError where a list has another number of entries."""
        if isinstance(self.expert_bytes, tuple) and len(self.expert_bytes) != layers:
            found = f"{len(self.expert_bytes)} entries"
            raise InputError(f"topology: expert_bytes: found {found}, expected {layers}, one per traced layer, or one number")
        return np.broadcast_to(np.asarray(self.expert_bytes, dtype=np.float64), (layers,))

    def of_layer(self, layer: int) -> Topology:
        """The same for one layer alone."""
        sizes = self.expert_bytes
        return replace(self, expert_bytes=sizes[layer]) if isinstance(sizes, tuple) else self

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads back."""
        return asdict(self)


def _require_positive(name: str, value: object, zero: bool = False) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (value > 0 or (zero and value == 0)) or value == float("inf"):  # type: ignore[operator]
        raise InputError(f"topology: {name}: found {value!r}, expected a {'non-negative' if zero else 'positive'} number")


# Unidirectional NVLink per GPU and network per node, from the vendors' data sheets.
PRESETS = {
    "dgx-a100": Topology(1, 8, Link(300e9, 5e-6), Link(200e9, 10e-6), 80e9, 2.0e12),
    "dgx-h100": Topology(1, 8, Link(450e9, 5e-6), Link(400e9, 10e-6), 80e9, 3.35e12),
    "dgx-h200": Topology(1, 8, Link(450e9, 5e-6), Link(400e9, 10e-6), 141e9, 4.8e12),
    "gb200-nvl72": Topology(18, 4, Link(900e9, 5e-6), Link(3600e9, 5e-6), 186e9, 8.0e12),
}


def parse_topology(text: str) -> Topology:
    """`2x4` (nodes x ranks per node), a preset's name, or the path of a JSON file. Raises InputError otherwise."""
    if match := re.fullmatch(r"([0-9]{1,4})x([0-9]{1,4})", text):
        return Topology(int(match[1]), int(match[2]))
    if text in PRESETS:
        return PRESETS[text]
    path = Path(text)
    if path.suffix == ".json" or path.is_file():
        try:
            return from_json(read_json(path))
        except InputError as error:
            raise error if str(path) in str(error) else InputError(f"{path}: {error}") from error
    allowed = ", ".join(sorted(PRESETS))
    raise InputError(f"topology: found {text!r}, expected NODESxRANKS such as 2x4, a JSON file, or one of {allowed}")


def from_json(value: Any) -> Topology:
    """A topology from its JSON object; unknown fields are an error, missing ones take the defaults."""
    if not isinstance(value, dict):
        raise InputError(f"topology: found {type(value).__name__}, expected a JSON object")
    names = {f.name for f in fields(Topology)}
    for name in value:
        if name not in names:
            raise InputError(f"topology: field {name!r} is unknown, expected some of {', '.join(sorted(names))}")
    for name in ("nodes", "ranks_per_node"):
        if name not in value:
            raise InputError(f"topology: field {name!r} is missing")
    links = {name: _link(name, value[name]) for name in ("within", "between") if name in value}
    lists = {name: tuple(value[name]) for name in ("memory_bytes", "expert_bytes") if isinstance(value.get(name), list)}
    return Topology(**{**value, **links, **lists})


def _link(name: str, value: Any) -> Link:
    expected = {f.name for f in fields(Link)}
    if not isinstance(value, dict) or set(value) != expected:
        raise InputError(f"topology: {name}: found {str(value)[:60]}, expected an object with {', '.join(sorted(expected))}")
    return Link(**value)
