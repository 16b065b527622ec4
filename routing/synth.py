"""Synthetic traces of known structure, of any size: what a planner can find in them is known beforehand.

    aligned     experts form groups and a token keeps to one group through all layers: some placement has no hops at all
    misaligned  every two consecutive layers have such groups, but the groups that tie a layer to the one before and to the
                one after it differ: each pair of layers could do without hops, all of them together cannot
    geometric   experts are points on a circle, a token is a point that drifts from layer to layer and takes the nearest

Pure functions of their arguments, the seed included. Labels are drawn anew in every layer, so that contiguous placement
knows nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coterie.routing.errors import require
from coterie.routing.trace import RoutingTrace

BLOCK = 1 << 14  # tokens drawn at once
REDRAWS = 100  # of strays that met, before they are dealt out
REACH = 4  # geometric: as many times top_k experts around the token are looked at
STRUCTURE, TOKENS = 0, 1  # two independent streams of random numbers from one seed


@dataclass(frozen=True)
class _Recipe:
    """The checked arguments of `make`."""

    family: str
    tokens: int
    layers: int
    num_experts: int
    top_k: int
    seed: int
    groups: int
    noise: float
    overlap: float
    skew: float
    drift: float
    sequences: int

    def __post_init__(self) -> None:
        require(self.family in FAMILIES, "family", repr(self.family), ", ".join(FAMILIES))
        require(0 < self.num_experts <= 32767, "num_experts", self.num_experts, "1 to 32767")
        require(0 < self.top_k <= self.num_experts, "top_k", self.top_k, f"1 to {self.num_experts} (num_experts)")
        for name in ("tokens", "layers"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require(1 <= self.sequences <= self.tokens, "sequences", self.sequences, f"1 to {self.tokens} (tokens)")
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        for name, most in (("noise", 1), ("overlap", 1), ("drift", 1), ("skew", 4)):
            require(0 <= getattr(self, name) <= most, name, getattr(self, name), f"0 to {most}")
        if self.family != "geometric":
            size = _group_size(self.num_experts, self.groups)
            require(size >= self.top_k, "groups", self.groups, f"at most {self.num_experts // self.top_k}, for top_k a group")
            outside = self.num_experts - size
            require(not self.noise or outside >= self.top_k, "noise", self.noise, f"0: {outside} experts are outside a group")
        if self.family == "misaligned":
            kept = _kept(size, self.overlap)
            parts = f"a share that leaves both parts of a group ({size} experts) top_k = {self.top_k}"
            require(self.top_k <= kept <= size - self.top_k, "overlap", self.overlap, parts)


def make(
    family: str,
    tokens: int,
    layers: int,
    num_experts: int,
    top_k: int,
    seed: int = 0,
    *,
    groups: int = 8,
    noise: float = 0.0,
    overlap: float = 0.5,
    skew: float = 0.0,
    drift: float = 0.02,
    sequences: int | None = None,
) -> RoutingTrace:
    """A trace of `family`, without router weights; the same arguments give the same trace.

    groups: of equal size, in aligned and misaligned. noise: there, the probability of each pick to lie outside the token's
    group; in geometric, what is added to every distance, as a normal deviation in units of top_k spacings of the circle.
    overlap: misaligned, as in `misaligned_groups`. skew: an expert's popularity falls with this power of its rank, 0: all
    alike. drift: geometric, a token's normal step from layer to layer as a share of the circle.
    sequences: of nearly equal length, one after another; None takes one per 256 tokens.
    Raises InputError for values that are out of range or do not go together.
    """
    count = max(1, tokens // 256) if sequences is None else sequences
    recipe = _Recipe(family, tokens, layers, num_experts, top_k, seed, groups, noise, overlap, skew, drift, count)
    ids = FAMILIES[family](recipe)
    sequence = np.arange(tokens) * count // tokens
    return RoutingTrace(
        expert_ids=ids,
        sequence_ids=sequence.astype(np.int32),
        positions=(np.arange(tokens) - np.searchsorted(sequence, sequence)).astype(np.int32),
        model=f"synthetic-{family}",
        num_experts=num_experts,
        layer_ids=tuple(range(layers)),
        scenario=family,
    )


def aligned_groups(layers: int, num_experts: int, groups: int, seed: int = 0) -> NDArray[np.int64]:
    """The group of every expert in `aligned`, int64 `[layers, E]`; where groups are ranks, a placement without hops."""
    size = _group_size(num_experts, groups)
    rng = _random(seed, STRUCTURE)
    return rng.permuted(np.tile(np.repeat(np.arange(groups), size), (layers, 1)), axis=1)


def misaligned_groups(
    layers: int, num_experts: int, groups: int, overlap: float = 0.5, seed: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The groups of `misaligned`, two int64 `[layers, E]`: those that tie a layer to the one before, and to the one after.

    Of every group of the first kind a share of `overlap` stays together in the second; the rest goes over to the next group
    on a random cycle through all of them. A token that comes in by a group of the first kind leaves by one of the second,
    which it enters the next layer by. So two layers alone can do without hops, but from three layers on only a placement
    that puts everything on one rank could: through the cycle every group hangs together with every other.
    """
    incoming = aligned_groups(layers, num_experts, groups, seed)
    outgoing = incoming.copy()
    rng = _random(seed, STRUCTURE, 1)
    kept = _kept(num_experts // groups, overlap)
    for layer in range(layers):
        cycle = rng.permutation(groups)
        following = np.empty(groups, dtype=np.int64)
        following[cycle] = np.roll(cycle, -1)
        moved = rng.permuted(_members(incoming[layer], groups), axis=1)[:, kept:]
        outgoing[layer, moved] = following[:, None]
    return incoming, outgoing


def circle_places(layers: int, num_experts: int, seed: int = 0) -> NDArray[np.int64]:
    """Where the experts of `geometric` lie on the circle of E evenly spaced places, int64 `[layers, E]`."""
    return np.argsort(_circle(layers, num_experts, seed), axis=1)


def _circle(layers: int, num_experts: int, seed: int) -> NDArray[np.int64]:
    """The expert at every place, int64 `[layers, E]`."""
    return _random(seed, STRUCTURE).permuted(np.tile(np.arange(num_experts), (layers, 1)), axis=1)


def _random(seed: int, *stream: int) -> np.random.Generator:
    require(seed >= 0, "seed", seed, "0 or more")
    return np.random.default_rng((seed, *stream))


def _group_size(num_experts: int, groups: int) -> int:
    require(groups >= 1 and num_experts % groups == 0, "groups", groups, f"a divisor of {num_experts} (num_experts)")
    return num_experts // groups


def _kept(size: int, overlap: float) -> int:
    require(0 <= overlap <= 1, "overlap", overlap, "0 to 1")
    return round(size * overlap)


def _members(groups_of: NDArray[np.int64], groups: int) -> NDArray[np.int64]:
    """The experts of every group, int64 `[groups, E / groups]`, ascending; groups_of `[E]`."""
    return np.argsort(groups_of, kind="stable").reshape(groups, -1)


def _aligned(recipe: _Recipe) -> NDArray[np.int16]:
    groups_of = aligned_groups(recipe.layers, recipe.num_experts, recipe.groups, recipe.seed)
    return _walk_groups(recipe, groups_of, groups_of)


def _misaligned(recipe: _Recipe) -> NDArray[np.int16]:
    return _walk_groups(
        recipe, *misaligned_groups(recipe.layers, recipe.num_experts, recipe.groups, recipe.overlap, recipe.seed)
    )


def _walk_groups(recipe: _Recipe, incoming: NDArray[np.int64], outgoing: NDArray[np.int64]) -> NDArray[np.int16]:
    """Expert ids `[tokens, layers, top_k]` of tokens that enter and leave each layer by these groups `[layers, E]`.

    In a layer a token draws one expert of the group it is in; that expert's outgoing group is where it goes next, and all
    its picks lie in both groups: drawn without replacement, as the first to arrive of exponential clocks.
    """
    rng = _random(recipe.seed, TOKENS)
    ids = np.empty((recipe.tokens, recipe.layers, recipe.top_k), dtype=np.int16)
    at = rng.integers(recipe.groups, size=recipe.tokens)
    for layer in range(recipe.layers):
        members = _members(incoming[layer], recipe.groups)
        leaves_by = outgoing[layer][members]
        pace = _pace(rng, members.shape, recipe.skew)
        # [group, member drawn, member]: barred are those that leave by another group than the one drawn
        clocks = np.where(leaves_by[:, :, None] == leaves_by[:, None, :], pace[:, None, :], np.float32(1e30))
        for block in _blocks(recipe.tokens):
            group = at[block]
            drawn = rng.integers(members.shape[1], size=len(group))
            times = rng.standard_exponential((len(group), members.shape[1]), dtype=np.float32) + np.float32(1e-9)
            first = _least(times * clocks[group, drawn], recipe.top_k)
            picks = members[group[:, None], first].astype(np.int16)
            ids[block, layer] = _strayed(rng, picks, group, incoming[layer], recipe)
            at[block] = leaves_by[group, drawn]
    return ids


def _strayed(
    rng: np.random.Generator, picks: NDArray[np.int16], group: NDArray[np.int64], groups_of: NDArray[np.int64], recipe: _Recipe
) -> NDArray[np.int16]:
    """`picks` `[tokens, top_k]`, each with probability `noise` replaced by any expert outside the token's group."""
    strays = rng.random(picks.shape) < recipe.noise
    rows = np.flatnonzero(strays.any(1))
    if not len(rows):
        return picks
    outside = np.array([np.flatnonzero(groups_of != g) for g in range(recipe.groups)], dtype=np.int16)
    for _ in range(REDRAWS):  # again wherever two strays met
        if not len(rows):
            return picks
        found = outside[group[rows, None], rng.integers(outside.shape[1], size=(len(rows), recipe.top_k))]
        picks[rows] = np.where(strays[rows], found, picks[rows])
        ordered = np.sort(picks[rows], axis=1)
        rows = rows[(ordered[:, 1:] == ordered[:, :-1]).any(1)]
    for row in rows:  # nearly all experts outside are wanted
        picks[row][strays[row]] = rng.permutation(outside[group[row]])[: strays[row].sum()]
    return picks


def _geometric(recipe: _Recipe) -> NDArray[np.int16]:
    """Expert ids `[tokens, layers, top_k]`: the nearest on the circle, of those within REACH * top_k places."""
    rng = _random(recipe.seed, TOKENS)
    size, circle = recipe.num_experts, _circle(recipe.layers, recipe.num_experts, recipe.seed)
    ids = np.empty((recipe.tokens, recipe.layers, recipe.top_k), dtype=np.int16)
    at = rng.random(recipe.tokens) * size
    reach = min(size, REACH * recipe.top_k)
    offsets = np.arange(reach) - reach // 2
    for layer in range(recipe.layers):
        pace = _pace(rng, (1, size), recipe.skew)[0]
        pace_near = pace[(np.arange(size)[:, None] + offsets) % size]  # [place, offset]
        for block in _blocks(recipe.tokens):
            place = np.floor(at[block]).astype(np.int64) % size
            apart = np.abs(offsets - (at[block] % 1)[:, None]).astype(np.float32)
            distance = np.minimum(apart, size - apart) * pace_near[place]
            if recipe.noise:
                deviation = np.float32(recipe.noise * recipe.top_k)
                distance += deviation * rng.standard_normal(distance.shape, dtype=np.float32)
            near = place[:, None] + offsets[_least(distance, recipe.top_k)]
            ids[block, layer] = circle[layer, near % size]
        at = (at + rng.standard_normal(recipe.tokens) * recipe.drift * size) % size
    return ids


def _pace(rng: np.random.Generator, shape: tuple[int, ...], skew: float) -> NDArray[np.float32]:
    """What times and distances are multiplied by, float32 like `shape`: the ranks of a random order to the power `skew`."""
    ranks = rng.permuted(np.broadcast_to(np.arange(1, shape[-1] + 1), shape), axis=-1)
    return np.asarray((ranks / ranks.mean()) ** skew, dtype=np.float32)


def _least(values: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Where the `count` least of each row are, int64 `[rows, count]`, in no order."""
    return np.argpartition(values, count - 1, axis=1)[:, :count]


def _blocks(tokens: int) -> Iterator[slice]:
    return (slice(start, start + BLOCK) for start in range(0, tokens, BLOCK))


FAMILIES: dict[str, Callable[[_Recipe], NDArray[np.int16]]] = {
    "aligned": _aligned,
    "misaligned": _misaligned,
    "geometric": _geometric,
}
