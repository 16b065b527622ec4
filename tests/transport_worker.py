"""Run by test_launchers.py on every rank: what a transport brings, against what each rank can work out by itself.

python tests/transport_worker.py RESULT.json TRANSPORT, under any launcher
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from coterie.launch.distributed import job, leave
from coterie.moe.collectives import Group
from coterie.moe.placement_map import layer_maps
from coterie.moe.strategy import Hierarchical
from coterie.placement.plan import PlacementPlan
from coterie.placement.topology import Topology


def rows_of(source: int, target: int, dtype: torch.dtype) -> torch.Tensor:
    """What `source` sends to `target`: as many rows as their numbers give, none for some pairs, `[n, 3]`."""
    count = (source * 2 + target) % 3
    return (torch.arange(count * 3).view(count, 3) + 16 * source + target / 2).to(dtype)


def check_exchanges(group: Group, dtype: torch.dtype) -> None:
    me, ranks = group.members[group.rank], range(group.size)
    theirs = [group.members[r] for r in ranks]
    parts = [rows_of(me, t, dtype) for t in theirs]
    expected = torch.cat([rows_of(s, me, dtype) for s in theirs])
    send, receive = [len(p) for p in parts], [len(rows_of(s, me, dtype)) for s in theirs]
    assert torch.equal(group.exchange_known(torch.cat(parts), send, receive), expected)
    for free in (0, 1 << 16):  # with an exchange of counts, and padded
        group.free_bytes = free
        got, counts = group.exchange(torch.cat(parts), send, 2)
        assert torch.equal(got, expected) and list(counts) == receive
    nothing = torch.empty((0, 3), dtype=dtype)
    assert group.exchange_known(nothing, [0] * group.size, [0] * group.size).shape == (0, 3)
    lengths = [len(rows_of(s, 1, dtype)) for s in theirs]
    gathered = group.gather_rows(rows_of(me, 1, dtype), lengths)
    assert torch.equal(gathered, torch.cat([rows_of(s, 1, dtype) for s in theirs]))
    big = torch.full((50_000, 8), me, dtype=torch.float32)
    out = group.exchange_known(big, [len(big) // group.size] * group.size, [len(big) // group.size] * group.size)
    assert torch.equal(out[:: len(big) // group.size, 0], torch.tensor(theirs, dtype=torch.float32))


def check_hierarchical(whole: Group) -> None:
    """As two nodes: with rows inside beside those between, and one after the other, the same bits and as many rows."""
    group = Group(whole.transport, whole.size // 2, whole.traffic)
    tokens = tuple(0 if r == 1 else 700 + 31 * r for r in range(group.size))
    slots = torch.arange(2 * group.size, dtype=torch.int64).view(1, -1).numpy()
    plan = PlacementPlan(slots, 2 * group.size, (0,), Topology(2, group.size // 2))
    drawn = torch.Generator().manual_seed(group.rank)
    x = torch.randn(tokens[group.rank], 512, generator=drawn)
    ids = torch.rand(len(x), 2 * group.size, generator=drawn).topk(3).indices
    found = []
    for least in (1 << 62, 0):
        strategy, before = Hierarchical(group, least), group.traffic.rows
        sent = strategy.dispatch(x, ids, torch.full(ids.shape, 0.5), layer_maps(plan, group.rank)[0], tokens)
        out = strategy.combine(sent.rows * sent.weights.sum(1, keepdim=True), sent)
        found.append((sent.rows, sent.ids, out, torch.tensor(group.traffic.rows - before)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    torch.testing.assert_close(found[0][2], 1.5 * x)


def main(result: Path, transport: str) -> None:
    with job(transport=transport or None) as group:
        for dtype in (torch.float32, torch.bfloat16):
            check_exchanges(group, dtype)
        check_hierarchical(group)
        assert group.agree([group.rank, 7]) == [(r, 7) for r in range(group.size)]
        assert group.gather({"rank": group.rank, "size": "x" * group.rank}) == [
            {"rank": r, "size": "x" * r} for r in range(group.size)
        ]
        pairs = group.subgroup([[r, r + 1] for r in range(0, group.size, 2)])
        check_exchanges(pairs, torch.bfloat16)
        started = pairs.start_exchange(torch.full((2, 3), float(group.rank)), [1, 1], [1, 1])
        assert pairs.gather(group.rank) == [group.rank // 2 * 2, group.rank // 2 * 2 + 1]
        assert started()[:, 0].tolist() == [group.rank // 2 * 2, group.rank // 2 * 2 + 1]
        assert group.transport is not None
        torch_group = torch.distributed.is_initialized()
        found = {"name": group.transport.name, "torch": torch_group, "per_node": group.ranks_per_node, "size": group.size}
        if group.rank == 0:
            result.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    leave(0)
