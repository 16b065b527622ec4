"""The batch-invariant mode: a sequence's text does not depend on which rank or with which others it ran.

What depends on the batch otherwise: GEMM libraries round differently for few rows than for many (float32 on CPUs: fewer
than 16; with weights stacked as gpt-oss does, more than 128, too), attention over padded keys adds in another order, and torch
computes the last few values of an exponential or the like by another function than those before. Here every product has at
least BLOCK_ROWS rows, those that are missing being zeros, every sequence attends by itself, without padding, and such
functions are given some values more. The experts' products do the same (`StackedExperts.least_rows`).
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from coterie.routing.errors import InputError

BLOCK_ROWS = 16
NAME = "coterie_rows"
TAIL_VALUES = 64  # more than two vector registers of any processor
BY_VALUE = {
    F.silu, F.gelu, F.softplus, torch.sigmoid, torch.Tensor.sigmoid, torch.exp, torch.Tensor.exp, torch.tanh, torch.Tensor.tanh,
    torch.cos, torch.Tensor.cos, torch.sin, torch.Tensor.sin, torch.erf, torch.Tensor.erf,
}  # fmt: skip
BASES = ("sdpa", "eager")
BY_NAME = re.compile(r"""if self\.config\._attn_implementation (in \("eager", "sdpa"\)|== "sdpa"):""")  # in a family's source
_starts: ContextVar[Sequence[int]] = ContextVar("padding before each row of the batch")


def varying(nodes: int) -> frozenset[str]:
    """Strategies by which a sum's order depends on where a sequence is at home, or products on which others are there."""
    return frozenset({"coherent", "hierarchical"} if nodes > 1 else {"coherent"})


def check_attention(model: Any) -> None:
    """Raises InputError for attention that cannot be run that way. model: or its skeleton."""
    base = model.config._attn_implementation
    if base not in (*BASES, NAME):
        raise InputError(f"--batch-invariant: found attention {base!r}, expected {' or '.join(BASES)}")
    try:
        source = inspect.getsource(sys.modules[type(model).__module__])
    except OSError:  # of a class that came without
        source = ""
    if BY_NAME.search(source):
        raise InputError(
            f"--batch-invariant: found attention of {model.config.model_type} that picks its keys by name of implementation, "
            f"expected a family whose attention does not; leave --batch-invariant out"
        )


def make_invariant(model: Any) -> None:
    """Let every sequence of `model` attend by itself. Raises InputError as `check_attention`."""
    check_attention(model)
    base = model.config._attn_implementation
    if base == NAME:
        return
    for module in model.modules():
        if hasattr(module, "config") and getattr(module.config, "_attn_implementation", None) == base:
            module.config._coterie_base = base
    model.set_attn_implementation(NAME)


@contextmanager
def full_blocks(starts: Sequence[int]) -> Iterator[None]:
    """Around a call of the model. starts: by how many positions each row of the batch is padded, on the left."""
    token = _starts.set(starts)
    try:
        with _FullBlocks():
            yield
    finally:
        _starts.reset(token)


class _FullBlocks(TorchFunctionMode):
    """`linear` with fewer than BLOCK_ROWS rows gets as many; functions by value get values behind those that count."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return _linear(*args, **kwargs)
        if func in BY_VALUE and args and args[0].numel():
            x = args[0]
            longer = F.pad(x.reshape(-1), (0, TAIL_VALUES))
            return func(longer, *args[1:], **kwargs)[: x.numel()].view(x.shape)
        return func(*args, **kwargs)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    rows = x.numel() // x.shape[-1]
    lacking = BLOCK_ROWS - rows if len(weight) > 1 else -rows % BLOCK_ROWS  # one output is another routine, in fours of rows
    if rows == 0 or lacking <= 0:
        return F.linear(x, weight, bias)
    full = F.pad(x.reshape(rows, -1), (0, 0, 0, lacking))
    return F.linear(full, weight, bias)[:rows].view(*x.shape[:-1], -1)


def rows_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """`[B, heads, queries, head size]` in, `[B, queries, heads, head size]` out, by the model's own attention, row by row."""
    base = module.config._coterie_base
    attend = ALL_ATTENTION_FUNCTIONS[base] if base != "eager" else sys.modules[type(module).__module__].eager_attention_forward
    queries, keys = query.shape[2], key.shape[2]
    outs = []
    for row, start in enumerate(_starts.get()):
        here, first = slice(row, row + 1), max(0, start - (keys - queries))
        mask = attention_mask[here, :, first:, start:]
        out, _ = attend(module, query[here, :, first:], key[here, :, start:], value[here, :, start:], mask, **kwargs)
        outs.append(F.pad(out, (0, 0, 0, 0, first, 0)))
    return torch.cat(outs), None


AttentionInterface.register(NAME, rows_attention)
AttentionMaskInterface.register(NAME, eager_mask)
