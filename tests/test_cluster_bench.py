"""`coterie bench cluster`: nodes as network namespaces, replayed routing, and rows from what workers find."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from coterie.launch import bench_cluster, cluster_cases, netns
from coterie.launch.cluster_sides import Side
from coterie.launch.replay import Replay
from coterie.routing.errors import CoterieError, InputError

HAVE = os.name == "posix" and os.geteuid() == 0 and all(shutil.which(program) for program in ("ip", "tc"))
needs_namespaces = pytest.mark.skipif(not HAVE, reason="network namespaces need root, ip and tc")

SINK = """
import socket
server = socket.create_server(("0.0.0.0", 5000))
print("ready", flush=True)
connection, _ = server.accept()
received = 0
while data := connection.recv(1 << 16):
    received += len(data)
print(received, flush=True)
"""
SOURCE = """
import socket, sys
socket.create_connection((sys.argv[1], 5000)).sendall(bytes(int(sys.argv[2])))
"""


def namespaces() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in listed.splitlines() if f"coterie-{os.getpid()}-" in line]


def send(source: netns.Node, to: netns.Node, count: int) -> float:
    """Seconds that `count` bytes take from one node to another."""
    sink = to.start([sys.executable, "-c", SINK], stdout=subprocess.PIPE, text=True)
    assert sink.stdout is not None
    with sink:
        assert sink.stdout.readline() == "ready\n"
        started = time.monotonic()
        sender = source.start([sys.executable, "-c", SOURCE, to.address, str(count)])
        assert int(sink.stdout.readline()) == count
        seconds = time.monotonic() - started
        assert sender.wait() == 0
    return seconds


@needs_namespaces
def test_links_carry_no_more_than_their_rate_and_count_what_is_sent() -> None:
    count = 4 << 20
    with netns.network(2, 1e9) as made:
        first, second = made.nodes
        made.shape(5e7)
        before = first.sent()
        # What may be sent at once leaves both ends of the link unshaped; a slow machine only makes this longer.
        assert send(first, second, count) > 0.9 * count * 8 / 5e7
        assert count < first.sent() - before < 1.2 * count
        assert second.sent() < 0.2 * count
    assert not namespaces()


ASKING = """
import socket, statistics, sys, time
connection = socket.create_connection((sys.argv[1], 5000))
seconds = []
for _ in range(9):
    started = time.perf_counter()
    connection.sendall(b"?")
    connection.recv(1)
    seconds.append(time.perf_counter() - started)
print(statistics.median(seconds))
"""
ANSWERING = """
import socket
server = socket.create_server(("0.0.0.0", 5000))
print("ready", flush=True)
connection, _ = server.accept()
while data := connection.recv(1):
    connection.sendall(data)
"""


def round_trip(source: netns.Node, to: netns.Node) -> float:
    """Seconds, median."""
    with to.start([sys.executable, "-c", ANSWERING], stdout=subprocess.PIPE, text=True) as answering:
        assert answering.stdout is not None and answering.stdout.readline() == "ready\n"
        asking = source.start([sys.executable, "-c", ASKING, to.address], stdout=subprocess.PIPE, text=True)
        said, _ = asking.communicate(timeout=60)
        return float(said)


@needs_namespaces
def test_links_between_far_nodes_take_their_latency_and_keep_their_rate() -> None:
    count = 4 << 20
    with netns.network(3, 1e9, far=True) as made:
        first, _, third = made.nodes
        assert round_trip(first, third) < 0.04
        made.shape(5e7, 0.02)
        assert round_trip(first, third) >= 0.04
        before = first.sent()
        assert send(first, third, count) > 0.9 * count * 8 / 5e7
        assert count < first.sent() - before < 1.2 * count
    assert not namespaces()
    assert made.switch.poll() is not None  # type: ignore[union-attr]


@needs_namespaces
def test_latency_needs_nodes_that_are_far() -> None:
    with (
        netns.network(2, 1e8) as made,
        pytest.raises(InputError, match=r"latency: found 0\.01, expected 0 s, or nodes that are far"),
    ):
        made.shape(1e8, 0.01)


@needs_namespaces
def test_processes_of_one_node_reach_each_other_unshaped_and_uncounted() -> None:
    with netns.network(2, 1e5) as made:  # at this rate it would take minutes
        node = made.nodes[0]
        before = node.sent()
        assert send(node, node, 4 << 20) < 60
        assert node.sent() - before < 1 << 16


@needs_namespaces
def test_namespaces_and_their_processes_are_gone_after_an_exception() -> None:
    with pytest.raises(KeyboardInterrupt), netns.network(2, 1e8) as made:
        assert len(namespaces()) == 3
        left = made.nodes[1].start([sys.executable, "-c", "import time; time.sleep(600)"])
        raise KeyboardInterrupt
    assert left.wait(timeout=10) != 0
    assert not namespaces()


@needs_namespaces
def test_a_terminated_run_leaves_nothing() -> None:
    with pytest.raises(KeyboardInterrupt), netns.network(2, 1e8):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    assert not namespaces()


@needs_namespaces
def test_two_networks_stand_side_by_side() -> None:
    with netns.network(2, 1e8) as first, netns.network(2, 1e8) as second:
        assert len(namespaces()) == 6
        assert not {n.namespace for n in first.nodes} & {n.namespace for n in second.nodes}
    assert not namespaces()


@needs_namespaces
def test_a_network_that_cannot_be_built_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: netns.Network, bits_per_second: float) -> None:
        raise CoterieError("no shaping here")

    monkeypatch.setattr(netns.Network, "shape", fails)
    with pytest.raises(CoterieError, match="no shaping here"), netns.network(2, 1e8):
        pass
    assert not namespaces()


def test_without_root_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(InputError, match=r"found user id 1000, expected 0 \(root\): run this under sudo"):
        next(iter(bench_cluster.rows(None)))  # type: ignore[arg-type]


def test_without_iproute2_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda program: None if program == "tc" else f"/sbin/{program}")
    with pytest.raises(InputError, match="found no program 'tc', expected iproute2: apt-get install iproute2"):
        netns.check_available()


class Experts(nn.Module):
    """As transformers' own: known by its attributes, called with hidden states, ids and weights."""

    is_transposed, has_gate, has_bias = False, True, False

    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.zeros(4, 1, 1))
        self.seen: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        self.seen = top_k_index
        return hidden_states


def called(replay: Replay, by_name: bool = False) -> list[torch.Tensor | None]:
    model = nn.ModuleList([Experts() for _ in range(2)])
    replay.attach(model)
    values = dict(top_k_index=torch.full((6, 2), 9), top_k_weights=torch.ones(6, 2))
    replay.at([2, 0], first=1, length=3)
    for module in model:
        module(torch.zeros(6, 1), **values) if by_name else module(torch.zeros(6, 1), *values.values())
    return [module.seen for module in model]  # type: ignore[misc]


@pytest.mark.parametrize("by_name", [False, True])
def test_replay_gives_each_layer_the_traces_experts_by_sequence_and_position(by_name: bool) -> None:
    ids = torch.arange(3 * 5 * 2 * 2).view(3, 5, 2, 2)  # [sequences, positions, layers, K]
    for layer, seen in enumerate(called(Replay(ids), by_name)):
        assert seen is not None
        assert seen.tolist() == torch.cat([ids[2, 1:4, layer], ids[0, 1:4, layer]]).tolist()


def test_replay_by_text_knows_sequences_by_their_tokens_and_positions() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Experts()])

        def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> list[list[int]]:
            count = input_ids.numel()
            self.layers[0](torch.zeros(count, 1), torch.full((count, 1), 99), torch.ones(count, 1))
            seen = self.layers[0].seen
            return seen[:, 0].view(input_ids.shape).tolist()  # type: ignore[no-any-return]

    token_ids = torch.tensor([[5, 5, 1, 2], [5, 6, 3, 4], [7, 7, 7, 7]])
    replay, model = Replay(torch.arange(12).view(3, 4, 1, 1), token_ids), Model()
    replay.attach(model)

    def run(tokens: list[list[int]], first: int) -> list[list[int]]:
        ids = torch.tensor(tokens)
        return model(input_ids=ids, position_ids=torch.arange(first, first + ids.shape[1]).expand(ids.shape))  # type: ignore[no-any-return]

    with replay.by_text():
        assert run([[5, 6], [7, 7], [5, 5]], 0) == [[4, 5], [8, 9], [0, 1]]
        assert run([[0], [0], [0]], 2) == [[6], [10], [2]]
        assert run([[0], [0], [0]], 5) == [[5], [9], [1]]
        assert run([[5, 6, 3, 4, 5, 6]], 0) == [[4, 5, 6, 7, 4, 5]]
    assert run([[5, 6]], 0) == [[99, 99]]


def test_without_replay_the_routers_choice_stays() -> None:
    assert all(seen is not None and (seen == 9).all() for seen in called(Replay(None)))


def test_synthetic_sequences_keep_company() -> None:
    ids = cluster_cases.company(16, 40, top_k=8)
    assert ids.shape == (16, 40, cluster_cases.LAYERS, 8)
    assert (np.diff(np.sort(ids, axis=3), axis=3) > 0).all()  # no token picks an expert twice
    load = np.array([np.bincount(sequence.ravel(), minlength=64) for sequence in ids[:, :, 0]]) / ids[0, :, 0].size
    spread = np.bincount(ids[:, :, 0].ravel(), minlength=64) / ids[:, :, 0].size
    assert np.sort(load, axis=1)[:, -8:].sum(1).mean() > 2 * np.sort(spread)[-8:].sum()
    assert (cluster_cases.company(16, 40, top_k=8) == ids).all()


def found(seconds: float, sent: float) -> dict[str, object]:
    return {"prefill_seconds": [seconds] * 5, "decode_seconds": [seconds] * 5, "prefill_bytes": [sent] * 5,
            "decode_bytes": [sent] * 5, "difference": 1e-7, "strategy": ["all_to_all"] * 5}  # fmt: skip


def a_case() -> cluster_cases.Case:
    ids = cluster_cases.company(4, 3, top_k=8)
    trace = cluster_cases.as_trace(ids, "m")
    return cluster_cases.Case("m", "m", 8, 2, 1, np.zeros((4, 3), dtype=np.int64), ids, trace, trace)


def test_rows_hold_each_figure_to_its_bar_and_say_why_one_is_missing() -> None:
    seconds = {
        "predicted": [{"prefill": 0.0, "decode": 0.5}] * 5,
        "communication": {"prefill": [0.1] * 5, "decode": [0.25] * 5},
    }
    promised = {"promised": [{"prefill": 10.0, "decode": 4.0}] * 5, **seconds}
    sides = {
        name: found(1.0, 2e6) | promised for name in (*bench_cluster.OURS[3:], bench_cluster.CHOSEN, bench_cluster.CHOSEN_GLOO)
    } | {bench_cluster.EP: found(2.0, 8e6)}
    cell = {"sides": sides, "skipped": {bench_cluster.HOMED: "not built yet", bench_cluster.LAYER: "not installed"}}
    layout = bench_cluster.Layout(2, 2, (1e8,), ())
    rows = list(bench_cluster.case_rows(a_case(), layout, bench_cluster.Bars(0.28, 2.8), {1e8: cell}))
    by_metric = {row.metric: row for row in rows}
    over = by_metric[f"prefill: chosen over {bench_cluster.EP}"]
    assert (over.value, over.bar, over.met) == (2.0, 2.8, False)
    assert by_metric[f"decode: chosen over {bench_cluster.EP}"].met
    chosen = by_metric["prefill: chosen (all_to_all)"]
    assert (chosen.value, chosen.ratio) == (8.0, 2.0)  # 4 sequences of 2 tokens in a second
    best = by_metric["prefill: chosen over the best peer"]
    assert (best.value, best.bar, best.met) == (2.0, 0.97, True)
    off = [by_metric[f"{phase}: the predicted tokens/s, off by a factor of"] for phase in ("prefill", "decode")]
    assert [(row.value, row.bar, row.met) for row in off] == [(1.25, 1.25, True), (1.0, 1.25, True)]  # 8 and 4 in a second
    told = [
        by_metric[f"{phase}: the predicted communication of a layer, off by a factor of"] for phase in ("prefill", "decode")
    ]
    assert [(row.value, row.met) for row in told] == [(None, None), (2.0, False)]
    missing = by_metric[f"sent between nodes, prefill: {bench_cluster.HOMED} over {bench_cluster.EP}"]
    assert (missing.value, missing.bar, missing.met) == (None, 0.28, None)
    assert "not built yet" in missing.why
    assert all(row.why for row in rows if row.value is None)


def test_predictions_are_held_against_the_turn_that_they_were_made_for() -> None:
    turns = {"promised": [{"decode": 4.0}, {"decode": 2.0}, {"decode": 1.0}], "decode_seconds": [1.0, 2.0, 4.0],
             "prefill_seconds": [1.0] * 3, "predicted": [{"decode": 0.0}, {}, {"decode": 0.25}],
             "communication": {"decode": [9.0, 9.0, 0.5]}, "strategy": ["overlapped", "all_to_all", "all_to_all"]}  # fmt: skip
    turns["promised"] = [turn | {"prefill": 8.0} for turn in turns["promised"]]
    cell = {"sides": {bench_cluster.CHOSEN: turns}, "skipped": {}}
    values = {row.metric: row.value for row in bench_cluster._predicted_rows("m", a_case(), cell)}
    assert values["decode: tokens/s, measured over predicted"] == 1.0  # 4 sequences, one token each
    assert values["decode: the predicted communication of a layer, off by a factor of"] == 2.0
    assert bench_cluster._labelled(cell, bench_cluster.CHOSEN) == "chosen (all_to_all 2, overlapped 1)"


def test_a_machine_that_becomes_slower_changes_no_ratio() -> None:
    slow = {"a": [1.0, 1.0, 4.0, 4.0, 4.0], "b": [1.1, 1.1, 4.4, 4.4, 4.4], "c": [0.5, 0.5, 2.0, 8.0, 8.0]}
    cell = {"sides": {name: {"decode_seconds": seconds} for name, seconds in slow.items()}}
    assert bench_cluster._faster(cell, "a", "b", "decode") == pytest.approx(1.1)
    assert bench_cluster._faster(cell, "a", "c", "decode") == 0.5
    assert bench_cluster._over_best(cell, "a", ("b", "c", "gone"), "decode") == 0.5
    assert bench_cluster._over_best(cell, "a", ("gone",), "decode") is None


def test_one_expert_a_token_is_held_to_its_bar_where_latency_rules() -> None:
    cell = {"sides": {bench_cluster.STAYING: found(1.0, 1.0), bench_cluster.RETURNING: found(1.5, 1.0),
                      bench_cluster.CHOSEN: found(1.2, 1.0)}, "skipped": {bench_cluster.EP: "not there"}}  # fmt: skip
    for seconds, bar in ((1e-3, None), (bench_cluster.RULING, 1.3)):
        layout = bench_cluster.Layout(4, 1, (1e9,), ("single",), seconds)
        by_metric = {row.metric: row for row in bench_cluster.coherent_rows(a_case(), layout, {1e9: cell})}
        over = by_metric[f"decode: {bench_cluster.STAYING} over {bench_cluster.RETURNING}"]
        assert (over.value, over.bar) == (1.5, bar)
        chosen = by_metric["decode: chosen over the better of both"]
        assert (chosen.value, chosen.met) == (pytest.approx(1 / 1.2), False)


def test_sides_of_a_case_run_every_sequence_once(tmp_path: Path) -> None:
    case = replace(a_case(), prompts=cluster_cases.as_trace(cluster_cases.company(8, 3, top_k=8), "m"))
    case = replace(case, token_ids=np.zeros((8, 3), dtype=np.int64))
    sides = cluster_cases.make_sides(case, 2, 2, tmp_path, 0.5)
    assert [side.name for side in sides] == [*reversed_ours(), *cluster_cases.PEERS]
    for side in sides:
        assert isinstance(side, Side)
        assert np.bincount(side.homes, minlength=4).tolist() == [2, 2, 2, 2]
        assert side.plan is None or Path(side.plan).is_file()


def reversed_ours() -> list[str]:
    names = cluster_cases
    return [names.CONTIGUOUS, names.PLANNED, names.HOMED, names.HOMED_FLAT, names.CHOSEN, names.CHOSEN_GLOO]


@pytest.mark.processes
@pytest.mark.slow
@needs_namespaces
def test_all_sides_of_the_embedded_model_agree_over_links(tmp_path: Path) -> None:
    from coterie.launch.cluster_driver import workers

    case = cluster_cases.embedded(tmp_path, per_rank=1, prefill=8, decode=2)
    case.save(tmp_path)
    sides = cluster_cases.make_sides(case, 2, 2, tmp_path, 1)
    with netns.network(2, 1e9) as links, workers(links, 2, tmp_path) as running:
        assert running.ask("transfer", bytes=1000)["bits_per_second"] > 0
        skipped = running.load(tmp_path, case.model, sides)["skipped"]
        cell = running.ask("cell", prefill=case.prefill, decode=case.decode, repeats=2)
        assert cluster_cases.CONTIGUOUS in cell["sides"]
        for name, side in cell["sides"].items():
            assert side["difference"] < 1e-4, name
            assert len(side["prefill_seconds"]) == 2
            assert min(side["prefill_bytes"]) > 0
        known = ("has no all-to-all expert parallelism", "deepspeed is not installed")
        assert all(name in cluster_cases.PEERS and any(why in reason for why in known) for name, reason in skipped.items())
        assert set(skipped) | set(cell["sides"]) == {side.name for side in sides}
        with pytest.raises(CoterieError, match=r"ended with exit code 1: .*nothing_like_it"):
            running.ask("nothing_like_it")
    assert not namespaces()
