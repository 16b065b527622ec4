"""The GPU benchmark's arithmetic, and its loop on a toy layer under the interpreter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from coterie.kernels.interpreter import interpreting, repair
from coterie.kernels.tiles import SHARED_BYTES, Tile, Work, choose_tile, rule, shared_bytes, table_text
from coterie.launch.bench import Row
from coterie.launch.bench_kernels import _candidates, _works, allowed, gpu_rows, shape_rows
from coterie.launch.cli import main
from coterie.launch.kernel_cases import (
    L2_BYTES,
    MOST_COPIES,
    SHAPES,
    STORED,
    TINY,
    WRONG,
    Layer,
    Machine,
    Shape,
    copies_past_cache,
)
from coterie.routing.errors import CoterieError, InputError

if interpreting():
    repair()
H200 = Machine(4.3e12, 788e12)
QWEN = SHAPES[1]


@pytest.mark.parametrize(
    ("shape", "tokens", "format", "microseconds"),
    [(0, 1, "plain", 164), (1, 64, "plain", 277), (1, 16, "int8", 91), (0, 4096, "plain", 3663), (3, 16, "plain", 2089)],
)
def test_the_floor_of_a_layer(shape: int, tokens: int, format: str, microseconds: float) -> None:
    """As worked out by hand for an H200."""
    assert 1e6 * H200.floor(SHAPES[shape], tokens, format) == pytest.approx(microseconds, rel=0.02)


def test_bars_follow_from_floor_rate_and_the_best_peer() -> None:
    one, many = H200.floor(QWEN, 1, "plain"), H200.floor(QWEN, 256, "plain")
    assert allowed(QWEN, 1, "plain", H200, None) == pytest.approx(one / 0.85 + 15e-6)
    assert allowed(QWEN, 256, "plain", H200, None) == pytest.approx(many / 0.88)
    assert allowed(SHAPES[0], 16384, "plain", H200, None) == pytest.approx(SHAPES[0].flops(16384) / 530e12)
    assert allowed(QWEN, 1, "plain", H200, 20.0) == pytest.approx(max(20e-6 / 1.15, one / 0.95))
    assert allowed(QWEN, 2048, "int8", H200, None) is None


@pytest.mark.parametrize("format", ["plain", "int4"])
def test_a_toy_layer_is_measured_beside_its_peers(format: str) -> None:
    if not interpreting():
        pytest.skip("a GPU has the real thing")
    rows = list(shape_rows(TINY, format, (1, 3), Machine(1e9, 1e9), "cpu"))
    times = [row for row in rows if row.metric.startswith("layer")]
    assert [row.metric for row in times] == ["layer, 1 tokens", "layer, 3 tokens"]
    assert all(row.value is not None and row.value > 0 and row.bar is not None for row in times), times
    assert all(bool(row.peers) == (format == "plain") for row in times)


def test_without_a_gpu_a_row_says_so_and_a_wrong_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [(row.value, row.why) for row in gpu_rows(False)] == [(None, "needs a GPU")]
    with pytest.raises(InputError, match="--only: found 'none', expected a part of Mixtral"):
        list(gpu_rows(False, "none"))


def test_a_measured_table_goes_before_the_rule_on_its_own_device_alone(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    from coterie.kernels import tiles

    work, best = Work(8, 64, 32, 2, 5), Tile(32, 64, 32, 4, 2)
    (tmp_path / "t.json").write_text(table_text("GPU", "3.6.0", [(work, (4, 8), best)]))
    monkeypatch.setattr(tiles, "TABLES", tmp_path)
    for cached in (tiles._tables, choose_tile):
        cached.cache_clear()
    try:
        assert choose_tile(work, "GPU", 90, "3.6.0") == best != rule(work)
        assert choose_tile(work, "GPU", 90, "3.7.0") == choose_tile(work, "other", 90, "3.6.0") == rule(work)
        assert choose_tile(Work(8, 64, 32, 2, 9), "GPU", 90, "3.6.0") == rule(Work(8, 64, 32, 2, 9))
    finally:
        for cached in (tiles._tables, choose_tile):
            cached.cache_clear()


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("format", ["plain", "int8", "int4", "fp8"])
@pytest.mark.parametrize("tokens", [1, 64, 700, 20000])
@pytest.mark.parametrize("shape", [(128, 768, 2048, 8), (8, 14336, 4096, 2)])
def test_the_rules_stay_within_shared_memory(capability: int, format: str, tokens: int, shape: tuple[int, ...]) -> None:
    for doubled in (True, False):
        experts, outputs, inputs, top_k = shape
        work = Work(experts, outputs, inputs, top_k, tokens, 2, format, doubled)
        tile = rule(work, capability)
        assert shared_bytes(tile, work, tile.stages) <= SHARED_BYTES[capability] and tile.stages >= 1


@pytest.mark.parametrize("format", ["plain", "int8", "int4"])
def test_few_rows_of_a_deep_product_are_computed_in_parts(format: str) -> None:
    """Mixtral's: 2 experts of 64 tiles are 128 programs of 112 steps for 132 multiprocessors."""
    mixtral = Work(8, 4096, 14336, 2, 1, 2, format, summed=True)
    assert rule(mixtral, 90).splits == 4 and rule(replace(mixtral, tokens=16), 90).splits == 2
    assert rule(replace(mixtral, tokens=256), 90).splits == 1  # every multiprocessor has programs enough
    assert rule(replace(mixtral, summed=False), 90).splits == 1
    assert rule(Work(128, 2048, 768, 8, 1, 2, format, summed=True), 90).splits == 1  # six steps, which a pipeline holds


def test_gates_and_ups_share_an_accumulator_where_programs_are_few() -> None:
    """Qwen3's: 8 experts of 12 tiles are 96 programs for 132 multiprocessors; folded, they are 192."""
    one = Work(128, 768, 2048, 8, 1, 2, "plain", True)
    assert rule(one, 90).fold and rule(one, 90).outputs == 32
    assert not rule(replace(one, tokens=16), 90).fold and rule(replace(one, tokens=16), 90).outputs == 64
    for other in ({"turned": True}, {"doubled": False}, {"bytes": 4}):
        assert not rule(replace(one, **other), 90).fold, other


def test_large_tiles_of_plain_weights_are_fetched_from_hopper_on() -> None:
    prefill = Work(128, 768, 2048, 8, 4096, 2, "plain", True)
    assert [rule(prefill, capability).tma for capability in (80, 90, 100)] == [False, True, True]
    for other in ({"tokens": 16}, {"format": "int8"}, {"turned": True}, {"inputs": 2000}, {"bytes": 4}):
        assert not rule(replace(prefill, **other), 90).tma, other


def test_tuning_tries_tiles_and_pointers_and_parts() -> None:
    prefill, decode = (list(_candidates(_works(SHAPES[0], "plain", tokens))) for tokens in (4096, 4))
    assert {first.tma for first, _ in prefill} == {False, True} and {second.splits for _, second in decode} == {1, 2, 4, 8}
    assert all(first.rows == second.rows and first.splits == 1 for first, second in prefill + decode)
    assert {first.tma for first, _ in _candidates(_works(SHAPES[0], "int4", 4096))} == {False}


@pytest.mark.parametrize("format", sorted(STORED))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_weights_are_out_of_the_cache_when_one_token_reads_them_again(shape: Shape, format: str) -> None:
    read = shape.top_k * shape.weights * STORED[format]  # by one token
    copies = copies_past_cache(shape, format)
    assert shape.hit(1) == pytest.approx(shape.top_k)
    assert (copies == 1 and read >= L2_BYTES) or (copies - 1) * read >= L2_BYTES or copies == MOST_COPIES
    assert copies * read > 60 << 20, "the largest L2 cache of these GPUs"


def test_an_interrupted_benchmark_still_tells_what_it_has_measured(monkeypatch, capsys) -> None:
    endings: list[BaseException] = [KeyboardInterrupt(), CoterieError("a worker ended")]

    def rows(options: Any) -> Iterator[Row]:
        yield Row("a", "b", "us", 1.0)
        raise endings.pop(0)

    monkeypatch.setattr("coterie.launch.bench_plan.rows", rows)
    for said, field in (("interrupted; 1 rows were measured before", "interrupted"), ("a worker ended", "error")):
        assert main(["bench", "plan", "--json", "--traces", "."]) == 1
        out, err = capsys.readouterr()
        assert said in err
        told = json.loads(out)
        assert told[field] and [row["value"] for row in told["rows"]] == [1.0]


def test_options_that_would_have_no_effect_are_refused(tmp_path: Path, capsys) -> None:
    for given in (["--compile", "c", "--only", "x"], ["--tune", "t", "--peers", "."], ["--compile", "c", "--tune", "t"]):
        assert main(["bench", "kernels", *given]) == 2
        assert "expected one of them" in capsys.readouterr().err
    assert main(["bench", "kernels", "--traces", str(tmp_path)]) == 2
    assert "--traces: found it with bench kernels" in capsys.readouterr().err


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("format", ["plain", "int8"])
def test_a_layer_that_computes_something_else_is_no_figure(monkeypatch, turned: bool, format: str) -> None:
    """Of either form; and a tile that miscomputes, as racing ones do, is not measured."""
    if not interpreting():
        pytest.skip("a GPU has the real thing")
    shape = replace(TINY, turned=turned)
    layer = Layer(shape, format, "cpu")
    inputs = layer.inputs(5)
    right = layer.ours(inputs)(0)
    assert layer.error(right, inputs) < WRONG < layer.error(right * 1.1, inputs)
    assert layer.experts[0].first.data.is_contiguous() == (not turned or format != "plain")
    plain = Layer.ours
    monkeypatch.setattr(Layer, "ours", lambda self, *given: lambda turn: 1.1 * plain(self, *given)(turn))
    (row,) = shape_rows(shape, format, (3,), Machine(1e9, 1e9), "cpu")
    assert row.value is None and "ours: wrong by" in row.why


def test_ours_and_peers_get_the_same_inputs() -> None:
    layer = Layer(TINY, "plain", "cpu")
    for one, other in zip(layer.inputs(3), layer.inputs(3), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(layer.inputs(3)[0], layer.inputs(4)[0][:3])
