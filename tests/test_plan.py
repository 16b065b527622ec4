"""The plan and its file: round trips, every kind of wrong file, fuzzing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.placement.plan import Objective, PlacementPlan, read_plan, save_plan, slots_from_assignment
from coterie.placement.topology import PRESETS, Topology, from_json, parse_topology
from coterie.routing.errors import CoterieError, InputError


def make_plan(**changes: Any) -> PlacementPlan:
    slots = slots_from_assignment(np.array([[0, 0, 1, 1, 2, 2], [2, 1, 0, 0, 1, 2]]), 3, 2)
    plan = PlacementPlan(
        slots,
        6,
        (3, 4),
        Topology(1, 3),
        "m",
        "all_to_all",
        Objective("hops", 0.5, 0.4),
        1.5,
        7,
        inputs=({"file": "t", "sha256": "ab"},),
    )
    return replace(plan, **changes)


def test_a_plan_comes_back_as_it_was_written(tmp_path: Path) -> None:
    plan = make_plan()
    save_plan(plan, tmp_path / "p.json")
    back = read_plan(tmp_path / "p.json")
    assert (back.physical_to_logical == plan.physical_to_logical).all()
    assert replace(back, physical_to_logical=plan.physical_to_logical) == plan
    assert back.objective.gap == pytest.approx(0.2)
    assert back.experts_on(1, 0) == [2, 3]


def test_the_file_is_what_the_contract_says(tmp_path: Path) -> None:
    save_plan(make_plan(), tmp_path / "p.json")
    value = json.loads((tmp_path / "p.json").read_text())
    assert set(value) == {
        "format",
        "model",
        "num_experts",
        "layer_ids",
        "nodes",
        "ranks",
        "slots_per_rank",
        "physical_to_logical",
        "strategy",
        "objective",
        "seconds",
        "seed",
        "iterations",
        "workers",
        "inputs",
        "topology",
    }
    assert set(value["objective"]) == {"name", "value", "lower_bound", "gap"}
    assert value["physical_to_logical"] == [[0, 1, 2, 3, 4, 5], [2, 3, 1, 4, 0, 5]]
    assert (value["nodes"], value["ranks"], value["slots_per_rank"]) == (1, 3, 2)


def test_empty_slots_and_uneven_ranks_are_allowed(tmp_path: Path) -> None:
    plan = make_plan(physical_to_logical=np.array([[0, 1, 2, 3, -1, -1, 4, 5, -1]] * 2, dtype=np.int32))
    save_plan(plan, tmp_path / "p.json")
    assert read_plan(tmp_path / "p.json").experts_on(0, 1) == [3]


def edited(tmp_path: Path, edit: Any) -> Path:
    path = tmp_path / "p.json"
    save_plan(make_plan(), path)
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))
    return path


def change(*keys: Any, to: Any) -> Any:
    def edit(value: Any) -> None:
        for key in keys[:-1]:
            value = value[key]
        value[keys[-1]] = to

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change("format", to="coterie.plan.v9"), "format: found 'coterie.plan.v9', expected 'coterie.plan.v1'"),
        (change("physical_to_logical", 0, 0, to=1), "layer 3 lacks expert 0, expected each at least once"),
        (change("physical_to_logical", 1, to=[2, 2, 1, 4, 0, 5]), "layer 4 lacks expert 3"),
        (change("physical_to_logical", 0, 0, to=6), "found 6, expected -1 .empty. to 5"),
        (change("physical_to_logical", 0, 0, to=-2), "expected expert ids or -1"),
        (change("physical_to_logical", 0, to=[0, 1]), r"physical_to_logical\[0\]: found 2 slots, expected 6"),
        (change("physical_to_logical", to=[]), "found 0 layers, expected 2"),
        (change("physical_to_logical", to="x"), "physical_to_logical: found str layers"),
        (change("ranks", to=2), "topology: found 1 nodes, 3 ranks, expected 1 nodes and 2 ranks"),
        (change("slots_per_rank", to=1), "found 6 slots, expected 3 = ranks x slots_per_rank"),
        (change("ranks", to=-1), "ranks: found -1, expected an integer from 1 to 1048576"),
        (change("nodes", to=2), "ranks: found 3|topology: found 1 nodes"),
        (change("num_experts", to="6"), "num_experts: found '6'"),
        (change("layer_ids", to=[4, 3]), "layer_ids: found .4, 3., expected increasing"),
        (change("strategy", to="magic"), "strategy: found 'magic', expected all_to_all or"),
        (change("objective", "name", to="joy"), "objective.name: found 'joy'"),
        (change("objective", "gap", to=0.9), r"objective.gap: found 0.9, expected 0.1999"),
        (change("objective", "gap", to="x"), "objective.gap: found 'x', expected a number within 1e.18"),
        (change("objective", to=3), "objective: found int"),
        (change("seed", to=1.5), "seed: found 1.5, expected an integer of 0 or more"),
        (change("iterations", to=-1), "iterations: found -1, expected an integer of 0 or more"),
        (change("topology", to=None), "topology: found NoneType, expected a JSON object"),
        (change("topology", "speed", to=3), "topology: field 'speed' is unknown"),
        (change("inputs", to=[1]), "inputs: found"),
        (change("seed", to=None), "seed: found None"),
    ],
)
def test_a_wrong_plan_names_file_field_value_and_what_is_allowed(tmp_path: Path, edit, message) -> None:
    path = edited(tmp_path, edit)
    with pytest.raises(InputError, match=message) as caught:
        read_plan(path)
    assert str(caught.value).startswith(str(path)) and str(caught.value).count("\n") <= 1


def test_a_duplicate_on_one_rank_is_named(tmp_path: Path) -> None:
    def duplicate(value: Any) -> None:
        value["slots_per_rank"] = 3
        value["physical_to_logical"] = [[0, 1, 0, 2, 3, -1, 4, 5, -1], [0, 1, -1, 2, 3, -1, 4, 5, -1]]

    with pytest.raises(InputError, match="layer 3 has an expert twice on one rank"):
        read_plan(edited(tmp_path, duplicate))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '{"format": NaN}', "[" * 100_000, '"\\ud800"', "\x00\xff"])
def test_what_is_no_json_object_is_an_input_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(InputError, match=r"p\.json"):
        read_plan(path)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(InputError, match=r"p\.json"):
        read_plan(path)


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=6), v, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_whatever_a_field_holds_the_reader_answers_with_an_error_of_ours(tmp_path_factory, data) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "p.json"
    save_plan(make_plan(), path)
    value = json.loads(path.read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.sampled_from([*value, "topology.within", "objective.value", "topology.nodes", "objective.gap"]))
        target = value
        *parents, last = where.split(".")
        for parent in parents:
            target = target[parent] if isinstance(target.get(parent), dict) else {}
        target[last] = data.draw(ANY)
    path.write_text(json.dumps(value))
    try:
        read_plan(path)
    except CoterieError as error:
        assert str(path) in str(error)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_whatever_the_bytes_the_reader_answers_with_an_error_of_ours(tmp_path_factory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "p.json"
    path.write_bytes(data)
    with pytest.raises(InputError):
        read_plan(path)


@pytest.mark.parametrize("text", ["2x4", "1x1", "12x8", *PRESETS])
def test_a_topology_is_written_nodes_x_ranks_or_by_name(text: str) -> None:
    topology = parse_topology(text)
    assert from_json(json.loads(json.dumps(topology.to_json()))) == topology
    if "x" in text and text[0].isdigit():
        assert f"{topology.nodes}x{topology.ranks_per_node}" == text


def test_a_topology_file_takes_defaults_for_what_it_leaves_out(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text('{"nodes": 2, "ranks_per_node": 3, "between": {"bytes_per_second": 1e9, "latency_seconds": 0}}')
    topology = parse_topology(str(path))
    assert (topology.ranks, topology.between.bytes_per_second) == (6, 1e9)
    assert topology.within == Topology(1, 1).within


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0x4", "nodes: found 0, expected an integer of at least 1"),
        ("2x", "topology: found '2x', expected NODESxRANKS"),
        ("9999x9999", "found 99980001 ranks, expected at most 4096"),
        ("moon", "expected NODESxRANKS such as 2x4, a JSON file, or one of dgx-a100"),
        ("nowhere.json", "nowhere.json: cannot be read"),
    ],
)
def test_a_wrong_topology_says_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_topology(text)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"nodes": 2}, "field 'ranks_per_node' is missing"),
        ({"nodes": 2.0, "ranks_per_node": 1}, "nodes: found 2.0, expected an integer"),
        ({"nodes": 1, "ranks_per_node": 1, "row_bytes": -1}, "row_bytes: found -1, expected a positive number"),
        ({"nodes": 1, "ranks_per_node": 1, "within": {"bytes_per_second": 1}}, "within: found .* latency_seconds"),
        (
            {"nodes": 1, "ranks_per_node": 1, "within": {"bytes_per_second": "1", "latency_seconds": 0}},
            "found '1', expected",
        ),
    ],
)
def test_a_wrong_topology_file_names_the_field(tmp_path: Path, value, message) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps(value))
    with pytest.raises(InputError, match=message) as caught:
        parse_topology(str(path))
    assert str(path) in str(caught.value)
