"""Dense layers in decode: what is faster with one row is as near to float64 as torch's own Linear."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, assert_same_steps, make_model
from torch import nn
from transformers import AutoModelForCausalLM

from coterie.kernels import cpu
from coterie.kernels.cpu import multiplies_bfloat16
from coterie.moe import one_row
from coterie.moe.model import load
from coterie.moe.one_row import OneRowLinear, plain_again, speed_up_one_row

needs_bfloat16 = pytest.mark.skipif(not multiplies_bfloat16(), reason="no bfloat16 instructions here: torch's own layers stay")


def in_bfloat16(module: nn.Module) -> bool:
    """Whether it is a router that does nothing but multiply by weights in bfloat16, before it chooses."""
    simple = "router" in type(module).__name__.lower() and getattr(module, "bias", None) is None
    return simple and module.weight.dtype == torch.bfloat16


@needs_bfloat16
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_step_of_every_family_is_as_by_torchs_layers(family: str, tmp_path: Path) -> None:
    folder = make_model(family, tmp_path)
    plain, fast = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval() for _ in range(2))
    speed_up_one_row(fast)
    assert any(isinstance(module, OneRowLinear) for module in fast.modules())
    routers = [name for name, module in fast.named_modules() if "forward" in vars(module)]
    assert routers == [name for name, module in plain.named_modules() if in_bfloat16(module)]
    assert set(fast.state_dict()) == set(plain.state_dict())
    assert_same_steps(plain, fast, most=0.05)
    plain_again(fast)
    assert not any("forward" in vars(module) or isinstance(module, OneRowLinear) for module in fast.modules())


@pytest.mark.parametrize(("inputs", "outputs"), [(2048, 1408), (1408, 2048), (7168, 512), (14_336, 100), (96, 40)])
def test_real_sizes_are_summed_in_float32_and_rounded_once(monkeypatch, inputs: int, outputs: int) -> None:
    monkeypatch.setattr(one_row, "multiplies_bfloat16", lambda: True)
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias=False).bfloat16().requires_grad_(False)
    x = torch.randn(1, inputs).bfloat16()
    speed_up_one_row(layer)
    found, right = layer(x), x.double() @ layer.weight.double().T
    assert type(layer) is OneRowLinear and found.shape == (1, outputs)
    assert float((found - right).norm()) <= 1.01 * float((right.to(x.dtype) - right).norm()), "no worse than rounding once"


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(1024, 1024), (512, 1000), (33, 7)])
def test_one_row_of_float32_is_as_near_to_float64_by_onednn(inputs: int, outputs: int, transposed: bool) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(inputs, outputs).T if transposed else torch.randn(outputs, inputs)
    row, out = torch.randn(inputs), torch.full((2, outputs), torch.nan)
    cpu.multiply_each([matrix], [row], [out[1]])
    right = matrix.double() @ row.double()
    assert float((out[1] - right).norm()) <= 2e-6 * float(right.norm()) and bool(out[0].isnan().all())


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_every_step_in_float32_is_as_by_torchs_layers(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_row, "one_row_by_onednn", lambda: True)
    folder = make_model(family, tmp_path)
    plain, fast = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for _ in range(2))
    speed_up_one_row(fast)
    assert any(isinstance(module, OneRowLinear) for module in fast.modules())
    assert not any(module.stack for module in fast.modules() if isinstance(module, OneRowLinear))
    assert_same_steps(plain, fast, most=2e-5)
    plain_again(fast)
    assert_same_steps(plain, fast)


def test_onednn_is_on_again_whatever_happens() -> None:
    assert torch._C._get_mkldnn_enabled()
    with pytest.raises(RuntimeError):
        cpu.multiply_row(torch.ones(3, 4).bfloat16(), torch.ones(5).bfloat16())
    assert torch._C._get_mkldnn_enabled()
    with torch.backends.mkldnn.flags(enabled=False):
        cpu.multiply_row(torch.ones(3, 4).bfloat16(), torch.ones(4).bfloat16())
        assert not torch._C._get_mkldnn_enabled(), "and off where somebody else has it so"
    with cpu.own_products:
        cpu.multiply_row(torch.ones(3, 4).bfloat16(), torch.ones(4).bfloat16())
        assert not torch._C._get_mkldnn_enabled(), "and until the outermost ends"
    assert torch._C._get_mkldnn_enabled()


@needs_bfloat16
def test_a_router_answers_one_token_by_torchs_own_product_and_more_by_onednns(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_model("qwen3_moe", tmp_path), dtype=torch.bfloat16).eval()
    router = model.model.layers[0].mlp.gate
    speed_up_one_row(model)
    seen, linear = [], one_row.F.linear

    def watched(*arguments):
        seen.append(torch._C._get_mkldnn_enabled())
        return linear(*arguments)

    hidden = torch.randn(3, router.weight.shape[1]).bfloat16()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(one_row.F, "linear", watched)
        one, many = router(hidden[:1]), router(hidden)
    assert seen == [False, True] and torch._C._get_mkldnn_enabled()
    assert torch.allclose(one[0].float(), many[0][:1].float(), rtol=1e-2, atol=1e-2) and torch.equal(one[2], many[2][:1])


class Block(nn.Module):
    """Three layers with one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(64, width, bias=False) for width in (96, 32, 32))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.q_proj(x), self.k_proj(x), self.v_proj(x)]


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> tuple[Block, Block]:
    monkeypatch.setattr(one_row, "multiplies_bfloat16", lambda: True)
    torch.manual_seed(0)
    plain, fast = Block().bfloat16().requires_grad_(False), Block().bfloat16().requires_grad_(False)
    fast.load_state_dict(plain.state_dict())
    speed_up_one_row(fast)
    return plain, fast


def close(found: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(f.shape == r.shape and torch.allclose(f, r, rtol=1e-2, atol=1e-2) for f, r in zip(found, right, strict=True))


def test_one_product_is_made_for_layers_with_one_input(blocks: tuple[Block, Block], monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fast = blocks
    made: list[tuple[int, ...]] = []
    mv = torch.mv
    monkeypatch.setattr(torch, "mv", lambda w, v, out: made.append(tuple(w.shape)) or mv(w, v, out=out))
    x = torch.randn(1, 1, 64).bfloat16()
    assert close(fast(x), plain(x)) and made == [(160, 64)]
    x.mul_(-2)
    assert close(fast(x), plain(x)) and len(made) == 2, "the same tensor with other values is computed anew"
    assert close(fast(x[0]), plain(x[0]))
    many = torch.randn(2, 5, 64).bfloat16()
    assert close(fast(many), plain(many)) and len(made) == 3


def test_weights_that_were_replaced_are_the_ones_computed_with(blocks: tuple[Block, Block]) -> None:
    plain, fast = blocks
    x = torch.randn(1, 64).bfloat16()
    for block in blocks:
        block.k_proj.weight = nn.Parameter(torch.ones(32, 64).bfloat16(), requires_grad=False)
        block.v_proj.weight.mul_(3)
    assert close(fast(x), plain(x))
    assert close(fast.float()(x.float()), plain.float()(x.float()))


def test_layers_are_torchs_own_again_and_others_never_change(blocks: tuple[Block, Block]) -> None:
    _, fast = blocks
    plain_again(fast)
    assert all(type(m) is nn.Linear for m in fast.children())
    speed_up_one_row(fast)
    assert all(type(m) is OneRowLinear for m in fast.children())
    single, biased = nn.Linear(4, 4, bias=False).double(), nn.Linear(4, 4).bfloat16()
    speed_up_one_row(nn.ModuleList([single, biased]))
    assert type(single) is type(biased) is nn.Linear


def test_coteries_own_models_have_them_unless_batch_invariant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_row, "multiplies_bfloat16", lambda: True)
    folder = make_model("qwen3_moe", tmp_path)
    for invariant in (False, True):
        made = load(folder, dtype="bfloat16", device="cpu", batch_invariant=invariant).transformers
        assert any(type(m) is OneRowLinear for m in made.modules()) != invariant
