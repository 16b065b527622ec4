"""Small random models of many families, built from tiny configurations and saved as real checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

COMMON: dict[str, Any] = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
)  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": dict(num_local_experts=8, num_experts_per_tok=2, head_dim=8),
    "qwen2_moe": dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=24, shared_expert_intermediate_size=40),
    "qwen3_moe": dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=24, head_dim=8, norm_topk_prob=True),
    "olmoe": dict(num_experts=8, num_experts_per_tok=3),
    "deepseek_v3": dict(
        n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=24, n_group=2, topk_group=1, n_shared_experts=1,
        first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        num_key_value_heads=4, routed_scaling_factor=1.5,
    ),
    "gpt_oss": dict(num_local_experts=8, num_experts_per_tok=3, head_dim=8, sliding_window=16),
    "phimoe": dict(num_local_experts=8, num_experts_per_tok=2),
    "granitemoe": dict(num_local_experts=8, num_experts_per_tok=3),
    "glm4_moe": dict(
        n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=24, n_group=1, topk_group=1, n_shared_experts=1,
        first_k_dense_replace=1, head_dim=8,
    ),
    "jamba": dict(num_experts=8, num_experts_per_tok=2, expert_layer_period=2, expert_layer_offset=1, attn_layer_period=2,
                  attn_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False),
    "lfm2_moe": dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24, num_dense_layers=1,
                     layer_types=["conv", "full_attention", "conv"]),
    "ernie4_5_moe": dict(moe_num_experts=8, moe_k=2, moe_intermediate_size=24, moe_layer_start_index=1),
}  # fmt: skip
FOUR_RANK_FAMILIES = tuple(FAMILIES)


_MADE: dict[str, Path] = {}


def make_model(family: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Save a random model of `family` in `folder`; its weights are large enough that routing and text vary.

    It is made once in a process, and copied then.
    """
    key = json.dumps([family, seed, changes], sort_keys=True, default=str)
    if key not in _MADE:
        _MADE[key] = _written(family, Path(tempfile.mkdtemp(dir=os.environ.get("XDG_CACHE_HOME"))), seed, changes)
    torch.manual_seed(seed)
    shutil.copytree(_MADE[key], folder, dirs_exist_ok=True)
    return folder


def _written(family: str, folder: Path, seed: int, changes: dict[str, Any]) -> Path:
    torch.manual_seed(seed)
    settings = {**COMMON, **FAMILIES[family], **changes}
    config = AutoConfig.for_model(family, **settings)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.25 if "embed" not in name else 1.0)
            elif "bias" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    return folder


def assert_same_steps(plain: Any, fast: Any, most: float = 0.0) -> None:
    """A prompt, two single tokens and two at once give logits with the same bits; most: or as far off, of each row's norm."""
    caches, ids = [None, None], torch.tensor([[5, 17, 33, 60]])
    with torch.inference_mode():
        for step in (ids, ids[:, :1], ids[:, 1:2], ids[:, 2:]):
            outs = [m(step, past_key_values=c, use_cache=True) for m, c in zip((plain, fast), caches, strict=True)]
            caches = [out.past_key_values for out in outs]
            right, found = (out.logits.float() for out in outs)
            assert ((found - right).norm(dim=-1) <= most * right.norm(dim=-1)).all()
