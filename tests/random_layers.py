"""One layer of random experts, where they are placed, and what tokens pick of them."""

from __future__ import annotations

import numpy as np
import torch

from coterie.kernels.experts import StackedExperts
from coterie.placement.plan import PlacementPlan
from coterie.placement.topology import Topology


def random_plan(rng: np.random.Generator, experts: int, ranks: int, copies: bool) -> PlacementPlan:
    """Uneven ranks, possibly empty ones, possibly several copies of an expert."""
    slots = np.full((1, ranks, experts), -1, dtype=np.int32)
    for expert in range(experts):
        held = rng.choice(ranks, size=min(ranks, int(rng.integers(1, 3))) if copies else 1, replace=False)
        slots[0, held, expert] = expert
    return PlacementPlan(slots.reshape(1, -1), experts, (0,), Topology(1, ranks))


def random_routing(rng: np.random.Generator, tokens: int, experts: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = np.array([rng.choice(experts, top_k, replace=False) for _ in range(tokens)], dtype=np.int64).reshape(tokens, top_k)
    ids[rng.random(ids.shape) < 0.1] = -1
    return torch.from_numpy(ids), torch.from_numpy(rng.random((tokens, top_k), dtype=np.float32))


def random_experts(rng: np.random.Generator, count: int, hidden: int = 8, inner: int = 6) -> StackedExperts:
    first = torch.from_numpy(rng.standard_normal((count, 2 * inner, hidden)).astype(np.float32))
    second = torch.from_numpy(rng.standard_normal((count, hidden, inner)).astype(np.float32))
    return StackedExperts(first, second, lambda h: torch.nn.functional.silu(h[..., ::2]) * h[..., 1::2])


def share_of(experts: StackedExperts, ids: tuple[int, ...]) -> StackedExperts:
    return StackedExperts(experts.first[list(ids)], experts.second[list(ids)], experts.activation)
