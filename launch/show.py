"""The report: one self-contained HTML page with inline SVG, no network, no script.

matplotlib draws it and is loaded only here.
"""

from __future__ import annotations

import html
import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coterie.launch.tables import cell
from coterie.placement.cost import CostReport, check_match, evaluate, evaluate_load
from coterie.placement.plan import PlacementPlan
from coterie.placement.planner import baseline_plan, compare
from coterie.routing.affinity import expert_load, mean_affinity, transition_counts
from coterie.routing.errors import InputError, wanted
from coterie.routing.files import write_text
from coterie.routing.trace import LoadStatistics, RoutingTrace

MAX_HEAT_MAPS = 12  # layer pairs drawn; of more, evenly spread ones
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#1c2430;background:#fff}
h1{font-size:1.6rem;margin-bottom:.2rem} h2{font-size:1.15rem;margin:2.2rem 0 .3rem}
p{margin:.3rem 0 .8rem;color:#4a5565;max-width:56rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.25rem .8rem;text-align:right;border-bottom:1px solid #e3e8ef}
td:first-child,th:first-child{text-align:left} tr.plan td{font-weight:600;background:#eef6ff} svg{max-width:100%;height:auto}
"""
COLUMNS = {
    "hops": "pairs of consecutive experts on different ranks",
    "dispatch": "ranks a token is sent to, per layer",
    "remote_rows": "rows sent per token and layer",
    "node_rows": "of those, rows that leave the node",
    "busiest_rank": "rows the busiest rank gets, per token",
    "load": "busiest rank's work over the mean",
    "coherent": "rows if tokens stay with their experts",
    "seconds": "predicted seconds per layer",
}


def write_report(path: Path, plan: PlacementPlan | None, routing: RoutingTrace | LoadStatistics | None) -> None:
    """Draw what is given, atomically. Raises InputError if matplotlib is missing or the two do not belong together."""
    check_plotting()
    if plan is not None and routing is not None:
        check_match(plan, routing)
    sections = [_heading(plan, routing)]
    if plan is not None and routing is not None:
        sections += [_numbers(plan, routing), *_before_and_after(plan, routing)]
    if plan is not None:
        sections.append(_plan_picture(plan))
    if routing is not None:
        sections.append(_load_picture(routing))
    if isinstance(routing, RoutingTrace) and routing.layers > 1:
        sections.append(_affinity_pictures(routing, plan))
    if isinstance(routing, RoutingTrace):
        from coterie.launch.show_cache import promised

        sections += filter(None, [promised(routing)])
    title = html.escape((plan or routing).model or "model")  # type: ignore[union-attr]
    head = f'<head><meta charset="utf-8"><title>coterie: {title}</title><style>{STYLE}</style></head>'
    body = "\n".join(sections)
    write_text(path, f'<!doctype html><html lang="en">{head}<body>{body}</body></html>\n')


def check_plotting() -> None:
    """Raises InputError if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(f"matplotlib is not installed, expected it for pictures: {wanted('plot')}") from error


def _heading(plan: PlacementPlan | None, routing: RoutingTrace | LoadStatistics | None) -> str:
    subject = plan or routing
    assert subject is not None
    parts = [f"{len(subject.layer_ids)} layers of {subject.num_experts} experts"]
    if isinstance(routing, RoutingTrace):
        parts.append(f"{routing.tokens} tokens, top-{routing.top_k} ({routing.phase})")
    if plan is not None:
        t, o = plan.topology, plan.objective
        parts.append(f"{t.nodes} node(s) of {t.ranks_per_node} rank(s), {plan.slots_per_rank} slots each")
        if o.value is not None:
            bound = "" if o.gap is None else f", lower bound {o.lower_bound:.4g}, gap {o.gap:.2%}"
            parts.append(f"planned for {o.name}: {o.value:.4g}{bound}")
    return f"<h1>{html.escape(subject.model or 'model')}</h1><p>{html.escape('; '.join(parts))}</p>"


def _numbers(plan: PlacementPlan, routing: RoutingTrace | LoadStatistics) -> str:
    plans = compare(plan, routing)
    fields = [f for f in COLUMNS if plans["plan"][f] is not None]
    head = "".join(f'<th title="{html.escape(COLUMNS[f])}">{f}</th>' for f in fields)
    rows = "".join(
        f'<tr class="{name}"><td>{name}</td>' + "".join(f"<td>{cell(values[f])}</td>" for f in fields) + "</tr>"
        for name, values in plans.items()
    )
    legend = "; ".join(f"{f}: {COLUMNS[f]}" for f in fields)
    return section("What it saves", legend + ".", f"<table><tr><th>plan</th>{head}</tr>{rows}</table>")


def _before_and_after(plan: PlacementPlan, routing: RoutingTrace | LoadStatistics) -> list[str]:
    contiguous = baseline_plan("contiguous", routing, plan.topology, plan.strategy)
    if isinstance(routing, LoadStatistics):
        return [_rank_load(evaluate_load(contiguous, routing, 0), evaluate_load(plan, routing, 0))]
    before, after = evaluate(contiguous, routing), evaluate(plan, routing)
    return [_rank_load(before, after), _links(before, after)]


def _rank_load(before: CostReport, after: CostReport) -> str:
    figure, axes = picture_axes(1, 2, 10, 3)
    scale = max(r.rank_load.max() for r in (before, after))
    for axis, report, name in zip(axes, (before, after), ("contiguous", "this plan"), strict=True):
        image = axis.imshow(report.rank_load, aspect="auto", cmap="Blues", vmin=0, vmax=scale)
        axis.set(title=f"{name}: busiest / mean {report.load:.3f}", xlabel="rank", ylabel="layer")
    figure.colorbar(image, ax=axes.tolist(), label="(token, expert) pairs")
    return section(
        "Load of each rank", "Before and after; a dark cell keeps all other ranks waiting in that layer.", svg(figure)
    )


def _links(before: CostReport, after: CostReport) -> str:
    figure, axes = picture_axes(1, 2, 9, 3.8)
    means = [r.rows.mean(0) for r in (before, after) if r.rows is not None]
    remote = [m * ~np.eye(len(m), dtype=bool) for m in means]
    for axis, rows, name in zip(axes, remote, ("contiguous", "this plan"), strict=True):
        image = axis.imshow(rows, cmap="Oranges", vmin=0, vmax=max(r.max() for r in remote))
        axis.set(title=f"{name}: {rows.sum():.3f} rows per token", xlabel="to rank", ylabel="from rank")
    figure.colorbar(image, ax=axes.tolist(), label="rows per token and layer")
    return section("Rows on each link", "Dispatch rows from home rank to destination, mean over layers.", svg(figure))


def _plan_picture(plan: PlacementPlan) -> str:
    holds = plan.holds()
    owner = np.where(holds.any(2), holds.argmax(2), -1)
    figure, axes = picture_axes(1, 1, 10, 0.8 + 0.3 * len(plan.layer_ids))
    colours = "tab10" if plan.ranks <= 10 else "tab20" if plan.ranks <= 20 else "turbo"
    axes[0].imshow(owner, aspect="auto", cmap=colours, vmin=0, vmax=max(plan.ranks - 1, 1), interpolation="nearest")
    if owner.size <= 1200:
        for (layer, expert), rank in np.ndenumerate(owner):
            axes[0].text(expert, layer, str(rank), ha="center", va="center", fontsize=8, color="white")
    axes[0].set(xlabel="expert", ylabel="layer")
    axes[0].set_yticks(range(len(plan.layer_ids)), [str(i) for i in plan.layer_ids], fontsize=7)
    return section("The plan", "The rank of every expert (of several copies, the first).", svg(figure))


def _load_picture(routing: RoutingTrace | LoadStatistics) -> str:
    load = expert_load(routing) if isinstance(routing, RoutingTrace) else routing.expert_load.sum(0).astype(np.float64)
    share = load / np.maximum(load.mean(1, keepdims=True), 1e-12)
    figure, axes = picture_axes(1, 1, 10, 0.8 + 0.3 * len(load))
    image = axes[0].imshow(share, aspect="auto", cmap="Purples", vmin=0)
    axes[0].set(xlabel="expert", ylabel="layer")
    axes[0].set_yticks(range(len(load)), [str(i) for i in routing.layer_ids], fontsize=7)
    figure.colorbar(image, ax=axes.tolist(), label="load / mean")
    return section("Load of each expert", "How often each expert is picked, relative to the mean of its layer.", svg(figure))


def _affinity_pictures(trace: RoutingTrace, plan: PlacementPlan | None) -> str:
    counts = transition_counts(trace)
    chosen = np.unique(np.linspace(0, len(counts) - 1, min(len(counts), MAX_HEAT_MAPS)).astype(int))
    columns = min(3, len(chosen))
    lines = -(-len(chosen) // columns)
    figure, axes = picture_axes(lines, columns, 3.6 * columns, 3.5 * lines)
    chances = counts / np.maximum(counts.sum(2, keepdims=True), 1)
    brightest = max(0.2, float(chances[chosen].max()))
    for axis, pair in zip(axes, chosen, strict=False):
        rows, cols, cuts = _order(trace.num_experts, plan, int(pair))
        image = axis.imshow(chances[pair][np.ix_(rows, cols)], cmap="magma_r", vmin=0, vmax=brightest)
        for cut in cuts:
            axis.axhline(cut - 0.5, color="#3b82f6", lw=0.6)
            axis.axvline(cut - 0.5, color="#3b82f6", lw=0.6)
        axis.set_title(f"layer {trace.layer_ids[pair]} to {trace.layer_ids[pair + 1]}", fontsize=9)
        axis.set(xticks=[], yticks=[])
    for axis in axes[len(chosen) :]:
        axis.axis("off")
    figure.colorbar(image, ax=axes.tolist(), label="P(next layer's expert | this layer's)", shrink=0.6)
    ordered = (
        " Experts are ordered by rank; blue lines part the ranks: what is dark in a block on the diagonal stays on its rank."
    )
    even = 1 / trace.num_experts
    text = f"Mean of the largest probability of a row: {mean_affinity(trace):.3f}; even routing would give {even:.3f}."
    return section("Affinity of consecutive layers", text + (ordered if plan else ""), svg(figure))


def _order(experts: int, plan: PlacementPlan | None, layer: int) -> tuple[NDArray[np.int64], NDArray[np.int64], list[int]]:
    """Experts of a layer and of the next in drawing order, and where ranks part (by the first layer of the pair)."""
    if plan is None:
        return np.arange(experts), np.arange(experts), []
    owners = plan.holds().argmax(2)
    rows, cols = (np.argsort(owners[i], kind="stable") for i in (layer, layer + 1))
    sizes = np.bincount(owners[layer], minlength=plan.ranks)
    return rows, cols, np.cumsum(sizes)[:-1].tolist()


def picture_axes(lines: int, columns: int, width: float, height: float) -> tuple[Any, NDArray[Any]]:
    """A figure of `lines` x `columns` axes, flat; width, height: of all, in inches."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = np.atleast_1d(figure.subplots(lines, columns)).ravel()
    for axis in axes:  # ranks, experts and layers are whole numbers
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def svg(figure: Any) -> str:
    """The figure as an element of a page, the same text on every run."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "coterie"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def section(title: str, text: str, body: str) -> str:
    """A heading, a sentence, and what is drawn."""
    return f"<section><h2>{html.escape(title)}</h2><p>{html.escape(text)}</p>{body}</section>"
