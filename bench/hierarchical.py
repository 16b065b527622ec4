"""What `hierarchical` gains where rows travel inside nodes while others travel between them (moe/strategy.py).

Two nodes of two ranks with shaped links (launch/netns.py: Linux, root, iproute2); a layer's dispatch and combine of random
routing without experts, both ways in turns. Seconds are those of the slowest rank, medians. Inside a node rows go over its
loopback, as fast as that is, or as slow as a rank's part of the link between nodes.

python bench/hierarchical.py [--repeats 9] [--transport tcp] [--out JSON]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from coterie.launch.cluster_driver import workers
from coterie.launch.distributed import job, leave
from coterie.launch.netns import QUEUE_BYTES, Network, network
from coterie.launch.tables import table
from coterie.moe.collectives import Group
from coterie.moe.placement_map import layer_maps
from coterie.moe.strategy import Hierarchical
from coterie.placement.plan import PlacementPlan
from coterie.placement.topology import Topology
from coterie.routing.files import write_text

NODES, PER_NODE, EXPERTS, HIDDEN, TOP_K = 2, 2, 64, 1024, 8
RATES = (1e8, 1e9, 1e10)
TOKENS = (4, 64, 256, 1024)
MOST_SECONDS = 0.5  # of one exchange: fewer tokens where the link is slow
LOOPBACK_BURST = 1 << 17  # two of its packets
NEVER = 1 << 62


def main() -> None:
    """As the module says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--transport", default="tcp")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.transport)
        leave(0)
    found = list(cells(options.repeats, options.transport))
    print(table(list(found[0]), [list(row.values()) for row in found]))
    if options.out:
        write_text(options.out, json.dumps(found, indent=1) + "\n")


def cells(repeats: int, transport: str) -> Iterator[dict[str, Any]]:
    """Every rate, inside unshaped and shaped, every number of tokens."""
    program = (__file__, "--worker", "--transport", transport)
    with (
        tempfile.TemporaryDirectory() as folder, network(NODES, max(RATES)) as links,
        workers(links, PER_NODE, Path(folder), program) as running,
    ):  # fmt: skip
        for rate, inside in [(rate, None) for rate in RATES] + [(rate, rate / PER_NODE) for rate in RATES]:
            links.shape(rate)
            shape_inside(links, inside)
            for tokens in TOKENS:
                if tokens * HIDDEN * 4 * 8 * PER_NODE / rate < MOST_SECONDS:
                    yield _cell(running.ask("", tokens=tokens, repeats=repeats), rate, inside, tokens)


def _cell(seconds: dict[str, list[float]], rate: float, inside: float | None, tokens: int) -> dict[str, Any]:
    one, beside = (statistics.median(seconds[way]) * 1e3 for way in ("in turn", "beside"))
    ratios = [a / b for a, b in zip(seconds["in turn"], seconds["beside"], strict=True)]
    return {
        "between, Mbit/s": rate / 1e6, "inside": "as it is" if inside is None else f"{inside / 1e6:g}", "tokens": tokens,
        "in turn, ms": one, "beside, ms": beside, "faster": one / beside, "faster, by pairs": statistics.median(ratios),
    }  # fmt: skip


def shape_inside(links: Network, bits_per_second: float | None) -> None:
    """What each rank gets of its node's loopback; None: as it is."""
    what = ["noqueue"]
    if bits_per_second is not None:
        rate = f"{bits_per_second * PER_NODE:.0f}bit"
        what = ["tbf", "rate", rate, "burst", str(LOOPBACK_BURST), "limit", str(QUEUE_BYTES)]
    for node in links.nodes:
        subprocess.run(["tc", "-n", node.namespace, "qdisc", "replace", "dev", "lo", "root", *what], check=True)


def work(transport: str) -> None:
    """A rank: lines of JSON in, rank 0's answers out."""
    torch.set_num_threads(1)
    with job(transport=transport) as group:
        group = Group(group.transport, int(os.environ["LOCAL_WORLD_SIZE"]), group.traffic)
        ways = {"in turn": Hierarchical(group, NEVER), "beside": Hierarchical(group, 0)}
        for line in sys.stdin:
            command = json.loads(line)
            found = _measured(group, ways, command["tokens"], command["repeats"])
            if group.rank == 0:
                print(json.dumps(found), flush=True)


def _measured(group: Group, ways: dict[str, Hierarchical], tokens: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of each way; the ways take turns, and take turns in going first."""
    plan = PlacementPlan(torch.arange(EXPERTS).view(1, -1).numpy(), EXPERTS, (0,), Topology(group.nodes, group.ranks_per_node))
    layer = layer_maps(plan, group.rank)[0]
    drawn = torch.Generator().manual_seed(group.rank)
    x, weights = torch.randn(tokens, HIDDEN, generator=drawn), torch.rand(tokens, TOP_K, generator=drawn)
    ids = torch.rand(tokens, EXPERTS, generator=drawn).topk(TOP_K).indices
    found: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(-1, repeats):
        results = []
        for name, way in list(ways.items())[:: 1 if repeat % 2 else -1]:
            group.agree([0])
            began = time.perf_counter()
            sent = way.dispatch(x, ids, weights, layer, (tokens,) * group.size)
            results.append(way.combine(sent.rows, sent))
            took = time.perf_counter() - began
            slowest = max(ns for (ns,) in group.agree([int(took * 1e9)])) / 1e9
            if repeat >= 0:
                found[name].append(slowest)
        assert torch.equal(*results)
    return found


if __name__ == "__main__":
    main()
