"""What a trace says about experts: how loaded they are, which follow which, which are picked together.

Inter-layer affinity is ExFlow's measure (Yao et al., "Exploiting Inter-Layer Expert Affinity for Accelerating
Mixture-of-Experts Model Inference", 2024), generalised from top-1 to all k x k pairs of a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coterie.routing.trace import RoutingTrace


@dataclass(frozen=True)
class Patterns:
    """The distinct expert sets that tokens used in one layer.

    experts: bool `[patterns, E]`; weight: float64 `[patterns]`, tokens that used the set;
    by_home: float64 `[patterns, homes]`, the same tokens by home rank, or None if not asked for.
    """

    experts: NDArray[np.bool_]
    weight: NDArray[np.float64]
    by_home: NDArray[np.float64] | None = None


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
    return Affinity(
        load=expert_load(trace),
        transitions=transition_counts(trace),
        patterns=tuple(patterns(trace, layer, homes, ranks) for layer in range(trace.layers)),
        tokens=trace.tokens,
    )


def expert_load(trace: RoutingTrace) -> NDArray[np.float64]:
    """(token, expert) pairs per layer and expert, float64 `[layers, E]`."""
    ids = trace.expert_ids
    load = np.zeros((trace.layers, trace.num_experts))
    for layer in range(trace.layers):
        used = ids[:, layer][ids[:, layer] >= 0]
        load[layer] = np.bincount(used, minlength=trace.num_experts)
    return load


def transition_counts(trace: RoutingTrace) -> NDArray[np.float64]:
    """How often one token used expert e at layer l and f at layer l+1, float64 `[layers-1, E, E]`."""
    size = trace.num_experts
    counts = np.zeros((max(trace.layers - 1, 0), size, size))
    for layer in range(trace.layers - 1):
        here, following = trace.expert_ids[:, layer], trace.expert_ids[:, layer + 1]
        pairs = here[:, :, None].astype(np.int64) * size + following[:, None, :]
        valid = (here[:, :, None] >= 0) & (following[:, None, :] >= 0)
        counts[layer] = np.bincount(pairs[valid], minlength=size * size).reshape(size, size)
    return counts


def patterns(trace: RoutingTrace, layer: int, homes: NDArray[np.integer] | None = None, ranks: int = 0) -> Patterns:
    """The distinct expert sets of one layer with their token counts.

    homes: integer `[tokens]` with values below `ranks`; then the counts are also split by home.
    """
    rows = np.sort(trace.expert_ids[:, layer], axis=1)
    distinct, inverse, counts = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
    experts = np.zeros((len(distinct), trace.num_experts), dtype=bool)
    row, slot = np.nonzero(distinct >= 0)
    experts[row, distinct[row, slot]] = True
    by_home = None
    if homes is not None:
        flat = inverse.reshape(-1).astype(np.int64) * ranks + homes
        by_home = np.bincount(flat, minlength=len(distinct) * ranks).reshape(len(distinct), ranks).astype(np.float64)
    return Patterns(experts, counts.astype(np.float64), by_home)


def mean_affinity(trace: RoutingTrace) -> float:
    """Mean over layers of the load-weighted max P(expert at layer l+1 | expert at layer l); 1/E if routing were even."""
    counts = transition_counts(trace)
    if not len(counts):
        return float("nan")
    return float(np.mean(counts.max(2).sum(1) / np.maximum(counts.sum((1, 2)), 1)))
