"""Placements that engines run with, brought in as plans: what was exported comes back, and goes on from there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_trace

from coterie.launch.cli import main
from coterie.placement.exports import EXPORTS
from coterie.placement.in_use import placement_in_use
from coterie.placement.plan import PlacementPlan, read_plan, save_plan
from coterie.placement.topology import Topology
from coterie.routing.errors import InputError
from coterie.routing.trace import RoutingTrace, save_trace

LAYERS = (1, 2, 3)


@pytest.fixture
def trace() -> RoutingTrace:
    return replace(make_trace(tokens=40), layer_ids=LAYERS)


@pytest.fixture
def plan() -> PlacementPlan:
    """Four ranks of three slots, all of them filled."""
    rng = np.random.default_rng(0)
    made = np.stack([rng.permutation(8).reshape(4, 2) for _ in LAYERS])
    copies = np.array([[rng.choice(np.setdiff1d(range(8), rank)) for rank in layer] for layer in made])
    by_rank = np.concatenate([made, copies[:, :, None]], 2).reshape(3, -1).astype(np.int32)
    return PlacementPlan(by_rank, 8, LAYERS, Topology(1, 4), model="m")


def exported(plan: PlacementPlan, engine: str, folder: Path) -> Path:
    save_plan(plan, folder / "p.json")
    out = folder / f"map{EXPORTS[engine].suffix or '.txt'}"
    assert main(["export", str(folder / "p.json"), "--to", engine, "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("engine", list(EXPORTS))
def test_what_was_exported_comes_back(engine: str, plan: PlacementPlan, trace: RoutingTrace, tmp_path: Path) -> None:
    found = placement_in_use(exported(plan, engine, tmp_path), engine, trace, plan.topology)
    assert (found.physical_to_logical == plan.physical_to_logical).all()
    assert (found.layer_ids, found.num_experts, found.model) == (LAYERS, 8, "m")


def test_the_map_in_a_recorders_dump(plan: PlacementPlan, trace: RoutingTrace, tmp_path: Path) -> None:
    """All decoder layers are in it; a rank that has an expert twice needs one of them."""
    table = torch.arange(12).remainder(8).repeat(5, 1)
    table[list(LAYERS)] = torch.tensor(plan.physical_to_logical).long()
    table[2] = torch.tensor([5, 5, 5, 0, 1, 2, 3, 4, 6, 7, 0, 1])
    torch.save({"records": [], "last_physical_to_logical_map": table}, tmp_path / "d.pt")
    found = placement_in_use(tmp_path / "d.pt", "sglang", trace, plan.topology)
    assert (found.physical_to_logical[[0, 2]] == plan.physical_to_logical[[0, 2]]).all()
    assert found.physical_to_logical[1].tolist() == [5, -1, -1, 0, 1, 2, 3, 4, 6, 7, 0, 1]


def test_it_is_judged_and_changed_within_a_few_moves(plan: PlacementPlan, trace: RoutingTrace, tmp_path: Path, capsys) -> None:
    file, kept = exported(plan, "sglang", tmp_path), tmp_path / "t"
    save_trace(trace, kept)
    out = tmp_path / "now.json"
    line = ["import", str(file), "--placement", "sglang", "--like", str(kept), "--topology", "1x4", "--out", str(out), "--json"]
    capsys.readouterr()
    assert main(line) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"plan": str(out), "layers": 3, "ranks": 4, "slots_per_rank": 3, "copies": 12}
    assert main(["evaluate", str(out), str(kept), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plans"]["plan"]["dispatch"] > 0
    new = tmp_path / "new.json"
    moved = ["plan", str(kept), "--topology", "1x4", "--slots-per-rank", "3", "--from", str(out), "--max-moves", "2"]
    assert main([*moved, "--out", str(new), "--time-limit", "2"]) == 0
    assert (read_plan(new).holds() & ~plan.holds()).sum() <= 2


@pytest.mark.parametrize(
    ("engine", "text", "message"),
    [
        ("llamafile", "x", "--placement: found 'llamafile', expected sglang or vllm or trtllm or ascend"),
        ("sglang", "x", "m.json: is not valid JSON"),
        (
            "sglang",
            json.dumps({"physical_to_logical_map": [[*range(8)]] * 2}),
            "m.json: layers: found 2, expected 4 or more, as --like has",
        ),
        ("sglang", json.dumps({"physical_to_logical_map": [[0] * 12] * 4}), "no slot with expert"),
        ("sglang", json.dumps({"physical_to_logical_map": [[*range(8), 0]] * 4}), "9 slots, expected a multiple of 4"),
        ("sglang", json.dumps({"physical_to_logical_map": [[*range(8), -1, 0, 0, 0]] * 4}), "expected expert ids from 0 to 7"),
        ("vllm", json.dumps([[*range(8)]] * 2), "expert map: found 2, expected 3 layers"),
        ("trtllm", "num_slots: 8\n", "load balancer: found other lines"),
        ("ascend", '{"layer_list": []}', "m.json: keys: found"),
    ],
)
def test_what_is_none_is_refused(engine: str, text: str, message: str, trace: RoutingTrace, tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(InputError) as caught:
        placement_in_use(tmp_path / "m.json", engine, trace, Topology(1, 4))
    assert message in str(caught.value)


def test_a_dump_for_other_ranks_is_refused(trace: RoutingTrace, tmp_path: Path) -> None:
    torch.save({"records": [], "last_physical_to_logical_map": torch.arange(12).remainder(8).repeat(4, 1)}, tmp_path / "d.pt")
    with pytest.raises(InputError, match=r"d.pt: slots: found 12, expected a multiple of 5 ranks"):
        placement_in_use(tmp_path / "d.pt", "sglang", trace, Topology(1, 5))


def test_what_does_not_go_together_is_refused(trace: RoutingTrace, tmp_path: Path, capsys) -> None:
    save_trace(trace, tmp_path / "t")
    (tmp_path / "m.json").write_text("[]")
    whole = ["--placement", "vllm", "--like", str(tmp_path / "t"), "--topology", "1x4"]
    for options, message in (
        (whole[:4], "--topology: found none with --placement"),
        (whole[:2] + whole[4:], "--like: found none with --placement"),
        (whole[2:4], "--like: found it without --placement"),
        ([*whole, "--model", "x"], "--model: found it with --placement"),
        ([str(tmp_path / "t"), *whole], "FILE: found 2 with --placement, expected one"),
    ):
        assert main(["import", str(tmp_path / "m.json"), *options, "--out", str(tmp_path / "o")]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "o").exists()
