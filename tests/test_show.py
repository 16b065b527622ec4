"""The report in a real browser, where there is one."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import make_trace

import coterie
from coterie.launch.demo import company
from coterie.launch.show import write_report
from coterie.placement.planner import baseline_plan
from coterie.placement.topology import Topology
from coterie.routing.errors import InputError
from coterie.routing.trace import LoadStatistics, RoutingTrace

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--hide-scrollbars"]  # fmt: skip


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_report_is_drawn_by_a_real_browser(tmp_path: Path) -> None:
    from matplotlib.image import imread

    trace = make_trace(tokens=300, layers=4, experts=16)
    plan = coterie.plan(trace, coterie.PlanRequest(Topology(1, 4), time_limit=1, max_load=2))
    write_report(tmp_path / "r.html", plan, trace)
    shot = tmp_path / "shot.png"
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,2600", f"--screenshot={shot}",
               (tmp_path / "r.html").as_uri()]  # fmt: skip
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    pixels = imread(shot)[:, :, :3]
    assert pixels.shape[:2] == (2600, 1200)
    bands = np.array_split(pixels[:2200], 8)
    assert all(band.std() > 0.02 for band in bands), "a part of the page is blank"
    dom = subprocess.run(
        [*command[:-2], "--dump-dom", command[-1]], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    for title in (
        "What it saves",
        "Load of each rank",
        "Rows on each link",
        "The plan",
        "Load of each expert",
        "Affinity of consecutive",
        "What a cache of experts would find",
    ):
        assert title in dom
    assert dom.count("<svg") == 6


def test_names_from_files_are_escaped(tmp_path: Path) -> None:
    trace = make_trace(model="<script>alert(1)</script>")
    write_report(tmp_path / "r.html", None, trace)
    text = (tmp_path / "r.html").read_text()
    assert "<script>" not in text and "&lt;script&gt;alert(1)" in text


def test_a_report_is_the_same_twice(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_report(tmp_path / name, baseline_plan("packed", make_trace(), Topology(2, 2), "all_to_all"), make_trace())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_load_statistics_and_single_layers_are_drawn(tmp_path: Path) -> None:
    statistics = LoadStatistics(np.ones((2, 3, 8), np.int64), "m", (0, 1, 2), ("a", "b"))
    write_report(tmp_path / "r.html", baseline_plan("packed", statistics, Topology(1, 2), "all_to_all"), statistics)
    assert "Rows on each link" not in (tmp_path / "r.html").read_text()
    write_report(tmp_path / "s.html", None, make_trace(layers=1))
    assert "Affinity" not in (tmp_path / "s.html").read_text()


def test_a_plan_and_a_trace_of_different_models_are_not_drawn_together(tmp_path: Path) -> None:
    plan = baseline_plan("packed", make_trace(model="other"), Topology(1, 2), "all_to_all")
    with pytest.raises(InputError, match="model: the trace has 'm', the plan 'other'"):
        write_report(tmp_path / "r.html", plan, make_trace())
    assert not (tmp_path / "r.html").exists()


def test_without_matplotlib_the_way_out_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"matplotlib is not installed.*pip install -c constraints.txt -e '.\[plot\]'"):
        write_report(tmp_path / "r.html", None, make_trace())


def test_the_demo_says_which_experts_are_together_and_why() -> None:
    """Two layers; in the second, experts 0 and 3 are always picked together, 1 and 2 never but by chance."""
    ids = np.array([[[0, 1], [0, 3]], [[2, 3], [0, 3]], [[1, 2], [0, 3]], [[0, 3], [1, 2]]], dtype=np.int16)
    trace = RoutingTrace(ids, np.arange(4, dtype=np.int32), np.zeros(4, dtype=np.int32), "m", 4, (5, 7))
    plan = replace(baseline_plan("contiguous", trace, Topology(1, 2), "all_to_all"),
                   physical_to_logical=np.array([[0, 1, 2, 3], [0, 3, 1, 2]], dtype=np.int32))  # fmt: skip
    who, why, share = company(plan, trace)
    assert who.split(maxsplit=4)[3:] == ["7", "rank 0: 0 3; rank 1: 1 2"]
    assert "75% of tokens pick both 0 and 3, 56.2% if picks were independent" in why
    assert "for 100% of tokens, 0% if dealt in order" in share
    (alone,) = company(baseline_plan("contiguous", trace, Topology(1, 4), "all_to_all"), trace)
    assert "rank 0: 0; rank 1: 1; rank 2: 2; rank 3: 3" in alone  # there is nothing that is together
