"""A token's whole path, foretold from token ids: by hand, against a plain table of visits, in traces, while text is made."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cached_models import PROMPTS, model
from conftest import make_trace
from tiny_models import make_model

import coterie
from coterie.launch.cli import main
from coterie.moe.batch import Request, Running, contexts
from coterie.offload import whole_path
from coterie.offload.ahead import Guesser
from coterie.offload.predictors import likeliest
from coterie.offload.simulate import Simulation, contexts_of
from coterie.offload.whole_path import ORDER, VISITS, Context, WholePath
from coterie.routing.errors import InputError
from coterie.routing.trace import read_trace, save_trace


def show(predictor: WholePath, context: Context, layers: list[list[int]]) -> None:
    predictor.read([context])
    for layer, experts in enumerate(layers):
        predictor.observe(layer, np.array(experts, dtype=np.int64))


def test_longer_matches_count_most_by_hand() -> None:
    found = WholePath(2, 4)
    show(found, (5,), [[0], [1]])
    show(found, (6, 5), [[2], [3]])
    show(found, (5, 6), [[1], [1]])
    found.read([(5, 6)])  # seen once after 6, and once more without
    usual = np.array([[1.25, 1.25, 1.25, 0.25], [0.25, 2.25, 0.25, 1.25]])
    usual /= usual.sum(1, keepdims=True)
    # (5, 6): half to its one visit; of the other half two thirds to the two visits of 5; what is left is as usual
    right = 1 / 6 * usual
    right[0, 0] += 1 / 6
    right[0, 1] += 1 / 2 + 1 / 6
    right[1, 1] += 1 / 2 + 1 / 3
    assert found.scores(1) == pytest.approx(right[0]) and found.scores(2) == pytest.approx(right[1])
    assert not found.scores(3).any(), "nothing is known of the token after it"
    found.observe(0, np.array([1]))
    assert found.scores(1) == pytest.approx(right[1])


def plain_scores(
    seen: list[tuple[Context, np.ndarray]], tokens: int, context: Context, layers: int, experts: int
) -> np.ndarray:
    """The same from a list of all visits."""
    made, rest = np.zeros((layers, experts)), 1.0
    uses = np.full((layers, experts), 1 / experts)
    for _, path in seen:
        for layer, picked in enumerate(path):
            uses[layer, picked] += 1
    for length in range(min(len(context), ORDER), 0, -1):
        # a place is forgotten when it is written anew, which has happened by the time that a token is foretold
        alike = [path for known, path in seen if known[:length] == context[:length]][-VISITS:]
        alike = [path for path in alike if any(path is kept for _, kept in seen[-tokens:])]
        for path in alike:
            for layer, picked in enumerate(path):
                made[layer, picked] += rest / (len(alike) + 1)
        rest /= len(alike) + 1
    return made + rest * 2 * uses / uses.sum(1, keepdims=True)


@pytest.mark.parametrize("tokens", [7, 60, 4096])
def test_it_is_what_a_plain_table_of_all_visits_says(tokens: int) -> None:
    layers, experts, rng = 3, 8, np.random.default_rng(tokens)
    found, seen, last = WholePath(layers, experts, tokens), [], ()
    for _ in range(200):
        context = (int(rng.integers(5)), *last)[:ORDER]
        found.read([context])
        if seen:
            right = plain_scores(seen, tokens, context, layers, experts)
            for layer in range(layers):
                assert found.scores(layer + 1) == pytest.approx(right[layer], rel=1e-5)
        path = np.stack([np.sort(rng.permutation(experts)[:2]) for _ in range(layers)])
        for layer, picked in enumerate(path):
            found.observe(layer, picked)
        seen.append((context, path))
        last = context
    assert sum(map(len, found.visits.values())) <= ORDER * tokens


def test_steps_of_several_tokens_and_steps_that_nobody_told_of() -> None:
    one, all_at_once = WholePath(2, 4), WholePath(2, 4)
    paths = np.array([[[0, 1], [2, -1]], [[1, 2], [3, 0]], [[3, 0], [0, 1]]])  # tokens, layers, picks
    read = [(7,), (8, 7), (9, 8, 7)]
    for context, path in zip(read, paths, strict=True):
        show(one, context, [[e for e in layer if e >= 0] for layer in path.tolist()])
    all_at_once.read(read)
    for layer in range(2):
        all_at_once.observe_each(layer, paths[:, layer])
    for found in (one, all_at_once):
        found.observe(0, np.array([3]))  # of a token that nobody told of: nothing is learned or foretold
        assert found.foretold is None and not found.scores(1).any()
        found.read([(9, 8)])
    assert one.scores(1) == pytest.approx(all_at_once.scores(1)) and likeliest(one.scores(1), 2).tolist() in ([0, 3], [3, 0])
    all_at_once.read([(1,)] * (whole_path.MOST + 1))
    assert all_at_once.foretold is None, "many tokens pick nearly everything"


def test_of_a_token_that_was_not_seen_its_neighbours_tell() -> None:
    vectors = np.array([[1, 0], [0, 1], [0.9, 0.1]], dtype=np.float32)
    without, found = WholePath(1, 4), WholePath(1, 4, embed=lambda ids: vectors[list(ids)])
    for one in (without, found):
        for _ in range(3):
            show(one, (0,), [[2]])
            show(one, (1,), [[3]])
        one.read([(2,)])
    assert likeliest(found.scores(1), 1).tolist() == [2] and found.scores(1)[2] > 2 * found.scores(1)[3]
    assert without.scores(1)[2] == pytest.approx(without.scores(1)[3])


def test_the_token_decides_once_it_was_right_more_often() -> None:
    """Layer 1 follows from the token alone; the router is wrong, and the path has nothing to go by."""
    guesser, rng, said = Guesser(2, 16), np.random.default_rng(0), []
    for _ in range(600):
        token = int(rng.integers(8))
        guesser.token.read([(token,)])
        for layer, experts in ((0, rng.permutation(16)[:2]), (1, np.array([token, token + 8]))):
            guesser.token.observe_each(layer, experts[None])
            guesser.observe(layer, experts.tolist())
            if layer == 0:
                said.append((set(guesser.guess(1, [(token + 1) % 16], 2)), set(experts.tolist()), {token, token + 8}))
    assert guesser.right["token"] > 0.9 > guesser.right["path"] and guesser.right["router"] < 0.3
    assert all(guess == right for guess, _, right in said[-50:])


def test_before_anything_was_seen_only_the_token_is_asked() -> None:
    """And after a token that ended early the path, which is elsewhere, is not."""
    guesser = Guesser(3, 8)
    guesser.token.read([(4,)])
    for layer in range(3):
        assert list(guesser.guess(layer, (), 2, layer + 1)) == [], "nothing is known yet"
    assert guesser.made is not None and set(guesser.made[1]) == {"token"}
    guesser.observe(0, [1, 2])
    guesser.guess(0, (), 2)
    assert guesser.made is not None and "path" not in guesser.made[1]
    guesser.guess(1, (), 2)
    assert guesser.made is not None and "path" in guesser.made[1]


def test_contexts_of_a_batch() -> None:
    prompt, other = Running(Request(0, (4, 5, 6, 7), 9)), Running(Request(1, (1, 2), 9), new_tokens=[3])
    assert contexts([prompt], [True], [4]) == [(4,), (5, 4), (6, 5, 4), (7, 6, 5)]
    assert contexts([other, prompt], [True, False], [1, 1]) == [(3, 2, 1)]


def test_traces_keep_token_ids_where_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, prompts = make_model("qwen3_moe", tmp_path / "m"), PROMPTS[:3].tolist()
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"token_ids": row}) + "\n" for row in prompts))
    arguments = ["trace", str(folder), "--prompts", str(tmp_path / "p.jsonl"), "--max-new-tokens", "6", "--batch-size", "2"]
    for name, more in (("with", ["--token-ids"]), ("without", [])):
        assert main([*arguments, "--out", str(tmp_path / name), *more]) == 0
    found, without = read_trace(tmp_path / "with"), read_trace(tmp_path / "without")
    assert without.token_ids is None and (found.expert_ids == without.expert_ids).all() and found.token_ids is not None
    texts = [o.token_ids for o in coterie.load(folder).generate([coterie.Prompt(token_ids=tuple(p)) for p in prompts], 6)[0]]
    for sequence, (prompt, new) in enumerate(zip(prompts, texts, strict=True)):
        mine = found.select((found.sequence_ids == sequence).nonzero()[0])
        order = mine.positions.argsort()
        assert mine.token_ids[order].tolist() == [*prompt, *new][: mine.tokens]
    save_trace(found, tmp_path / "again")
    assert (read_trace(tmp_path / "again").token_ids == found.token_ids).all()
    every = contexts_of(found)
    last = int(found.positions.argmax())
    sequence = [*prompts[found.sequence_ids[last]], *texts[found.sequence_ids[last]]]
    assert every[last] == tuple(sequence[found.positions[last] - ORDER + 1 : found.positions[last] + 1][::-1])


def test_token_ids_that_do_not_fit_are_refused() -> None:
    trace = make_trace(tokens=5)
    for wrong, message in (
        (np.zeros(4, dtype=np.int32), r"token_ids: found shape \(4,\)"),
        (np.zeros(5, dtype=np.int64), "token_ids: found int64, expected int32"),
        (np.full(5, -1, dtype=np.int32), "token_ids: found -1, expected 0 or more"),
    ):
        with pytest.raises(InputError, match=message):
            coterie.RoutingTrace(
                trace.expert_ids, trace.sequence_ids, trace.positions, "m", 8, trace.layer_ids, token_ids=wrong
            )


def told_by_tokens(tokens: int = 300) -> coterie.RoutingTrace:
    """What a token picks follows from its id, but for one layer in five."""
    trace, rng = make_trace(tokens=tokens, layers=5, experts=16), np.random.default_rng(1)
    ids = rng.integers(0, 12, tokens).astype(np.int32)
    paths = np.stack([[rng.permutation(16)[:2] for _ in range(5)] for _ in range(12)]).astype(np.int16)
    made = paths[ids]
    made[:, 2] = np.stack([rng.permutation(16)[:2] for _ in range(tokens)])
    return coterie.RoutingTrace(
        made, trace.sequence_ids, trace.positions, "m", 16, trace.layer_ids, phase="decode", token_ids=ids
    )


def test_cache_sim_plays_it_where_there_are_token_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_trace(told_by_tokens(), tmp_path / "t")
    assert main(["cache-sim", str(tmp_path / "t"), "--slots", "0.25", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    recall = found["predictors"]["token"]
    assert recall["recall_before_first_layer"] > 0.7 and recall["recall"]["1"] > found["predictors"]["path"]["recall"]["1"]
    assert "recall_before_first_layer" not in found["predictors"]["path"]
    assert found["policies"]["coterie+token"]["hidden"] > 0.5
    save_trace(make_trace(tokens=20), tmp_path / "u")
    assert main(["cache-sim", str(tmp_path / "u"), "--slots", "0.25"]) == 0
    said = capsys.readouterr()
    assert "no token_ids, so token is not played; coterie trace --token-ids records them" in said.err
    assert "coterie+token" not in said.out and "coterie+token" not in Simulation(make_trace(tokens=20), 0.25).names


def test_while_text_is_made_the_cache_is_told_and_the_text_stays(tmp_path: Path) -> None:
    folder = make_model("qwen3_moe", tmp_path / "m")
    prompts = [coterie.Prompt(token_ids=tuple(row)) for row in PROMPTS.tolist()]
    right = [o.token_ids for o in model(folder, None).generate(prompts, 12, batch_size=1)[0]]
    made = model(folder, 9)
    for size in (1, 3):
        found, _ = made.generate(prompts, 12, batch_size=size)
        assert [o.token_ids for o in found] == right
    guesser = made.cache.guesser
    fed = sum(len(p.token_ids) + len(new) - 1 for p, new in zip(prompts, right, strict=True))
    assert guesser.token.next == 2 * fed and guesser.right["token"] != 0.5
    last = guesser.token.contexts[guesser.token.next - 1]
    assert len(last) == ORDER and last[0] in range(97)
    read = guesser.token.next
    with torch.no_grad():
        made.transformers(PROMPTS[:1])  # nobody tells of these
    assert guesser.token.next == read and guesser.token.foretold is None
    made.cache.store.close()
