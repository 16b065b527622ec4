"""The experts as one operator that torch.compile and torch.export leave as it is, so that a model's graph has no breaks."""

from __future__ import annotations

import json
from dataclasses import asdict

import torch

from coterie.kernels.activations import Activation
from coterie.kernels.experts import StackedExperts, compute_experts


@torch.library.custom_op("coterie::experts", mutates_args=())
def _experts(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, first: torch.Tensor, second: torch.Tensor,
    first_bias: torch.Tensor | None, second_bias: torch.Tensor | None, transposed: bool, activation: str,
) -> torch.Tensor:  # fmt: skip
    made = Activation(**json.loads(activation))
    return compute_experts(
        StackedExperts(first, second, made, first_bias, second_bias, transposed, known=made), x, ids, weights
    )


@_experts.register_fake
def _(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, first: torch.Tensor, second: torch.Tensor,
    first_bias: torch.Tensor | None, second_bias: torch.Tensor | None, transposed: bool, activation: str,
) -> torch.Tensor:  # fmt: skip
    return torch.empty_like(x)


def experts_op(experts: StackedExperts, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`compute_experts` as the operator; what it cannot carry (a model's own functions) is run as it is, with a graph break."""
    if experts.known is None or experts.finish is not None:
        return compute_experts(experts, x, ids, weights)
    out: torch.Tensor = _experts(
        x, ids, weights, experts.first, experts.second, experts.first_bias, experts.second_bias, experts.transposed,
        json.dumps(asdict(experts.known)),
    )  # fmt: skip
    return out
