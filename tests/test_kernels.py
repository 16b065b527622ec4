"""The CPU path of the experts against the plain reference, and that against double precision."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from coterie.kernels.experts import StackedExperts, grouped_experts, reference_experts


def make_experts(kind: str, dtype: torch.dtype, count: int = 5, hidden: int = 12, inner: int = 7) -> StackedExperts:
    width = inner if kind == "plain" else 2 * inner
    first, second = torch.randn(count, width, hidden, dtype=dtype), torch.randn(count, hidden, inner, dtype=dtype)
    if kind == "plain":
        return StackedExperts(first, second, F.relu)
    if kind == "transposed":
        return StackedExperts(
            first.transpose(1, 2).contiguous(),
            second.transpose(1, 2).contiguous(),
            lambda h: h[..., ::2] * h[..., 1::2].sigmoid(),
            torch.randn(count, width, dtype=dtype),
            torch.randn(count, hidden, dtype=dtype),
            transposed=True,
            finish=lambda y: y * 0.5,
        )
    return StackedExperts(first, second, lambda h: F.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1])


def routing(tokens: int, slots: int, count: int, kind: str) -> torch.Tensor:
    if kind == "all to one":
        return torch.full((tokens, slots), count - 1)
    if kind == "none":
        return torch.full((tokens, slots), -1)
    ids = (
        torch.stack([torch.randperm(count)[:slots] for _ in range(tokens)])
        if tokens
        else torch.empty(0, slots, dtype=torch.int64)
    )
    if kind == "half empty":
        ids[ids % 2 == 0] = -1
    return ids


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(0, 9),
    slots=st.integers(1, 4),
    experts=st.sampled_from(["gated", "plain", "transposed"]),
    routed=st.sampled_from(["random", "all to one", "none", "half empty"]),
)
def test_grouping_equals_one_token_at_a_time(seed, tokens, slots, experts, routed) -> None:
    torch.manual_seed(seed)
    made = make_experts(experts, torch.float32)
    x, weights, ids = torch.randn(tokens, 12), torch.rand(tokens, slots), routing(tokens, slots, 5, routed)
    got = grouped_experts(made, x, ids, weights)
    torch.testing.assert_close(got, reference_experts(made, x, ids, weights), rtol=1e-5, atol=1e-5)
    assert torch.equal(got, grouped_experts(made, x, ids, weights))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 1e-3), (torch.bfloat16, 5e-3)])
def test_errors_stay_within_the_precision(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    made = make_experts("gated", dtype, hidden=64, inner=48)
    double = StackedExperts(made.first.double(), made.second.double(), made.activation)
    x, ids, weights = torch.randn(40, 64).to(dtype), routing(40, 3, 5, "random"), torch.rand(40, 3)
    expected = torch.zeros(40, 64, dtype=torch.float64)
    for t in range(40):
        for j in range(3):
            expected[t] += double.run(int(ids[t, j]), x[t : t + 1].double())[0] * weights[t, j].double()
    error = (grouped_experts(made, x, ids, weights).double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() <= tolerance * (1 if dtype == torch.float32 else 2)
