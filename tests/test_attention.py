"""Attention of one query by heads together: as near to float64 as torch's own, and torch's own everywhere else."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, assert_same_steps, make_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from coterie.moe import attention
from coterie.moe.attention import FLAG, attend, plain_attention_again, speed_up_attention
from coterie.moe.model import load
from coterie.moe.prepare import Share
from coterie.moe.text import Prompt
from coterie.routing.errors import InputError


class Shared(torch.nn.Module):
    """What the operator is told of a layer."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups, self.is_causal = groups, True
        speed_up_attention(self)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("batch", "heads", "shared", "keys", "size"), [(1, 8, 4, 1, 64), (2, 32, 4, 300, 128), (1, 6, 1, 2000, 80)]
)
def test_it_is_as_near_to_float64_as_torchs_own(
    dtype: torch.dtype, batch: int, heads: int, shared: int, keys: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    query, module = torch.randn(batch, heads, 1, size).to(dtype), Shared(heads // shared)
    key, value = (torch.randn(batch, shared, keys + 9, size).to(dtype)[:, :, :keys] for _ in range(2))
    asked: list[tuple[int, ...]] = []
    plain = F.scaled_dot_product_attention
    right = plain(query.double(), key.double(), value.double(), scale=0.11, enable_gqa=True).transpose(1, 2)
    theirs, _ = sdpa_attention_forward(module, query, key, value, None, scaling=0.11)

    def watched(q, k, v, **options):
        asked.append(tuple(q.shape))
        return plain(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    found, _ = attend(module, query, key, value, None, scaling=0.11, sliding_window=None, position_ids=None)
    together = dtype != torch.float32 or keys >= attention.LEAST_KEYS
    assert asked == [(batch, shared, heads // shared, size) if together else (batch, heads, 1, size)]
    assert found.shape == theirs.shape == (batch, 1, heads, size) and found.dtype == dtype
    error, their_error = (float((out.double() - right).norm() / right.norm()) for out in (found, theirs))
    assert error <= max(1.5 * their_error, {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype])


def test_masks_prompts_and_arguments_of_others_are_left_to_transformers() -> None:
    torch.manual_seed(0)
    module, key = Shared(2), torch.randn(1, 2, 5, 16).bfloat16()
    one, several = torch.randn(1, 4, 1, 16).bfloat16(), torch.randn(1, 4, 5, 16).bfloat16()
    mask = torch.tensor([False, True, True, True, True]).view(1, 1, 1, 5)
    for query, given, options in (
        (one, mask, {}),
        (several, None, {}),
        (one, None, {"position_bias": torch.randn(1, 1, 1, 5).bfloat16()}),
    ):
        found, right = (f(module, query, key, key, given, **options)[0] for f in (attend, sdpa_attention_forward))
        assert torch.equal(found, right)
    with pytest.raises(ValueError, match="softcap"):
        attend(module, one, key, key, None, softcap=30.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_step_of_every_family_is_as_by_transformers(
    family: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "LEAST_KEYS", 1)
    folder = make_model(family, tmp_path)
    plain, fast = (AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval() for _ in range(2))
    speed_up_attention(fast)
    shared = plain.config.num_attention_heads > plain.config.num_key_value_heads
    assert any(FLAG in vars(module) for module in fast.modules()) == shared
    assert fast.config._attn_implementation == plain.config._attn_implementation
    assert_same_steps(plain, fast, most=1e-5 if dtype == torch.float32 else 0.05)
    plain_attention_again(fast)
    assert not any(FLAG in vars(module) for module in fast.modules())
    assert_same_steps(plain, fast)


def test_without_the_flag_it_is_transformers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "LEAST_KEYS", 1)
    module, query, key = Shared(4), torch.randn(1, 8, 1, 16), torch.randn(1, 2, 30, 16)
    plain_attention_again(module)
    assert torch.equal(attend(module, query, key, key, None)[0], sdpa_attention_forward(module, query, key, key, None)[0])


def test_loading_the_module_again_leaves_others_models_as_they_are() -> None:
    importlib.reload(attention)
    module, query, key = Shared(4), torch.randn(1, 8, 1, 16), torch.randn(1, 2, 300, 16)
    found, right = (f(module, query, key, key, None)[0] for f in (ALL_ATTENTION_FUNCTIONS["sdpa"], sdpa_attention_forward))
    assert torch.allclose(found, right, atol=1e-5)
    plain_attention_again(module)
    assert torch.equal(ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, key, None)[0], right)


def test_coteries_own_models_attend_so_unless_batch_invariant(tmp_path: Path) -> None:
    folder = make_model("qwen3_moe", tmp_path)
    for invariant in (False, True):
        made = load(folder, device="cpu", batch_invariant=invariant).transformers
        assert any(FLAG in vars(module) for module in made.modules()) != invariant


def test_attention_that_picks_its_keys_by_the_name_of_its_implementation_goes_on_doing_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse = {**FAMILIES["deepseek_v3"], "index_topk": 4, "index_head_dim": 16, "index_n_heads": 2}
    monkeypatch.setitem(FAMILIES, "deepseek_v32", sparse)
    folder, ids = make_model("deepseek_v32", tmp_path), torch.arange(24)[None] % 50 + 3
    plain, made = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), load(folder, device="cpu")
    with torch.inference_mode():
        right = plain.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)[0, 24:].tolist()
    made.transformers.generation_config.eos_token_id = None
    (output,), _ = made.generate([Prompt(token_ids=tuple(ids[0].tolist()))], 8)
    assert list(output.token_ids) == right
    monkeypatch.setattr(Share, "read", lambda *_: pytest.fail("it is refused before anything is read"))
    with pytest.raises(InputError, match=r"--batch-invariant: found attention .* deepseek_v32.* by name"):
        load(folder, device="cpu", batch_invariant=True)
