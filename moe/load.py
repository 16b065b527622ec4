"""Loading one rank's share of a model: the dense part and this rank's experts, and no other byte of the checkpoint.

transformers' own loader does the conversions (stacking per-expert tensors, renaming, casting, tying, buffers); it is given
a model whose experts are as many as this rank holds, and lazily read slices of just the tensors that go into it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from coterie.moe.families import ModelShape
from coterie.offload.checkpoint import Checkpoint, TensorPlace, TensorSlice
from coterie.offload.coded import check_known
from coterie.routing.errors import InputError, first_line
from coterie.routing.record import expert_modules

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def load_share(
    shape: ModelShape, empty: nn.Module, checkpoint: Checkpoint, experts: dict[int, tuple[int, ...]], dtype: torch.dtype,
    device: torch.device, implementation: str, on_bytes: Callable[[int, int], object] | None = None,
) -> Any:  # fmt: skip
    """The transformers model with only `experts` (ascending ids by layer) in its experts modules, in that order.

    empty: the model's skeleton; implementation: the name of the experts function to call; on_bytes: told from any thread, one
    at a time, (bytes just read, bytes in all). Raises InputError, naming the tensor, if the checkpoint lacks one or has it in
    another shape.
    """
    slices = select(shape, empty, checkpoint, experts)
    if on_bytes is not None:
        whole = sum(one.length for one in slices.values())
        checkpoint.counter.watch = lambda count: on_bytes(count, whole)
    share = _share_class(type(empty), shape, experts)
    options = {} if device.type == "cpu" else {"device_map": {"": device}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            model, info = share.from_pretrained(
                None, config=shape.config, state_dict=slices, dtype=dtype, experts_implementation=implementation,
                output_loading_info=True, ignore_mismatched_sizes=True, **options,
            )  # fmt: skip
        except RuntimeError as error:  # transformers' loader says only in its log which tensor it was
            raise InputError(
                f"{shape.folder}: the weights cannot be converted; do they fit config.json? ({first_line(error)})"
            ) from error
        finally:
            checkpoint.counter.watch = None
    model.__class__ = type(empty)
    _check(shape, model, info)
    if (shape.folder / "generation_config.json").is_file():
        model.generation_config = _generation_config(shape.folder)
    return model.eval()


def _generation_config(folder: Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:  # transformers raises many kinds
        raise InputError(f"{folder / 'generation_config.json'}: cannot be used ({first_line(error)})") from error


def select(
    shape: ModelShape, empty: nn.Module, checkpoint: Checkpoint, experts: dict[int, tuple[int, ...]]
) -> dict[str, TensorSlice]:
    """The parts of the checkpoint that make up the share, by checkpoint name."""
    transforms = get_model_conversion_mapping(empty)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state = empty.state_dict()
    layer_of = {name: layer for layer, name in shape.expert_names.items()}
    ignored = getattr(empty, "_keys_to_ignore_on_load_unexpected", None) or ()
    chosen: dict[str, TensorSlice] = {}
    found: dict[tuple[str, str], set[int]] = {}
    for name, place in checkpoint.tensors.items():
        target, pattern = rename_source_key(name, renamings, converters, empty.base_model_prefix, state)
        layer = layer_of.get(target.rpartition(".")[0])
        if target not in state and any(re.search(known, target) for known in ignored):
            continue  # of layers that predict several tokens, which transformers leaves out
        check_known(name, place)
        if layer is None:
            chosen[name] = checkpoint.slice(name)
            continue
        if target not in state or place.dtype not in WEIGHT_DTYPES:
            what = "an unknown tensor" if target not in state else str(place.dtype)
            raise InputError(
                f"{place.file}: tensor {name!r}: found {what} among the experts, expected their float32, bfloat16 or float16 "
                f"weights, or in fewer bits as quantization_config of config.json says"
            )
        if state[target].ndim == 0:
            chosen[name] = checkpoint.slice(name)
        elif pattern is not None and "*" in pattern:
            if not experts[layer]:  # a stack without rows, which is not missing
                row = tuple(state[target].shape[1:])
                chosen[target] = TensorSlice(TensorPlace(place.file, 0, 0, place.dtype, (0, *row)), checkpoint.counter)
            elif (expert := expert_in(name)) in experts[layer]:
                chosen[name] = checkpoint.slice(name)
                found.setdefault((target, pattern), set()).add(expert)
        elif place.shape[:1] == (shape.num_experts,):
            chosen[name] = checkpoint.slice(name, experts[layer])
        else:
            raise InputError(
                f"{place.file}: tensor {name!r}: found shape {list(place.shape)}, expected [{shape.num_experts}, ...]: "
                f"coterie reads experts stacked along the first dimension or one tensor per expert"
            )
    for (target, _), present in found.items():
        wanted = experts[layer_of[target.rpartition(".")[0]]]
        if lacking := sorted(set(wanted) - present):
            raise InputError(f"{shape.folder}: the checkpoint lacks expert {lacking[0]} of {target!r}; fetch it again")
    return chosen


def expert_in(name: str) -> int:
    """The expert that a per-expert tensor belongs to: the last number in its dotted name."""
    return [int(part) for part in name.split(".") if part.isdigit()][-1]


def _share_class(model_class: type[Any], shape: ModelShape, experts: dict[int, tuple[int, ...]]) -> type[Any]:
    """The model's class, but with its experts modules cut to this rank's share as soon as it is built (on meta)."""

    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        for layer, (_, module) in expert_modules(self).items():
            cut_experts(module, shape.num_experts, len(experts[layer]))

    # Same name: transformers looks up its weight conversions by class name.
    return type(model_class.__name__, (model_class,), {"__init__": build, "__module__": model_class.__module__})


def cut_experts(module: Any, num_experts: int, kept: int) -> None:
    """Give every stacked parameter of an experts module `kept` rows instead of `num_experts`."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.ndim > 0 and parameter.shape[0] == num_experts:
            smaller = torch.empty((kept, *parameter.shape[1:]), dtype=parameter.dtype, device=parameter.device)
            setattr(module, name, nn.Parameter(smaller, requires_grad=False))
    module.num_experts = kept


def _check(shape: ModelShape, model: nn.Module, info: dict[str, Any]) -> None:
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    missing = sorted(name for name in info["missing_keys"] if sizes.get(name, 1) > 0)
    if missing:
        raise InputError(
            f"{shape.folder}: the checkpoint lacks {len(missing)} tensors, among them {missing[0]!r}; fetch it again"
        )
    for field in ("mismatched_keys", "error_msgs", "conversion_errors"):
        if info.get(field):
            first = sorted(info[field].items() if isinstance(info[field], dict) else info[field])[0]
            raise InputError(
                f"{shape.folder}: {field.replace('_', ' ')}: {str(first)[:160]}; does config.json fit the weights?"
            )
