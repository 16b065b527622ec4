"""Dense layers in prefill without bfloat16 instructions: nearer to float64 than torch's own, which run everywhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import make_model
from torch import nn
from transformers import AutoModelForCausalLM

import coterie
from coterie.kernels import cpu
from coterie.moe import many_rows, one_row, sizes
from coterie.moe.many_rows import LEAST_ROWS, ManyRowsLinear, plain_many_rows_again, speed_up_many_rows
from coterie.moe.prepare import prepare


@pytest.fixture(autouse=True)
def without_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("multiplies_bfloat16", "multiplies_float16"):
        monkeypatch.setattr(cpu, name, lambda: False)
    monkeypatch.setattr(one_row, "multiplies_bfloat16", lambda: False)  # which has a class of its own for one row
    monkeypatch.setattr(cpu._scratch, "panels", {})


def layer_of(inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias=bias).to(dtype).requires_grad_(False)
    speed_up_many_rows(layer)
    assert type(layer) is ManyRowsLinear
    return layer


def error(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found.double() - right).norm() / right.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(96, 700), (700, 96)])
def test_many_rows_are_summed_in_float32_and_rounded_once(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bias: bool, inputs: int, outputs: int
) -> None:
    monkeypatch.setattr(cpu, "WIDENED", 30_000)  # so that outputs are taken in parts
    monkeypatch.setattr(many_rows, "AT_ONCE", 70 * (inputs + outputs))  # and rows, the last part of another size
    layer = layer_of(inputs, outputs, bias, dtype)
    x = torch.randn(3, 67, inputs).to(dtype)
    right = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
    found = layer(x)
    assert found.shape == (3, 67, outputs) and found.dtype == dtype
    assert error(found, right) <= 1.01 * error(right.to(dtype), right), "no worse than rounding once"
    panel = max(256, 30_000 // inputs) * inputs
    assert sum(p.numel() for p in cpu._scratch.panels.values()) == min(panel, inputs * outputs)


def test_few_rows_gradients_and_other_dtypes_are_torchs_own() -> None:
    layer = layer_of(64, 48, True, torch.bfloat16)
    plain = nn.Linear(64, 48).bfloat16().requires_grad_(False)
    plain.load_state_dict(layer.state_dict())
    few, many = torch.randn(LEAST_ROWS - 1, 64).bfloat16(), torch.randn(LEAST_ROWS, 64).bfloat16()
    assert torch.equal(layer(few), plain(few))
    assert not cpu._scratch.panels
    wanted = many.clone().requires_grad_()
    layer(wanted).sum().backward()
    torch.testing.assert_close(wanted.grad, layer.weight.sum(0).expand(LEAST_ROWS, -1), rtol=2e-2, atol=2e-2)
    with pytest.raises(RuntimeError, match="dtype"):
        layer(many.float())
    assert not cpu._scratch.panels
    layer(many)
    assert cpu._scratch.panels
    plain_many_rows_again(layer)
    assert type(layer) is nn.Linear and torch.equal(layer(many), plain(many))


def test_only_half_precision_without_instructions_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = nn.Linear(8, 8)
    speed_up_many_rows(wide)
    assert type(wide) is nn.Linear
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: True)
    half, other = nn.Linear(8, 8).bfloat16(), nn.Linear(8, 8).half()
    for layer in (half, other):
        speed_up_many_rows(layer)
    assert type(half) is nn.Linear and type(other) is ManyRowsLinear, "instructions for the one are none for the other"
    assert not cpu.widens(torch.empty(8, 8, dtype=torch.float16, device="meta"), 100), (
        "a host's instructions are not a device's"
    )


def test_a_loaded_model_has_them_unless_it_is_batch_invariant(tmp_path: Path, monkeypatch) -> None:
    made: list[int] = []
    folder = make_model("qwen3_moe", tmp_path)
    ids = torch.arange(1, 90)[None] % 80
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    for invariant in (False, True):
        model = coterie.load(folder, dtype="bfloat16", device="cpu", batch_invariant=invariant).transformers
        assert any(type(module) is ManyRowsLinear for module in model.modules()) != invariant
        if not invariant:
            with torch.no_grad():
                monkeypatch.setattr(
                    many_rows, "multiply_widened", lambda *given: made.append(1) or cpu.multiply_widened(*given)
                )
                ours, theirs = model(ids).logits[0].float(), plain(ids).logits[0].float()
            off = (ours - theirs).norm(dim=1) / theirs.norm(dim=1)
            assert off.median() < 0.02, "a near tie may route a token otherwise"
    assert len(made) > 6, "dense layers of every decoder layer"


@pytest.mark.parametrize("shape", [(512, 700), (64, 32)])
def test_a_row_is_multiplied_by_either_way(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]) -> None:
    matrix, row = torch.randn(shape).bfloat16(), torch.randn(shape[1]).bfloat16()
    right = matrix.double() @ row.double()
    for dtype in (torch.bfloat16, torch.float16):
        for stored in (matrix.to(dtype), matrix.to(dtype).T.contiguous().T):
            out = torch.full((shape[0],), float("nan"), dtype=dtype)
            cpu.multiply_row(stored, row.to(dtype), out)
            assert error(out, right) < 5e-3
    layer, x = layer_of(96, 700, False, torch.bfloat16), torch.randn(1, 1, 96).bfloat16()
    one = x.double()[0] @ layer.weight.double().T
    assert layer(x).shape == (1, 1, 700) and error(layer(x)[0], one) <= 1.01 * error(one.bfloat16(), one)


@pytest.mark.parametrize(
    ("format", "dtype"), [(None, torch.bfloat16), ("int8", torch.bfloat16), ("int8", torch.float16), ("fp8", torch.float32)]
)
def test_memory_counts_what_is_widened(
    monkeypatch: pytest.MonkeyPatch, format: str | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    monkeypatch.setattr(cpu, "WIDENED", 5_000)
    monkeypatch.setattr(cpu, "LEAST_OUTPUTS", 64)
    folder = make_model("qwen3_moe", tmp_path, hidden_size=128, moe_intermediate_size=128)
    share = prepare(folder, None, str(dtype).removeprefix("torch."), 1, device="cpu", quantise=format)
    told = sizes.sizes_of(share.shape, share.empty, share.dtype, share.rounding)
    coterie.load(folder, dtype=str(dtype).removeprefix("torch."), device="cpu", quantise=format).transformers(
        torch.arange(1, 90).repeat(3)[None] % 80
    )
    assert told.widened == 4 * sum(panel.numel() for panel in cpu._scratch.panels.values()) > 0
    row, most = told.widened_rows
    assert (row > 0) == (dtype != torch.float32) and most % 4 == 0 and most >= LEAST_ROWS * row * (row > 0)
