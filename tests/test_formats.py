"""Weights in 8 and 4 bits: how far from the weights they are, how they are stored, and their products on a CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.kernels import cpu
from coterie.kernels.activations import FUNCTIONS, Activation, recognise
from coterie.kernels.cpu import Int4, Int8, Panels, for_cpu
from coterie.kernels.experts import StackedExperts, grouped_experts, reference_experts
from coterie.kernels.formats import FORMATS, GROUP, LARGEST, Weights, quantise, unpacked


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6), format=st.sampled_from(list(LARGEST)), rows=st.integers(1, 140), columns=st.integers(1, 300),
    scale=st.sampled_from([1e-6, 1.0, 300.0]), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_a_weight_is_off_by_what_the_table_says(seed, format, rows, columns, scale, dtype) -> None:
    torch.manual_seed(seed)
    weights = (torch.randn(2, rows, columns) * scale).to(dtype)
    weights[0, 0] = 0.0
    made = quantise(weights, format)
    assert made.shape == (2, rows, columns) and made.scale is not None and made.scale.dtype == torch.float32
    error, exact = (made.dequantised() - weights.double()).abs(), weights.double().abs()
    if format == "fp8":
        largest = made.scale.repeat_interleave(GROUP, 1)[:, :rows].repeat_interleave(GROUP, 2)[..., :columns].double()
        largest_of = blocks(weights, GROUP, GROUP) / 448
        assert (error <= torch.maximum(exact / 16, largest * 2**-10) * (1 + 1e-6)).all()
    else:
        steps = made.scale[..., None] if format == "int8" else made.scale.repeat_interleave(GROUP, 2)[..., :columns]
        largest_of = blocks(weights, 1, columns)[..., 0] / 127 if format == "int8" else blocks(weights, 1, GROUP) / 7
        assert (error <= steps.double() * (0.5 + 2e-5)).all()
    some = largest_of > 0  # any scale does for zeros
    torch.testing.assert_close(made.scale[some].double(), largest_of[some], rtol=1e-5, atol=0)


def blocks(weights: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The largest magnitude of every block of so many rows and columns."""
    padded = torch.nn.functional.pad(weights.double().abs(), (0, -weights.shape[2] % columns, 0, -weights.shape[1] % rows))
    return padded.unflatten(1, (-1, rows)).unflatten(3, (-1, columns)).amax((2, 4))


def test_int4_keeps_the_halves_of_a_group_side_by_side() -> None:
    values = torch.arange(-8, 8).repeat(16)[:200].float()
    values[:2] = 7.0  # the largest of each group, so that a step is 1
    values[130] = 7.0
    values = values.clamp(-7, 7)
    made = quantise(values[None, None], "int4")
    assert made.data.shape == (1, 1, 128) and made.scale is not None and made.scale.flatten().tolist() == [1.0, 1.0]
    assert (made.data[0, 0, :64] & 15).tolist() == (values[:64] + 8).int().tolist()
    assert (made.data[0, 0, :64] >> 4).tolist() == (values[64:128] + 8).int().tolist()
    assert torch.equal(unpacked(made.data, 200)[0, 0].float(), values)


def test_what_cannot_be_rounded_is_refused() -> None:
    with pytest.raises(ValueError, match="weights: found values that are not finite"):
        quantise(torch.tensor([[[float("inf")]]]), "int8")
    with pytest.raises(ValueError, match=r"format: found 'int3', expected one of plain, int8, int4, fp8"):
        quantise(torch.zeros(1, 1, 1), "int3")
    with pytest.raises(ValueError, match="scale: found none with format int8"):
        Weights(torch.zeros(1, 1, 1), "int8")


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("format", "shape", "kind"),
    [
        ("int8", (64, 128), Int8), ("int8", (63, 50), Panels), ("int4", (64, 256), Int4), ("int4", (60, 200), Panels),
        ("fp8", (64, 128), Panels),
    ],
)  # fmt: skip
def test_products_on_a_cpu(format: str, shape: tuple[int, int], kind: type, dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(0)
    weights = quantise(torch.randn(3, *shape), format)
    made, x = for_cpu(weights), torch.randn(rows, shape[1]).to(dtype)
    out = torch.full((rows, shape[0]), float("nan"), dtype=dtype)
    made.multiply(1, x, out)
    right = x.double() @ weights.dequantised()[1].T
    assert isinstance(made, kind) and made.shape == weights.shape
    assert ((out.double() - right).norm(dim=1) / right.norm(dim=1)).max() < (1e-5 if dtype == torch.float32 else 8e-3)
    if dtype == torch.float16:  # sums beyond float16 before they are scaled, and scales below it
        for size in (1e-5, 1.0):
            small = quantise(torch.full((1, *shape), size), format)
            for_cpu(small).multiply(0, torch.full((rows, shape[1]), 8.0, dtype=dtype), out)
            assert (out.double() / (8 * size * shape[1]) - 1).abs().max() < (8e-2 if format == "fp8" else 5e-3)
        made.multiply(1, x, out)
    picked = [(2 * row) % 3 for row in range(rows)]
    found = made.vectors(picked, x)
    for row, expert in enumerate(picked):
        made.multiply(expert, x[row : row + 1], out[row : row + 1])
    assert torch.equal(found, out)


@pytest.mark.parametrize("format", list(LARGEST))
@pytest.mark.parametrize("shape", [(300, 200), (40, 128), (128, 130)])
def test_a_panel_holds_the_weights_that_are_dequantised(monkeypatch, format: str, shape: tuple[int, int]) -> None:
    monkeypatch.setattr(cpu._scratch, "panels", {})
    torch.manual_seed(0)
    weights = quantise(torch.randn(2, *shape), format)
    for expert in range(2):
        assert torch.equal(cpu.Panels(weights)._widened(expert), weights.dequantised(torch.float32)[expert])
    assert sum(p.numel() for p in cpu._scratch.panels.values()) == shape[0] * shape[1]


@pytest.mark.parametrize("instructions", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_bfloat16_without_instructions_for_it_is_widened_into_one_panel(monkeypatch, instructions, transposed) -> None:
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: instructions)
    monkeypatch.setattr(cpu._scratch, "panels", {})
    torch.manual_seed(0)
    first, second = torch.randn(3, 32, 24).bfloat16(), torch.randn(3, 24, 16).bfloat16()
    if transposed:
        first, second = first.transpose(1, 2).contiguous(), second.transpose(1, 2).contiguous()
    experts = StackedExperts(first, second, Activation(), torch.randn(3, 32).bfloat16(), transposed=transposed)
    x, ids, weights = torch.randn(50, 24).bfloat16(), torch.randint(0, 3, (50, 2)), torch.rand(50, 2)
    ids[:40] = 1
    got = grouped_experts(experts, x, ids, weights)
    torch.testing.assert_close(got, reference_experts(experts, x, ids, weights), rtol=2e-2, atol=5e-2)
    assert bool(cpu._scratch.panels) != instructions
    assert sum(p.numel() for p in cpu._scratch.panels.values()) == (0 if instructions else 32 * 24)


@settings(max_examples=30, deadline=None)
@given(
    function=st.sampled_from(list(FUNCTIONS)), turns=st.booleans(), limit=st.sampled_from([None, 7.0, 1.5]),
    alpha=st.sampled_from([1.0, 1.702]), offset=st.sampled_from([0.0, 1.0]), gated=st.booleans(),
)  # fmt: skip
def test_a_models_own_function_is_recognised_by_what_it_does(function, turns, limit, alpha, offset, gated) -> None:
    made = Activation(function, True, turns, limit, alpha, offset) if gated else Activation(function, False)
    found = recognise(lambda z: made(z), gated, [7.0, 1.5], [1.702])
    assert found is not None
    z = torch.randn(9, 14, dtype=torch.float64) * 5
    torch.testing.assert_close(found(z), made(z), rtol=1e-6, atol=1e-9)


def test_a_function_that_no_kernel_knows_is_none() -> None:
    assert recognise(lambda z: torch.sin(z.chunk(2, -1)[0]) * z.chunk(2, -1)[1], True) is None
    assert recognise(lambda z: Activation("silu", limit=3.0)(z), True, limits=[7.0]) is None
    assert recognise(lambda z: z.float().to(torch.complex64).real.view(3, 3), True) is None
    with pytest.raises(ValueError, match="activation: found 'swish', expected one of silu"):
        Activation("swish")
    with pytest.raises(ValueError, match="expected interleaved, limit, alpha and offset only where it is gated"):
        Activation("silu", False, limit=1.0)


def test_formats_are_named_once() -> None:
    from coterie.kernels.tiles import GROUPED

    assert set(GROUPED) < set(FORMATS) and FORMATS[0] == "plain"
