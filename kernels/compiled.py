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
    return x.new_empty(x.shape)


def as_text(activation: Activation) -> str:
    """What the operator takes."""
    return json.dumps(asdict(activation))


def experts_op(
    experts: StackedExperts, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, activation: str
) -> torch.Tensor:
    """`compute_experts` as the operator. experts: plain stacks; activation: `as_text` of what is between the products."""
    out: torch.Tensor = _experts(
        x, ids, weights, experts.first, experts.second, experts.first_bias, experts.second_bias, experts.transposed, activation
    )
    return out
