"""A layer's router, asked beforehand: whose answer it is, and when it is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cached_models import PROMPTS
from tiny_models import FAMILIES, make_model

import coterie
from coterie.moe.routers import choice_of, router_in
from coterie.offload.ahead import NEARLY, SELDOM, Guesser
from coterie.routing.record import expert_modules

WITHOUT = {"gemma4"}  # its router stands elsewhere, and has a norm of its own


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(request.param, tmp_path_factory.mktemp(request.param))


def step(model: coterie.Model, tokens: torch.Tensor, past: Any = None) -> Any:
    with torch.no_grad():
        return model.transformers(tokens, past_key_values=past, use_cache=True).past_key_values


def test_the_routers_choice_is_what_the_layer_is_given(folder: Path) -> None:
    model, given = coterie.load(folder), {}
    modules = dict(model.transformers.named_modules())
    for layer, (name, experts) in expert_modules(model.transformers).items():
        router = router_in(modules[name.rpartition(".")[0]], model.shape.num_experts)
        if router is None:
            continue
        choose = choice_of(router, model.shape.top_k)
        router.register_forward_pre_hook(lambda _, args, layer=layer: given.update({layer: [args[0]]}))

        def compare(module: Any, args: Any, kwargs: Any, layer: int = layer, choose: Any = choose) -> None:
            ids = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
            x = given[layer][0]
            got = choose(x.reshape(-1, x.shape[-1]))
            given[layer].append(torch.equal(got.sort(1).values, ids.reshape(got.shape).sort(1).values))

        experts.register_forward_pre_hook(compare, with_kwargs=True)
    step(model, PROMPTS)
    assert given or folder.name[:-1] in WITHOUT
    assert all(found[1:] == [True] for found in given.values()), given


def test_a_router_that_is_seldom_right_is_seldom_asked() -> None:
    guesser = Guesser(2, 8)
    guesser.right |= {"path": 0.7, "token": 0.2, "router": 0.7 - NEARLY + 0.01}
    assert all(guesser.asks() for _ in range(20))
    guesser.right["router"] = 0.1
    assert sum(guesser.asks() for _ in range(10 * SELDOM)) == 10
    guesser.observe(1, [0])
    guesser.guess(0, [3, 4], 2)
    guesser.observe(0, [3, 4])
    assert guesser.right["router"] > 0.1, "and may come to be asked again"


def test_one_whose_answer_is_not_understood_is_asked_by_its_weights() -> None:
    plain = torch.nn.Linear(4, 6, bias=False)
    x = torch.randn(3, 4)
    assert torch.equal(choice_of(plain, 2)(x), (x @ plain.weight.T).topk(2, 1).indices)
