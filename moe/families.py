"""Which transformers families coterie runs, and how a model of one is looked at before anything is loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from coterie.offload.coded import check_method
from coterie.routing.errors import InputError, first_line
from coterie.routing.record import expert_modules

EMBEDDED = "coterie-tiny"
EMBEDDED_FOLDER = Path(__file__).resolve().parent / "tiny"
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


@dataclass(frozen=True)
class ModelShape:
    """What is known of a model before its weights are read.

    layer_ids: decoder layers with routed experts; expert_names: their experts modules' dotted names, by layer.
    """

    name: str
    folder: Path
    config: Any
    num_experts: int
    top_k: int
    expert_names: dict[int, str]

    @property
    def layer_ids(self) -> tuple[int, ...]:
        """Ascending decoder layers with routed experts."""
        return tuple(self.expert_names)


def resolve_model(model: str) -> tuple[str, Path]:
    """(name, folder) of MODEL: the embedded model's name, a folder, or a repository id on the Hugging Face hub."""
    if model == EMBEDDED:
        return EMBEDDED, EMBEDDED_FOLDER
    folder = Path(model)
    if model and folder.is_dir():
        same = folder.resolve() == EMBEDDED_FOLDER
        return (EMBEDDED if same else folder.resolve().name), folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith((".", "/")):
        raise InputError(f"MODEL: found {model!r}, expected a checkpoint folder, a hub id such as org/name, or {EMBEDDED}")
    return model, _from_hub(model)


def _from_hub(model: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=list(HUB_FILES), ignore_patterns=["*/*"]))
    except Exception as error:  # the hub's client raises many kinds; each means that there is no such model here
        raise InputError(
            f"MODEL: {model!r} is no folder here and could not be fetched from the hub ({first_line(error)})"
        ) from error


def read_config(folder: Path) -> Any:
    """The model's configuration, without how its weights are stored.

    Raises InputError, naming the file, if there is none, transformers does not know it, or weights are in an unknown code.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise InputError(f"{file}: no such file, expected a transformers checkpoint folder")
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers raises many kinds for a bad configuration
        raise InputError(
            f"{file}: not a configuration that transformers {transformers.__version__} reads ({first_line(error)})"
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        check_method(file, config.quantization_config)
        del config.quantization_config  # weights are worked out as they are read (offload/coded.py)
    return config


def skeleton(config: Any, file: Path) -> Any:
    """The model with its tensors on the meta device: shapes without memory."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise InputError(
            f"{file}: model_type {config.model_type!r} cannot be built as a causal language model ({first_line(error)})"
        ) from error


def inspect(model: str) -> tuple[ModelShape, Any]:
    """(shape, skeleton) of MODEL. Raises InputError for families without experts that coterie can run."""
    name, folder = resolve_model(model)
    config = read_config(folder)
    empty = skeleton(config, folder / "config.json")
    modules = expert_modules(empty)
    if not modules:
        raise InputError(_no_experts(folder / "config.json", config.model_type))
    sizes = {int(cast(torch.Tensor, module.down_proj).shape[0]) for _, module in modules.values()}
    if len(sizes) != 1:
        raise InputError(f"{folder / 'config.json'}: layers have {sorted(sizes)} experts, expected the same number in each")
    experts, top_k = sizes.pop(), _top_k(config)
    if not 1 <= top_k <= experts:
        raise InputError(
            f"{folder / 'config.json'}: experts per token: found {top_k}, expected 1 to {experts}, as many as there are"
        )
    shape = ModelShape(name, folder, config, experts, top_k, {k: n for k, (n, _) in modules.items()})
    return shape, empty


def _top_k(config: Any) -> int:
    text = config.get_text_config()
    for field in (
        "num_experts_per_tok",
        "moe_topk",
        "moe_k",
        "top_k_experts",
        "experts_per_token",
        "num_experts_per_token",
    ):
        value = getattr(text, field, None)
        if isinstance(value, int):
            return value
    raise InputError(f"config.json: model_type {config.model_type!r}: found no number of experts per token")


def _no_experts(file: Path, family: str) -> str:
    if family in supported_families():
        return f"{file}: model_type {family!r}: this configuration has no layer with routed experts, expected at least one"
    known = ", ".join(supported_families())
    return (
        f"{file}: model_type {family!r} has no experts that go through transformers' experts interface, "
        f"expected one of the families that do: {known}"
    )


@cache
def supported_families() -> tuple[str, ...]:
    """The families of the installed transformers whose experts go through its experts interface, alphabetically."""
    root = Path(transformers.__file__).parent / "models"
    files = root.glob("*/modeling_*.py")
    return tuple(sorted({f.parent.name for f in files if "@use_experts_implementation" in f.read_text(encoding="utf-8")}))
