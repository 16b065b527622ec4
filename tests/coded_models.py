"""Checkpoints in fewer bits as their publishers write them, made from a random model's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from coterie.offload.coded import E2M1

BLOCK = (8, 8)
AS_THEY_ARE = ("lm_head", "embed_tokens", "norm", "gate.weight", "router")


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _written(folder: Path, tensors: dict[str, torch.Tensor], **how: Any) -> Path:
    tensors = {name: t.bfloat16() if t.dtype == torch.float32 and "scale" not in name else t for name, t in tensors.items()}
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "config.json", dtype="bfloat16", quantization_config=how)
    return folder


def to_fp8(weight: torch.Tensor, block: tuple[int, int] | None) -> tuple[torch.Tensor, torch.Tensor]:
    """float8 `[N, K]` and float32 scales, one of a block, or one of all."""
    if block is None:
        scale = weight.float().abs().amax() / 448
        return (weight.float() / scale).to(torch.float8_e4m3fn), scale
    (rows, columns), (by, of) = weight.shape, block
    padded = F.pad(weight.float(), (0, -columns % of, 0, -rows % by))
    blocks = padded.view(len(padded) // by, by, padded.shape[1] // of, of)
    scale = blocks.abs().amax((1, 3)) / 448
    values = (blocks / scale[:, None, :, None]).view(padded.shape)[:rows, :columns]
    return values.to(torch.float8_e4m3fn), scale


def to_mxfp4(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 `[E, N, K / 32, 16]` and `[E, N, K / 32]` of weights `[E, K, N]`."""
    groups = weights.float().transpose(1, 2).unflatten(2, (-1, 32))
    exponents = groups.abs().amax(3).log2().floor().clamp(-120) - 2
    scaled = groups / exponents.exp2()[..., None]
    nearest = (scaled.abs()[..., None] - torch.tensor(E2M1)).abs().argmin(-1)
    codes = (nearest + 8 * (scaled < 0)).to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponents + 127).to(torch.uint8)


def publish_fp8(folder: Path, block: tuple[int, int] | None = BLOCK) -> Path:
    """The model in `folder` as DeepSeek-V3 is published: dense layers and experts in float8, all else as it is."""
    made: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if tensor.ndim == 2 and name.endswith("weight") and not any(part in name for part in AS_THEY_ARE):
            made[name], made[f"{name}_scale_inv"] = to_fp8(tensor, block)
        else:
            made[name] = tensor
    return _written(folder, made, quant_method="fp8", activation_scheme="dynamic", weight_block_size=block)


def publish_mxfp4(folder: Path) -> Path:
    """The same as gpt-oss is."""
    made: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith("_proj") and tensor.ndim == 3:
            made[f"{name}_blocks"], made[f"{name}_scales"] = to_mxfp4(tensor)
        else:
            made[name] = tensor
    return _written(folder, made, quant_method="mxfp4", modules_to_not_convert=["lm_head"])
