"""Pictures of a run's traffic, from the file that `coterie generate --trace-events` writes."""

from __future__ import annotations

import html
from pathlib import Path

import numpy as np

from coterie.launch.show import STYLE, check_plotting, picture_axes, section, svg
from coterie.launch.show_cache import happened
from coterie.launch.timeline import Sums
from coterie.routing.files import write_text


def write_traffic_report(path: Path, sums: Sums, source: str) -> None:
    """One page, atomically: bytes on each link, rows by layer, time of each rank, and what its cache of experts did."""
    check_plotting()
    ranks = len(sums.hosts)
    heading = f"<h1>{html.escape(source)}</h1><p>{ranks} ranks on {len(set(sums.hosts))} host(s)</p>"
    pictures = [] if ranks == 1 else [_links(sums), _layers(sums)]
    body = "\n".join([heading, *pictures, _time(sums), *([] if sums.cache is None else [happened(sums.cache)])])
    head = f'<head><meta charset="utf-8"><title>coterie: traffic</title><style>{STYLE}</style></head>'
    write_text(path, f'<!doctype html><html lang="en">{head}<body>{body}</body></html>\n')


def _links(sums: Sums) -> str:
    figure, axes = picture_axes(1, 1, 5, 4)
    sent = np.array(sums.bytes) / 1e6
    image = axes[0].imshow(sent, cmap="Oranges", vmin=0)
    axes[0].set(title=f"{sent.sum():.1f} MB in all", xlabel="to rank", ylabel="from rank")
    figure.colorbar(image, ax=axes.tolist(), label="MB")
    return section("Bytes on each link", "All that this program sent: rows, headers, counts, padding, agreement.", svg(figure))


def _layers(sums: Sums) -> str:
    figure, axes = picture_axes(1, 1, 8, 3)
    rows = np.array(sums.rows_by_layer)
    bottom = np.zeros(rows.shape[1])
    for rank, of_rank in enumerate(rows):
        axes[0].bar(np.arange(rows.shape[1]), of_rank, bottom=bottom, label=f"rank {rank}" if len(rows) <= 16 else None)
        bottom += of_rank
    axes[0].set(xlabel="layer with experts", ylabel="rows sent")
    if len(rows) <= 16:
        axes[0].legend(fontsize=7, ncols=4)
    return section("Rows by layer", "Dispatch and combine together, by the rank that sent them.", svg(figure))


def _time(sums: Sums) -> str:
    figure, axes = picture_axes(1, 1, 8, 3)
    ranks = np.arange(len(sums.hosts))
    axes[0].bar(ranks - 0.2, sums.communication_seconds, 0.4, label="in collectives: sending, and waiting for others")
    axes[0].bar(ranks + 0.2, sums.experts_seconds, 0.4, label="in the experts")
    axes[0].set(xlabel="rank", ylabel="seconds")
    axes[0].legend(fontsize=8)
    return section("Time of each rank", "A rank that computes long keeps the others waiting.", svg(figure))
