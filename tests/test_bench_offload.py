"""`coterie bench offload --quick`: every figure is there, of a small model, and what cannot be had says why."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from coterie.launch import bench_offload, offload_cases


@pytest.mark.processes
@pytest.mark.slow
def test_a_small_model_is_measured_in_place_and_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(offload_cases, "DROP", tmp_path / "nothing")  # other tests want what the system has cached
    monkeypatch.setattr(offload_cases, "missing", lambda: "llama.cpp is left out")
    for name, value in {"NEW": 2, "WARM": 4, "REPEATS": 2}.items():
        monkeypatch.setattr(bench_offload, name, value)
    threads = torch.get_num_threads()
    try:
        rows = list(bench_offload.rows(argparse.Namespace(quick=True, traces=tmp_path)))
    finally:
        torch.set_num_threads(threads)
    assert rows[0].metric == "dropped before every token" and rows[0].value == 0
    for way in ("in place", "packed"):
        found = {row.metric: row for row in rows if row.case.endswith(way)}
        for metric in ("decode", "time per token over the larger of computing and reading what is missed", "read", "hit rate"):
            assert found[metric].value is not None and found[metric].value > 0, (way, metric)
        assert found["decode over llama.cpp's mapped file"].why == "llama.cpp is left out"
        assert (found["decode over accelerate's disk offload"].value or 0) > 0, found
    (peak,) = [row for row in rows if row.metric == "peak memory over the budget"]
    assert peak.value is not None and 0 < peak.value <= bench_offload.OVER_BUDGET, peak
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(offload_cases.PREFIX)]
