"""Experts in 8 or 4 bits: the rest of the model stays as it is, and so does everything about routing."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from coterie.kernels.cpu import for_cpu
from coterie.kernels.formats import LARGEST, Weights, quantise
from coterie.routing.errors import InputError
from coterie.routing.record import expert_modules


def check_format(format: str) -> str:
    """Raises InputError unless it is one that experts can be rounded to."""
    if format not in LARGEST:
        raise InputError(f"--quantise: found {format!r}, expected one of {', '.join(LARGEST)}")
    return format


def quantise_experts(model: nn.Module, format: str) -> None:
    """Round all experts of `model` to `format` (kernels/formats.py), in place and one expert at a time.

    The modules' own stacks are emptied. Raises InputError for an unknown format.
    """
    check_format(format)
    for _, module in expert_modules(model).values():
        first = "gate_up_proj" if module.has_gate else "up_proj"
        module.coterie_products = tuple(_rounded(module, name, format) for name in (first, "down_proj"))  # type: ignore[assignment]


def _rounded(module: Any, name: str, format: str) -> Any:
    stack = getattr(module, name).detach()
    parts = [quantise(e[None].transpose(1, 2) if module.is_transposed else e[None], format) for e in stack]
    scale = torch.cat([p.scale for p in parts if p.scale is not None])
    columns = stack.shape[1 if module.is_transposed else 2]
    weights = Weights(torch.cat([p.data for p in parts]), format, scale, columns)
    setattr(module, name, nn.Parameter(stack.new_empty((len(stack), 0, 0)), requires_grad=False))
    return weights if stack.is_cuda else for_cpu(weights)
