"""Draws the pictures of docs/placement.md: every number in them is from a run of the library on synthetic traces.

    python docs/pictures.py [--only NAME] [--png DIR]

Seeds and iterations are fixed, so a repeat run on the same machine draws the same files. About two minutes on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from coterie import PlanRequest, RoutingTrace, Topology, evaluate, plan
from coterie.placement.bounds import chain_bound, lower_bound
from coterie.placement.cost import anchors, homes_of, needed_ranks
from coterie.placement.deadline import Deadline
from coterie.placement.plan import PlacementPlan
from coterie.placement.planner import baseline_plan
from coterie.placement.problem import hops_problem
from coterie.routing.affinity import transition_counts
from coterie.routing.synth import make

FOLDER = Path(__file__).parent / "img"
EXPERTS, TOKENS, SEQUENCES, SEED = 32, 16384, 64, 1
ITERATIONS = {"hops": 1, "dispatch": 4, "load": 3}
PATIENCE = 3600.0  # seconds that no run here comes near: iterations end the search
BLUE, RED, GREEN, GREY, INK = "#0072b2", "#d55e00", "#009e73", "#a8b0ba", "#1c2430"  # told apart by the colour-blind, too
NAMES = {"contiguous": "contiguous", "packed": "balanced packing", "round_robin": "round-robin"}


def recorded(family: str, layers: int, top_k: int, **settings: float) -> tuple[RoutingTrace, RoutingTrace]:
    """A synthetic trace in two halves: sequences to plan from, and sequences to judge on."""
    whole = make(family, TOKENS, layers, EXPERTS, top_k, SEED, sequences=SEQUENCES, **settings)  # type: ignore[arg-type]
    seen = whole.sequence_ids < SEQUENCES // 2
    return whole.select(seen), whole.select(~seen)


def planned(seen: RoutingTrace, ranks: int, objective: str, max_load: float | None = None) -> PlacementPlan:
    """A plan without a certificate, which none of the curves needs."""
    strategy = "coherent" if objective == "hops" else "all_to_all"
    request = PlanRequest(
        Topology(1, ranks), strategy, objective, max_load=max_load, iterations=ITERATIONS[objective], time_limit=PATIENCE
    )
    return plan(seen, request, prove=False)


def contiguous(trace: RoutingTrace, ranks: int) -> PlacementPlan:
    """What a plan has to beat."""
    return baseline_plan("contiguous", trace, Topology(1, ranks), "all_to_all")


# --- a token's way through the ranks ---


def path(layers: int = 8, ranks: int = 4) -> Figure:
    """Return-home against context-coherent, before and after planning for hops; top-1."""
    seen, unseen = recorded("geometric", layers, 1, noise=0.25)
    plans = {"contiguous placement": contiguous(unseen, ranks), "planned for hops": planned(seen, ranks, "hops")}
    token = _typical(plans, unseen)
    home = int(homes_of(unseen, ranks)[token])
    figure, axes = _axes(2, 2, 9.5, 5.6)
    for column, (name, made) in enumerate(plans.items()):
        report, at = evaluate(made, unseen), _ranks_of(made, unseen)[token]
        assert report.dispatch is not None
        _draw_return(axes[column], at, home)
        _draw_stay(axes[2 + column], at)
        out, hops = 2 * int((at != home).sum()), int((np.diff(at) != 0).sum())
        axes[column].set_title(f"{name}, tokens return home\n{_rows(out)}; all tokens: {2 * report.dispatch:.2f} a layer")
        axes[2 + column].set_title(f"{name}, tokens stay\n{_rows(hops)}; all tokens: {report.coherent:.2f} a layer")
    for axis in axes:
        axis.set(ylim=(ranks - 0.5, -0.6), xlim=(-0.6, layers - 0.4), xticks=range(layers), yticks=range(ranks), ylabel="rank")
        axis.set_xlabel("layer")
    return figure


def _ranks_of(made: PlacementPlan, trace: RoutingTrace) -> np.ndarray:
    """The rank of every token's one expert, `[tokens, layers]`; in every layer that is the anchor after it."""
    return np.stack([following for _, _, following in anchors(trace, made.holds(), made.topology)], axis=1)


def _typical(plans: dict[str, PlacementPlan], trace: RoutingTrace) -> int:
    """The first token, at home on rank 0, whose rows are nearest to the mean under every plan and strategy."""
    off = np.zeros(trace.tokens)
    homes = homes_of(trace, next(iter(plans.values())).ranks)
    for made in plans.values():
        at = _ranks_of(made, trace)
        for count in (2 * (at != homes[:, None]).sum(1), (np.diff(at, axis=1) != 0).sum(1)):
            off += np.abs(count - count.mean())
    return int(np.where(homes == 0, off, np.inf).argmin())


def _draw_return(axis: Any, at: np.ndarray, home: int) -> None:
    axis.axhline(home, color=GREY, lw=2, zorder=1)
    axis.text(len(at) - 0.45, home - 0.12, "home", ha="right", va="bottom", color="#5b6673")
    for layer, rank in enumerate(at):
        if rank != home:
            for shift, ends in ((-0.12, (home, rank)), (0.12, (rank, home))):
                _arrow(axis, (layer + shift, ends[0]), (layer + shift, ends[1]))
        axis.plot(layer, rank, "o", color=BLUE, ms=9, zorder=3)


def _draw_stay(axis: Any, at: np.ndarray) -> None:
    for layer in range(len(at) - 1):
        if at[layer] == at[layer + 1]:
            axis.plot([layer, layer + 1], [at[layer]] * 2, color=GREY, lw=2, zorder=1)
        else:
            _arrow(axis, (layer, at[layer]), (layer + 1, at[layer + 1]))
    axis.plot(range(len(at)), at, "o", color=BLUE, ms=9, zorder=3)


def _rows(count: int) -> str:
    return f"{count} row" + ("" if count == 1 else "s")


def _arrow(axis: Any, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0) -> None:
    style = f"arc3,rad={bend}"
    axis.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=RED, lw=1.6, shrinkA=5, shrinkB=5,
                        connectionstyle=style, zorder=2)
    )  # fmt: skip


# --- distinct ranks ---


def dispatch(ranks: int = 4, top_k: int = 4) -> Figure:
    """One layer: the same picks, two placements."""
    seen, unseen = recorded("geometric", 8, top_k, noise=0.25)
    plans = {"contiguous": contiguous(unseen, ranks), "planned for dispatch": planned(seen, ranks, "dispatch", 1.1)}
    token = _typical_rows(plans, unseen)
    home, picks = int(homes_of(unseen, ranks)[token]), unseen.expert_ids[token, 0]
    figure, axes = _axes(2, 1, 9.5, 4.4)
    for axis, (name, made) in zip(axes, plans.items(), strict=True):
        rows = _draw_ranks(axis, made, picks, home)
        mean = evaluate(made, unseen).dispatch
        axis.set_title(f"{name}: {_rows(rows)} for this token; all tokens, all layers: {mean:.2f}")
    return figure


def _typical_rows(plans: dict[str, PlacementPlan], trace: RoutingTrace) -> int:
    """As `_typical`, for the rows of the first layer."""
    off = np.zeros(trace.tokens)
    homes = homes_of(trace, next(iter(plans.values())).ranks)
    for made in plans.values():
        needed = needed_ranks(made.holds()[0].argmax(1)[trace.expert_ids[:, 0]], made.ranks)
        rows = needed.sum(1) - needed[np.arange(trace.tokens), homes]
        off += np.abs(rows - rows.mean())
    return int(np.where(homes == 0, off, np.inf).argmin())


def _draw_ranks(axis: Any, made: PlacementPlan, picks: np.ndarray, home: int) -> int:
    """A box for each rank with its experts; returns the rows sent."""
    rows, wide = 0, made.slots_per_rank / 2 + 1.2
    for rank in range(made.ranks):
        x = rank * wide
        axis.add_patch(Rectangle((x - 0.15, -0.15), wide - 0.9, 2.3, fill=False, ec=BLUE if rank == home else GREY, lw=1.6))
        label = f"rank {rank}" + (", home" if rank == home else "")
        axis.text(x + wide / 2 - 0.6, -0.65, label, ha="center", va="center", color=BLUE if rank == home else INK)
        for number, expert in enumerate(made.experts_on(0, rank)):
            cell, picked = (x + number // 2, 1 - number % 2), expert in picks
            axis.add_patch(Rectangle(cell, 0.9, 0.9, fc=GREEN if picked else "#eef1f5", ec="none"))
            colour = "white" if picked else "#5b6673"
            axis.text(cell[0] + 0.45, cell[1] + 0.45, str(expert), ha="center", va="center", color=colour)
        if rank != home and set(made.experts_on(0, rank)) & set(picks.tolist()):
            rows += 1
            _arrow(axis, (home * wide + wide / 2 - 0.6, 2.2), (x + wide / 2 - 0.6, 2.2), bend=-0.12)
    axis.set(xlim=(-0.4, made.ranks * wide - 0.6), ylim=(-1, 3.6))
    axis.axis("off")
    return rows


# --- load against dispatch ---


def tradeoff(ranks: int = 8) -> Figure:
    """Rows against the busiest rank, for several load caps, on experts of uneven popularity."""
    seen, unseen = recorded("geometric", 4, 4, noise=0.25, skew=1.0)
    figure, axes = _axes(1, 1, 7, 4.4)
    axis = axes[0]
    points = {cap: evaluate(planned(seen, ranks, "dispatch", cap), unseen) for cap in (1.1, 1.2, 1.35, 1.6, 2.0, 3.0)}
    x, y = [p.load for p in points.values()], [p.dispatch for p in points.values()]
    axis.plot(x, y, "o-", color=BLUE)
    for cap, report in points.items():
        axis.annotate(f"{cap:g}", (report.load, report.dispatch), (0, 7), textcoords="offset points", color=BLUE)
    axis.text(1.42, 2.36, "planned for dispatch; --max-load beside each point", color=BLUE)
    others = {NAMES[name]: baseline_plan(name, seen, Topology(1, ranks), "all_to_all") for name in NAMES}
    others["planned for load"] = planned(seen, ranks, "load")
    for name, made in others.items():
        report = evaluate(made, unseen)
        axis.plot(report.load, report.dispatch, "s", color=RED)
        below = name == "planned for load"
        axis.annotate(name, (report.load, report.dispatch), (7, -13 if below else 2), textcoords="offset points", color=RED)
    axis.set(
        xlabel="load: busiest rank over the mean (unseen text)", ylabel="dispatch: rows per token and layer", xlim=(1, 2.3)
    )
    axis.set_ylim(1.95, 3.2)
    return figure


# --- when a placement cannot help ---


def limits() -> Figure:
    """The share of hops and rows that a plan saves, by the number of ranks and by how flat routing is."""
    figure, axes = _axes(1, 2, 10, 4.2)
    sizes = (2, 4, 8, 16, 32)
    seen, unseen = recorded("geometric", 8, 4, noise=0.25)
    for objective, colour in (("hops", BLUE), ("dispatch", RED)):
        cuts = [_cut(seen, unseen, ranks, objective)[1] for ranks in sizes]
        axes[0].plot(sizes, cuts, "o-", color=colour, label=objective)
    axes[0].set_xscale("log", base=2)
    axes[0].set_xticks(sizes, [f"{ranks}\n{EXPERTS // ranks}" for ranks in sizes])
    axes[0].set(xlabel="ranks, and experts on each", title="Fewer experts on a rank: less company")
    shares = (0.0, 0.2, 0.4, 0.6, 0.75, 0.875)
    for objective, colour in (("hops", BLUE), ("dispatch", RED)):
        pairs = [_cut(*recorded("aligned", 8, 4, noise=noise), 8, objective) for noise in shares]
        axes[1].plot(shares, [cut for _, cut in pairs], "o-", color=colour, label=f"{objective}, unseen text")
        axes[1].plot(shares, [cut for cut, _ in pairs], "--", color=colour, label=f"{objective}, planned text")
    axes[1].axvline(0.875, 0, 0.6, color=GREY, lw=1, zorder=0)
    axes[1].text(0.865, 0.42, "chance", rotation=90, ha="right", color="#5b6673")
    axes[1].set(xlabel="share of picks outside the token's group of experts", title="Flatter routing: less to find (8 ranks)")
    for axis in axes:
        axis.set(ylim=(-0.03, 1.03), ylabel="saved against contiguous placement")
        axis.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, 0))
        axis.axhline(0, color=GREY, lw=1, zorder=0)
        axis.legend(frameon=False, loc="upper right")
    return figure


def _cut(seen: RoutingTrace, unseen: RoutingTrace, ranks: int, objective: str) -> tuple[float, float]:
    """What the plan saves on the text it was made from, and on other text; rows are planned under a load cap of 1.1."""
    made = planned(seen, ranks, objective, 1.1 if objective == "dispatch" and ranks < EXPERTS else None)
    cuts = []
    for trace in (seen, unseen):
        before, after = (getattr(evaluate(p, trace), objective) for p in (contiguous(trace, ranks), made))
        cuts.append(1 - after / before)
    return cuts[0], cuts[1]


# --- what the gap says ---


def gap(ranks: int = 4, layers: int = 6) -> Figure:
    """Hops of plans between contiguous placement and two certificates, as routing gets flatter."""
    noises = (0.0, 0.25, 0.5, 0.75, 1.0)
    values, proven, cheap, before = [], [], [], []
    for noise in noises:
        seen, _ = recorded("geometric", layers, 4, noise=noise)
        problem = hops_problem([transition_counts(seen)], [1.0], ranks, EXPERTS // ranks, ())
        values.append(planned(seen, ranks, "hops").objective.value or 0.0)
        proven.append(problem.scale * chain_bound(problem, Deadline(PATIENCE)))
        cheap.append(problem.scale * lower_bound(problem))
        before.append(evaluate(contiguous(seen, ranks), seen).hops)
    figure, axes = _axes(1, 1, 7.5, 4.6)
    axis = axes[0]
    axis.plot(noises, before, "s-", color=GREY, label="contiguous")
    axis.plot(noises, values, "o-", color=BLUE, label="plan")
    axis.plot(noises, proven, "_", ms=16, mew=2, color=GREEN, label="semidefinite bound")
    axis.plot(noises, cheap, "v--", color=RED, label="matching bound")
    for x, value, strong, weak in zip(noises, values, proven, cheap, strict=True):
        axis.annotate(f"{1 - strong / value:.1%}", (x, value), (0, 11), textcoords="offset points", ha="center", color=GREEN)
        axis.annotate(f"{1 - weak / value:.0%}", (x, weak), (0, -17), textcoords="offset points", ha="center", color=RED)
    axis.set(xlabel="noise of the routing", ylabel="hops", ylim=(-0.09, 0.95), xlim=(-0.08, 1.08))
    axis.legend(frameon=False, loc="upper center", ncols=4)
    return figure


# --- files ---


def _axes(lines: int, columns: int, width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = np.atleast_1d(figure.subplots(lines, columns)).ravel()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


PICTURES: dict[str, Callable[[], Figure]] = {
    "path": path, "dispatch": dispatch, "tradeoff": tradeoff, "limits": limits, "gap": gap,
}  # fmt: skip
STYLE = {
    "svg.hashsalt": "coterie", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "axes.titlesize": 9.5,
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": GREY,
}  # fmt: skip


def main() -> None:
    """Draw all pictures, or one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PICTURES)
    parser.add_argument("--png", type=Path, metavar="DIR", help="also as PNG, to look at")
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        if options.only in (None, name):
            with matplotlib.rc_context(STYLE):
                figure = draw()
                figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None, "Creator": None})
                if options.png:
                    figure.savefig(options.png / f"{name}.png", dpi=110)
            print(FOLDER / f"{name}.svg")


if __name__ == "__main__":
    main()
