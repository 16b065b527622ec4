"""Rotary frequencies that depend on how long a text is: for each sequence of a batch by its own length.

transformers' `longrope` and `dynamic` take the longest sequence of a call for all of them, so that a prompt's text would
depend on what else is in its batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

Cosines = tuple[torch.Tensor, torch.Tensor]  # and sines, `[rows, length, head size]`


def tell_apart(model: nn.Module) -> None:
    """Make the model's rotary embeddings of these two kinds do so."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if any(
            "dynamic" in str(kind) or kind == "longrope" for kind in (kinds.values() if isinstance(kinds, dict) else [kinds])
        ):
            module.forward = partial(_by_length, module, module.forward)


def _by_length(
    module: Any, forward: Callable[..., Cosines], x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
) -> Cosines:
    kind = module.rope_type if layer_type is None else module.rope_type[layer_type]
    named = {} if layer_type is None else {"layer_type": layer_type}
    lengths = position_ids.amax(1) + 1
    if kind == "longrope":
        given = module.config.rope_parameters if layer_type is None else module.config.rope_parameters[layer_type]
        lengths = (lengths > given["original_max_position_embeddings"]).long()
    elif "dynamic" not in kind:
        return forward(x, position_ids, **named)
    rows = [(lengths == one).nonzero()[:, 0] for one in sorted(set(lengths.tolist()))]
    parts = []
    for own in rows:
        if "dynamic" in kind:
            _reset(module, "" if layer_type is None else f"{layer_type}_")
        parts.append(forward(x, position_ids[own], **named))
    order = torch.cat(rows).argsort()
    cosines, sines = (torch.cat(values)[order] for values in zip(*parts, strict=True))
    return cosines, sines


def _reset(module: Any, prefix: str) -> None:
    """Forget the lengths of earlier calls."""
    module.register_buffer(f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq"), persistent=False)
    setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
