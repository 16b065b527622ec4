"""Plans as files of other engines: what they read is what was planned, and what they would misread is never written."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.launch import exporting
from coterie.launch.cli import main
from coterie.placement.exports import EXPORTS, Engine, Layout, fill_empty, layout, verify
from coterie.placement.homes import HomeClass, Homes
from coterie.placement.plan import PlacementPlan, holders, save_plan
from coterie.placement.topology import Topology
from coterie.routing.errors import CoterieError, InputError

FULL = np.array([[0, 1, 2, 3, 0, 4], [4, 3, 2, 1, 0, 2]], dtype=np.int32)
GAPS = np.array([[0, 1, -1, 2, 3, 4], [4, 3, -1, 1, 0, 2]], dtype=np.int32)


def make_plan(slots: np.ndarray = FULL, layer_ids: tuple[int, ...] = (1, 3), ranks: int = 2, **changes: Any) -> PlacementPlan:
    return replace(PlacementPlan(slots, int(slots.max()) + 1, layer_ids, Topology(1, ranks)), **changes)


@st.composite
def plans(draw: st.DrawFn) -> PlacementPlan:
    """Any plan: replicas, empty slots, uneven ranks, gaps between the layers."""
    experts, ranks, layers = draw(st.integers(1, 7)), draw(st.integers(2, 4)), draw(st.integers(1, 3))
    width = draw(st.integers(-(-experts // ranks), experts + 1))
    layer_ids = tuple(sorted(draw(st.sets(st.integers(0, 6), min_size=layers, max_size=layers))))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    slots = np.full((layers, ranks, width), -1, dtype=np.int32)
    for layer in range(layers):
        homes = rng.permutation(np.repeat(np.arange(ranks), width))[:experts]
        for rank in range(ranks):
            own = np.flatnonzero(homes == rank)
            others = rng.permutation(np.setdiff1d(np.arange(experts), own))[: rng.integers(0, width - len(own) + 1)]
            held = rng.permutation(np.concatenate([own, others]))
            slots[layer, rank, rng.permutation(width)[: len(held)]] = held
    return PlacementPlan(slots.reshape(layers, -1), experts, layer_ids, Topology(1, ranks))


def written(plan: PlacementPlan, to: str, num_layers: int | None = None) -> tuple[str, Layout]:
    made = layout(plan, to, num_layers)
    return EXPORTS[to].write(made), made


@pytest.mark.parametrize("to", EXPORTS)
@settings(max_examples=60, deadline=None)
@given(plan=plans())
def test_what_an_engine_reads_holds_every_expert_where_the_plan_has_it(to: str, plan: PlacementPlan) -> None:
    if to == "ascend" and plan.slots_per_rank > plan.num_experts:
        with pytest.raises(InputError, match="slots_per_rank: found"):
            layout(plan, to)
        return
    text, made = written(plan, to)
    verify(text, to, made)
    rows = EXPORTS[to].read(text, made)
    own = rows[[made.layer_ids.index(layer) for layer in plan.layer_ids]]
    planned = plan.physical_to_logical
    assert (own[planned >= 0] == planned[planned >= 0]).all() and made.filled == (planned < 0).sum()
    held = holders(own, plan.num_experts, plan.ranks)
    assert (held >= plan.holds()).all() and held.any(2).all()
    if made.filled == 0:
        assert (held == plan.holds()).all()
    if plan.slots_per_rank <= plan.num_experts:
        assert held.sum() == own.size, "a rank has an expert twice"


def test_an_empty_slot_takes_the_expert_with_the_fewest_copies_that_its_rank_lacks() -> None:
    slots = np.array([[0, 1, -1, 2, 1, -1, 3, 0, 2]], dtype=np.int32)
    filled, count = fill_empty(slots, 4, 3)
    assert count == 2 and filled.tolist() == [[0, 1, 3, 2, 1, 0, 3, 0, 2]]
    crowded, _ = fill_empty(np.array([[0, 1, -1, -1, 1, -1]], dtype=np.int32), 2, 2)
    assert crowded.tolist() == [[0, 1, 0, 0, 1, 1]], "no other expert is left"


def test_sglang_gets_one_key_and_all_decoder_layers() -> None:
    text, made = written(make_plan(), "sglang", num_layers=5)
    trivial = [0, 1, 2, 3, 4, 0]
    rows = [trivial, FULL[0].tolist(), trivial, FULL[1].tolist(), trivial]
    assert json.loads(text) == {"physical_to_logical_map": rows} and made.unplanned == 3
    assert len(layout(make_plan(), "sglang").layer_ids) == 4
    deepseek = make_plan(np.tile(np.arange(16, dtype=np.int32), (58, 1)), tuple(range(3, 61)), 8)
    assert len(json.loads(written(deepseek, "sglang")[0])["physical_to_logical_map"]) == 61


def test_vllm_gets_a_list_of_rows_of_the_layers_with_experts() -> None:
    assert json.loads(written(make_plan(), "vllm")[0]) == FULL.tolist()


def test_trtllm_gets_yaml_that_a_yaml_reader_reads() -> None:
    text, _ = written(make_plan(), "trtllm")
    rows = {1: FULL[0].tolist(), 3: FULL[1].tolist()}
    assert text.startswith("num_slots: 6\nlayer_updates_per_iter: 0\ninitial_global_assignments:\n  1: [0, 1, 2, 3, 0, 4]\n")
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(text) == {"num_slots": 6, "layer_updates_per_iter": 0, "initial_global_assignments": rows}


def test_ascend_gets_layers_by_position_and_the_experts_of_every_device() -> None:
    value = json.loads(written(make_plan(), "ascend")[0])
    assert value["moe_layer_count"] == 2 and [e["layer_id"] for e in value["layer_list"]] == [0, 1]
    assert value["layer_list"][1] == {
        "layer_id": 1,
        "device_count": 2,
        "device_list": [{"device_id": 0, "device_expert": [4, 3, 2]}, {"device_id": 1, "device_expert": [1, 0, 2]}],
    }


@pytest.mark.parametrize(
    ("to", "plan", "num_layers", "message"),
    [
        ("sglang", make_plan(), 3, "--num-layers: found 3, expected 4 or more: the plan has layer 3"),
        ("sglang", make_plan(), 1 << 24, "--num-layers: found 16777216, expected at most 2796202 with 6 slots"),
        ("vllm", make_plan(), 4, "--num-layers: found 4, expected none: vllm is told of the layers with experts only"),
        ("ascend", make_plan(ranks=1, slots=np.arange(3, dtype=np.int32)[None], layer_ids=(0,)), None, "ranks: found 1"),
        ("ascend", make_plan(np.array([[0, 1, -1]] * 2, np.int32).reshape(1, 6), (0,)), None, "slots_per_rank: found 3, .* 2"),
        ("llamafile", make_plan(), None, "--to: found 'llamafile', expected sglang or vllm or trtllm or ascend"),
    ],
)
def test_what_an_engine_cannot_take_is_refused_by_name(to: str, plan: Any, num_layers: int | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        layout(plan, to, num_layers)


def edit_json(change: Callable[[Any], Any]) -> Callable[[str], str]:
    def edit(text: str) -> str:
        value = json.loads(text)
        return json.dumps(change(value) or value)

    return edit


def swap(old: str, new: str) -> Callable[[str], str]:
    return lambda text: text.replace(old, new)


@pytest.mark.parametrize(
    ("to", "edit", "message"),
    [
        (
            "sglang",
            swap('{"physical', '{"model": "m", "physical'),
            "keys: found .* expected exactly .'physical_to_logical_map'",
        ),
        ("sglang", swap("[0, 1, 2, 3, 0, 4]", "[-1, 1, 2, 3, 0, 4]"), "layer 1: found .* expected expert ids from 0 to 4"),
        ("sglang", swap("[4, 3, 2, 1, 0, 2]", "[4, 3, 2, 1, 3, 2]"), r"layer 3: found no slot with expert \[0\]"),
        ("sglang", swap("[4, 3, 2, 1, 0, 2]", "[4, 3, 2, 1, 0]"), "layer 3: found 5 slots, expected 6"),
        ("sglang", edit_json(lambda v: v["physical_to_logical_map"]), "keys: found list, expected exactly"),
        ("sglang", lambda text: text[:-3], "is not valid JSON"),
        ("vllm", edit_json(lambda v: v[:1]), "expert map: found 1, expected 2 layers"),
        ("vllm", edit_json(lambda v: {"map": v}), "expert map: found dict"),
        ("vllm", swap("3", "true"), "expert ids from 0 to 4"),
        ("trtllm", swap("num_slots: 6", "num_slots: 8"), "num_slots: found 8, expected 6"),
        ("trtllm", swap("per_iter: 0", "per_iter: 1"), "expected num_slots, layer_updates_per_iter: 0"),
        ("trtllm", swap("  3:", "  2:"), r"initial_global_assignments: found layers \(1, 2\), expected \(1, 3\)"),
        ("trtllm", swap("[0, 1", "[9, 1"), "expert ids from 0 to 4"),
        ("ascend", edit_json(lambda v: v.update(moe_layer_count=3)), "moe_layer_count: found 3, expected 2"),
        ("ascend", swap('"layer_id": 1', '"layer_id": 3'), r"layer_list\[1\].layer_id: found 3, expected 1"),
        ("ascend", swap('"device_count": 2', '"device_count": 3'), r"found \(3, 2\), expected 2 ranks"),
        ("ascend", swap("[0, 1, 2]", "[0, 0, 2]"), r"an expert twice on device \[0\]"),
        ("ascend", swap("[0, 1, 2]", "[0, 1]"), "found uneven devices"),
    ],
)
def test_what_an_engine_would_refuse_or_misread_does_not_read_back(to: str, edit: Any, message: str) -> None:
    text, made = written(make_plan(), to)
    with pytest.raises(InputError, match=message):
        EXPORTS[to].read(edit(text), made)
    with pytest.raises(CoterieError, match="defect of coterie"):
        verify(edit(text), to, made)


def test_an_expert_in_another_slot_is_found_by_reading_back() -> None:
    text, made = written(make_plan(), "vllm")
    with pytest.raises(CoterieError, match="layer 3, slot 0: read back 3, expected 4"):
        verify(text.replace("[4, 3,", "[3, 4,"), "vllm", made)


def test_the_vllm_plugin_of_the_documents_moves_experts_to_where_the_plan_has_them(tmp_path: Path, monkeypatch) -> None:
    import torch

    class DefaultPolicy:
        @classmethod
        def rebalance_experts(cls, weight, num_replicas, num_groups, num_nodes, num_ranks, old=None):
            return torch.zeros(len(weight), num_replicas, dtype=torch.int64)

    policies = ModuleType("vllm.distributed.eplb.policy")
    policies.EPLB_POLICIES = {"default": DefaultPolicy}  # type: ignore[attr-defined]
    for name in ("vllm", "vllm.distributed", "vllm.distributed.eplb"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "vllm.distributed.eplb.policy", policies)
    path = tmp_path / "map.json"
    path.write_text(written(make_plan(), "vllm")[0])
    monkeypatch.setenv("COTERIE_EXPERT_MAP", str(path))

    snippet = next(b for b in re.findall(r"```python\n(.*?)```", (ROOT / "docs/formats.md").read_text(), re.S) if "EPLB" in b)
    names: dict[str, Any] = {}
    exec(snippet, names)
    names["register"]()
    load = torch.ones(2, 5)
    moved = DefaultPolicy.rebalance_experts(load, 6, 1, 1, 2, torch.zeros(2, 6))
    assert moved.dtype == torch.int64 and moved.tolist() == FULL.tolist()
    for other in ((torch.ones(3, 5), 6), (load, 8)):
        with pytest.raises(ValueError, match=r"expert map: found 2 layers of 6 slots, expected \d layers of \d"):
            DefaultPolicy.rebalance_experts(*other, 1, 1, 2)


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    save_plan(make_plan(GAPS), tmp_path / "plan.json")
    return tmp_path / "plan.json"


@pytest.mark.parametrize(("to", "layers", "start"), [
    ("sglang", 4, "--ep-size 2 --ep-num-redundant-experts 1"), ("vllm", 2, '{"num_redundant_experts": 1}'),
    ("trtllm", 2, "moe_config: {load_balancer: "), ("ascend", 2, '{"eplb_config": {"expert_map_path": "'),
])  # fmt: skip
def test_the_command_writes_a_file_and_says_what_was_filled(tmp_path, plan_file, capsys, to, layers, start) -> None:
    out = tmp_path / "out.json"
    code, printed, err = run(capsys, "export", plan_file, "--to", to, "--out", out, "--json")
    assert code == 0 and json.loads(printed) == {"export": str(out), "to": to, "layers": layers, "slots": 6, "filled": 2}
    assert "2 empty slots are filled with copies" in err and start in err
    assert ("2 layers are not in the plan" in err) == (to == "sglang")
    assert ("the plan skips layers" in err) == (to in ("vllm", "ascend"))
    rows = EXPORTS[to].read(out.read_text(), layout(make_plan(GAPS), to))
    assert (rows >= 0).all() and sorted(p.name for p in tmp_path.iterdir()) == ["out.json", "plan.json"]


def test_homes_are_said_to_be_lost(tmp_path: Path, plan_file: Path, capsys, monkeypatch) -> None:
    made = make_plan()
    homes = Homes(tuple(HomeClass(r, 0.0, ()) for r in range(made.ranks)), ())
    monkeypatch.setattr(exporting, "read_plan", lambda path: replace(made, homes=homes))
    _, _, err = run(capsys, "export", plan_file, "--to", "vllm", "--out", tmp_path / "o.json")
    assert "the plan's homes are lost" in err and "filled" not in err


def test_wrong_arguments_name_what_is_allowed_and_write_nothing(tmp_path: Path, plan_file: Path, capsys) -> None:
    for arguments, message in (
        (("--to", "sglang", "--out", tmp_path / "o.txt"), "expected a name that ends in .json, as sglang wants it"),
        (("--to", "sglang", "--out", tmp_path / "o.json", "--num-layers", "2"), f"{plan_file}: --num-layers: found 2"),
        (("--to", "vllm", "--out", tmp_path / "o.json", "--num-layers", "0"), "--num-layers: found 0, expected 1 or more"),
        (("--to", "mlx", "--out", tmp_path / "o.json"), "invalid choice: 'mlx'"),
        (("--to", "vllm", "--out", tmp_path / "no" / "o.json"), "does not exist"),
    ):
        code, out, err = run(capsys, "export", plan_file, *arguments)
        assert code == 2 and out == "" and message in err and len(err.strip().splitlines()) <= 2, err
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_file_that_reads_back_wrong_never_appears(tmp_path: Path, plan_file: Path, capsys, monkeypatch) -> None:
    def write(made: Layout) -> str:
        return json.dumps(made.experts[::-1].tolist())

    broken: Engine = replace(EXPORTS["vllm"], write=write)
    monkeypatch.setitem(EXPORTS, "vllm", broken)
    out = tmp_path / "o.json"
    out.write_text("precious")
    code, _, err = run(capsys, "export", plan_file, "--to", "vllm", "--out", out)
    assert code == 1 and "read back" in err and "defect of coterie" in err
    assert out.read_text() == "precious" and len(list(tmp_path.iterdir())) == 2
