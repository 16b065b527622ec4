"""SGLang's recorder dumps, written here as the engine's recorder writes them: what they become, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coterie.routing.errors import InputError
from coterie.routing.imported import ImportOptions
from coterie.routing.imports import import_routing
from coterie.routing.sglang import Requests
from coterie.routing.trace import LoadStatistics, RoutingTrace

LAYERS, EXPERTS, SLOTS, TOP_K = 3, 6, 8, 2  # layer 0 is dense
TABLE = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1], [5, 4, 3, 2, 1, 0, 5, 4], [1, 0, 3, 2, 5, 4, 1, 1]])


def picked(request: int, position: int) -> list[int]:
    """Slots of a token, the same in every layer; eight of a token, as the recorder keeps, most of them unused."""
    first = (5 * request + position) % EXPERTS
    copied = 6 if first == 0 and request % 2 else first  # slot 6 has another copy of slot 0's expert
    return [copied, (first + 1 + request % 3) % EXPERTS, *[-1] * (8 - TOP_K)]


def record(tokens: list[tuple[int, int]], lengths: list[int] | None, rank: int = 0) -> dict[str, Any]:
    """One pass over tokens (request, position)."""
    rows = [picked(*token) for token in tokens]
    slots = torch.tensor(rows, dtype=torch.int32).view(1, len(rows), 8).repeat(LAYERS, 1, 1)
    slots[0] = -1
    return {
        "forward_pass_id": 0, "rank": rank, "gatherer_key": "primary", "input_ids": [1000 * r + p for r, p in tokens],
        "positions": [p for _, p in tokens], "extend_seq_lens": lengths, "forward_mode": 1 if lengths else 2,
        "topk_ids_of_layer": slots, "misc_objects": [],
    }  # fmt: skip


def served(requests: range, seed: int) -> list[dict[str, Any]]:
    """A rank that serves requests: prompts, some in pieces or with a prefix in the cache, then decoding; no two of a length."""
    random = np.random.default_rng(seed)
    shortest = dict(zip(requests, 20 * random.permutation(len(requests)) + 3, strict=True))
    waiting, running, records = list(requests), [], []
    while waiting or running:
        if waiting and (not running or random.random() < 0.4):
            tokens, lengths, arrived = [], [], []
            for request in waiting[: random.integers(1, 4)]:
                cached, length = 2 * (request % 4 == 3), int(shortest[request])
                tokens += [(request, cached + i) for i in range(length)]
                lengths.append(length)
                arrived.append([request, cached + length, int(random.integers(1, 7))])
            waiting = waiting[len(lengths) :]
            records.append(record(tokens, lengths))
            if random.random() < 0.5:  # the last prompt was longer than a piece
                last = arrived[-1]
                records.append(record([(last[0], last[1] + i) for i in range(4)], [4]))
                last[1] += 4
            running += arrived
        else:
            records.append(record([(r, p) for r, p, _ in running], None))
            running = [[r, p + 1, left - 1] for r, p, left in running if left > 1]
    return records


def saved(path: Path, records: list[dict[str, Any]], **others: Any) -> Path:
    torch.save({"records": records, "last_physical_to_logical_map": TABLE} | others, path)
    return path


@pytest.mark.parametrize("seed", range(4))
def test_tokens_of_a_request_are_one_sequence(tmp_path: Path, seed: int) -> None:
    """What the recorder does not say, told by positions; token ids tell here which request a token was of."""
    records = served(range(24), seed)
    trace = import_routing(saved(tmp_path / "a.pt", records), ImportOptions("m"))
    assert isinstance(trace, RoutingTrace) and trace.token_ids is not None
    requests = trace.token_ids // 1000
    assert len(set(zip(requests.tolist(), trace.sequence_ids.tolist(), strict=True))) == 24 == len(set(trace.sequence_ids))
    assert (trace.positions == trace.token_ids % 1000).all()
    assert (trace.layer_ids, trace.num_experts, trace.top_k, trace.phase) == ((1, 2), EXPERTS, TOP_K, "mixed")
    for token in (0, trace.tokens - 1):
        slots = picked(int(requests[token]), int(trace.positions[token]))[:TOP_K]
        assert trace.expert_ids[token].tolist() == TABLE[1:][:, slots].tolist()


def test_decoding_beside_prompts_in_one_pass(tmp_path: Path) -> None:
    records = [
        record([(0, 0), (0, 1), (1, 0)], [2, 1]),
        record([(2, 0), (2, 1), (0, 2), (1, 1)], [2, 1, 1]),
        record([(2, 2), (0, 3), (1, 2)], None),
    ]
    trace = import_routing(saved(tmp_path / "a.pt", records), ImportOptions())
    assert trace.sequence_ids.tolist() == [0, 0, 1, 2, 2, 0, 1, 2, 0, 1]
    only = [import_routing(saved(tmp_path / "b.pt", [r]), ImportOptions()).phase for r in (records[0], records[2])]
    assert only == ["prefill", "decode"]


@pytest.mark.parametrize("first", [3, 30])
def test_a_prompt_in_pieces_beside_decoding(first: int) -> None:
    """The piece goes on with the prompt, also where the request that decodes stands at the same position."""
    told = Requests()
    assert told.rows(list(range(first)), [first]) == [0] * first
    assert told.rows([first], None) == [0]
    assert told.rows([0, 1, 2, 3, 4, first + 1], [5, 1]) == [1, 1, 1, 1, 1, 0]
    assert told.rows([5, 6, 7, 8, first + 2], [4, 1]) == [1, 1, 1, 1, 0]
    assert told.rows([9, first + 3], None) == [1, 0]


def test_the_next_turn_of_a_conversation_is_a_request_of_its_own() -> None:
    """Its prefix, the last one's prompt and text, is in the engine's cache."""
    told = Requests()
    assert told.rows([0, 1, 2, 3, 4], [5]) == [0] * 5
    assert [told.rows([p], None) for p in (5, 6)] == [[0], [0]]
    assert told.rows([7, 8, 9], [3]) == [1, 1, 1]


def test_dumps_of_several_ranks_are_one_trace(tmp_path: Path) -> None:
    """Ranks with requests of their own add up; ranks that share their attention record the same, which counts once."""
    parts = [served(range(8), 1), served(range(8), 1), served(range(8, 20), 2)]
    files = [saved(tmp_path / f"{i}.pt", part) for i, part in enumerate(parts)]
    trace = import_routing(files, ImportOptions())
    alone = [import_routing(file, ImportOptions()) for file in files]
    assert trace.tokens == alone[1].tokens + alone[2].tokens
    assert len(set(trace.sequence_ids)) == 20
    assert (trace.expert_ids == np.concatenate([alone[0].expert_ids, alone[2].expert_ids])).all()


def test_token_ids_that_no_vocabulary_has_are_left_out(tmp_path: Path) -> None:
    odd = record([(0, 0), (0, 1)], [2]) | {"input_ids": [3, 2**40]}  # SGLang's number of an image
    assert import_routing(saved(tmp_path / "a.pt", [odd]), ImportOptions()).token_ids is None


def test_counts_by_pass_are_summed_over_passes_ranks_and_copies(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    counts = random.integers(0, 9, (2, 3, LAYERS, SLOTS))  # of two ranks, three passes each
    counts[:, :, 0] = 0
    files = []
    for rank, passes in enumerate(counts):
        records = [{"forward_pass_id": i, "rank": rank, "global_physical_count": torch.tensor(c)} for i, c in enumerate(passes)]
        files.append(saved(tmp_path / f"{rank}.pt", records))
    load = import_routing(files, ImportOptions("m", scenario="day"))
    by_hand = np.zeros((LAYERS, EXPERTS), np.int64)
    for layer in range(LAYERS):
        for slot in range(SLOTS):
            by_hand[layer, TABLE[layer, slot]] += counts[:, :, layer, slot].sum()
    assert isinstance(load, LoadStatistics) and load.layer_ids == (1, 2) and load.scenarios == ("day",)
    assert (load.expert_load[0] == by_hand[1:]).all()


def test_counts_of_experts_are_summed_over_passes(tmp_path: Path) -> None:
    torch.save({"rank": 0, "logical_count": torch.ones(4, 3, 5, dtype=torch.int64)}, tmp_path / "d.pt")
    assert import_routing(tmp_path / "d.pt", ImportOptions()).expert_load.tolist() == [[[4] * 5] * 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": [0, 2**32 + 1]}, "positions: found 0 to 4294967297"),
        ({"extend_seq_lens": [3]}, "extend_seq_lens: found 3 tokens together, expected 2"),
        ({"input_ids": [1]}, "records: input_ids: found 1, expected 2"),
        ({"positions": [0]}, r"topk_ids_of_layer: found shape \[3, 2, 8\], expected \[layers, 1, top_k\]"),
        ({"topk_ids_of_layer": torch.full((3, 2, 1), -65533)}, "expert_ids: found -65533"),
        ({"topk_ids_of_layer": torch.full((3, 2, 1), 8)}, "topk_ids_of_layer: found 8, expected less than 8, the slots of"),
        ({"topk_ids_of_layer": "x"}, "a.pt: is not what its kind of recording holds|expected topk_ids_of_layer and positions"),
    ],
)
def test_records_that_cannot_be_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        import_routing(saved(tmp_path / "a.pt", [record([(0, 0), (0, 1)], [2]) | change]), ImportOptions())


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    tokens = saved(tmp_path / "a.pt", [record([(0, 0)], [1])])
    counts = saved(tmp_path / "b.pt", [{"global_physical_count": torch.ones(LAYERS, SLOTS)}])
    torch.save({"logical_count": torch.ones(LAYERS, 4)}, tmp_path / "c.pt")
    np.savez(tmp_path / "d.npz", expert_ids=np.zeros((1, 1, 1), int))
    for files, message in (
        ([tokens, counts], r"b.pt: found counts of slots \(mode per_pass\), expected single tokens .*a.pt has"),
        ([tokens, tmp_path / "d.npz"], "d.npz: found 2 files, expected one, or SGLang's dumps"),
        ([saved(tmp_path / "e.pt", [])], "e.pt: records: found none"),
        ([saved(tmp_path / "f.pt", [{"x": 1}])], r"f.pt: found \['x'\], expected an SGLang recorder dump"),
        ([saved(tmp_path / "g.pt", [{"global_physical_count": torch.ones(1, 1)}])], r"g.pt: .*found shape \[1, 1\]"),
        ([saved(tmp_path / "h.pt", [record([(0, 0)], [1])], last_physical_to_logical_map=TABLE - 1)], "h.pt: last_.*found -1"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            import_routing(files, ImportOptions())
