"""What a trace says about experts: how loaded they are, which follow which, which are picked together.

Inter-layer affinity is ExFlow's measure (Yao et al., "Exploiting Inter-Layer Expert Affinity for Accelerating
Mixture-of-Experts Model Inference", 2024), generalised from top-1 to all k x k pairs of a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from coterie.routing.trace import RoutingTrace

BLOCK = 1 << 19  # counts made at once: many beside the table they go into, few enough for the cache
THREADS = 2  # more would mostly wait for the interpreter's lock


@dataclass(frozen=True)
class Patterns:
    """The distinct expert sets that tokens used in one layer.

    ids: int16 `[patterns, top_k]`, each row ascending, so that unused slots (-1) come first; rows distinct, in
    lexicographic order. weight: float64 `[patterns]`, tokens that used the set.
    num_experts: E. by_home: float64 `[patterns, homes]`, the same tokens by home rank, or None if not asked for.
    """

    ids: NDArray[np.int16]
    weight: NDArray[np.float64]
    num_experts: int
    by_home: NDArray[np.float64] | None = None

    @property
    def experts(self) -> NDArray[np.bool_]:
        """The sets as masks, bool `[patterns, E]`; built anew at every call, E / (2 * top_k) times the size of `ids`."""
        padded = np.zeros((len(self.ids), self.num_experts + 1), dtype=bool)
        padded[np.arange(len(self.ids))[:, None], self.ids] = True  # -1 falls into the column that is cut off
        return padded[:, : self.num_experts]

    @property
    def tokens(self) -> float:
        """How many in all; every token uses one set, if only the empty one."""
        return float(self.weight.sum())


@dataclass(frozen=True)
class Affinity:
    """load: float64 `[layers, E]`, (token, expert) pairs; transitions: float64 `[layers-1, E, E]`, pairs of an expert at
    layer l and one at layer l+1 used by the same token; patterns: one `Patterns` per layer; tokens: how many in all.
    """

    load: NDArray[np.float64]
    transitions: NDArray[np.float64]
    patterns: tuple[Patterns, ...]
    tokens: int


def measure(trace: RoutingTrace, homes: NDArray[np.integer] | None = None, ranks: int = 0) -> Affinity:
    """All three statistics of a trace; with homes and ranks, patterns are also counted by home (see `patterns`)."""
    sets = pattern_counts(trace, homes, ranks)
    return Affinity(load=expert_load(trace), transitions=transition_counts(trace), patterns=sets, tokens=trace.tokens)


def expert_load(trace: RoutingTrace) -> NDArray[np.float64]:
    """(token, expert) pairs per layer and expert, float64 `[layers, E]`."""
    size = trace.num_experts + 1  # unused slots are counted in a first column, which is cut off
    first = np.arange(trace.layers)[:, None] * size + 1
    counts = np.zeros(trace.layers * size)
    for tokens in _blocks(trace.tokens, trace.layers * trace.top_k):
        counts += np.bincount((trace.expert_ids[tokens] + first).ravel(), minlength=len(counts))
    return np.ascontiguousarray(counts.reshape(trace.layers, size)[:, 1:])


def transition_counts(trace: RoutingTrace) -> NDArray[np.float64]:
    """How often one token used expert e at layer l and f at layer l+1, float64 `[layers-1, E, E]`."""
    counts = np.zeros((trace.layers - 1, trace.num_experts, trace.num_experts))
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(partial(_add_transitions, trace, counts), np.array_split(np.arange(len(counts)), THREADS)))
    return counts


def _add_transitions(trace: RoutingTrace, counts: NDArray[np.float64], layers: NDArray[np.int64]) -> None:
    """Adds to `counts` what follows these layers; all of them block by block, since they share the lines of the cache."""
    size, top_k = trace.num_experts + 1, trace.top_k  # unused slots are counted in a first row and column, cut off below
    buffer = np.empty(max(BLOCK, top_k**2), dtype=np.int32)
    ones = np.ones(len(buffer), dtype=np.int32)
    for tokens in _blocks(trace.tokens, top_k**2):
        for layer in layers:
            # Slots first, so that the innermost loop of the sum runs over tokens: twice as fast.
            here = (trace.expert_ids[tokens, layer].T.astype(np.int32, order="C") + 1) * size
            following = trace.expert_ids[tokens, layer + 1].T.astype(np.int32, order="C") + 1
            keys = buffer[: top_k * here.size].reshape(top_k, *here.shape)
            np.add(here[:, None], following, out=keys)
            counts[layer] += _counted(keys.reshape(-1), ones, size * size).reshape(size, size)[1:, 1:]


def _counted(keys: NDArray[np.int32], ones: NDArray[np.int32], size: int) -> NDArray[np.int32]:
    """How often each number below `size` is among the keys; ones: as many, or more. numpy's bincount keeps the interpreter's
    lock while it counts; this does not.
    """
    row = csr_array((ones[: len(keys)], keys, np.array([0, len(keys)], dtype=np.int32)), shape=(1, size))
    return np.asarray(row.toarray()[0])


def _blocks(tokens: int, width: int) -> Iterator[slice]:
    """Slices of the tokens, such that tokens times `width` in each is about BLOCK."""
    step = max(1, BLOCK // width)
    return (slice(start, start + step) for start in range(0, tokens, step))


def pattern_counts(trace: RoutingTrace, homes: NDArray[np.integer] | None = None, ranks: int = 0) -> tuple[Patterns, ...]:
    """The `patterns` of every layer."""
    with ThreadPoolExecutor(THREADS) as pool:
        return tuple(pool.map(partial(patterns, trace, homes=homes, ranks=ranks), range(trace.layers)))


def patterns(trace: RoutingTrace, layer: int, homes: NDArray[np.integer] | None = None, ranks: int = 0) -> Patterns:
    """The distinct expert sets of one layer with their token counts.

    homes: integer `[tokens]` with values below `ranks`; then the counts are also split by home.
    """
    ids = trace.expert_ids[:, layer]
    low = int(ids.min(initial=0))
    bits = max(1, (trace.num_experts - 1 - low).bit_length())
    if bits * trace.top_k <= 64 and homes is None:
        keys = np.sort(_packed(ids, low, bits))
        starts = _first_of_equal(keys)
        rows = _unpacked(keys[starts], low, bits, trace.top_k)
        return Patterns(rows, np.diff(starts, append=len(keys)).astype(np.float64), trace.num_experts)
    rows = np.sort(ids, axis=1)
    order, starts = _equal_rows(rows, low, bits)
    counts = np.diff(starts, append=len(rows))
    by_home = None
    if homes is not None:
        pattern = np.repeat(np.arange(len(starts)), counts)  # of the tokens in `order`
        split = np.bincount(pattern * ranks + homes[order], minlength=len(starts) * ranks)
        by_home = split.reshape(len(starts), ranks).astype(np.float64)
    return Patterns(rows[order[starts]], counts.astype(np.float64), trace.num_experts, by_home)


def _packed(ids: NDArray[np.int16], low: int, bits: int) -> NDArray[np.uint64]:
    """Each token's ids `[tokens, k]`, ascending, in one number `[tokens]`: less `low`, of `bits` bits each, the first highest.

    Columns are put in order by an odd-even transposition network, block by block: a third of the time of np.sort by rows.
    """
    keys = np.empty(len(ids), dtype=np.uint64)
    for tokens in _blocks(len(ids), 16):
        columns = list(np.ascontiguousarray(ids[tokens].T))
        for turn in range(len(columns)):
            for i in range(turn % 2, len(columns) - 1, 2):
                one, other = columns[i : i + 2]
                columns[i], columns[i + 1] = np.minimum(one, other), np.maximum(one, other)
        key = np.zeros(len(columns[0]), dtype=np.uint64)
        for column in columns:
            _append(key, column, low, bits)
        keys[tokens] = key
    return keys


def _append(key: NDArray[np.uint64], column: NDArray[np.int16], low: int, bits: int) -> None:
    """The column's ids, less `low`, behind what the keys hold, in place."""
    key <<= np.uint64(bits)
    key |= (column - np.int16(low)).astype(np.uint64)


def _unpacked(keys: NDArray[np.uint64], low: int, bits: int, top_k: int) -> NDArray[np.int16]:
    """The ids of which `_packed` made the keys, `[len(keys), top_k]`."""
    shifts = np.arange(top_k - 1, -1, -1, dtype=np.uint64) * np.uint64(bits)
    digits = (keys[:, None] >> shifts) & np.uint64((1 << bits) - 1)
    return (digits.astype(np.int32) + low).astype(np.int16)


def _equal_rows(rows: NDArray[np.int16], low: int, bits: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Lexicographic order of the rows `[tokens, k]`: int64 `[tokens]`, and where each distinct row begins in it.

    As many columns as fit are packed into a 64-bit key; if some are left, the key gives way to its rank and goes on.
    """
    key, free = np.zeros(len(rows), dtype=np.uint64), 64
    for column in rows.T:
        if free < bits:
            order = np.argsort(key)
            starts = _first_of_equal(key[order])
            key[order] = np.repeat(np.arange(len(starts), dtype=np.uint64), np.diff(starts, append=len(rows)))
            free = 64 - len(starts).bit_length()
        _append(key, column, low, bits)
        free -= bits
    order = np.argsort(key)
    return order, _first_of_equal(key[order])


def _first_of_equal(ordered: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where each distinct value begins."""
    return np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(ordered) else np.zeros(0, np.int64)


def shared(transitions: NDArray[np.float64], sets: Sequence[Patterns], share: float) -> NDArray[np.float64]:
    """`transitions` with a share of every count dealt out to experts that are picked together with the two of the pair.

    Kernel smoothing of a sparse table: an expert's weight for another is how often the two are picked together, over all
    its company, itself included. transitions `[layers-1, E, E]`, sets: of every layer. Totals stay; at top-1 nothing changes.
    """
    near = [_company(p) for p in sets]
    dealt = [one.T @ counts @ two for one, counts, two in zip(near, transitions, near[1:], strict=False)]
    return (1 - share) * transitions + share * np.reshape(dealt, transitions.shape)


def _company(sets: Patterns) -> NDArray[np.float64]:
    """How often two experts are picked together, in shares of the first one's, `[E, E]`; an expert never picked is alone."""
    members = sets.experts.astype(np.float64)
    together = (members * sets.weight[:, None]).T @ members
    total = together.sum(1, keepdims=True)
    return np.where(total > 0, together / np.maximum(total, 1), np.eye(sets.num_experts))


def mean_affinity(trace: RoutingTrace) -> float:
    """Mean over layers of the load-weighted max P(expert at layer l+1 | expert at layer l); 1/E if routing were even."""
    counts = transition_counts(trace)
    if not len(counts):
        return float("nan")
    return float(np.mean(counts.max(2).sum(1) / np.maximum(counts.sum((1, 2)), 1)))
