"""Attention of one query on a CPU, which is what decoding asks for, where several heads share keys and values.

torch then reads these once for every head. Heads that share them are here the queries of one head: at 4,096 positions in
bfloat16 0.7 instead of 3.2 ms a layer (docs/kernels.md). transformers does so itself, but only under a mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME, BASE = "coterie_one_query", "sdpa"
LEAST_KEYS = 256  # in float32; with fewer it takes longer
OTHERWISE = ("position_bias", "cache", "softcap")  # arguments that are left to transformers


def attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """query `[B, heads, queries, D]`, key and value `[B, shared heads, positions, D]`; returns `[B, queries, heads, D]`."""
    batch, heads, queries, size = query.shape
    together = queries == 1 and heads > key.shape[1] and attention_mask is None and dropout == 0
    if not together or not _pays(key) or any(kwargs.get(name) is not None for name in OTHERWISE):
        out: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out
    rows = query.reshape(batch, key.shape[1], heads // key.shape[1], size)
    attended = F.scaled_dot_product_attention(rows, key, value, scale=scaling)
    return attended.reshape(batch, 1, heads, value.shape[-1]), None


def _pays(key: torch.Tensor) -> bool:
    return key.device.type == "cpu" and (key.dtype != torch.float32 or key.shape[2] >= LEAST_KEYS)


def speed_up_attention(model: Any) -> None:
    """Let `model` attend so if it attends by torch's operator. Not for one that is to run batch-invariant."""
    if model.device.type == "cpu" and model.config._attn_implementation == BASE:
        model.set_attn_implementation(NAME)


def plain_attention_again(model: Any) -> None:
    """The model attends as transformers has it."""
    if model.config._attn_implementation == NAME:
        model.set_attn_implementation(BASE)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
