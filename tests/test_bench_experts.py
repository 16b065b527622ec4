"""`coterie bench experts` on a model of a few kilobytes: every side runs, and what cannot be had says why."""

from __future__ import annotations

import argparse

import pytest
import torch

from coterie.launch import bench_experts

TINY = {"hidden_size": 128, "moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 2}


def test_all_formats_are_measured_beside_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SMALL": TINY, "PROMPT": 8, "NEW": 3, "LONG": 20}.items():
        monkeypatch.setattr(bench_experts, name, value)
    monkeypatch.setattr(bench_experts, "missing", lambda: "llama.cpp is left out")
    threads = torch.get_num_threads()
    try:
        rows = list(bench_experts.rows(argparse.Namespace(quick=True)))
    finally:
        torch.set_num_threads(threads)
    for phase in (bench_experts.DECODE, bench_experts.AFTER, bench_experts.PREFILL):
        for format in ("float32", "bfloat16", "int8", "int4"):
            (row,) = [row for row in rows if row.case.endswith(f"{phase}, {format}")]
            assert row.value is not None and row.value > 0, row
            if format in ("float32", "bfloat16"):
                assert all(row.peers[peer] for peer in row.peers if not peer.startswith("llama")), row
            assert "llama.cpp is left out" in row.why
