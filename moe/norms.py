"""RMS norms in three calls instead of eight: in decode on a CPU what a call costs is more than what it computes.

Every family has a class of its own for the same few lines. Which of them `torch.rms_norm` repeats to the bit is found out by
trying; the others stay as they are.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

TRIED_ROWS = 64


def speed_up_norms(model: nn.Module) -> None:
    """Let the norms of `model` that are plain RMS norms be computed so. Not for one that is to run batch-invariant."""
    known: dict[tuple[Any, ...], bool] = {}
    for module in model.modules():
        epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        weight = getattr(module, "weight", None)
        if not (type(module).__name__.endswith("RMSNorm") and isinstance(epsilon, float) and isinstance(weight, torch.Tensor)):
            continue
        if weight.ndim != 1 or weight.device.type != "cpu":
            continue
        key = type(module), weight.dtype, len(weight), epsilon
        if key not in known:
            known[key] = _gives_the_same(module, epsilon)
        if known[key]:
            module.forward = partial(_normed, module, epsilon)


def plain_norms_again(model: nn.Module) -> None:
    """The norms compute as their classes say."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), partial) and vars(module)["forward"].func is _normed:
            del module.forward


def _normed(module: Any, epsilon: float, hidden_states: torch.Tensor) -> torch.Tensor:
    """`[..., H]`; rounded to the input's dtype before it is weighed, as transformers does."""
    weight: torch.Tensor = module.weight
    return weight * torch.rms_norm(hidden_states, weight.shape, None, epsilon)


@torch.no_grad()
def _gives_the_same(module: nn.Module, epsilon: float) -> bool:
    """Whether rows of very different sizes come out with the same bits."""
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    drawn = torch.Generator().manual_seed(0)
    rows = torch.randn(TRIED_ROWS, len(weight), generator=drawn) * torch.logspace(-4, 3, TRIED_ROWS)[:, None]
    kept = weight.clone()
    weight.copy_(torch.rand(len(weight), generator=drawn) + 0.5)  # of ones rounding would not be seen
    try:
        return all(
            torch.equal(type(module).forward(module, x), _normed(module, epsilon, x))
            for x in (rows.to(weight.dtype), rows[:1, None].to(weight.dtype))
        )
    except TypeError:  # a norm that is called with more than its input
        return False
    finally:
        weight.copy_(kept)
