"""Generation on one process: the embedded model, sampling, stopping, streaming, wrong settings."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import make_model
from transformers import AutoModelForCausalLM, TextIteratorStreamer

import coterie
from coterie.moe.generate import Sampling
from coterie.routing.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_model("qwen3_moe", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> coterie.Model:
    return coterie.load(folder)


PROMPTS = [coterie.Prompt(token_ids=tuple(range(3, 3 + n))) for n in (4, 9, 2, 6, 13)]


def test_a_batch_gives_what_each_prompt_gives_alone(model: coterie.Model) -> None:
    together, _ = model.generate(PROMPTS, 12)
    for batch_size in (1, 2):
        assert model.generate(PROMPTS, 12, batch_size=batch_size)[0] == together


HALF = 4  # frequencies of a head of the tiny models
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * HALF, "long_factor": [8.0, 4.0, 2.0, 1.5],
    "short_mscale": 1.0, "long_mscale": 1.3, "original_max_position_embeddings": 16,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(
    ("name", "rope"),
    [("phimoe", LONGROPE), ("qwen3_moe", LONGROPE), ("qwen3_moe", DYNAMIC)],
    ids=["phimoe", "longrope", "dynamic"],
)
def test_frequencies_that_follow_the_length_follow_each_prompts_own(name: str, rope: dict[str, object], tmp_path: Path) -> None:
    """Those of transformers go by the longest sequence of a batch, whoever is beside it."""
    folder = make_model(name, tmp_path, rope_parameters=rope, max_position_embeddings=24, head_dim=2 * HALF)
    model, plain = coterie.load(folder), AutoModelForCausalLM.from_pretrained(folder)
    rng = np.random.default_rng(0)
    prompts = [coterie.Prompt(token_ids=tuple(rng.integers(0, 97, n).tolist())) for n in (6, 40, 12, 30, 15)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # beyond the model's positions
        together, _ = model.generate(prompts, 8)
    for prompt, output in zip(prompts, together, strict=True):
        ids, past, right = torch.tensor([prompt.token_ids]), None, []
        for _ in range(8):
            with torch.no_grad():
                out = plain(ids, past_key_values=past, use_cache=True)
            past, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            right.append(int(ids))
        assert output.token_ids == tuple(right), len(prompt.token_ids)


def test_an_end_token_stops_a_sequence_and_no_other(folder: Path, tmp_path: Path) -> None:
    free = coterie.load(folder)
    free.transformers.generation_config.eos_token_id = None
    texts = [o.token_ids for o in free.generate(PROMPTS, 12)[0]]
    end = texts[0][3]
    free.transformers.generation_config.eos_token_id = [end]
    for output, text in zip(free.generate(PROMPTS, 12)[0], texts, strict=True):
        cut = text.index(end) + 1 if end in text else len(text)
        assert output.token_ids == text[:cut]
        assert output.finish_reason == ("stop" if end in text else "length")


def test_a_prompts_own_limit_counts_for_it_alone(model: coterie.Model) -> None:
    prompts = [coterie.Prompt(token_ids=(5, 6), max_new_tokens=n, id=f"p{n}") for n in (1, 4, 2)]
    outputs, statistics = model.generate(prompts, 12)
    assert [len(o.token_ids) for o in outputs] == [1, 4, 2] and [o.id for o in outputs] == ["p1", "p4", "p2"]
    assert (statistics.new_tokens, statistics.prompt_tokens) == (7, 6)
    assert statistics.peak_memory_bytes > 10**7 and statistics.seconds > 0


def test_a_limit_below_nothing_is_refused_by_the_prompts_name(model: coterie.Model) -> None:
    prompts = [coterie.Prompt(token_ids=(5, 6)), coterie.Prompt(token_ids=(5, 6), max_new_tokens=-1, id="p")]
    with pytest.raises(coterie.InputError, match="prompt 'p': max_new_tokens: found -1, expected 0 or more"):
        model.generate(prompts, 12)


def test_sampling_depends_on_seed_and_prompt_and_not_on_the_batch(model: coterie.Model) -> None:
    warm = Sampling(temperature=1.0, top_k=20, top_p=0.95, seed=3)
    same = [coterie.Prompt(token_ids=(5, 6, 7))] * 3
    one = model.generate(same, 10, warm)[0]
    assert one == model.generate(same, 10, warm, batch_size=1)[0]
    assert len({o.token_ids for o in one}) > 1, "equal prompts must draw differently"
    assert one != model.generate(same, 10, Sampling(1.0, 20, 0.95, seed=4))[0]
    cold = model.generate(same, 10, Sampling(temperature=1e-4))[0]
    assert cold == model.generate(same, 10)[0]
    assert model.generate(same, 10, Sampling(temperature=1.0, top_k=1))[0] == cold


def test_a_checkpoints_repetition_penalty_is_carried_out(folder: Path, tmp_path: Path) -> None:
    model = coterie.load(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for one in (model.transformers, reference):
        one.generation_config.repetition_penalty = 1.5
    ids = torch.tensor([PROMPTS[1].token_ids])
    expected = reference.generate(ids, max_new_tokens=15, do_sample=False)[0, ids.shape[1] :].tolist()
    assert list(model.generate([PROMPTS[1]], 15)[0][0].token_ids) == expected


def test_settings_that_are_not_carried_out_are_refused(folder: Path) -> None:
    model = coterie.load(folder)
    model.transformers.generation_config.no_repeat_ngram_size = 2
    with pytest.raises(
        InputError, match=r"generation_config\.json: no_repeat_ngram_size: found 2, which coterie does not carry out"
    ):
        model.generate(PROMPTS, 2)


def test_numbers_of_other_kinds_are_taken_or_refused(model: coterie.Model) -> None:
    with pytest.raises(InputError, match=r"--temperature: found 1e-39, expected 0 \(greedy\), or 1e-06 or more"):
        Sampling(temperature=1e-39)
    prompt = coterie.Prompt(token_ids=tuple(torch.tensor([5, 7, 9])))  # type: ignore[arg-type]
    whole, _ = model.generate([prompt], 4, Sampling(temperature=1))
    assert (
        whole[0].token_ids
        == model.generate([coterie.Prompt(token_ids=(5, 7, 9))], 4, Sampling(temperature=1.0))[0][0].token_ids
    )
    with pytest.raises(InputError, match=r"token_ids: found 5\.7, expected integers"):
        model.generate([coterie.Prompt(token_ids=(5.7, 6))], 4)  # type: ignore[arg-type]


def test_text_beyond_the_models_positions_is_warned_about(tmp_path: Path) -> None:
    model = coterie.load(make_model("qwen3_moe", tmp_path, max_position_embeddings=32))
    with pytest.warns(RuntimeWarning, match=r"prompt 1 .*: 30 tokens and 4 new ones, more than the model's 32 positions"):
        model.generate([coterie.Prompt(token_ids=(1,) * 3), coterie.Prompt(token_ids=(1,) * 30)], 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate([coterie.Prompt(token_ids=(1,) * 28)], 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(temperature=-1.0), "--temperature: found -1.0, expected 0"),
        (dict(temperature=1.0, top_k=0), "--top-k: found 0"),
        (dict(temperature=1.0, top_p=1.5), "--top-p: found 1.5"),
        (dict(top_p=0.5), "have no effect on greedy text"),
    ],
)
def test_wrong_sampling_says_what_is_allowed(settings, message) -> None:
    with pytest.raises(InputError, match=message):
        Sampling(**settings)


def test_transformers_streamers_get_every_token_as_it_comes() -> None:
    model = coterie.load("coterie-tiny")
    for skip_prompt in (True, False):
        streamer = TextIteratorStreamer(model.tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True, timeout=30)
        (output,), _ = model.generate(["import os\nimport "], 24, streamer=streamer)
        assert "".join(streamer) == ("" if skip_prompt else "import os\nimport ") + output.text and len(output.token_ids) == 24
    with pytest.raises(InputError, match="streamer: found 2 prompts, expected one"):
        model.generate(["a", "b"], 2, streamer=streamer)


def test_transformers_own_generate_works_on_a_model_coterie_loaded(model: coterie.Model) -> None:
    model.context.live = None
    ids = torch.tensor([PROMPTS[0].token_ids])
    text = model.transformers.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist()
    assert text == list(model.generate([PROMPTS[0]], 8)[0][0].token_ids)


@pytest.mark.parametrize("prompt", [coterie.Prompt(text=""), coterie.Prompt(token_ids=())])
def test_an_empty_prompt_is_an_error(prompt: coterie.Prompt) -> None:
    with pytest.raises(InputError, match=r"prompt 0 .*: found no token"):
        coterie.load("coterie-tiny").generate([prompt], 2)


def test_the_output_is_fit_for_json(model: coterie.Model) -> None:
    from dataclasses import asdict

    outputs, statistics = model.generate(PROMPTS[:1], 3)
    json.dumps([asdict(outputs[0]), asdict(statistics)])
