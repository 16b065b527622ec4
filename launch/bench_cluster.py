"""`coterie bench cluster`: several nodes over links of a known rate, beside the expert parallelism of others.

Nodes are network namespaces (`netns`), so this needs Linux and root. All sides run the same prompts through the same model in
the same processes, taking turns: prefill of a batch, then decode steps with given tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from coterie.launch import cluster_cases as cases
from coterie.launch.bench import Row, named
from coterie.launch.cluster_cases import (
    CHOSEN,
    CHOSEN_GLOO,
    CONTIGUOUS,
    COPIED,
    HOMED,
    HOMED_FLAT,
    PEERS,
    PLANNED,
    RANKS,
    RETURNING,
    STAYING,
    Case,
)
from coterie.launch.cluster_driver import Workers, workers
from coterie.launch.cluster_sides import Side
from coterie.launch.netns import Network, check_available, network
from coterie.launch.quiet import quiet_transformers
from coterie.routing.errors import InputError

OURS = (CHOSEN, CHOSEN_GLOO, HOMED, HOMED_FLAT, COPIED, PLANNED, CONTIGUOUS)  # with copies in one case alone
ALIKE = (HOMED, HOMED_FLAT)  # the plan and the homes of CHOSEN, each by one strategy
EP, LAYER = PEERS
REPEATS = 5
RATES = {1e8: "100 Mbit/s", 1e9: "1 Gbit/s", 1e10: "10 Gbit/s"}
LIMITED = 1e8  # the rate at which the network is the limit
RULING = 8e-3  # a latency that takes longer than computing a layer here, 6 ms: what rules where links are good and GPUs fast
NEVER_BELOW = 0.97
NEAR = 0.9  # of the best strategy measured, that the chosen one has to be
OFF = 1.25  # times that a prediction may be above or below what was measured
DECODE_BAR, LAYER_BAR, COHERENT_BAR = 1.4, 2.5, 1.3
EQUAL = 1e-4
LINK_BYTES_SECONDS = 0.4  # how long a link is tried


@dataclass(frozen=True)
class Bars:
    """Against transformers' expert parallelism. sent: bytes, at most; prefill: throughput where the network is the limit."""

    sent: float | None = None
    prefill: float | None = None


@dataclass(frozen=True)
class Work:
    """A case yet to be made, and what it is held to."""

    make: Callable[[Path, argparse.Namespace], Case]
    bars: Bars
    sides: Callable[[Case, int, int, Path, float], list[Side]] = cases.make_sides


@dataclass(frozen=True)
class Layout:
    """nodes x ranks_per_node; rates: of the links, in bits per second; works: names in `WORKS`; seconds: links' latency."""

    nodes: int
    ranks_per_node: int
    rates: tuple[float, ...]
    works: tuple[str, ...]
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.nodes}x{self.ranks_per_node}" + (f", {self.seconds * 1e3:g} ms" if self.seconds else "")


SMALL: dict[str, Any] = {"per_rank": 2, "decode": 3}  # of a quick run
WORKS = {
    "embedded": Work(lambda folder, options: cases.embedded(folder, **(SMALL if options.quick else {})), Bars(0.50, 1.8)),
    "synthetic": Work(lambda folder, options: cases.synthetic(folder, **(SMALL if options.quick else {})), Bars(0.28, 2.8)),
    "recorded": Work(lambda folder, options: cases.recorded(folder, options.traces), Bars()),
    "single": Work(lambda folder, options: cases.single(folder), Bars(), cases.coherent_sides),
}
FULL = (
    Layout(2, 2, tuple(RATES), tuple(WORKS)),
    Layout(4, 1, tuple(RATES), ("embedded", "synthetic", "single")),
    *(Layout(nodes, RANKS // nodes, (1e9,), ("single",), seconds) for nodes in (2, 4) for seconds in (1e-3, RULING)),
)
QUICK = (Layout(2, 2, (1e8, 1e9), ("embedded", "synthetic")),)
PLAN_SECONDS, QUICK_PLAN_SECONDS = 15.0, 2.0
LEFT_OUT = (CHOSEN_GLOO, COPIED, PLANNED)  # of a quick run


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """All cells, or with `quick` those that take under three minutes together; `only`: of some works.

    Raises InputError where there is no root.
    """
    check_available()
    quiet_transformers()
    layouts = QUICK if options.quick else FULL
    chosen = named(dict.fromkeys(work for layout in layouts for work in layout.works), options.only)
    layouts = tuple(replace(layout, works=tuple(work for work in layout.works if work in chosen)) for layout in layouts)
    with tempfile.TemporaryDirectory(prefix="coterie-cluster-") as name:
        root = Path(name)
        made: dict[str, Case] = {}
        for work in dict.fromkeys(name for layout in layouts for name in layout.works):
            (root / work).mkdir()
            try:
                with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed, where installed, logs to standard output
                    made[work] = WORKS[work].make(root / work, options)
                made[work].save(root / work)
            except InputError as error:
                yield Row(work, "all", "", None, why=str(error))
        for layout in filter(lambda layout: layout.works, layouts):
            known = {work: made[work] for work in layout.works if work in made}
            yield from _layout(layout, known, root, options.quick)


def _layout(layout: Layout, made: dict[str, Case], root: Path, quick: bool) -> Iterator[Row]:
    sides = {work: _planned(work, case, layout, root / work, quick) for work, case in made.items()}
    far = layout.seconds > 0
    with network(layout.nodes, max(layout.rates), far) as links, workers(links, layout.ranks_per_node, root) as running:
        yield from _links(layout, links, running)
        for work, case in made.items():
            links.shape(max(layout.rates), layout.seconds)
            running.load(root / work, case.model, sides[work])
            cells = {}
            for rate in layout.rates:
                links.shape(rate, layout.seconds)
                cells[rate] = running.ask("cell", prefill=case.prefill, decode=case.decode, repeats=REPEATS)
            if work == "single":
                yield from coherent_rows(case, layout, cells)
            else:
                yield from case_rows(case, layout, WORKS[work].bars, cells)


def _planned(work: str, case: Case, layout: Layout, folder: Path, quick: bool) -> list[Side]:
    plans = folder / str(layout)
    plans.mkdir()
    seconds = QUICK_PLAN_SECONDS if quick else PLAN_SECONDS
    sides = WORKS[work].sides(case, layout.nodes, layout.ranks_per_node, plans, seconds)
    return [replace(side, once=True) for side in sides if side.name not in LEFT_OUT] if quick else sides


def _links(layout: Layout, links: Network, running: Workers) -> Iterator[Row]:
    """What the links carry: the larger rates are more than this machine's network stack may reach."""
    for rate in layout.rates:
        links.shape(rate, layout.seconds)
        count = int(rate / 8 * LINK_BYTES_SECONDS)
        carried = [running.ask("transfer", bytes=count)["bits_per_second"] for _ in range(REPEATS)]
        yield Row(f"links of {layout}, {RATES[rate]}", "carried", "Mbit/s", statistics.median(carried) / 1e6, higher=True)


def case_rows(case: Case, layout: Layout, bars: Bars, cells: dict[float, dict[str, Any]]) -> Iterator[Row]:
    """All rows of a case on a layout, from what the workers found at each rate.

    Among them what the chooser predicts, beside what was measured.
    """
    name = f"{case.name}, {layout}"
    yield from _sent_rows(name, bars, cells[max(cells)])
    for rate, cell in cells.items():
        yield from _speed_rows(f"{name}, {RATES[rate]}", case, rate, bars, cell)
        yield from _predicted_rows(f"{name}, {RATES[rate]}", case, cell)
    yield from _equal_rows(name, cells)


def coherent_rows(case: Case, layout: Layout, cells: dict[float, dict[str, Any]]) -> Iterator[Row]:
    """Tokens that stay beside tokens that return, one expert per token; and which of them was chosen."""
    name = f"{case.name}, {layout}"
    for rate, cell in cells.items():
        where = f"{name}, {RATES[rate]}"
        tokens = case.decode * case.sequences
        theirs = {side: _speed(cell, side, "decode", tokens) for side in (RETURNING, EP)}
        value = _speed(cell, STAYING, "decode", tokens)
        yield Row(where, f"decode: {STAYING}", "tokens/s", value, None, theirs, higher=True, why=_why(cell, STAYING, EP))
        bar = COHERENT_BAR if layout.seconds >= RULING else None
        over, why = _faster(cell, STAYING, RETURNING, "decode"), _why(cell, STAYING, RETURNING)
        yield Row(where, f"decode: {STAYING} over {RETURNING}", "x", over, bar, higher=True, why=why)
        value, why = _speed(cell, CHOSEN, "decode", tokens), _why(cell, CHOSEN)
        yield Row(where, f"decode: {_labelled(cell, CHOSEN)}", "tokens/s", value, higher=True, why=why)
        over, why = _over_best(cell, CHOSEN, (STAYING, RETURNING), "decode"), _why(cell, CHOSEN, STAYING, RETURNING)
        yield Row(where, f"decode: {CHOSEN} over the better of both", "x", over, NEAR, higher=True, why=why)
    worst = max(cell["sides"][RETURNING]["difference"] for cell in cells.values())
    yield Row(name, f"logits: {RETURNING} against {STAYING}", "", worst, EQUAL)


def _sent_rows(name: str, bars: Bars, cell: dict[str, Any]) -> Iterator[Row]:
    """Bytes that leave the nodes, by their devices' counters: all of TCP/IP, and what keeps the ranks in step."""
    for phase in ("prefill", "decode"):
        peers = {peer: _sent(cell, peer, phase) for peer in PEERS}
        for side in _there(cell):
            limit = bars.sent if side == HOMED and phase == "prefill" else None
            theirs = peers[EP]
            bar = limit * theirs if limit is not None and theirs is not None else None
            value = _sent(cell, side, phase)
            yield Row(name, f"sent between nodes, {phase}: {side}", "MB", value, bar, peers, why=_why(cell, side, *PEERS))
        bar = bars.sent if phase == "prefill" else None
        for side in (side for side in (HOMED, COPIED) if side in _there(cell)):
            over = _over(_sent(cell, side, phase), peers[EP])
            yield Row(name, f"sent between nodes, {phase}: {side} over {EP}", "x", over, bar, why=_why(cell, side, EP))


def _speed_rows(name: str, case: Case, rate: float, bars: Bars, cell: dict[str, Any]) -> Iterator[Row]:
    for phase, tokens in (("prefill", case.prefill), ("decode", case.decode)):
        peers = {peer: _speed(cell, peer, phase, tokens * case.sequences) for peer in PEERS}
        for side in _there(cell):
            value = _speed(cell, side, phase, tokens * case.sequences)
            label = _labelled(cell, side)
            yield Row(name, f"{phase}: {label}", "tokens/s", value, None, peers, higher=True, why=_why(cell, side, *PEERS))
        over, why = _over_best(cell, CHOSEN, ALIKE, phase), _why(cell, CHOSEN, *ALIKE)
        yield Row(name, f"{phase}: {CHOSEN} over the best strategy with its plan", "x", over, NEAR, higher=True, why=why)
        over, why = _over_best(cell, CHOSEN, tuple(PEERS), phase), _why(cell, CHOSEN, *PEERS)
        yield Row(name, f"{phase}: {CHOSEN} over the best peer", "x", over, NEVER_BELOW, higher=True, why=why)
        for peer, bar in _limits(phase, rate, bars).items():
            over, why = _faster(cell, CHOSEN, peer, phase), _why(cell, CHOSEN, peer)
            yield Row(name, f"{phase}: {CHOSEN} over {peer}", "x", over, bar, higher=True, why=why)


def _predicted_rows(name: str, case: Case, cell: dict[str, Any]) -> Iterator[Row]:
    """What the chooser predicts of whole steps and of a layer's communication, beside what was measured right after it."""
    found = cell["sides"].get(CHOSEN)
    if found is None:
        return
    for phase, tokens in (("prefill", case.prefill), ("decode", case.decode)):
        speeds = [tokens * case.sequences / seconds for seconds in found[f"{phase}_seconds"]]
        yield from _off(name, phase, "tokens/s", speeds, [turn.get(phase) for turn in found["promised"]])
    for phase, seconds in found["communication"].items():
        yield from _off(name, phase, "communication of a layer", seconds, [turn.get(phase) for turn in found["predicted"]])


def _off(name: str, phase: str, what: str, measured: Sequence[float], predicted: Sequence[float | None]) -> Iterator[Row]:
    """Medians over the turns that predict anything: exchanges may take no longer than computing alone."""
    overs = [m / p for m, p in zip(measured, predicted, strict=True) if p and p > 0 and m > 0]
    over = statistics.median(overs) if overs else None
    why = "" if overs else "steps that were tried took no longer than computing"
    yield Row(name, f"{phase}: {what}, measured over predicted", "x", over, why=why)
    factor = max(over, 1 / over) if over else None
    yield Row(name, f"{phase}: the predicted {what}, off by a factor of", "x", factor, OFF, why=why)


def _limits(phase: str, rate: float, bars: Bars) -> dict[str, float]:
    """What a cell is held to, by peer."""
    if rate != LIMITED or bars.prefill is None:
        return {}
    return {EP: bars.prefill, LAYER: LAYER_BAR} if phase == "prefill" else {EP: DECODE_BAR}


def _equal_rows(name: str, cells: dict[float, dict[str, Any]]) -> Iterator[Row]:
    """The largest difference of logits from the contiguous all-to-all's, relative to the largest logit, over all cells."""
    for side in (*_there(next(iter(cells.values())))[:-1], *PEERS):
        found = [cell["sides"][side]["difference"] for cell in cells.values() if side in cell["sides"]]
        why = _why(next(iter(cells.values())), side)
        yield Row(name, f"logits: {side} against {CONTIGUOUS}", "", max(found) if found else None, EQUAL, why=why)


def _there(cell: dict[str, Any]) -> list[str]:
    """Our sides: copies are tried in one case alone, and not all in a quick run."""
    return [side for side in OURS if side in cell["sides"] or side in cell["skipped"]]


def _labelled(cell: dict[str, Any], side: str) -> str:
    """With the strategies that coterie chose, how often each if they differ."""
    if side not in (CHOSEN, CHOSEN_GLOO) or side not in cell["sides"]:
        return side
    found = Counter(cell["sides"][side]["strategy"])
    told = [name if len(found) == 1 else f"{name} {times}" for name, times in found.most_common()]
    return f"{side} ({', '.join(told)})"


def _sent(cell: dict[str, Any], side: str, phase: str) -> float | None:
    found = cell["sides"].get(side)
    return None if found is None else statistics.median(found[f"{phase}_bytes"]) / 1e6


def _speed(cell: dict[str, Any], side: str, phase: str, tokens: int) -> float | None:
    found = cell["sides"].get(side)
    return None if found is None else tokens / statistics.median(found[f"{phase}_seconds"])


def _faster(cell: dict[str, Any], side: str, other: str, phase: str) -> float | None:
    """How many times as fast as another side: the median over turns, in each of which all sides run; machines drift."""
    if side not in cell["sides"] or other not in cell["sides"]:
        return None
    mine, theirs = (cell["sides"][name][f"{phase}_seconds"] for name in (side, other))
    return float(statistics.median(b / a for a, b in zip(mine, theirs, strict=True)))


def _over_best(cell: dict[str, Any], side: str, others: Sequence[str], phase: str) -> float | None:
    """`_faster` than the one of `others` that it is least faster than."""
    found = [over for over in (_faster(cell, side, other, phase) for other in others) if over is not None]
    return min(found, default=None)


def _over(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value / other


def _why(cell: dict[str, Any], *sides: str) -> str:
    """The reasons of those of `sides` that could not be had."""
    missing: Sequence[str] = [f"{side}: {cell['skipped'][side]}" for side in sides if side in cell["skipped"]]
    return "; ".join(missing)
