"""`--trace-events` on several ranks: a lane for each, sums that add up to the counters, and the pictures made of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from thread_ranks import load, on_ranks
from tiny_models import make_model

import coterie
from coterie.launch import timeline
from coterie.launch.cli import main
from coterie.moe.collectives import Group
from coterie.routing.errors import InputError

RANKS = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, int, int]], str]:
    """The file; of each rank rows, bytes and bytes beside rows as counted; what is told to people."""
    folder = tmp_path_factory.mktemp("timeline")
    make_model("mixtral", folder / "m")
    file = folder / "t.json"

    def work(group: Group) -> tuple[tuple[int, int, int], str]:
        model = load(folder / "m", dtype="float32", group=group, strategy="all_to_all")
        timeline.begin(group, None)
        model.generate([coterie.Prompt(token_ids=(n + 1, 2, 3)) for n in range(4)], 5, batch_size=2)
        counted = group.traffic.rows, group.traffic.bytes, group.traffic.overhead
        sums = timeline.write(file, group, len(model.shape.layer_ids), None)
        return counted, "" if sums is None else timeline.describe(sums, 1.0)

    found = on_ranks(RANKS, work)
    return file, [counted for counted, _ in found], found[0][1]


def test_every_rank_has_a_lane_with_what_it_did_in_every_layer(run) -> None:
    events = json.loads(run[0].read_text())["traceEvents"]
    lanes = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    assert sorted(lanes) == list(range(RANKS)) and all(name.startswith(f"rank {rank} (") for rank, name in lanes.items())
    for rank in range(RANKS):
        own = [e for e in events if e["ph"] == "X" and e["tid"] == rank]
        assert {"dispatch", "experts", "combine", "agree"} <= {e["name"] for e in own}
        assert {e["args"]["layer"] for e in own if e["name"] == "experts"} == {0, 1, 2}
        assert all(e["dur"] >= 0 for e in own)


def test_sums_are_the_counters(run) -> None:
    file, counted, told = run
    sums = timeline.read(file)
    assert sums is not None
    sent = np.array(sums.bytes)
    assert (sent.diagonal() == 0).all() and sent.sum(1).tolist() == [of_rows + beside for _, of_rows, beside in counted]
    assert np.array(sums.rows_by_layer).sum(1).tolist() == [rows for rows, _, _ in counted] and sent.sum() > 0
    assert min(sums.communication_seconds) > 0 and min(sums.experts_seconds) > 0
    source, to = np.unravel_index(sent.argmax(), sent.shape)
    assert f"links: {sent.sum() / 1e6:.1f} MB, most from rank {source} to {to}" in told


def test_the_page_has_the_link_matrix_and_the_layers(run, tmp_path: Path) -> None:
    assert main(["show", str(run[0]), "--out", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    assert all(title in page for title in ("Bytes on each link", "Rows by layer", "Time of each rank", "3 ranks on 1 host(s)"))


@pytest.mark.parametrize("change", [{"bytes": [[0, 1]]}, {"rows_by_layer": []}, {"hosts": ["a"]}, {"other": 1}])
def test_sums_of_another_shape_are_refused(change, run, tmp_path: Path) -> None:
    value = json.loads(run[0].read_text())
    value["coterie"] |= change
    (tmp_path / "t.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match=r"t.json: coterie: found .*, expected what generate --trace-events writes"):
        timeline.read(tmp_path / "t.json")


def test_a_timeline_and_the_outputs_are_not_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "o")
    assert main(["generate", "coterie-tiny", "--prompt", "x", "--out", out, "--trace-events", out]) == 2
    assert "--trace-events: found" in (said := capsys.readouterr().err) and "expected another file than --out" in said
