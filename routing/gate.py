"""Routing functions: from router logits to experts and weights, as pure functions.

Each is one published rule, tested against the routers of transformers' own models. The models keep their own routers; these are
a library for whoever predicts a layer's experts ahead of time or replays recorded logits: no verb of coterie calls them. All
take `logits` float `[tokens, E]` and return (ids int64 `[tokens, top_k]`, weights `[tokens, top_k]` in the logits' dtype or
float32 as noted), best first.
"""

from __future__ import annotations

import torch


def softmax_top_k(logits: torch.Tensor, top_k: int, renormalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over all experts in float32, then the best; weights sum to 1 if `renormalise` (Qwen3-MoE), else less (OLMoE)."""
    weights, ids = logits.softmax(-1, dtype=torch.float32).topk(top_k, -1)
    return ids, weights / weights.sum(-1, keepdim=True) if renormalise else weights


def top_k_softmax(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best logits, then softmax among them, in the logits' dtype (gpt-oss, Granite)."""
    best, ids = logits.topk(top_k, -1)
    return ids, best.softmax(-1)


def grouped_sigmoid_top_k(
    logits: torch.Tensor, bias: torch.Tensor, top_k: int, groups: int, kept_groups: int, scale: float, renormalise: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sigmoid scores; a load-balancing bias `[E]` chooses but does not weigh; only the best groups take part.

    A group is worth the sum of its two best biased scores. DeepSeek-V3 technical report, section 2.1.2 and its router.
    """
    scores = logits.float().sigmoid()
    biased = scores + bias
    by_group = biased.view(len(logits), groups, -1)
    worth = by_group.topk(min(2, by_group.shape[-1]), -1).values.sum(-1)
    kept = torch.zeros_like(worth, dtype=torch.bool).scatter(1, worth.topk(kept_groups, -1).indices, True)
    allowed = kept.repeat_interleave(by_group.shape[-1], dim=1)
    ids = biased.masked_fill(~allowed, float("-inf")).topk(top_k, -1).indices
    weights = scores.gather(1, ids)
    if renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids, weights * scale
