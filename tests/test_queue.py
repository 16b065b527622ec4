"""Which rank runs which prompt, whatever the lengths, homes and room: pure, so no processes."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.moe.batch import Request
from coterie.moe.queue import PREFILL_TOKENS, Queue


def made(rng: np.random.Generator, count: int) -> list[Request]:
    indices = sorted(rng.choice(3 * count + 1, count, replace=False).tolist())  # as after a resumed run: some are missing
    return [Request(i, (5,) * int(rng.choice([1, 3, 50, 3000, 9000])), 4) for i in indices]


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10_000), ranks=st.integers(1, 6), count=st.integers(0, 40), home=st.booleans())
def test_every_request_runs_once_within_the_room_and_at_home_first(seed, ranks, count, home) -> None:
    rng = np.random.default_rng(seed)
    requests = made(rng, count)
    homes = rng.integers(0, ranks, count).tolist() if home else None
    at = dict(zip((r.index for r in requests), homes or [r.index % ranks for r in requests], strict=True))
    everywhere = [Queue(requests, ranks, homes) for _ in range(ranks)]
    ran: list[int] = []
    for _ in range(20 * count + 20):
        waiting_at = [sum(h == r for i, h in at.items() if i not in ran) for r in range(ranks)]
        room = rng.integers(0, 4, ranks).tolist()
        taken, *others = [queue.assign(room) for queue in everywhere]
        assert all(other == taken for other in others), "ranks disagree"
        for rank, own in enumerate(taken):
            assert len(own) <= room[rank]
            longest = max((len(r.token_ids) for r in own), default=0)
            assert len(own) <= 1 or longest * len(own) <= PREFILL_TOKENS
            if waiting_at[rank]:
                assert all(at[r.index] == rank for r in own), "others' prompts before its own"
                assert bool(own) == bool(room[rank])
        ran += [r.index for own in taken for r in own]
        assert len(everywhere[0]) == count - len(ran)
        if not len(everywhere[0]):
            break
    assert sorted(ran) == sorted(at) and len(set(ran)) == len(ran)


def test_an_idle_rank_takes_from_the_longest_queue() -> None:
    requests = [Request(i, (5,), 1) for i in range(9)]
    taken = Queue(requests, 3, [0] * 6 + [1] * 3).assign([1, 1, 1])
    assert [[r.index for r in own] for own in taken] == [[0], [6], [1]]


def test_own_prompts_keep_their_order() -> None:
    queue = Queue([Request(i, (5,), 1) for i in range(6)], 2)
    assert [[[r.index for r in own] for own in queue.assign([2, 1])] for _ in range(3)] == [
        [[0, 2], [1]],
        [[4], [3]],
        [[], [5]],
    ]
