"""The kernels compiled for GPUs that are not there, against the committed table (`coterie bench kernels --compile`)."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import product
from pathlib import Path

import pytest
from conftest import ROOT

pytest.importorskip("triton")

import triton

from coterie.kernels import cubin
from coterie.kernels.cubin import pending
from coterie.kernels.tiles import rule
from coterie.launch.bench_kernels import compiled_rows, sources_digest

WAITING = "wgmma.wait_group.sync.aligned {};\n"
PRODUCT = "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {{%f1,%f2}}, {}, %rd2, %p1, 1, 1;\n"
SAMPLE = 7  # each so-manieth kernel is compiled where nothing has changed
COMMITTED = ROOT / "bench" / "results" / "machine_code.json"


def test_products_that_run_on_over_a_wait_are_found_by_their_left_operand() -> None:
    from_registers, from_memory = PRODUCT.format("{%r1,%r2,%r3,%r4}"), PRODUCT.format("%rd1")
    assert pending(from_registers + WAITING.format(7) + WAITING.format(0)) == 7
    assert pending(from_registers + WAITING.format(0)) == 0
    assert pending(from_memory + WAITING.format(1)) == 0


def test_every_kernel_that_the_rules_come_to_is_in_the_table() -> None:
    """Also for numbers of tokens in between: a tile that nobody compiled could spill unseen."""
    made = json.loads(COMMITTED.read_text())["kernels"]
    compiled = {
        (k["arch"], "first product" in k["case"], k["case"].split(", ")[1], tuple(k["tile"].items())) for k in made if k["tile"]
    }
    for arch, format, sizes, first in product(cubin.MATRIX, cubin.POINTERS, cubin.MODELS.values(), (True, False)):
        if (format == "fp8" and arch < 89) or (sizes[4] and format != "plain"):
            continue
        for tokens in (*range(1, 200), *range(200, 20_000, 331)):
            tile = rule(cubin.work_of(sizes, tokens, format, first), arch)
            assert (arch, first, format, tuple(asdict(tile).items())) in compiled, (arch, format, sizes, tokens, first, tile)


@pytest.mark.slow
def test_no_product_spills_outgrows_shared_memory_or_leaves_the_tensor_cores(tmp_path: Path) -> None:
    before = json.loads(COMMITTED.read_text())
    known = (before["sources"], before["triton"]) == (sources_digest(), triton.__version__)
    every = SAMPLE if known else 1  # the table has been made from just these kernels, by this compiler
    rows = list(compiled_rows(tmp_path / "c.json", every))
    assert len(rows) > 200 / every and not [f"{row.case}: {row.metric} {row.value}" for row in rows if not row.met]
    made = json.loads((tmp_path / "c.json").read_text())
    before["kernels"] = before["kernels"][::every]
    assert [(k["arch"], k["case"]) for k in made["kernels"]] == [(k["arch"], k["case"]) for k in before["kernels"]]
    assert {k["arch"] for k in made["kernels"]} == {80, 90, 100}
    if made["triton"] != before["triton"]:
        pytest.skip(f"the table is of Triton {before['triton']}, this is {made['triton']}: bars hold, figures are not compared")
    for now, then in zip(made["kernels"], before["kernels"], strict=True):
        assert now["tile"] == then["tile"], (
            "make the table anew: coterie bench kernels --compile bench/results/machine_code.json"
        )
        assert now["registers"] <= then["registers"] + 16 and now["shared"] <= then["shared"], (now, then)
