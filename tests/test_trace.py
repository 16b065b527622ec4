"""The routing trace, its file, its errors."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import make_trace
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from coterie.routing.affinity import expert_load, measure, patterns, transition_counts
from coterie.routing.errors import CoterieError, InputError
from coterie.routing.trace import LoadStatistics, RoutingTrace, read_routing, read_trace, save_load, save_trace


def test_a_trace_comes_back_as_it_was_written(tmp_path: Path, trace) -> None:
    path = tmp_path / "t.safetensors"
    save_trace(trace, path)
    back = read_trace(path)
    for name in ("expert_ids", "sequence_ids", "positions", "router_weights"):
        assert (getattr(back, name) == getattr(trace, name)).all()
    for name in ("model", "num_experts", "layer_ids", "scenario", "phase"):
        assert getattr(back, name) == getattr(trace, name)


def test_the_file_is_what_the_contract_says(tmp_path: Path, trace) -> None:
    from safetensors import safe_open

    path = tmp_path / "t.safetensors"
    save_trace(trace, path)
    with safe_open(path, "np") as file:
        metadata = file.metadata()
        kinds = {k: (file.get_tensor(k).dtype.name, file.get_tensor(k).ndim) for k in file.keys()}  # noqa: SIM118
    assert metadata == {"format": "coterie.trace.v1", "model": "m", "num_experts": "8", "layer_ids": "[0, 1, 2]",
                        "scenario": "test", "phase": "prefill"}  # fmt: skip
    assert kinds == {"expert_ids": ("int16", 3), "sequence_ids": ("int32", 1), "positions": ("int32", 1),
                     "router_weights": ("float16", 3)}  # fmt: skip


def test_load_statistics_come_back_as_they_were_written(tmp_path: Path) -> None:
    statistics = LoadStatistics(np.arange(24).reshape(2, 3, 4), "m", (1, 2, 5), ("prefill", "decode"))
    save_load(statistics, tmp_path / "l.safetensors")
    back = read_routing(tmp_path / "l.safetensors")
    assert isinstance(back, LoadStatistics)
    assert (back.expert_load == statistics.expert_load).all()
    assert (back.model, back.layer_ids, back.scenarios) == ("m", (1, 2, 5), ("prefill", "decode"))
    with pytest.raises(InputError, match=r"l\.safetensors: format: found 'coterie.load.v1', expected 'coterie.trace.v1'"):
        read_trace(tmp_path / "l.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(expert_ids=np.full((4, 3, 2), 8, np.int16)), r"expert_ids: found 8, expected -1 \(unused\) to 7"),
        (dict(expert_ids=np.full((4, 3, 2), -2, np.int16)), r"expert_ids: found -2"),
        (dict(expert_ids=np.zeros((4, 3, 2), np.int16)), r"expert_ids: found one twice by token 0 in layer 0: \[0, 0\]"),
        (dict(expert_ids=np.zeros((0, 3, 2), np.int16)), r"expert_ids: found 0 tokens"),
        (dict(expert_ids=np.zeros((4, 3), np.int16)), r"expert_ids: found 2 dimensions"),
        (dict(layer_ids=(0, 1)), r"layer_ids: found 2 entries, expected 3"),
        (
            dict(layer_ids=(0, 2, 1)),
            r"layer_ids: found \[0, 2, 1\], expected layer numbers from 0 to 1048575 in increasing order",
        ),
        (dict(positions=np.zeros(3, np.int32)), r"positions: found shape \(3,\)"),
        (dict(sequence_ids=np.full(4, -1, np.int32)), r"sequence_ids: found -1, expected 0 or more"),
        (dict(phase="lunch"), r"phase: found 'lunch', expected prefill or decode or mixed"),
        (dict(num_experts=0), r"num_experts: found 0"),
        (dict(router_weights=np.zeros((4, 3, 1), np.float16)), r"router_weights: found shape"),
    ],
)
def test_a_wrong_trace_names_the_field_the_value_and_what_is_allowed(change, message) -> None:
    good = make_trace(tokens=4)
    with pytest.raises(InputError, match=message):
        replace(good, **change)


def rewritten(path: Path, metadata: dict[str, str] | None = None, drop: str = "") -> None:
    from coterie.routing.trace import trace_metadata

    tensors = {k: v for k, v in load_file(path).items() if k != drop}
    save_file(tensors, path, metadata={**trace_metadata(make_trace()), **(metadata or {})})


@pytest.mark.parametrize(
    ("metadata", "drop", "message"),
    [
        ({"format": "other"}, "", "format: found 'other', expected 'coterie.trace.v1' or"),
        ({"num_experts": "many"}, "", "num_experts: found 'many', expected an integer"),
        ({"num_experts": "²"}, "", "num_experts"),
        ({"layer_ids": "{}"}, "", "layer_ids: found '{}', expected a JSON list"),
        ({"layer_ids": '["a"]'}, "", "expected a JSON list of integers"),
        ({}, "positions", "positions: found no such tensor"),
    ],
)
def test_a_wrong_file_names_file_and_field(trace_file: Path, metadata, drop, message) -> None:
    rewritten(trace_file, metadata, drop)
    with pytest.raises(InputError, match=message) as caught:
        read_trace(trace_file)
    assert str(caught.value).startswith(str(trace_file))


def test_truncated_empty_and_missing_files_are_named(trace_file: Path, tmp_path: Path) -> None:
    data = trace_file.read_bytes()
    for length in (0, 4, 100, len(data) // 2, len(data) - 1):
        trace_file.write_bytes(data[:length])
        with pytest.raises(InputError, match="is it truncated"):
            read_trace(trace_file)
    with pytest.raises(InputError, match="no such file"):
        read_trace(tmp_path / "nothing")
    with pytest.raises(InputError, match="is a folder, expected a file"):
        read_trace(tmp_path)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_whatever_the_bytes_the_reader_answers_with_an_error_of_ours(tmp_path_factory, data) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "t.safetensors"
    save_trace(make_trace(tokens=5, layers=2, experts=4), path)
    original = path.read_bytes()
    kind = data.draw(st.sampled_from(["any bytes", "flipped", "cut", "header"]))
    if kind == "any bytes":
        path.write_bytes(data.draw(st.binary(max_size=300)))
    elif kind == "cut":
        path.write_bytes(original[: data.draw(st.integers(0, len(original)))])
    elif kind == "flipped":
        changed = bytearray(original)
        for _ in range(data.draw(st.integers(1, 6))):
            changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(bytes(changed))
    else:
        values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda v: st.lists(v, max_size=3)
                              | st.dictionaries(st.text(max_size=9), v, max_size=3), max_leaves=6)  # fmt: skip
        names = st.sampled_from(["expert_ids", "positions", "__metadata__", "sequence_ids"])
        text = json.dumps(data.draw(st.dictionaries(names, values))).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
    try:
        read_routing(path)
    except CoterieError as error:
        assert str(path) in str(error)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, trace, monkeypatch, no_partial_files) -> None:
    path = tmp_path / "t.safetensors"
    path.write_text("precious")
    monkeypatch.setattr(
        "coterie.routing.trace.safetensors_header", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    with pytest.raises(CoterieError, match="No space left"):
        save_trace(trace, path)
    assert path.read_text() == "precious"


def test_the_same_contents_are_the_same_bytes(tmp_path: Path, trace) -> None:
    """Their digest stands in plans."""
    for name in "ab":
        save_trace(trace, tmp_path / name)
        save_load(LoadStatistics(np.ones((1, 2, 3), np.int64), "m", (0, 1), ("x",)), tmp_path / f"l{name}")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "la").read_bytes() == (tmp_path / "lb").read_bytes()


def test_a_name_that_no_file_can_hold_is_refused(trace, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected text that UTF-8 can write"):
        save_trace(replace(trace, model="m\udcff"), tmp_path / "t")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_refused(trace, wrong: float) -> None:
    weights = np.ones(trace.expert_ids.shape, np.float16)
    weights[3, 1, 0] = wrong
    with pytest.raises(InputError, match="router_weights: found nan or infinity, expected numbers"):
        replace(trace, router_weights=weights)


def test_load_counts_every_pair_once(trace) -> None:
    load = expert_load(trace)
    for layer in range(trace.layers):
        for expert in range(trace.num_experts):
            assert load[layer, expert] == (trace.expert_ids[:, layer] == expert).sum()


def test_transitions_count_all_pairs_of_a_token_and_no_unused_slot() -> None:
    ids = np.array([[[0, 1], [2, -1]], [[3, -1], [2, 0]]], dtype=np.int16)
    trace = replace(make_trace(tokens=2, layers=2, experts=4), expert_ids=ids, router_weights=None)
    counts = transition_counts(trace)[0]
    expected = np.zeros((4, 4))
    expected[0, 2] = expected[1, 2] = expected[3, 2] = expected[3, 0] = 1
    assert (counts == expected).all()


def test_patterns_are_the_distinct_sets_with_their_homes(trace) -> None:
    homes = trace.sequence_ids % 3
    found = patterns(trace, 1, homes, 3)
    assert found.weight.sum() == trace.tokens == found.by_home.sum()
    sets = {frozenset(np.flatnonzero(row)): i for i, row in enumerate(found.experts)}
    assert len(sets) == len(found.weight)
    for ids, home in zip(trace.expert_ids[:, 1], homes, strict=True):
        found.by_home[sets[frozenset(ids.tolist())], home] -= 1
    assert not found.by_home.any()


def random_trace(tokens: int, experts: int, top_k: int, unused: float, seed: int) -> RoutingTrace:
    """Three layers without structure, a share of the slots unused; half of the tokens are picked from a tenth of them."""
    rng = np.random.default_rng(seed)
    ids = rng.random((tokens, 3, experts)).argsort(2)[:, :, :top_k].astype(np.int16)
    ids[rng.random(ids.shape) < unused] = -1
    ids[: tokens // 2] = ids[rng.integers(0, 1 + tokens // 10, tokens // 2)]
    zeros = np.zeros(tokens, dtype=np.int32)
    return RoutingTrace(ids, zeros, zeros, "m", experts, (0, 1, 2))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 9999), tokens=st.integers(1, 90), experts=st.sampled_from([1, 2, 7, 12, 255, 256, 257, 600]),
    top_k=st.sampled_from([1, 2, 7, 8, 10, 12]), unused=st.sampled_from([0.0, 0.2, 1.0]),
    block=st.sampled_from([1, 300, 1 << 19]),
)  # fmt: skip
def test_statistics_equal_counting_token_by_token(seed, tokens, experts, top_k, unused, block) -> None:
    trace = random_trace(tokens, experts, min(top_k, experts), unused, seed)
    homes = np.random.default_rng(seed).integers(0, 3, tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("coterie.routing.affinity.BLOCK", block)
        found = measure(trace, homes, 3)
    sets = [[tuple(sorted(int(e) for e in ids if e >= 0)) for ids in token] for token in trace.expert_ids]
    for layer in range(3):
        load = Counter(e for token in sets for e in token[layer])
        assert dict(enumerate(found.load[layer])) == {e: load[e] for e in range(experts)}
        p = found.patterns[layer]
        stored = [tuple(int(e) for e in row if e >= 0) for row in p.ids]
        assert [tuple(np.flatnonzero(row).tolist()) for row in p.experts] == stored
        assert p.ids.dtype == np.int16 and sorted(p.ids.tolist()) == p.ids.tolist() and (np.diff(p.ids) >= 0).all()
        assert dict(zip(stored, p.weight, strict=True)) == Counter(token[layer] for token in sets)
        by_home = Counter((token[layer], int(home)) for token, home in zip(sets, homes, strict=True))
        assert {(s, h): p.by_home[i, h] for i, s in enumerate(stored) for h in range(3) if p.by_home[i, h]} == by_home
    for layer in range(2):
        pairs = Counter((e, f) for token in sets for e in token[layer] for f in token[layer + 1])
        counts = found.transitions[layer]
        assert {(int(e), int(f)): counts[e, f] for e, f in np.argwhere(counts)} == pairs
    assert found.tokens == tokens


def test_an_expert_picked_twice_is_found_wherever_it_is(monkeypatch) -> None:
    monkeypatch.setattr("coterie.routing.trace.CHECKED_AT_ONCE", 50)
    good = random_trace(20, 12, 5, 0.3, 0)
    for token, layer, a, b in [(0, 0, 0, 1), (7, 1, 1, 4), (19, 2, 0, 4), (19, 2, 3, 4)]:
        ids = good.expert_ids.copy()
        ids[token, layer] = [-1, -1, -1, -1, -1]
        ids[token, layer, [a, b]] = 3
        with pytest.raises(
            InputError, match=f"expert_ids: found one twice by token {token} in layer {good.layer_ids[layer]}: "
        ):
            replace(good, expert_ids=ids)
