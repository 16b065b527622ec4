"""Eviction policies on routing whose answer is known, against brute force and on synthetic traces; the command."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import make_trace
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.launch.cli import main
from coterie.offload.policies import MAKERS
from coterie.offload.simulate import Belady, Simulation, simulate, steps_of
from coterie.routing.trace import save_trace

Steps = list[list[np.ndarray]]


def as_steps(numbers: list[list[int]], layers: int = 1) -> Steps:
    """Each step's experts, `layers` steps a token."""
    made = [np.array(sorted(set(step)), dtype=np.int64) for step in numbers]
    return [made[i : i + layers] for i in range(0, len(made), layers)]


def run(name: str, steps: Steps, experts: int, slots: int) -> float:
    policy = Belady(steps, experts) if name == "belady" else MAKERS[name](len(steps[0]), experts, 2, slots)
    return simulate(steps, experts, slots, policy).hit_rate


def fewest_transfers(steps: list[list[int]], slots: int) -> int:
    """By trying every way to evict."""
    states = {frozenset(): 0}
    for step in steps:
        following: dict[frozenset[int], int] = {}
        for held, cost in states.items():
            missing = set(step) - held
            for kept in itertools.chain.from_iterable(
                itertools.combinations(held - set(step), n) for n in range(len(held) + 1)
            ):
                after = frozenset(kept) | frozenset(step)
                if len(after) <= slots:
                    following[after] = min(following.get(after, 1 << 30), cost + len(missing))
        states = following
    return min(states.values())


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=2), min_size=1, max_size=12), slots=st.integers(2, 5))
def test_belady_is_the_optimum_and_nobody_beats_it(steps: list[list[int]], slots: int) -> None:
    played = as_steps(steps)
    requests = sum(len(token[0]) for token in played)
    best = run("belady", played, 6, slots)
    assert best == pytest.approx(1 - fewest_transfers(steps, slots) / requests)
    assert all(run(name, played, 6, slots) <= best + 1e-12 for name in MAKERS)


def test_lru_and_lfu_give_up_what_they_say() -> None:
    steps = as_steps([[0], [0], [1], [2], [0], [1]])  # two slots: when 2 comes, 0 is the oldest, 1 the rarest
    assert run("lru", steps, 3, 2) == pytest.approx(1 / 6)  # 0 again, then 2 puts 0 out, and 0 puts 1 out
    assert run("lfu", steps, 3, 2) == pytest.approx(2 / 6)  # 2 puts 1 out: 0 is still there


def test_below_one_tokens_cycle_lru_hits_nothing_and_the_default_does() -> None:
    steps = [[np.array([0, 1 + t % 3]) for _ in range(8)] for t in range(60)]
    assert run("lru", steps, 4, 12) == 0.0
    assert run("coterie", steps, 4, 12) > 0.3


def test_all_that_fits_is_transferred_once() -> None:
    trace = make_trace(tokens=50)
    steps = steps_of(trace)
    used = len({(layer, int(e)) for token in steps for layer, picked in enumerate(token) for e in picked})
    requests = sum(len(picked) for token in steps for picked in token)
    for name in (*MAKERS, "belady"):
        assert run(name, steps, 8, 24) == pytest.approx(1 - used / requests), name


@pytest.mark.parametrize("share", [0.1, 0.125, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("seed", range(3))
def test_the_default_is_never_far_below_lru(share: float, seed: int) -> None:
    """On routing with structure, and where each token goes its own way, so that nothing can be learned."""
    structured = make_trace(tokens=300, layers=6, experts=16, seed=seed)
    rng = np.random.default_rng(seed)
    drifting = make_trace(tokens=300, layers=6, experts=16, seed=seed)
    ids = np.stack([[rng.permutation(16)[:2] if t % 4 == 0 else [-1, -1] for _ in range(6)] for t in range(300)])
    for t in range(300):
        ids[t] = ids[t - t % 4]  # picks come in runs of four tokens: recency is all there is
    drifting.expert_ids[:] = ids
    for trace in (structured, drifting):
        simulation = Simulation(trace, share)
        assert simulation.run("coterie").hit_rate >= simulation.run("lru").hit_rate - 0.006, simulation.slots


def test_the_command_prints_the_contracts_fields(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_trace(make_trace(tokens=60), tmp_path / "t.safetensors")
    assert main(["cache-sim", str(tmp_path / "t.safetensors"), "--slots", "0.25", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["slots"] == 6 and found["tokens"] == 60 and {"lru", "lfu", "coterie", "belady"} <= set(found["policies"])
    for name, policy in found["policies"].items():
        assert set(policy) - {"hidden"} == {"hit_rate", "gap_closed", "microseconds_per_layer"}
        assert policy["microseconds_per_layer"] > 0 and ("hidden" in policy) == ("+" in name)
    assert {"coterie+path", "coterie+transition", "coterie+popularity", "coterie+activation"} <= set(found["policies"])
    assert found["policies"]["lru"]["gap_closed"] == 0 and found["policies"]["belady"]["gap_closed"] == 1
    assert main(["cache-sim", str(tmp_path / "t.safetensors"), "--max-tokens", "10"]) == 0
    out = capsys.readouterr().out
    assert "gap to Belady closed" in out and "recall 1 ahead" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--slots", "0"], "--slots: found 0.0, expected more than 0 and at most 1"),
        (["--slots", "0.05"], r"--slots: found 0.05 \(1 experts\), expected at least 2"),
        (["--max-tokens", "0"], "--max-tokens: found 0, expected 1 or more"),
    ],
)
def test_what_cannot_be_simulated_is_refused(arguments, message, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_trace(make_trace(tokens=10), tmp_path / "t.safetensors")
    assert main(["cache-sim", str(tmp_path / "t.safetensors"), *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
