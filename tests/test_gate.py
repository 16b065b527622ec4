"""Routing functions against the routers of transformers' own models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import COMMON, FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM

from coterie.routing.gate import grouped_sigmoid_top_k, softmax_top_k, top_k_softmax
from coterie.routing.record import expert_modules


def routed(family: str, **changes: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any]:
    """(hidden states, ids, weights) that a model's last MoE block hands to its experts, and the block."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    seen: list[Any] = []
    name, experts = list(expert_modules(model).values())[-1]
    block = model.get_submodule(name.rpartition(".")[0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.2)
        experts.register_forward_pre_hook(lambda module, args: seen.append(args))
        model(torch.randint(3, 97, (2, 20)))
    return (*seen[0][:3], block)


def same(found: tuple[torch.Tensor, torch.Tensor], ids: torch.Tensor, weights: torch.Tensor) -> None:
    order, expected = found[0].argsort(-1), ids.argsort(-1)
    assert torch.equal(found[0].gather(1, order), ids.gather(1, expected))
    torch.testing.assert_close(found[1].gather(1, order).float(), weights.gather(1, expected).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("family", "renormalise"), [("qwen3_moe", True), ("olmoe", False), ("mixtral", True)])
def test_softmax_then_top_k(family: str, renormalise: bool) -> None:
    x, ids, weights, block = routed(family)
    same(softmax_top_k(x @ block.gate.weight.T, ids.shape[1], renormalise), ids, weights)


def test_top_k_then_softmax() -> None:
    x, ids, weights, block = routed("gpt_oss")
    same(top_k_softmax(x @ block.router.weight.T + block.router.bias, ids.shape[1]), ids, weights)


@pytest.mark.parametrize(("groups", "kept"), [(2, 1), (4, 2), (1, 1)])
def test_grouped_sigmoid_with_a_choosing_bias(groups: int, kept: int) -> None:
    x, ids, weights, block = routed("deepseek_v3", n_group=groups, topk_group=kept)
    logits = x.float() @ block.gate.weight.T.float()
    found = grouped_sigmoid_top_k(logits, block.gate.e_score_correction_bias, ids.shape[1], groups, kept, 1.5)
    same(found, ids, weights)


def test_groups_limit_where_experts_come_from() -> None:
    logits = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    ids, weights = grouped_sigmoid_top_k(logits, torch.zeros(12), 3, groups=4, kept_groups=2, scale=1.0)
    assert all(len(set((row // 3).tolist())) <= 2 for row in ids)
    torch.testing.assert_close(weights.sum(-1), torch.ones(50))
