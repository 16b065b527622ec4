"""Attention of one query on a CPU, which is what decoding asks for, where several heads share keys and values.

torch then reads these once for every head. Heads that share them are here the queries of one head: at 4,096 positions in
bfloat16 0.7 instead of 3.2 ms a layer (docs/kernels.md). transformers does so itself, but only under a mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

BASE = "sdpa"
FLAG = "_coterie_together"  # on modules that attend so; the implementation keeps its name, by which some families decide
LEAST_KEYS = 256  # in float32; with fewer it takes longer
OTHERWISE = ("position_bias", "cache", "softcap")  # arguments that are left to transformers
_plain = getattr(ALL_ATTENTION_FUNCTIONS[BASE], "plain", ALL_ATTENTION_FUNCTIONS[BASE])  # where this module is loaded again


def attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """query `[B, heads, queries, D]`, key and value `[B, shared heads, positions, D]`; returns `[B, queries, heads, D]`."""
    together = hasattr(module, FLAG) and query.shape[2] == 1 and attention_mask is None and dropout == 0
    if not together or not _pays(query, key) or any(kwargs.get(name) is not None for name in OTHERWISE):
        out: tuple[torch.Tensor, None] = _plain(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out
    batch, heads, _, size = query.shape
    rows = query.reshape(batch, key.shape[1], heads // key.shape[1], size)
    attended = F.scaled_dot_product_attention(rows, key, value, scale=scaling)
    return attended.reshape(batch, 1, heads, value.shape[-1]), None


def _pays(query: torch.Tensor, key: torch.Tensor) -> bool:
    shared = query.shape[1] > key.shape[1] and key.device.type == "cpu"
    return shared and (key.dtype != torch.float32 or key.shape[2] >= LEAST_KEYS)


def speed_up_attention(model: nn.Module) -> None:
    """Let modules of `model` attend so where heads share keys. Not for one that is to run batch-invariant.

    From the first such model on, transformers' implementation of this name is ours, of all models of the process; modules
    without the flag attend as before.
    """
    for module in model.modules():
        groups = getattr(module, "num_key_value_groups", 1)
        if isinstance(groups, int) and groups > 1:
            setattr(module, FLAG, True)
            AttentionInterface.register(BASE, attend)


def plain_attention_again(model: nn.Module) -> None:
    """The model attends as transformers has it."""
    for module in model.modules():
        vars(module).pop(FLAG, None)


attend.plain = _plain  # type: ignore[attr-defined]
