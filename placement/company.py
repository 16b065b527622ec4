"""A start for placements with homes: sequences that use the same experts share a home, and those experts are there.

The alternation of `homing.py` moves single experts, and a plan without homes groups the experts of each layer by themselves;
what matters with homes is which groups share a rank in all layers at once. So sequences are clustered, as k-means would:
experts go to the rank whose sequences use them most (an assignment problem in every layer), sequences to the rank that holds
most of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from coterie.placement import limits
from coterie.placement.baselines import Assignment
from coterie.placement.homes import balanced
from coterie.placement.prices import Prices
from coterie.placement.problem import Problem
from coterie.placement.starts import groups_of
from coterie.routing.trace import RoutingTrace

Array = NDArray[np.float64]
ROUNDS = 20
GROUPED = 256  # sequences at most that are grouped to begin with
BALANCE = 1.1


def clustered(problem: Problem, traces: Sequence[RoutingTrace], prices: Prices, otherwise: Assignment) -> Assignment:
    """A placement within the problem's limits, int64 `[L, E]`; a layer that cannot be mended is taken from `otherwise`."""
    used = np.concatenate([picks(trace) for trace in traces])  # [sequences, L, E]
    lengths = np.concatenate([np.unique(trace.sequence_ids, return_counts=True)[1] for trace in traces])
    worth = gains(prices)
    home, found = _grouped(used, lengths, problem.ranks), np.zeros((problem.layers, problem.experts), dtype=np.int64)
    for _ in range(ROUNDS):
        found = np.stack([_placed(used[:, layer], home, problem, worth) for layer in range(problem.layers)])
        kept = sum(used[:, layer] @ worth[found[layer]] for layer in range(problem.layers))
        before, home = home, balanced(-np.asarray(kept), lengths, BALANCE)
        if np.array_equal(before, home):
            break
    return _mended(problem, found, otherwise)


def gains(prices: Prices) -> Array:
    """What a pick on a rank saves by home, `[ranks, homes]`: a whole row at home, a link on the same node."""
    most = prices.between if prices.matter else 1.0
    row = prices.by_rank + np.repeat(prices.by_node, prices.topology.ranks_per_node, axis=1)
    return np.asarray(most - row.T)


def picks(trace: RoutingTrace) -> NDArray[np.float32]:
    """How often each sequence uses each expert, float32 `[sequences, L, E]`, by ascending id."""
    ids, sequence = np.unique(trace.sequence_ids, return_inverse=True)
    size = trace.num_experts + 1  # unused slots are counted in a first column, which is cut off
    found = np.empty((len(ids), trace.layers, trace.num_experts), dtype=np.float32)
    for layer in range(trace.layers):
        keys = sequence[:, None] * size + (trace.expert_ids[:, layer].astype(np.int64) + 1)
        found[:, layer] = np.bincount(keys.ravel(), minlength=len(ids) * size).reshape(-1, size)[:, 1:]
    return found


def _grouped(used: NDArray[np.float32], lengths: NDArray[np.int64], ranks: int) -> NDArray[np.int64]:
    """A home for every sequence to begin with: groups of a sample, the others with the group that they are most like."""
    shares = (used / lengths[:, None, None]).reshape(len(used), -1)
    shares = shares - shares.mean(0)
    sample = np.unique(np.linspace(0, len(used) - 1, min(len(used), GROUPED)).astype(np.int64))
    near = (shares[sample] @ shares[sample].T).astype(np.float64)
    group = groups_of(near - near.min(), -(-len(sample) // ranks))
    centre = np.stack([shares[sample[group == rank]].sum(0) for rank in range(ranks)])
    return balanced(-(shares @ centre.T).astype(np.float64) * lengths[:, None], lengths, BALANCE)


def _placed(used: NDArray[np.float32], home: NDArray[np.int64], problem: Problem, worth: Array) -> NDArray[np.int64]:
    """Where one layer's experts save most, `[E]`; used `[sequences, E]`."""
    by_home = used.T.astype(np.float64) @ (home[:, None] == np.arange(problem.ranks))  # [E, homes]
    rows, columns = linear_sum_assignment(np.repeat(by_home @ worth.T, problem.slots, axis=1), maximize=True)
    return np.asarray(columns[np.argsort(rows)] // problem.slots)


def _mended(problem: Problem, found: Assignment, otherwise: Assignment) -> Assignment:
    for layer, row in enumerate(found):
        limits.mend_layer(problem, layer, row)
        if not problem.keeps(layer, row):
            found[layer] = otherwise[layer]
    return found
