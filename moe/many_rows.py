"""Dense layers on processors without bfloat16 instructions: in prefill float32 products of widened weights.

torch computes bfloat16 there by other instructions, which with 512 rows takes three times as long (docs/kernels.md). Widening
is exact, so the products are those of the stored weights, summed in float32 and rounded once. One row is a matrix times a
vector, as in `one_row.py`.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from coterie.kernels.cpu import multiply_row, multiply_widened, slow
from coterie.moe.one_row import torchs_own

LEAST_ROWS = 64
AT_ONCE = 1 << 22  # float32 values of rows and their products beside the weights, about


def rows_at_once(inputs: int, outputs: int) -> int:
    """How many rows are multiplied at once."""
    return max(LEAST_ROWS, AT_ONCE // (inputs + outputs))


class ManyRowsLinear(nn.Linear):
    """torch's Linear, except for many rows."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`[..., K]` to `[..., N]`."""
        rows = input.reshape(-1, self.in_features)
        other = torchs_own(self, input)
        if len(rows) == 1 and self.bias is None and not other:
            return multiply_row(self.weight, rows[0]).view(*input.shape[:-1], self.out_features)
        if other or len(rows) < LEAST_ROWS:
            return F.linear(input, self.weight, self.bias)
        out = input.new_empty(len(rows), self.out_features)
        count = rows_at_once(self.in_features, self.out_features)
        for first in range(0, len(rows), count):
            product = multiply_widened(rows[first : first + count], self.weight.T)
            out[first : first + count] = product if self.bias is None else product.add_(self.bias)
        return out.view(*input.shape[:-1], self.out_features)


def speed_up_many_rows(model: nn.Module) -> None:
    """Let the dense layers of `model` do so where they are of half precision on such a CPU. Not for one run batch-invariant."""
    for module in model.modules():
        if type(module) is nn.Linear and slow(module.weight.dtype) and module.weight.device.type == "cpu":
            module.__class__ = ManyRowsLinear


def plain_many_rows_again(model: nn.Module) -> None:
    """The dense layers are torch's own again."""
    for module in model.modules():
        if type(module) is ManyRowsLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]
