"""Recorded routing that a cache begins with: what it then knows, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cached_models import Ready, logits
from tiny_models import make_model

import coterie
from coterie.launch.cli import main
from coterie.offload.cache import ExpertCache
from coterie.offload.prior import teach
from coterie.routing.errors import InputError
from coterie.routing.trace import RoutingTrace, save_trace


def recorded(model: coterie.Model, tokens: int = 40, seed: int = 0) -> RoutingTrace:
    """Routing of a model's shape in which two paths through the experts take turns, and a token tells which."""
    rng, shape = np.random.default_rng(seed), model.shape
    paths = np.stack(
        [[rng.permutation(shape.num_experts)[: shape.top_k] for _ in shape.layer_ids] for _ in range(2)]
    )  # [2, layers, top_k]
    which = np.arange(tokens) % 2
    return RoutingTrace(
        paths[which].astype(np.int16), np.zeros(tokens, dtype=np.int32), np.arange(tokens, dtype=np.int32), "any",
        shape.num_experts, tuple(shape.layer_ids), token_ids=(7 + which).astype(np.int32),
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("qwen3_moe", tmp_path_factory.mktemp("prior"))


def test_a_cache_knows_from_the_start_what_follows_what(folder: Path) -> None:
    plain = coterie.load(folder, slots=8)
    prior = recorded(plain)
    knowing = coterie.load(folder, slots=8, prior=prior)
    first = prior.expert_ids[0]
    for model, expected in ((plain, False), (knowing, True)):
        guesser = model.cache.guesser
        guesser.token.read([(7, 8, 7)])
        token = np.argsort(-guesser.token.foretold[0])[: model.shape.top_k]
        assert (set(token.tolist()) == set(first[0].tolist())) == expected
        guesser.observe(0, sorted(first[0].tolist()))
        path = guesser.path.scores(1)
        found = set(np.argsort(-path)[: model.shape.top_k].tolist()) if path.any() else set()
        assert (found == set(first[1].tolist())) == expected
        assert model.cache.statistics.transfers == 0 and not model.cache.policy.held.any(), (
            "nothing is read, or thought to be there"
        )


def test_the_choice_that_was_learned_is_kept_beside_an_empty_cache() -> None:
    """Few experts that come again and many that never do: learning pays, and a cold cache is no reason to doubt it."""
    layers, experts, slots, rng = 4, 64, 32, np.random.default_rng(0)

    def tokens(count: int) -> np.ndarray:
        often = rng.integers(0, 4, (count, layers, 1))
        return np.concatenate([often, rng.integers(8, experts, (count, layers, 1))], 2).astype(np.int16)

    def trace(ids: np.ndarray) -> RoutingTrace:
        at = np.arange(len(ids), dtype=np.int32)
        return RoutingTrace(ids, np.zeros(len(ids), dtype=np.int32), at, "any", experts, tuple(range(layers)))

    cache = ExpertCache(Ready(layers, experts), experts, slots, {"w": (1,)}, torch.float32, 2)
    teach(cache, trace(tokens(400)), [range(experts)] * layers)
    policy = cache.policy
    assert policy.learning and policy.debt == 0 and not policy.held.any()
    assert not policy.shadow.resident.any() and not policy.by_age.order
    patience = policy.patience
    for token in tokens(40):
        for layer, picked in enumerate(token):
            cache.announce(layer, picked.tolist())
            assert len([place for group in cache.arrivals(layer, picked.tolist()) for place in group]) == 2
    assert policy.learning and policy.patience == patience, "never changed its mind"


def test_tokens_without_experts_of_this_rank_are_tokens_all_the_same(folder: Path) -> None:
    made = coterie.load(folder, slots=8)
    prior = recorded(made)
    first = sorted({int(e) for e in prior.expert_ids[0, 0]} - {int(e) for e in prior.expert_ids[1, 0]})[:1]
    teach(made.cache, prior, [first] + [[]] * (len(made.shape.layer_ids) - 1))
    assert made.cache.guesser.path.seen == prior.tokens


def test_logits_are_the_same_with_a_prior(folder: Path) -> None:
    right = logits(coterie.load(folder))
    made = coterie.load(folder, slots=5, prior=recorded(coterie.load(folder)))
    assert all(torch.equal(got, expected) for got, expected in zip(logits(made), right, strict=True))


def test_only_experts_of_this_rank_are_learned(folder: Path) -> None:
    made = coterie.load(folder, slots=8)
    local = [[0, 1]] * len(made.shape.layer_ids)
    teach(made.cache, recorded(made), local)
    assert not made.cache.guesser.path.by_token[:, :, 2:].any() and made.cache.guesser.path.by_token.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 99}, "--prior: num_experts: found 99, expected "),
        ({"token_ids": np.full(40, 5000, dtype=np.int32)}, "--prior: token_ids: found 5000, expected less than "),
        ({"layer_ids": (5, 6, 7)}, r"--prior: layer_ids: found \[5, 6, 7\], expected \["),
    ],
)
def test_another_models_prior_is_refused(change: dict, message: str, folder: Path) -> None:
    made = coterie.load(folder)
    with pytest.raises(InputError, match=message):
        coterie.load(folder, slots=8, prior=replace(recorded(made), **change))


def test_a_prior_where_nothing_is_read_later_is_refused(folder: Path, tmp_path: Path, capsys) -> None:
    made = coterie.load(folder)
    with pytest.raises(InputError, match="prior: found it without slots"):
        coterie.load(folder, prior=recorded(made))
    save_trace(recorded(made), tmp_path / "t.safetensors")
    command = ["generate", str(folder), "--prompts", str(tmp_path / "p.jsonl"), "--prior", str(tmp_path / "t.safetensors")]
    (tmp_path / "p.jsonl").write_text('{"token_ids": [5, 6]}\n')
    assert main(command) == 2 and "--prior: found it where all experts fit" in capsys.readouterr().err
    assert main([*command, "--memory", "100GB", "--max-new-tokens", "2"]) == 0
    assert "t.safetensors is not used" in capsys.readouterr().err
