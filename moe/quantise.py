"""Experts in 8 or 4 bits: the rest of the model stays as it is, and so does everything about routing.

Weights are rounded from the checkpoint's own, an expert at a time, so that the plain ones never are in memory together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from coterie.kernels.formats import LARGEST
from coterie.offload.copies import Rounding, scale_of, stored
from coterie.offload.store import ExpertStore
from coterie.offload.transfer import Part, Record
from coterie.routing.errors import InputError
from coterie.routing.record import expert_modules

FP8_CAPABILITY = (8, 9)  # of GPUs that have the type, at least
ROUNDING_BYTES = 28  # of memory while one expert is rounded, for a weight of its larger product: copies in float32


def check_format(format: str) -> str:
    """Raises InputError unless it is one that experts can be rounded to."""
    if format not in LARGEST:
        raise InputError(f"--quantise: found {format!r}, expected one of {', '.join(LARGEST)}")
    return format


def products(module: Any) -> tuple[str, str]:
    """The parameters of an experts module that are rounded: of its first product, and of its second."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def rounding_of(model: nn.Module, format: str, device: torch.device) -> Rounding:
    """How a model's experts are rounded to be multiplied on `device`. Raises InputError for a format that it does not know."""
    if format == "fp8" and device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < FP8_CAPABILITY:
        known = ".".join(map(str, found))
        raise InputError(f"--quantise: found fp8 on a GPU of compute capability {known}, expected int8 or int4 below 8.9")
    module: Any = next(iter(expert_modules(model).values()))[1]
    return Rounding(check_format(format), products(module), bool(module.is_transposed), device.type == "cpu")


def stacked_record(module: Any) -> dict[str, Part]:
    """The parts of one expert of a module in which all are stacked, maybe without memory."""
    return {n: Part(p.dtype, tuple(p.shape[1:]), ()) for n, p in module.named_parameters(recurse=False) if p.ndim > 1}


def kept_record(module: Any, dtype: torch.dtype, rounding: Rounding | None) -> dict[str, Part]:
    """The same as a model of `dtype` holds them, rounded or not."""
    record = stacked_record(module)
    if rounding is None:
        return {name: replace(part, dtype=dtype) for name, part in record.items()}
    dtypes = rounding.dtypes(record, dtype)
    return {name: replace(part, dtype=dtypes[name]) for name, part in rounding.record(record).items()}


def quantise_experts(model: nn.Module, format: str) -> None:
    """Round all experts of `model`, which has them in memory, to `format` (kernels/formats.py), one expert at a time.

    The modules' own stacks are emptied. Raises InputError for an unknown format.
    """
    device = next(model.parameters()).device
    rounding = rounding_of(model, format, device)
    for _, module in expert_modules(model).values():
        record, count = stacked_record(module), len(module.down_proj)  # type: ignore[arg-type]
        stacks = empty_stacks(rounding, record, count, record["down_proj"].dtype, device)
        for expert in range(count):
            _put(stacks, expert, rounding.made({name: getattr(module, name)[expert].detach() for name in record}, record))
        hold(module, stacks, rounding)


def load_rounded(
    model: nn.Module, store: ExpertStore, rounding: Rounding, local: Sequence[Sequence[int]], dtype: torch.dtype,
    device: torch.device,
) -> None:  # fmt: skip
    """Read the experts `local` (by layer) into `model`, which was loaded without any, and round each as it comes."""
    for layer, (_, module) in enumerate(expert_modules(model).values()):
        stacks = empty_stacks(rounding, store.records[layer][0], len(local[layer]), dtype, device)
        for place, expert in enumerate(local[layer]):
            record = store.records[layer][expert]
            exact = rounding.published(record)
            plain = _plain(store, layer, expert, exact)
            _put(stacks, place, rounding.made({name: tensor.to(device) for name, tensor in plain.items()}, record, exact))
        hold(module, stacks, rounding)
        for name in set(store.records[layer][0]) - set(rounding.products):
            setattr(module, name, nn.Parameter(stacks[name], requires_grad=False))
        module.num_experts = len(local[layer])  # type: ignore[assignment]


def _plain(store: ExpertStore, layer: int, expert: int, without: Iterable[str]) -> dict[str, torch.Tensor]:
    """Weights of an expert as stored, or as what is stored stands for them."""
    record = store.records[layer][expert]
    if not any(part.coded for part in record.values()):
        plain = {name: torch.empty(part.shape, dtype=part.dtype) for name, part in record.items()}
        store.read(layer, expert, plain)
        return plain
    store.counter.add(sum(part.length for part in record.values() if not part.coded))  # others count themselves
    return {name: stored(part) for name, part in record.items() if name not in set(without)}


def empty_stacks(
    rounding: Rounding, record: Record, count: int, dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    """Stacks of `count` experts by part, in the dtypes in which a model of `dtype` multiplies them."""
    dtypes = rounding.dtypes(record, dtype)
    return {n: torch.empty((count, *p.shape), dtype=dtypes[n], device=device) for n, p in rounding.record(record).items()}


def _put(stacks: Mapping[str, torch.Tensor], place: int, made: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in made.items():
        stacks[name][place].copy_(tensor)


def hold(module: Any, stacks: Mapping[str, torch.Tensor], rounding: Rounding) -> None:
    """Let a module multiply the experts that lie in `stacks` now, or whenever it is asked; its own stacks are emptied."""
    made = []
    for name in rounding.products:
        stack = getattr(module, name)
        made.append(rounding.kept(tuple(stack.shape[1:])).over(stacks[name], stacks[scale_of(name)]))
        setattr(module, name, nn.Parameter(stack.detach().new_empty((len(stack), 0, 0)), requires_grad=False))
    module.coterie_products = tuple(made)
