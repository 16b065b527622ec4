"""Home ranks for sequences, told when they arrive: `homes` of a plan file (docs/planning.md), and what it does to a trace.

A class of sequences belongs to each rank. What tells the classes apart is how often some watched tokens stand in a prompt,
which is known before anything runs, or how often its first tokens use some watched experts: a line through those counts
predicts the rows that the sequence sends if a rank is its home.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coterie.routing.errors import InputError, require
from coterie.routing.trace import RoutingTrace

Array = NDArray[np.float64]
BY_IDS, BY_PREFILL = "token_ids", "prefill"
WATCHED = {BY_IDS: "token_ids", BY_PREFILL: "experts"}  # the field with what is watched, by `told_by`
FIELDS = ("told_by", "tokens", "balance", "classes")
CANDIDATES = 512  # sequences of each of two homes that are tried for a swap, those that gain most from leaving
STEPS = 300  # of the prices that fill the homes
SWEEPS = 6  # over all pairs of homes, at most
ROUNDING = 1e-9


@dataclass(frozen=True)
class HomeClass:
    """The sequences that are at home on rank `home`.

    A sequence is expected to send `rows` + the sum over what is watched of weight x uses, per token and layer, if this is its
    home; uses: how often a looked-at token is the watched one or uses the watched expert, on average. weights: one for each.
    """

    home: int
    rows: float
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Homes:
    """How sequences find their home ranks.

    classes: one for each rank, in order. experts: the watched ones, (decoder layer, expert); or token_ids: the watched tokens
    of the model's vocabulary, and no experts. tokens: how many first positions of a sequence's prompt are looked at, None for
    all of it. balance: the most tokens a home may have, over the mean home.
    """

    classes: tuple[HomeClass, ...]
    experts: tuple[tuple[int, int], ...] = ()
    tokens: int | None = None
    balance: float = 1.1
    token_ids: tuple[int, ...] | None = None

    @property
    def told_by(self) -> str:
        """What is looked at."""
        return BY_PREFILL if self.token_ids is None else BY_IDS

    @property
    def watched(self) -> tuple[object, ...]:
        """The experts or tokens that weights are for."""
        return self.experts if self.token_ids is None else self.token_ids

    def __post_init__(self) -> None:
        require(self.token_ids is None or not self.experts, "homes.experts", f"{len(self.experts)} beside token_ids", "none")
        require(self.tokens is None or self.tokens >= 1, "homes.tokens", self.tokens, "1 or more, or null")
        require(1 <= self.balance < math.inf, "homes.balance", self.balance, "1 or more")
        for rank, one in enumerate(self.classes):
            where, size = f"homes.classes[{rank}]", len(one.weights)
            require(one.home == rank, f"{where}.home", one.home, f"{rank}: one class for each rank, in order")
            field = f"homes.{WATCHED[self.told_by]}"
            require(size == len(self.watched), f"{where}.weights", size, f"{len(self.watched)} numbers, as {field}")

    def check(self, layer_ids: Sequence[int], num_experts: int, ranks: int) -> None:
        """Raises InputError unless these are homes for a plan of this shape."""
        require(len(self.classes) == ranks, "homes.classes", f"{len(self.classes)} classes", f"{ranks}, one for each rank")
        for number, (layer, expert) in enumerate(self.experts):
            known = layer in layer_ids and 0 <= expert < num_experts
            require(known, f"homes.experts[{number}]", [layer, expert], f"[layer of the plan, expert below {num_experts}]")
        require(len(set(self.watched)) == len(self.watched), f"homes.{WATCHED[self.told_by]}", "one twice", "each once")

    def to_json(self) -> dict[str, Any]:
        """As it stands in a plan file."""
        classes = [{"home": c.home, "rows": c.rows, "weights": list(c.weights)} for c in self.classes]
        watched = [list(one) if isinstance(one, tuple) else one for one in self.watched]
        return {
            "told_by": self.told_by, "tokens": self.tokens, "balance": self.balance, WATCHED[self.told_by]: watched,
            "classes": classes,
        }  # fmt: skip


def from_json(value: Any) -> Homes | None:
    """The homes of a plan file, None where it has none. Raises InputError naming the field."""
    if value is None:
        return None
    require(isinstance(value, dict), "homes", type(value).__name__, f"an object with {', '.join(FIELDS)}")
    require("told_by" in value, "homes.told_by", "nothing", "it given")
    told_by = value["told_by"]
    known = isinstance(told_by, str) and told_by in WATCHED
    require(known, "homes.told_by", repr(told_by)[:40], " or ".join(map(repr, WATCHED)))
    field = WATCHED[str(told_by)]
    _check_fields(value, "homes", (*FIELDS, field))
    tokens = value["tokens"]
    require(tokens is None or type(tokens) is int, "homes.tokens", repr(tokens)[:40], "an integer or null")
    classes = _list(value["classes"], "homes.classes")
    watched = _list(value[field], f"homes.{field}")
    by_ids = told_by == BY_IDS
    return Homes(
        classes=tuple(_class(one, f"homes.classes[{number}]") for number, one in enumerate(classes)),
        experts=() if by_ids else tuple(_expert(pair, f"homes.experts[{i}]") for i, pair in enumerate(watched)),
        tokens=tokens,
        balance=_number(value["balance"], "homes.balance"),
        token_ids=tuple(_id(one, f"homes.token_ids[{i}]") for i, one in enumerate(watched)) if by_ids else None,
    )


def _id(value: Any, where: str) -> int:
    require(type(value) is int and 0 <= value < 1 << 31, where, repr(value)[:40], "a token id, 0 or more")
    return int(value)


def _class(value: Any, where: str) -> HomeClass:
    _check_fields(value, where, ("home", "rows", "weights"))
    require(type(value["home"]) is int, f"{where}.home", repr(value["home"])[:40], "a rank")
    weights = _list(value["weights"], f"{where}.weights")
    numbers = tuple(_number(weight, f"{where}.weights[{number}]") for number, weight in enumerate(weights))
    return HomeClass(value["home"], _number(value["rows"], f"{where}.rows"), numbers)


def _expert(value: Any, where: str) -> tuple[int, int]:
    pair = isinstance(value, list) and len(value) == 2 and all(type(v) is int and 0 <= v < 1 << 20 for v in value)
    require(pair, where, repr(value)[:40], "[layer, expert]")
    return value[0], value[1]


def _check_fields(value: Any, where: str, fields: Sequence[str]) -> None:
    require(isinstance(value, dict), where, type(value).__name__, f"an object with {', '.join(fields)}")
    for name in fields:
        require(name in value, f"{where}.{name}", "nothing", "it given")
    unknown = next((str(name) for name in value if name not in fields), None)
    require(unknown is None, where, f"a field {str(unknown)[:40]!r}", f"no other than {', '.join(fields)}")


def _list(value: Any, where: str) -> list[Any]:
    require(isinstance(value, list), where, type(value).__name__, "a list")
    return list(value)


def _number(value: Any, where: str) -> float:
    fine = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e18
    require(fine, where, repr(value)[:40], "a finite number")
    return float(value)


def assign(homes: Homes, trace: RoutingTrace) -> NDArray[np.int64]:
    """The home rank of each token, int64 `[tokens]`: every sequence of the trace has one, told by its first tokens.

    The trace has all layers that are watched (`cost.check_match`). Raises InputError if token ids are and it has none.
    The rows that the classes expect are minimised over the whole trace, under the balance limit (`balanced`).
    """
    _, sequence, lengths = np.unique(trace.sequence_ids, return_inverse=True, return_counts=True)
    return placed(homes, uses(trace, homes), lengths)[sequence]


def placed(homes: Homes, used: Array, lengths: NDArray[np.integer]) -> NDArray[np.int64]:
    """The home rank of each sequence, int64 `[sequences]`; used: as `uses` returns it; lengths: tokens of each."""
    rows = np.array([c.rows for c in homes.classes]) + used @ _weights(homes).T
    return balanced(rows * lengths[:, None], lengths, homes.balance)


def _weights(homes: Homes) -> Array:
    """float64 `[ranks, watched]`."""
    return np.array([c.weights for c in homes.classes], dtype=np.float64).reshape(len(homes.classes), len(homes.watched))


def uses(trace: RoutingTrace, homes: Homes) -> Array:
    """How often a looked-at token is, or uses, each that is watched, float64 `[sequences, watched]`, sequences by ascending id.

    Looked at are the first `homes.tokens` recorded of every sequence, in the order of their positions.
    """
    looked, experts = first_tokens(trace, homes.tokens), homes.experts
    _, sequence, lengths = np.unique(trace.sequence_ids[looked], return_inverse=True, return_counts=True)
    if homes.token_ids is not None:
        if trace.token_ids is None:
            raise InputError("homes: found no token_ids in the trace, by which they are told: record it with --token-ids")
        return shares(homes.token_ids, trace.token_ids[looked].astype(np.int64), sequence)
    number = {layer: i for i, layer in enumerate(trace.layer_ids)}
    found = np.empty((len(lengths), len(experts)))
    for column, (layer, expert) in enumerate(experts):
        used = (trace.expert_ids[looked, number[layer]] == expert).sum(1)
        found[:, column] = np.bincount(sequence, weights=used, minlength=len(lengths))
    return found / lengths[:, None]


def shares(watched: Sequence[int], token_ids: NDArray[np.int64], sequence: NDArray[np.integer]) -> Array:
    """Of each sequence's tokens, those that are each watched one: float64 `[sequences, watched]`; sequence: of each token."""
    order = np.argsort(watched)
    ids = np.asarray(watched, dtype=np.int64)[order]
    lengths = np.bincount(sequence)
    found = np.zeros((len(lengths), len(ids)))
    place = np.minimum(np.searchsorted(ids, token_ids), max(len(ids) - 1, 0))
    if len(ids):
        known = ids[place] == token_ids
        np.add.at(found, (sequence[known], order[place[known]]), 1.0)
    return found / lengths[:, None]


def first_tokens(trace: RoutingTrace, tokens: int | None) -> NDArray[np.int64]:
    """Indices of the first `tokens` recorded of every sequence, by position; all for None."""
    order = np.lexsort((trace.positions, trace.sequence_ids))
    if tokens is None:
        return order
    ids = trace.sequence_ids[order]
    return order[np.arange(len(ids)) - np.searchsorted(ids, ids) < tokens]


def balanced(costs: Array, lengths: NDArray[np.integer], balance: float) -> NDArray[np.int64]:
    """A home for every sequence, int64 `[sequences]`, cheap in all, and none with more than balance x the mean of the tokens.

    costs: float64 `[sequences, ranks]`; lengths `[sequences]`, in tokens. Where that limit cannot be kept, because
    sequences are long, it is what packing the longest first reaches. Homes in demand get a price; at these prices those who
    lose most by not getting their best home choose first; then sequences move and swap until nothing is gained. Deterministic.
    """
    packed = _packed(lengths, costs.shape[1])
    reached = int(np.bincount(packed, weights=lengths, minlength=costs.shape[1]).max())
    cap = max(balance * float(lengths.sum()) / costs.shape[1] * (1 + ROUNDING), float(reached))
    chosen = _greedy(costs + lengths[:, None] * _prices(costs, lengths, cap), lengths, cap)
    here = packed if chosen is None else chosen
    for _ in range(SWEEPS):
        pairs = [(a, b) for a in range(costs.shape[1]) for b in range(a)]
        if not sum(_swapped(here, costs, lengths, cap, pair) for pair in pairs):
            break
    return here


def _packed(lengths: NDArray[np.integer], ranks: int) -> NDArray[np.int64]:
    """The longest sequence first, each to the home with the fewest tokens."""
    here, held = np.empty(len(lengths), dtype=np.int64), np.zeros(ranks)
    for sequence in np.argsort(-lengths, kind="stable"):
        here[sequence] = held.argmin()
        held[here[sequence]] += lengths[sequence]
    return here


def _prices(costs: Array, lengths: NDArray[np.integer], cap: float) -> Array:
    """What a token pays for its home, float64 `[ranks]`, so that homes in demand are about full: subgradient steps."""
    prices = np.zeros(costs.shape[1])
    step = float(np.median(np.ptp(costs, axis=1) / lengths))
    for turn in range(STEPS):
        held = np.bincount((costs + lengths[:, None] * prices).argmin(1), weights=lengths, minlength=len(prices))
        prices = np.maximum(0.0, prices + step / (1 + turn / 16) * (held / cap - 1))
    return prices


def _greedy(costs: Array, lengths: NDArray[np.integer], cap: float) -> NDArray[np.int64] | None:
    """Each in turn to its cheapest home with room; None if one finds none."""
    here, room = np.empty(len(lengths), dtype=np.int64), np.full(costs.shape[1], cap)
    for sequence in np.argsort(costs.min(1) - costs.mean(1), kind="stable"):
        fits = room >= lengths[sequence]
        if not fits.any():
            return None
        here[sequence] = np.where(fits, costs[sequence], np.inf).argmin()
        room[here[sequence]] -= lengths[sequence]
    return here


def _swapped(here: NDArray[np.int64], costs: Array, lengths: NDArray[np.integer], cap: float, pair: tuple[int, int]) -> int:
    """Moves and swaps sequences between two homes, in place, best first, while that pays; how many it made."""
    a, b = pair
    for made in range(len(here)):
        out, back = _leaving(here, costs, a, b), _leaving(here, costs, b, a)
        gain = _or_none(costs[out, a] - costs[out, b])[:, None] + _or_none(costs[back, b] - costs[back, a])[None, :]
        shift = _or_none(lengths[out])[:, None] - _or_none(lengths[back])[None, :]
        held_a, held_b = int(lengths[here == a].sum()), int(lengths[here == b].sum())
        gain[(held_b + shift > cap) | (held_a - shift > cap)] = 0.0
        first, second = np.unravel_index(gain.argmax(), gain.shape)
        if gain[first, second] <= ROUNDING * max(1.0, float(np.abs(costs).max())):
            return made
        here[out[first : first + 1]], here[back[second : second + 1]] = b, a  # past the end: nobody goes that way
    return len(here)


def _leaving(here: NDArray[np.int64], costs: Array, a: int, b: int) -> NDArray[np.int64]:
    """The sequences at home on a that gain most, or lose least, by moving to b."""
    own = np.flatnonzero(here == a)
    return own[np.argsort(costs[own, b] - costs[own, a], kind="stable")[:CANDIDATES]]


def _or_none(values: NDArray[Any]) -> Array:
    """With a zero at the end, for nobody."""
    return np.append(values, 0).astype(np.float64)
