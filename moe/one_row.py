"""Dense layers in decode: a bfloat16 product with one row as a matrix times a vector, and layers with one input as one product.

torch's Linear gives a single row to oneDNN as a matrix, which takes two to three times as long as torch's own product with a
vector (`kernels.cpu.multiply_each`). Both sum in float32 and round once, in another order: some 2 of 10,000 outputs differ by
their last bit. Routers multiply so, too. Layers that stand side by side and are called with one input, as query, key and
value are, lie in one stack: the first one called computes all. A row of float32 goes the other way, to oneDNN, where torch
takes one thread for it (`kernels.cpu.one_row_by_onednn`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from coterie.kernels.cpu import multiplies_bfloat16, multiply_row, one_row_by_onednn, own_products
from coterie.routing.record import expert_modules

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # names of layers that are given the same input


def torchs_own(layer: nn.Linear, input: torch.Tensor) -> bool:
    """Whether only torch's Linear will do: where gradients are wanted, dtypes differ, or a graph is made of it."""
    learning = torch.is_grad_enabled() and (input.requires_grad or layer.weight.requires_grad)
    return learning or input.dtype != layer.weight.dtype or torch.compiler.is_compiling()


@dataclass
class Stack:
    """Layers with one input. weight: theirs, one below another `[sum of N, K]`; left: outputs that nobody has taken yet."""

    weight: torch.Tensor
    sizes: list[int]
    seen: torch.Tensor | None = None
    left: dict[int, torch.Tensor] = field(default_factory=dict)

    def output(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """Of one layer, `[N]`. Each output is given once, so that an input whose values change is computed anew."""
        if self.seen is not x or number not in self.left:
            self.left = dict(enumerate(torch.split(multiply_row(self.weight, x.reshape(-1)), self.sizes)))
            self.seen = x
        return self.left.pop(number)


class OneRowLinear(nn.Linear):
    """torch's Linear, except for one row. stack, number: what it is computed with, and its place there; None: alone."""

    stack: Stack | None
    number: int
    place: int

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`[..., K]` to `[..., N]`."""
        if input.numel() != self.in_features or torchs_own(self, input):
            return F.linear(input, self.weight, self.bias)
        if self.stack is not None and self.weight.data_ptr() == self.place:
            return self.stack.output(self.number, input).view(*input.shape[:-1], -1)
        return multiply_row(self.weight, input.reshape(-1)).view(*input.shape[:-1], -1)


def speed_up_one_row(model: nn.Module) -> None:
    """Let the dense layers of `model` do so in bfloat16 on a CPU that multiplies it; on others `many_rows.py` does. In float32
    those of one row alone, where torch would take one thread for them.

    Weights of layers that stand side by side are laid one below another; they are otherwise as they were. Not for a model that
    is to be trained or run batch-invariant.
    """
    found: list[Any] = [module for module in model.modules() if type(module) is nn.Linear and _fits(module)]
    for module in found:
        module.__class__ = OneRowLinear
        if "stack" not in vars(module):
            module.stack = None
    for parent in model.modules():
        for names in TOGETHER:
            beside = [getattr(parent, name, None) for name in names]
            if all(isinstance(layer, OneRowLinear) and layer.weight.dtype == torch.bfloat16 for layer in beside):
                _lay_together([layer for layer in beside if isinstance(layer, OneRowLinear)])
    for name, _ in expert_modules(model).values():
        for router in model.get_submodule(name.rpartition(".")[0]).children():
            if not isinstance(router, OneRowLinear) and _fits(router) and router.weight.dtype == torch.bfloat16:
                router.forward = partial(_routed, router)


def plain_again(model: nn.Module) -> None:
    """The dense layers and routers are torch's own again."""
    for module in model.modules():
        if type(module) is OneRowLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]
        forward = vars(module).get("forward")
        if isinstance(forward, partial) and forward.func is _routed:
            del module.forward


def _routed(router: nn.Module, hidden_states: torch.Tensor, *arguments: Any, **named: Any) -> Any:
    """The router's own answer for `[..., H]`, and what else its family gives it."""
    own = type(router).forward
    if hidden_states.numel() != hidden_states.shape[-1] or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return own(router, hidden_states, *arguments, **named)
    with own_products:
        return own(router, hidden_states, *arguments, **named)


def _fits(layer: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or getattr(layer, "bias", None) is not None:
        return False
    faster = {torch.bfloat16: multiplies_bfloat16, torch.float32: one_row_by_onednn}.get(weight.dtype)
    return faster is not None and faster() and weight.device.type == "cpu" and weight.is_contiguous()


@torch.no_grad()
def _lay_together(layers: Iterable[OneRowLinear]) -> None:
    layers = list(layers)
    if len({layer.in_features for layer in layers}) > 1 or layers[0].stack is not None:
        return
    sizes = [layer.out_features for layer in layers]
    stack = Stack(torch.cat([layer.weight for layer in layers]), sizes)
    for number, (layer, weight) in enumerate(zip(layers, torch.split(stack.weight, sizes), strict=True)):
        layer.weight.data = weight
        layer.stack, layer.number, layer.place = stack, number, weight.data_ptr()
