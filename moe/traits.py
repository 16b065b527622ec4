"""What a model under a plan asks of the links: sizes of rows, and how many ranks a token's experts are on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from coterie.moe.families import ModelShape
from coterie.placement.plan import PlacementPlan


@dataclass(frozen=True)
class Traits:
    """What a model under a plan asks of the links, per token and layer.

    row_bytes, back_bytes: of a dispatched row and of a returned one. ranks, nodes: remote ones that host its experts, on
    average. moves: rows of the coherent strategy, both exchanges; kv_bytes: of one token's keys and values in one layer.
    dense_seconds: of one token's dense part of a layer; expert_seconds: of its experts.
    """

    row_bytes: float
    back_bytes: float
    ranks: float
    nodes: float
    moves: float
    top_k: int
    kv_bytes: float = 0.0
    dense_seconds: float = 0.0
    expert_seconds: float = 0.0


def expected_remote(plan: PlacementPlan, top_k: int, parts: int) -> float:
    """Remote ranks (or nodes: `parts` groups of consecutive ranks) per token if its experts were drawn evenly."""
    holds = plan.holds()
    layers, experts, ranks = holds.shape
    grouped = holds.reshape(layers, experts, parts, ranks // parts).any(3).sum(1)  # [layers, parts] experts held
    missed = [[_misses(experts, int(held), top_k) for held in row] for row in grouped]
    touched = sum(sum(1 - p for p in row) for row in missed) / float(layers)
    return touched * (parts - 1) / parts


def _misses(experts: int, held: int, top_k: int) -> float:
    """The chance that none of `top_k` different experts is among `held` of `experts`."""
    return float(math.comb(experts - held, top_k) / math.comb(experts, top_k))


def _kept_of_a_token(text: Any) -> int:
    """Values of its keys in one layer; where layers differ in their heads, as many as a head for every query would take."""
    try:
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        return int(heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads))
    except Exception:  # transformers' own kind, where a model has no one number
        return int(text.hidden_size)


def traits_of(shape: ModelShape, plan: PlacementPlan, value_bytes: int, seconds_per_weight: float = 0.0) -> Traits:
    """From the model's configuration and the plan: its planned value where that says it, else evenly drawn experts."""
    text = shape.config.get_text_config()
    inner = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
    dense_weights = 4 * text.hidden_size**2  # of attention, near enough
    ranks = expected_remote(plan, shape.top_k, plan.ranks)
    nodes = expected_remote(plan, shape.top_k, plan.topology.nodes)
    moves = 2 * ranks
    if plan.objective.name == "dispatch" and plan.objective.value is not None:
        nodes *= min(1.0, plan.objective.value / ranks) if ranks else 1.0
        ranks = plan.objective.value
    if plan.objective.name in ("coherent", "hops") and plan.objective.value is not None:
        moves = plan.objective.value * (1.0 if plan.objective.name == "coherent" or shape.top_k == 1 else 2 * shape.top_k)
    hidden = text.hidden_size * value_bytes
    return Traits(
        hidden + 8 * shape.top_k,
        hidden,
        ranks,
        nodes,
        moves,
        shape.top_k,
        2 * _kept_of_a_token(text) * value_bytes,
        dense_weights * seconds_per_weight,
        3 * text.hidden_size * inner * shape.top_k * seconds_per_weight,
    )
