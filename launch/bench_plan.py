"""`coterie bench plan`: the planner on recorded and synthetic routing, beside the methods of others.

Recorded traces are looked for in `--traces` by name; a case whose file is not there is a row that says so.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from coterie.launch.bench import Row, named
from coterie.placement.advice import halves, renumbered
from coterie.placement.cost import evaluate
from coterie.placement.deadline import Deadline
from coterie.placement.planner import PEERS, PlanRequest, baseline_plan, plan_whole
from coterie.placement.scenarios import gathered, summarised
from coterie.placement.spread import Child
from coterie.placement.topology import Topology
from coterie.routing import synth
from coterie.routing.affinity import measure
from coterie.routing.errors import InputError
from coterie.routing.trace import LoadStatistics, RoutingTrace, read_routing, read_trace, save_trace

WORKERS = 2
METHOD_SECONDS = 10.0
OBJECTIVES = ("hops", "coherent", "dispatch", "load", "time")
TIED, TIED_SMALL, SMALL_TRACE = 1.005, 1.02, 1000


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """All cases, or with `quick` those that take under three minutes together; of these, `only` the ones so named."""
    traces = _Traces(options.traces)
    cases = (_proven, _quick_gap, _dispatch, _load_quick, _aligned) if options.quick else (
        _proven, _gaps, _dispatch, _homes, _load, _left_out, _scale, _aligned, _million, _methods,
    )  # fmt: skip
    by_name = {case.__name__.strip("_"): case for case in cases}
    for name in named(by_name, options.only):
        try:
            yield from by_name[name](traces)
        except _MissingError as missing:
            yield Row(name, "all", "", None, why=str(missing))


class _MissingError(InputError):
    """A recorded trace is not there."""


class _Traces:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, name: str) -> Any:
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            raise _MissingError(f"{path} is not there: give --traces DIR")
        return read_routing(path)

    def both_domains(self) -> tuple[RoutingTrace, RoutingTrace]:
        """Even and odd sequences of both DeepSeek-V2-Lite domains, numbered anew."""
        first, second = self.get("deepseek-v2-lite-intent"), self.get("deepseek-v2-lite-law")
        whole = _joined(first, second)
        return tuple(renumbered(whole.select(whole.sequence_ids % 2 == parity)) for parity in (0, 1))  # type: ignore[return-value]


def _joined(first: RoutingTrace, second: RoutingTrace) -> RoutingTrace:
    offset = int(first.sequence_ids.max()) + 1
    return replace(
        first, expert_ids=np.concatenate([first.expert_ids, second.expert_ids]), router_weights=None, scenario="both",
        sequence_ids=np.concatenate([first.sequence_ids, second.sequence_ids + offset]).astype(np.int32),
        positions=np.concatenate([first.positions, second.positions]),
    )  # fmt: skip


def _request(topology: Topology, seconds: float, **settings: Any) -> PlanRequest:
    return PlanRequest(topology, time_limit=seconds, workers=WORKERS, **settings)


def _proven(traces: _Traces) -> Iterator[Row]:
    trace = traces.get("mixtral-8x7b-humaneval")
    started = time.perf_counter()
    made = plan_whole(trace, _request(Topology(1, 4), 30, objective="hops"))
    case = "mixtral 32x8, 4 ranks, hops"
    yield Row(case, "gap", "", made.objective.gap, 0.0)
    yield Row(case, "time to proof", "s", time.perf_counter() - started, 2.0)


def _gap(traces: _Traces, ranks: int, seconds: float, bar: float) -> Row:
    made = plan_whole(traces.get("deepseek-v2-lite-intent"), _request(Topology(1, ranks), seconds, objective="hops"))
    return Row(f"deepseek-v2-lite-intent, {ranks} ranks, hops, {seconds:g} s", "gap", "", made.objective.gap, bar)


def _quick_gap(traces: _Traces) -> Iterator[Row]:
    yield _gap(traces, 8, 30, 0.02)


def _gaps(traces: _Traces) -> Iterator[Row]:
    yield _gap(traces, 8, 30, 0.02)
    for ranks, bar in ((2, 0.07), (4, 0.025), (16, 0.015), (32, 0.015)):
        yield _gap(traces, ranks, 60, bar)


def _dispatch(traces: _Traces) -> Iterator[Row]:
    yield from _judged_dispatch(traces, False, (2.95, 0.45, 1.17))


def _homes(traces: _Traces) -> Iterator[Row]:
    yield from _judged_dispatch(traces, True, (2.87, None, 1.17))


def _judged_dispatch(traces: _Traces, homes: bool, bars: tuple[float | None, ...]) -> Iterator[Row]:
    seen, unseen = traces.both_domains()
    topology = Topology(1, 8)
    made = plan_whole(seen, _request(topology, 30, objective="dispatch", max_load=1.1, homes=homes))
    found = evaluate(made, unseen)
    others = {name: evaluate(_peer(name, seen, topology), unseen) for name in ("contiguous", "round_robin", "packed")}
    case = f"deepseek-v2-lite both domains, 8 ranks, dispatch{' with homes' if homes else ''}, 30 s"
    for metric, bar in zip(("dispatch", "busiest_rank", "load"), bars, strict=True):
        peers = {name: getattr(report, metric) for name, report in others.items()}
        yield Row(case, f"{metric}, unseen sequences", "", getattr(found, metric), bar, peers)
    if homes:
        from coterie.placement.cost import plan_homes

        tokens = np.bincount(plan_homes(made, unseen), minlength=8)
        yield Row(case, "busiest home over mean", "", float(tokens.max() / tokens.mean()), 1.1)


def _peer(name: str, seen: RoutingTrace, topology: Topology, seconds: float = METHOD_SECONDS) -> Any:
    if name in ("contiguous", "round_robin", "packed"):
        return baseline_plan(name, seen, topology, "all_to_all")
    return plan_whole(seen, _request(topology, seconds, objective="hops", method=name))


def _load_quick(traces: _Traces) -> Iterator[Row]:
    yield _load_row(traces, Topology(4, 8), 9, 20, 1.025)


def _load(traces: _Traces) -> Iterator[Row]:
    yield _load_row(traces, Topology(4, 8), 9, 60, 1.025)
    yield _load_row(traces, Topology(8, 8), 5, 60, 1.05)


def _load_row(traces: _Traces, topology: Topology, slots: int, seconds: float, bar: float) -> Row:
    statistics = traces.get("deepseek-v3-load")
    made = plan_whole(statistics, _request(topology, seconds, objective="load", robust="worst", slots_per_rank=slots))
    contiguous = baseline_plan("contiguous", statistics, topology, "all_to_all")
    plans = {"contiguous": contiguous, "packed": _packed(statistics, topology, slots)}
    peers: dict[str, float | None] = {name: _worst_load(p, statistics) for name, p in plans.items()}
    case = f"deepseek-v3-load, {topology.ranks} ranks, {slots} slots, worst of {len(statistics.scenarios)}, {seconds:g} s"
    return Row(case, "load", "", _worst_load(made, statistics), bar, peers)


def _packed(statistics: LoadStatistics, topology: Topology, slots: int) -> Any:
    """Greedy replication and packing of the scenarios' mean into as many slots."""
    return plan_whole(statistics, _request(topology, METHOD_SECONDS, objective="load", method="packed", slots_per_rank=slots))


def _worst_load(made: Any, statistics: LoadStatistics) -> float:
    return summarised(made, gathered([statistics]), "load", "worst")


def _left_out(traces: _Traces) -> Iterator[Row]:
    statistics = traces.get("deepseek-v3-load")
    for out, name in enumerate(statistics.scenarios):
        kept = [i for i in range(len(statistics.scenarios)) if i != out]
        seen = replace(
            statistics, expert_load=statistics.expert_load[kept], scenarios=tuple(statistics.scenarios[i] for i in kept)
        )
        unseen = replace(statistics, expert_load=statistics.expert_load[[out]], scenarios=(name,))
        made = plan_whole(seen, _request(Topology(4, 8), 20, objective="load", robust="worst", slots_per_rank=9))
        packed = _worst_load(_packed(seen, Topology(4, 8), 9), unseen)
        yield Row(f"deepseek-v3-load, 32 ranks, 9 slots, without {name}", "load of it", "", _worst_load(made, unseen), 1.07,
                  {"packed": packed})  # fmt: skip


def _scale(traces: _Traces) -> Iterator[Row]:
    case = "synthetic misaligned 58x256, 64 ranks (8x8), hops"
    short, long = (_apart("scale", family="misaligned", seconds=s) for s in (15.0, 300.0))
    yield Row(case, "value after 15 s over that after 300 s", "", short["value"] / long["value"], 1.01)
    distance = (long["value"] - long["bound"]) / (long["contiguous"] - long["bound"])
    yield Row(case, "(value - bound) / (contiguous - bound)", "", distance, 0.12)
    yield Row(case, "peak memory of all processes", "GB", max(short["gigabytes"], long["gigabytes"]), 4.0)


def _aligned(traces: _Traces) -> Iterator[Row]:
    found = _apart("scale", family="aligned", seconds=10.0)
    case = "synthetic aligned 58x256, 64 ranks (8x8), hops, 10 s"
    yield Row(case, "gap", "", 0.0 if found["value"] == found["bound"] else 1 - found["bound"] / found["value"], 0.0)


def _apart(function: str, **arguments: Any) -> dict[str, float]:
    """A case in a process of its own, so that its memory is its own."""
    result: dict[str, float] = Child(f"coterie.launch.bench_plan:{function}", arguments, Deadline(1200)).start().result()
    return result


def scale(family: str, seconds: float, deadline: Deadline) -> dict[str, float]:
    """Plans a synthetic trace of the size of DeepSeek-V3 with top-1 routing; value, bound, contiguous' hops, peak memory."""
    noise = 0.0 if family == "aligned" else 0.1
    trace = synth.make(family, 20_000, 58, 256, 1, groups=64, noise=noise)
    topology = Topology(8, 8)
    made = plan_whole(trace, _request(topology, seconds, objective="hops"))
    contiguous = evaluate(baseline_plan("contiguous", trace, topology, "all_to_all"), trace).hops
    kilobytes = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {"value": made.objective.value or 0.0, "bound": made.objective.lower_bound or 0.0, "contiguous": contiguous or 0.0,
            "gigabytes": kilobytes * 1024 / 1e9}  # fmt: skip


def _million(traces: _Traces) -> Iterator[Row]:
    case = "a trace of 1,000,000 tokens, 58 layers, 8 picks of 256"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.safetensors"
        save_trace(synth.make("misaligned", 1_000_000, 58, 256, 8, groups=16, noise=0.1), path)
        found = _apart("compress", path=str(path))
    yield Row(case, "read and compressed", "s", found["seconds"], 30.0)
    yield Row(case, "peak memory", "GB", found["gigabytes"], 6.0)


def compress(path: str, deadline: Deadline) -> dict[str, float]:
    """Reads a trace and measures its affinity; seconds, the median of five, and peak memory."""
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        measure(read_trace(Path(path)))
        seconds.append(time.perf_counter() - started)
    return {"seconds": statistics.median(seconds), "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}


def _methods(traces: _Traces) -> Iterator[Row]:
    """Every method, planned on half of every trace, judged on the other half by the objective that `coterie` was given."""
    names = ("mixtral-8x7b-humaneval", "gemma-4-26b-a4b-decode", "deepseek-v2-lite-intent", "deepseek-v2-lite-law")
    for name in names:
        parts = halves(traces.get(name))
        assert parts is not None
        seen, unseen = parts
        topology = Topology(1, 4 if seen.num_experts == 8 else 8)
        others = {peer: _peer(peer, seen, topology) for peer in PEERS}
        tied = TIED_SMALL if seen.tokens + unseen.tokens < SMALL_TRACE else TIED
        judged = gathered([unseen])
        for objective in OBJECTIVES:
            made = plan_whole(seen, _request(topology, METHOD_SECONDS, objective=objective))
            ours = summarised(made, judged, objective, "mean")
            peers: dict[str, float | None] = {n: summarised(p, judged, objective, "mean") for n, p in others.items()}
            best = min(p for p in peers.values() if p is not None)
            yield Row(f"{name}, {topology.ranks} ranks, unseen half", objective, "", ours, best * tied, peers)
