"""The Triton kernels against float64: under the interpreter where there is no GPU, else on it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

pytest.importorskip("triton")

import triton
import triton.language as tl

from coterie.kernels import fused, ordering
from coterie.kernels.activations import Activation
from coterie.kernels.formats import FORMATS, GROUP, Weights, quantise
from coterie.kernels.fused import FusedExperts, untiled
from coterie.kernels.grouped_gemm import _tile_of
from coterie.kernels.interpreter import interpreting, repair
from coterie.kernels.ordering import AT_ONCE, most_blocks, order_picks
from coterie.kernels.tiles import GROUPED, Tile

if interpreting():
    repair()
DEVICE = "cpu" if interpreting() else "cuda"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
GPT_OSS = Activation("silu", True, True, 7.0, 1.702, 1.0)
ACTIVATIONS = (
    Activation(), Activation("gelu"), Activation("gelu_tanh"), GPT_OSS, Activation("silu", limit=0.5),
    Activation("silu", interleaved=True), Activation("silu", False), Activation("none", False), Activation("relu2", False),
)  # fmt: skip
ROUTINGS = ("uniform", "zipf", "all to one", "half of the experts", "none", "some empty", "tile size")
GARBAGE = {torch.int32: 5, torch.int64: 5}


@pytest.fixture(autouse=True)
def garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors are full of what would be noticed: NaN, or wrong places."""

    def filled(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan") if tensor.is_floating_point() else GARBAGE.get(tensor.dtype, 1))

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, plain=plain, **k: filled(plain(*a, **k)))


def routed(kind: str, tokens: int, slots: int, experts: int, rows: int = 16) -> torch.Tensor:
    """Ids int64 `[tokens, slots]`."""
    if kind == "none":
        return torch.full((tokens, slots), -1)
    if kind == "all to one":
        return torch.full((tokens, slots), experts - 1)
    if kind == "tile size":  # counts of rows - 1, rows, rows + 1, 0, rows - 1, ...
        counts = [(rows + d) for d in (-1, 0, 1)] * experts
        ids = torch.cat([torch.full((n,), e % experts) for e, n in enumerate(counts) if e % 4 != 3])
        return ids.repeat(1 + tokens * slots // len(ids))[: tokens * slots].view(tokens, slots)
    chances = 1.0 / torch.arange(1, experts + 1) if kind == "zipf" else torch.ones(experts)
    if kind == "half of the experts":
        chances[::2] = 1e-30 if experts > 1 else 1.0
    replace_ = slots > experts or kind == "half of the experts"
    ids = torch.multinomial(chances.expand(max(tokens, 1), -1), slots, replacement=replace_)[:tokens]
    return ids.masked_fill(torch.rand(ids.shape) < 0.3, -1) if kind == "some empty" else ids


def made(
    format: str = "plain", dtype: torch.dtype = torch.float32, activation: Activation = ACTIVATIONS[0], experts: int = 4,
    hidden: int = 40, inner: int = 24, biases: bool = False, turned: bool = False,
) -> FusedExperts:  # fmt: skip
    """Random experts. turned: kept as `[S, K, N]`, of which the kernels get a view."""
    width = inner * (2 if activation.gated else 1)
    weights = [torch.randn(experts, width, hidden) / hidden**0.5, torch.randn(experts, hidden, inner) / inner**0.5]
    first, second = (quantise(w.to(dtype), format) for w in weights)
    if turned:
        first, second = (replace(w, data=w.data.transpose(1, 2).contiguous().transpose(1, 2)) for w in (first, second))
    bias = [torch.randn(experts, n).to(dtype) if biases else None for n in (width, hidden)]
    moved = [replace(w, data=w.data.to(DEVICE), scale=None if w.scale is None else w.scale.to(DEVICE)) for w in (first, second)]
    return FusedExperts(*moved, activation, *(None if b is None else b.to(DEVICE) for b in bias))


def expected(
    experts: FusedExperts, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, stored: torch.dtype = torch.float64
) -> torch.Tensor:
    """Float64, token by token, on the dequantised weights. stored: what hidden values and outputs are rounded to in between."""
    first, second = (w.dequantised().cpu() for w in (experts.first, experts.second))
    biases = [0.0 if b is None else b.double().cpu() for b in (experts.first_bias, experts.second_bias)]
    x, out = x.double().cpu(), torch.zeros(x.shape, dtype=torch.float64)
    assert experts.activation is not None
    for t, j in (ids >= 0).nonzero().tolist():
        e = int(ids[t, j]) if experts.table is None else int(experts.table[ids[t, j]])
        one = [b if isinstance(b, float) else b[e] for b in biases]
        hidden = experts.activation(first[e] @ x[t] + one[0]).to(stored).double()
        y = (second[e] @ hidden + one[1]).to(stored).double()
        out[t] += y * weights[t, j].double().cpu()
    return out


def check(experts: FusedExperts, x: torch.Tensor, ids: torch.Tensor, tiles: tuple[Tile, Tile] | None = None) -> None:
    """Within TOLERANCE of each row, or, where terms cancel in few values, as near as rounding them to bfloat16 lets it."""
    weights = torch.rand(ids.shape)
    x, on, beside = x.to(DEVICE), ids.to(DEVICE), weights.to(DEVICE)
    got = experts(x, on, beside, tiles)
    if DEVICE != "cpu":  # under the interpreter programs run one after another
        assert torch.equal(got, experts(x, on, beside, tiles)), "a repeat run differs"
    right = expected(experts, x, ids, weights)
    norms = right.norm(dim=1)
    error = (got.double().cpu() - right).norm(dim=1)
    assert torch.isfinite(got).all() and not error[norms == 0].any()
    allowed = TOLERANCE[x.dtype] * norms
    if x.dtype == torch.bfloat16:
        rounding = (expected(experts, x, ids, weights, x.dtype).to(x.dtype).double() - right).norm(dim=1)  # all else exact
        allowed = torch.maximum(allowed, 1.5 * rounding)
    assert error.le(allowed)[norms > 0].all(), (error / norms).max()


def tile(format: str, rows: int, swap: bool, outputs: int = 16) -> Tile:
    return Tile(rows, outputs, GROUP if format in GROUPED else 16, 4, 2, swap, 1 if swap else 2)


@settings(
    max_examples=60 if DEVICE == "cpu" else 15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 10**6), routing=st.sampled_from(ROUTINGS), tokens=st.sampled_from([0, 1, 2, 15, 16, 17, 33]),
    slots=st.integers(1, 3), format=st.sampled_from(FORMATS), dtype=st.sampled_from(list(TOLERANCE)),
    activation=st.sampled_from(ACTIVATIONS), hidden=st.sampled_from([16, 40, 129]), inner=st.sampled_from([16, 24, 33]),
    experts=st.sampled_from([1, 3, 8]), biases=st.booleans(), swap=st.booleans(), strided=st.booleans(),
    splits=st.sampled_from([1, 2, 3]),
)  # fmt: skip
def test_any_routing_shape_and_format_is_right(
    seed, routing, tokens, slots, format, dtype, activation, hidden, inner, experts, biases, swap, strided, splits
) -> None:
    torch.manual_seed(seed)
    slots = min(slots, experts)
    model = made(format, dtype, activation, experts, hidden, inner, biases)
    x = torch.randn(tokens, 2 * hidden).to(dtype)
    x = x[:, ::2] if strided else x[:, :hidden]
    tiles = tile(format, 16, swap), replace(tile(format, 16, swap), splits=splits)
    check(model, x, routed(routing, tokens, slots, experts), tiles)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tokens", [1, 5, 150])
def test_the_rules_tiles(format: str, dtype: torch.dtype, tokens: int) -> None:
    torch.manual_seed(tokens)
    check(made(format, dtype, hidden=136, inner=72), torch.randn(tokens, 136).to(dtype), routed("uniform", tokens, 2, 4))


@pytest.mark.parametrize(("tokens", "splits", "dtype"), [(1, 2, torch.float32), (2, 6, torch.bfloat16)])
@pytest.mark.parametrize("format", FORMATS)
def test_inputs_of_the_second_product_in_parts(format: str, tokens: int, splits: int, dtype: torch.dtype) -> None:
    """Of 2 or 5 steps, whose last is not whole: parts of several steps, of one, and of none."""
    torch.manual_seed(splits)
    model = made(format, dtype, experts=2, hidden=24, inner=200 if format in GROUPED else 72, biases=True)
    check(model, torch.randn(tokens, 24).to(dtype), routed("uniform", tokens, 2, 2), (
        tile(format, 16, True), replace(tile(format, 16, True), splits=splits)
    ))  # fmt: skip


def test_picks_made_group_by_group_in_parts_give_the_same_bits() -> None:
    torch.manual_seed(0)
    model, x, ids = (
        made(dtype=torch.bfloat16),
        torch.randn(5, 40, device=DEVICE).bfloat16(),
        routed("uniform", 5, 2, 4).to(DEVICE),
    )
    weights, tiles = torch.rand(5, 2, device=DEVICE), (tile("plain", 16, True), replace(tile("plain", 16, True), splits=2))
    rows = model.room(x, ids, tiles)
    assert rows.shape == (2, 10, 40) and rows.dtype == torch.float32
    for present in (ids < 2, ids >= 2):
        model.picked(x, ids.where(present, -1), rows, tiles)
    assert torch.equal(model.summed(rows, ids, weights, x.dtype), model(x, ids, weights, tiles))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_gates_and_ups_in_one_accumulator_give_the_bits_of_two(format: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x, ids = made(format, dtype, biases=True), torch.randn(3, 40, device=DEVICE).to(dtype), routed("some empty", 3, 2, 4)
    ids, weights, second = ids.to(DEVICE), torch.rand(3, 2, device=DEVICE), tile(format, 16, True)
    folded = model(x, ids, weights, (replace(tile(format, 16, True, 32), fold=True), second))
    apart = model(x, ids, weights, (tile(format, 16, True, 64), second))
    if interpreting() and dtype == torch.float32:  # numpy's library may sum a row otherwise where it stands elsewhere
        torch.testing.assert_close(folded, apart, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(folded, apart)


FETCHES = interpreting() or torch.cuda.get_device_capability() >= (9, 0)


@pytest.mark.skipif(not FETCHES, reason="of sm_90 and later")
@pytest.mark.parametrize(
    ("dtype", "activation", "swap"),
    [
        (torch.float16, ACTIVATIONS[0], False), (torch.bfloat16, ACTIVATIONS[0], True), (torch.bfloat16, GPT_OSS, False),
        (torch.float16, Activation("silu", False), True),
    ],
)  # fmt: skip
def test_weights_fetched_as_tiles_give_the_bits_of_pointers(dtype: torch.dtype, activation: Activation, swap: bool) -> None:
    """Outputs that are no multiple of the tile's: 48 and 40 in tiles of 32."""
    torch.manual_seed(0)
    model, size = made("plain", dtype, activation, 4, 64, 48, True), {"outputs": 64 if swap and not interpreting() else 32}
    model = replace(model, second=Weights(model.second.data[:, :40].contiguous()), second_bias=None)
    x, ids = torch.randn(9, 64, device=DEVICE).to(dtype), routed("some empty", 9, 2, 4).to(DEVICE)
    weights = torch.rand(9, 2, device=DEVICE)
    by_pointers = tuple(replace(tile("plain", 16, swap, **size), splits=n) for n in (1, 2 if swap else 1))
    by_tiles = tuple(replace(t, tma=True) for t in by_pointers)
    assert torch.equal(model(x, ids, weights, by_tiles), model(x, ids, weights, by_pointers))


@pytest.mark.skipif(not FETCHES, reason="of sm_90 and later")
def test_tiles_of_weights_in_a_pool_that_is_a_view_are_those_of_the_table() -> None:
    """The last tile of a place, of 48 outputs in 32s, reaches into nothing: what lies there is not a number."""
    torch.manual_seed(0)
    model, places = made("plain", torch.float16, experts=3, hidden=48, inner=48), torch.tensor([4, 0, 2], device=DEVICE)

    def pooled(data: torch.Tensor) -> torch.Tensor:
        room = data.new_full((6, data.shape[1] + 8, data.shape[2] + 16), float("nan"))
        room[places, : data.shape[1], : data.shape[2]] = data
        return room[:, : data.shape[1], : data.shape[2]]

    pool = replace(
        model, first=Weights(pooled(model.first.data)), second=Weights(pooled(model.second.data)), table=places.int()
    )
    assert not pool.first.data.is_contiguous()
    tiles = (replace(tile("plain", 16, False, 32), tma=True),) * 2
    x, ids, weights = (
        torch.randn(9, 48, device=DEVICE).half(),
        routed("uniform", 9, 2, 3).to(DEVICE),
        torch.rand(9, 2, device=DEVICE),
    )
    assert torch.equal(pool(x, ids, weights, tiles), model(x, ids, weights, tiles))
    check(pool, x, ids, tiles)


def test_what_cannot_be_fetched_as_tiles_goes_by_pointers_and_is_refused_if_asked_for() -> None:
    x, ids, weights = torch.randn(3, 64, device=DEVICE), routed("uniform", 3, 2, 4).to(DEVICE), torch.ones(3, 2, device=DEVICE)
    tiles = (replace(tile("plain", 16, False), tma=True),) * 2
    half = made(dtype=torch.float16, hidden=64, inner=32)
    shifted = torch.zeros(4 * 64 * 64 + 1, device=DEVICE, dtype=torch.float16)[1:].view(4, 64, 64)
    for model, why in (
        (made(hidden=64, inner=32), "plain weights of 4 bytes"),
        (made("int8", torch.float16, hidden=64), "int8 weights of 1 bytes"),
        (made(dtype=torch.float16, hidden=64, inner=32, turned=True), r"strides \(4096, 1, 64\) at 0 bytes"),
        (replace(half, first=Weights(shifted)), "at 2 bytes beyond a multiple of 16"),
        (made(dtype=torch.float16, hidden=64, inner=24), "24 inputs in steps of 16"),
    ):  # fmt: skip
        assert untiled(model.first, tiles[0]) or untiled(model.second, tiles[1])
        with pytest.raises(ValueError, match=f"tiles: found tma with .*{why}"):
            model(x.to(torch.float16), ids, weights, tiles)
    assert untiled(Weights(half.first.data[:0]), tiles[0]) == "no experts"
    many = torch.zeros(600, 64, dtype=torch.float16, device=DEVICE)
    assert [t.tma for t in half._tiles(many, 600, 2)] == [True, False]  # 32 inputs are less than a step
    assert not any(t.tma for t in made(dtype=torch.float16, hidden=64, inner=64, turned=True)._tiles(many, 600, 2))


@triton.jit
def tile_order(out, blocks, columns, TOGETHER: tl.constexpr):
    block, column = _tile_of(blocks, columns, 16, TOGETHER)
    tl.store(out + 2 * tl.program_id(0), block)
    tl.store(out + 2 * tl.program_id(0) + 1, column)


@pytest.mark.parametrize(("blocks", "columns", "together"), [(5, 70, 1), (5, 70, 2), (9, 33, 8), (3, 16, 8)])
def test_every_tile_has_one_program_and_blocks_go_over_the_columns_together(blocks: int, columns: int, together: int) -> None:
    tiles = -(-columns // 16)
    out = torch.zeros(blocks * tiles, 2, dtype=torch.int32, device=DEVICE)
    tile_order[(blocks * tiles,)](out, blocks, columns, TOGETHER=together)
    waves = [range(first, min(first + together, blocks)) for first in range(0, blocks, together)]
    assert out.tolist() == [[block, column] for wave in waves for column in range(tiles) for block in wave]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_weights_that_transformers_keeps_the_other_way_round_are_not_copied(activation: Activation) -> None:
    torch.manual_seed(0)
    model = made(activation=activation, turned=True, biases=True)
    assert not model.first.data.is_contiguous()
    check(model, torch.randn(9, 40), routed("uniform", 9, 2, 4))


@pytest.mark.parametrize("format", FORMATS)
def test_weights_in_a_pool_of_slots_give_the_same_bits(format: str) -> None:
    """Three of five experts, at other places than their numbers; the rest of the pool is never read."""
    torch.manual_seed(0)
    resident = made(format, torch.bfloat16, experts=5, biases=True)
    places = torch.tensor([3, 0, 5], dtype=torch.int32)
    table = torch.full((5,), -(10**6), dtype=torch.int32)
    table[torch.tensor([0, 2, 4])] = places

    def pooled(t: torch.Tensor | None) -> torch.Tensor | None:
        if t is None:
            return None
        pool = t.new_zeros(7, *t.shape[1:]) if t.element_size() == 1 else t.new_full((7, *t.shape[1:]), float("nan"))
        pool[places.long()] = t[torch.tensor([0, 2, 4])]
        return pool

    first, second = (replace(w, data=pooled(w.data), scale=pooled(w.scale)) for w in (resident.first, resident.second))
    pool = FusedExperts(
        first, second, resident.activation, pooled(resident.first_bias), pooled(resident.second_bias), table.to(DEVICE)
    )
    ids = torch.tensor([[0, 4], [2, 0], [4, -1], [2, 4]], device=DEVICE)
    x, weights = torch.randn(4, 40, device=DEVICE).bfloat16(), torch.rand(4, 2, device=DEVICE)
    assert torch.equal(pool(x, ids, weights), resident(x, ids, weights))
    assert torch.equal(pool(x[:1], ids[:1], weights[:1]), resident(x[:1], ids[:1], weights[:1]))


def test_an_activation_of_the_models_own_and_a_norm_after_each_expert() -> None:
    torch.manual_seed(0)
    known = made()
    own = replace(known, activation=None, between=Activation(), finish=lambda y: y * 0.5)
    x, ids, weights = torch.randn(6, 40, device=DEVICE), routed("uniform", 6, 2, 4).to(DEVICE), torch.rand(6, 2, device=DEVICE)
    torch.testing.assert_close(own(x, ids, weights), known(x, ids, weights) * 0.5, rtol=1e-5, atol=1e-6)


def far_apart(values: torch.Tensor, step: int) -> torch.Tensor:
    """The same values, `step` elements between two along the first dimension; memory is there only where written."""
    count, size = (len(values) - 1) * step + values[0].numel(), values.element_size()
    room = np.zeros(count * size, dtype=np.uint8)  # the system gives pages when they are touched
    flat = torch.from_numpy(room).to(DEVICE).view(values.dtype)
    return flat.as_strided(values.shape, (step, *values.stride()[1:])).copy_(values)


def test_weights_and_rows_beyond_two_to_the_31_elements() -> None:
    torch.manual_seed(0)
    small = made("int8", experts=2, hidden=16, inner=16)
    far = replace(small, first=replace(small.first, data=far_apart(small.first.data, (1 << 31) + 64)))
    check(far, far_apart(torch.randn(3, 16).half(), 1 << 30), torch.tensor([[0, 1], [1, 0], [1, -1]]))
    check(replace(small, second=replace(small.second, data=far_apart(small.second.data, (1 << 31) + 64))),
          torch.randn(3, 16).half(), torch.tensor([[0, 1], [1, 0], [1, -1]]))  # fmt: skip


@pytest.mark.parametrize("splits", [1, 2])
def test_picks_and_parts_beyond_two_to_the_31_elements(splits: int) -> None:
    """The last of six picks, or the second part, begins there."""
    torch.manual_seed(0)
    model, ids = made(experts=2, hidden=32, inner=32), torch.tensor([[0, 1], [1, 0], [1, -1]], device=DEVICE)
    x, weights = torch.randn(3, 32, device=DEVICE), torch.rand(3, 2, device=DEVICE)
    tiles = tuple(Tile(16, 16, 16, 4, 2, True, splits=n) for n in (1, splits))
    near = model.picked(x, ids, tiles=tiles)
    rows = near.view(-1, 32)
    step = (1 << 31) // (5 if splits == 1 else 6) + 64
    far = far_apart(torch.zeros_like(rows), step).as_strided(near.shape, (near.shape[1] * step, step, 1))
    model.picked(x, ids, out=far, tiles=tiles)
    real = ids.view(-1) >= 0
    assert torch.equal(far[:, real], near[:, real])
    assert torch.equal(model.summed(far, ids, weights, x.dtype), model.summed(near, ids, weights, x.dtype))


class Launches:
    """Instead of a kernel: launched with anything, does nothing."""

    def __getitem__(self, grid: object) -> Any:
        return lambda *_, **__: None


@pytest.mark.parametrize("tokens", [1, 3, 600])
@pytest.mark.parametrize("format", ["plain", "int8"])
def test_nothing_is_asked_of_the_device_between_launches(monkeypatch: pytest.MonkeyPatch, tokens: int, format: str) -> None:
    """By tensors without values, of which nothing can be asked; what waits for the device could not be captured in a graph."""
    for owner, names in (
        (fused, ("first_product", "second_product", "weighted_sum")),
        (ordering, ("_order_at_once", "_count", "_place", "_map_blocks")),
    ):
        for name in names:
            assert hasattr(owner, name)
            monkeypatch.setattr(owner, name, Launches())
    with FakeTensorMode():
        kind = torch.int8 if format == "int8" else torch.bfloat16
        first, second = (
            Weights(torch.zeros(8, *size, dtype=kind), format, torch.ones(8, size[0]) if format == "int8" else None)
            for size in ((96, 40), (40, 48))
        )
        model, x = FusedExperts(first, second, Activation()), torch.zeros(tokens, 40, dtype=torch.bfloat16)
        ids = torch.zeros(tokens, 2, dtype=torch.int64)
        assert model(x, ids, torch.ones(tokens, 2)).shape == (tokens, 40)
        with pytest.raises(DataDependentOutputException):
            ids.max().item()


@pytest.mark.parametrize("tokens", [1, 2, 3, 9, 10, 63, 64, 65, 700])
def test_lists_of_the_order_begin_where_one_compiled_kernel_reads_them_all(tokens: int) -> None:
    """At multiples of 16 bytes: elsewhere each number of blocks would be compiled for anew, while text is made."""
    order = order_picks(routed("uniform", tokens, 2, 5).to(DEVICE), 5, 16)
    assert all(part.data_ptr() % 16 == 0 for part in (order.picks, order.expert, order.start, order.count))


def test_numbers_that_change_while_text_is_made_are_not_compiled_in() -> None:
    """A kernel would be compiled anew wherever one of them is 1 or a multiple of 16."""
    said = (
        "from coterie.kernels import grouped_gemm as g, ordering as o\n"
        "for k in (g.first_product, g.second_product, o._order_at_once, o._count, o._place, o._map_blocks):\n"
        "    print(*(p.name for p in k.params if p.do_not_specialize))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = subprocess.run([sys.executable, "-c", said], env=environment, capture_output=True, text=True, check=True).stdout
    assert out.splitlines() == ["blocks", "blocks", "N blocks", "N parts", "N parts", "blocks parts"]


@pytest.mark.parametrize("activation", [GPT_OSS, Activation("relu2", False), Activation("relu")], ids=str)
def test_what_is_no_number_stays_none(activation: Activation) -> None:
    """An overflow further up must be seen: a limit or a maximum would hide it."""
    torch.manual_seed(0)
    model, x = made(activation=activation), torch.randn(3, 40, device=DEVICE)
    x[1] = float("nan")
    got = model(x, routed("uniform", 3, 2, 4).to(DEVICE), torch.rand(3, 2, device=DEVICE))
    assert torch.isnan(got[1]).all() and torch.isfinite(got[[0, 2]]).all()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6), routing=st.sampled_from(ROUTINGS), tokens=st.sampled_from([0, 1, 7, 100, 600]),
    slots=st.integers(1, 3), experts=st.sampled_from([1, 3, 8, 130]), rows=st.sampled_from([16, 32]), kind=st.sampled_from(
        [torch.int64, torch.int32]),
)  # fmt: skip
def test_picks_are_ordered_by_expert_and_blocks_cover_them(seed, routing, tokens, slots, experts, rows, kind) -> None:
    torch.manual_seed(seed)
    ids = routed(routing, tokens, min(slots, experts), experts, rows).to(kind)
    order = order_picks(ids.to(DEVICE), experts, rows)
    keys = ids.reshape(-1).masked_fill(ids.reshape(-1) < 0, experts)
    assert order.picks.tolist() == keys.argsort(stable=True).tolist()
    assert len(order.expert) == most_blocks(ids.numel(), experts, rows)
    covered = []
    for expert, start, count in zip(order.expert.tolist(), order.start.tolist(), order.count.tolist(), strict=True):
        assert (expert >= 0) == (count > 0) and count <= rows
        picks = order.picks[start : start + count].long().cpu()
        assert (keys[picks] == expert).all()
        covered += range(start, start + count)
    assert covered == list(range(int((keys < experts).sum())))


def test_more_picks_than_are_compared_at_once_are_ordered_alike() -> None:
    ids = routed("zipf", AT_ONCE, 2, 8)
    keys = ids.reshape(-1)
    assert order_picks(ids.to(DEVICE), 8, 128).picks.tolist() == keys.argsort(stable=True).tolist()


def test_what_cannot_be_is_refused() -> None:
    model = made("int4")
    x, ids, weights = torch.randn(2, 40, device=DEVICE), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
    with pytest.raises(ValueError, match="tiles: found 16 inputs with format int4, expected 128"):
        model(x, ids, weights, (tile("plain", 16, False), tile("plain", 16, False)))
    with pytest.raises(ValueError, match="tiles: found 16 and 32 rows, expected as many"):
        model(x, ids, weights, (tile("int4", 16, False), tile("int4", 32, False)))
    fold = replace(tile("plain", 16, True), fold=True)
    with pytest.raises(ValueError, match="tiles: found fold, expected it only by pointers"):
        made(activation=GPT_OSS)(x, ids, weights, (fold, replace(fold, fold=False)))
    parts = replace(tile("int4", 16, False), splits=2)
    with pytest.raises(ValueError, match="tiles: found 1 and 2 splits, expected 1 where outputs are not only added up"):
        replace(model, finish=lambda y: y)(x, ids, weights, (tile("int4", 16, False), parts))
    with pytest.raises(ValueError, match="tiles: found 2 and 2 splits"):
        model(x, ids, weights, (parts, parts))
    with pytest.raises(ValueError, match="format: found int4 and plain, expected the same"):
        FusedExperts(model.first, made().second)
    with pytest.raises(ValueError, match="activation: expected one, or else `between`"):
        FusedExperts(model.first, model.second, None)
    with pytest.raises(ValueError, match=r"format: found 'int3', expected one of plain, int8, int4, fp8"):
        Weights(torch.zeros(1, 1, 1), "int3")


@pytest.mark.skipif(not interpreting(), reason="of the interpreter")
def test_the_interpreter_refuses_what_it_would_get_wrong() -> None:
    @triton.jit
    def add(x, out):
        tl.store(out, tl.load(x) + tl.load(x))

    x = torch.ones(1, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="bfloat16 arithmetic in the interpreter: convert to float32 first"):
        add[(1,)](x, torch.empty_like(x))
