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


def main(result: Path, transport: str) -> None:
    with job(transport=transport or None) as group:
        for dtype in (torch.float32, torch.bfloat16):
            check_exchanges(group, dtype)
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
