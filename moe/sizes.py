"""The sizes of a model that its memory follows from, measured on the meta device: shapes without memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from coterie.kernels.cpu import Int8, kind_for, slow, widened_outputs
from coterie.moe.batch import keeps_only_attention
from coterie.moe.families import ModelShape
from coterie.moe.load import select
from coterie.moe.many_rows import rows_at_once
from coterie.moe.memory import FLOAT32, LayerState, ModelSizes
from coterie.moe.quantise import ROUNDING_BYTES, kept_record, stacked_record
from coterie.offload.checkpoint import Checkpoint
from coterie.offload.copies import Rounding
from coterie.offload.slots import slot_bytes
from coterie.routing.errors import CoterieError, first_line
from coterie.routing.record import expert_modules

NO_EXPERTS = "coterie_none"
PROCESS_BYTES = 40_000_000  # what coterie-tiny takes beyond its tensors: libraries that are loaded when first used
LOADERS = 4  # threads of transformers' loader
PROBES = (2, 4)  # tokens; what a layer keeps of them tells what it keeps of any number


def _no_experts(module: nn.Module, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(hidden)


ALL_EXPERTS_FUNCTIONS.register(NO_EXPERTS, _no_experts)


def sizes_of(
    shape: ModelShape, empty: Any, dtype: torch.dtype, rounding: Rounding | None = None, checkpoint: Checkpoint | None = None
) -> ModelSizes:
    """Sizes of the model in `dtype` on a CPU.

    empty: its skeleton, which tells what attention it will run with; rounding: of experts; checkpoint: what it is read from.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(shape.config), dtype=dtype, attn_implementation="eager", experts_implementation=NO_EXPERTS
        )
    text = shape.config.get_text_config()
    dense, expert = weight_bytes(model, shape.num_experts)
    rounded, working = (expert, 0) if rounding is None else rounded_bytes(model, rounding, dtype)
    eager = empty.config.get_text_config()._attn_implementation == "eager"
    return ModelSizes(
        value=dtype.itemsize,
        dense=dense,
        expert=rounded,
        states=layer_states(model, keeps_only_attention(shape.config)),
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        top_k=shape.top_k,
        eager_heads=text.num_attention_heads if eager else 0,
        process=PROCESS_BYTES,
        rounding=working,
        casting=0 if checkpoint is None else casting_bytes(shape, empty, checkpoint, dtype),
        widened=widened_bytes(model, dtype, rounding),
        widened_rows=widened_rows(model, dtype),
        room=slot_room(model, dtype, rounding),
    )


def casting_bytes(shape: ModelShape, empty: Any, checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """What is held as stored while the dense part is cast: as many of its largest tensors as transformers reads at once."""
    stored = select(shape, empty, checkpoint, dict.fromkeys(shape.layer_ids, ())).values()
    return sum(sorted(one.length for one in stored if one.place.dtype != dtype)[-LOADERS:])


def widened_bytes(model: nn.Module, dtype: torch.dtype, rounding: Rounding | None) -> int:
    """Of the weights that a CPU widens at once: of some outputs of a product, or of all of one that is rounded otherwise."""
    narrow, whole = slow(dtype), 0
    parts = [tuple(module.weight.shape) for module in model.modules() if narrow and type(module) is nn.Linear]
    for outputs, inputs in _products(model):
        if rounding is None:
            parts += [(outputs, inputs)] if narrow else []
        elif kind_for(rounding.format, outputs, inputs) is not Int8:
            whole = max(whole, FLOAT32 * outputs * inputs)
        elif narrow or dtype != torch.bfloat16:
            parts.append((outputs, inputs))
        else:
            whole = max(whole, dtype.itemsize * outputs * inputs)
    return max(whole, *(FLOAT32 * widened_outputs(outputs, inputs) * inputs for outputs, inputs in parts), 0)


def _products(model: nn.Module) -> Iterator[tuple[int, int]]:
    """(outputs, inputs) of an expert's products, by layer."""
    for _, module in expert_modules(model).values():
        for part in stacked_record(module).values():
            if len(part.shape) == 2:
                outputs, inputs = reversed(part.shape) if module.is_transposed else part.shape
                yield outputs, inputs


def widened_rows(model: nn.Module, dtype: torch.dtype) -> tuple[int, int]:
    """(bytes for each row that a dense layer multiplies by widened weights, the most for all)."""
    if not slow(dtype):
        return 0, 0
    sizes = [tuple(module.weight.shape) for module in model.modules() if type(module) is nn.Linear]
    most = (rows_at_once(inputs, outputs) * (inputs + outputs) for outputs, inputs in sizes)
    return FLOAT32 * max(map(sum, sizes), default=0), FLOAT32 * max(most, default=0)


def weight_bytes(model: nn.Module, num_experts: int) -> tuple[int, tuple[int, ...]]:
    """(bytes of everything that every rank holds, bytes of one expert of each layer with experts). Tied weights count once."""
    modules = [module for _, module in expert_modules(model).values()]
    expert = tuple(
        sum(_bytes(p) for p in module.parameters(recurse=False) if p.ndim and len(p) == num_experts) // num_experts
        for module in modules
    )
    everything = sum(map(_bytes, model.parameters())) + sum(map(_bytes, model.buffers()))
    return everything - num_experts * sum(expert), expert


def slot_room(model: nn.Module, dtype: torch.dtype, rounding: Rounding | None) -> int:
    """Bytes that a slot on a CPU has around its expert, of the layer that has most."""
    most = 0
    for _, module in expert_modules(model).values():
        parts = kept_record(module, dtype, rounding).values()
        most = max(most, sum(slot_bytes(part.length, part.dtype) - part.length for part in parts))
    return most


def rounded_bytes(model: nn.Module, rounding: Rounding, dtype: torch.dtype) -> tuple[tuple[int, ...], int]:
    """(bytes of one rounded expert of each layer with experts, what rounding the largest takes beside it)."""
    experts, working = [], 0
    for _, module in expert_modules(model).values():
        record = stacked_record(module)
        experts.append(sum(part.length for part in kept_record(module, dtype, rounding).values()))
        sizes = [torch.Size(record[name].shape).numel() for name in rounding.products]
        working = max(working, torch.float32.itemsize * sum(sizes) + ROUNDING_BYTES * max(sizes))
    return tuple(experts), working


def layer_states(model: Any, attention_only: bool) -> tuple[LayerState, ...]:
    """What each decoder layer keeps of one sequence, as `batch.Batch` runs the model."""
    try:
        few, more = (_cache_after(model, tokens, attention_only) for tokens in PROBES)
    except Exception as error:  # any family's own code runs here
        raise CoterieError(
            f"model_type {model.config.model_type!r}: its memory cannot be told before it is loaded ({first_line(error)})"
        ) from error
    return tuple(_state(a, b) for a, b in zip(few.layers, more.layers, strict=True))


def _cache_after(model: Any, tokens: int, attention_only: bool) -> Any:
    ids = torch.zeros((1, tokens), dtype=torch.int64, device="meta")
    cache = DynamicCache() if attention_only else None
    with torch.inference_mode():
        return model(input_ids=ids, position_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values


def _state(few: Any, more: Any) -> LayerState:
    kept = _kept(few)
    token = (_kept(more) - kept) // (PROBES[1] - PROBES[0])
    window = more.sliding_window - 1 if getattr(more, "is_sliding", False) else None
    return LayerState(kept - PROBES[0] * token, token, window)


def _kept(layer: Any) -> int:
    return sum(_bytes(t) for t in _tensors(vars(layer)))


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for one in inside for tensor in _tensors(one)]


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
