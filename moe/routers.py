"""A layer's router, asked for what it would pick beforehand: whoever asks must not be seen by hooks on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Choose = Callable[[torch.Tensor], torch.Tensor]  # `[tokens, H]` -> `[tokens, K]`, the likeliest first where that is known


def router_in(block: nn.Module, experts: int) -> Any | None:
    """The module in a block, beside its experts, whose weights `[E, H]` rank these; None where there is none so simple."""
    for child in block.children():
        weight = getattr(child, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.ndim == 2 and len(weight) == experts:
            return child
    return None


def choice_of(router: Any, top_k: int) -> Choose:
    """How a router picks: as it does itself, past all hooks, or by its weights alone where its answer is not understood."""

    def by_weights(x: torch.Tensor) -> torch.Tensor:
        ranked: torch.Tensor = F.linear(x.to(router.weight.dtype), router.weight)
        return ranked.topk(top_k, 1).indices

    def by_itself(x: torch.Tensor) -> torch.Tensor:
        answer = type(router).forward(router, x)
        found: tuple[torch.Tensor, ...] = answer if isinstance(answer, tuple) else (answer,)
        return next(part for part in found if not part.is_floating_point() and part.shape == (len(x), top_k))

    try:
        by_itself(router.weight.new_zeros(1, router.weight.shape[1]))
    except Exception:  # any family's own code, which may want or answer anything
        return by_weights
    return by_itself
