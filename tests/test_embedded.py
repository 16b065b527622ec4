"""The model that ships with coterie: small, really trained, with held-out text and figures that are true."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import coterie
from coterie.moe.families import EMBEDDED_FOLDER
from coterie.moe.tiny.corpus import DOMAINS, Document
from coterie.moe.tiny.train import byte_tokenizer, config, locality_loss


@pytest.fixture(scope="module")
def reference():
    return AutoModelForCausalLM.from_pretrained(EMBEDDED_FOLDER, dtype=torch.float32)


@pytest.fixture(scope="module")
def traces(tmp_path_factory) -> dict[str, coterie.RoutingTrace]:
    """Of calibration and held-out text."""
    from coterie.launch.prompts import read_prompts

    model, folder, found = coterie.load("coterie-tiny"), tmp_path_factory.mktemp("traces"), {}
    for name in ("calibration", "heldout"):
        model.record(read_prompts(EMBEDDED_FOLDER / "prompts" / f"{name}.jsonl"), folder / name)
        found[name] = coterie.read_trace(folder / name)
    return found


def prompts(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (EMBEDDED_FOLDER / "prompts" / f"{name}.jsonl").read_text().splitlines()]


def test_the_weights_fit_in_8_megabytes() -> None:
    assert (EMBEDDED_FOLDER / "model.safetensors").stat().st_size <= 8_000_000


def test_its_configuration_is_what_the_script_trains(reference) -> None:
    ours = config()
    for name in (
        "hidden_size",
        "num_hidden_layers",
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "vocab_size",
    ):
        assert getattr(reference.config, name) == getattr(ours, name)


def test_held_out_text_of_each_domain_is_predicted_as_the_card_says(reference) -> None:
    card = (EMBEDDED_FOLDER / "README.md").read_text()
    stated = {d: float(re.search(rf"\| {d} \| ([0-9.]+) \|", card)[1]) for d in DOMAINS}
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_FOLDER)
    assert max(stated.values()) < 1.6
    for domain in DOMAINS:
        texts = [p["prompt"] for p in prompts("heldout") if p["domain"] == domain]
        ids = tokenizer(texts, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = reference(ids[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
        assert loss < max(1.5 * stated[domain], stated[domain] + 0.35), domain  # shorter windows, so a little more


def test_calibration_and_held_out_text_share_no_prompt() -> None:
    seen = {p["prompt"] for p in prompts("calibration")}
    for name in ("heldout", "generate"):
        rows = prompts(name)
        assert {p["domain"] for p in rows} == set(DOMAINS)
        assert not seen & {p["prompt"] for p in rows}
    assert [p["domain"] for p in prompts("heldout")] == [p["domain"] for p in prompts("calibration")], "the same mix"


@pytest.mark.slow
def test_no_prompt_repeats_what_was_trained_on_and_the_two_sides_share_no_document() -> None:
    from coterie.moe.tiny.corpus import TrainingText, digest, read_corpus

    corpus = read_corpus()
    if json.loads((EMBEDDED_FOLDER / "training.json").read_text())["digest"] != digest(corpus):
        pytest.skip("this Python carries other text than the model was trained on")
    trained = TrainingText(corpus)
    assert trained.has_seen(next(d for d in corpus["python"] if not d.held_out).text[:300])
    assert not [
        p["id"] for name in ("calibration", "heldout", "generate") for p in prompts(name) if trained.has_seen(p["prompt"])
    ]
    held = [d for documents in corpus.values() for d in documents if d.held_out]
    for name, side in (("calibration", 0), ("heldout", 1), ("generate", 1)):
        text = "\0".join(d.text for d in held if d.side == side)
        assert all(p["prompt"] in text for p in prompts(name))


def test_the_tokenizer_is_bytes() -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_FOLDER)
    text = "def f():\n\treturn 'é 日' # \x00"
    assert tokenizer(text).input_ids == list(text.encode())
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert byte_tokenizer().get_vocab() == tokenizer.get_vocab()
    assert tokenizer.eos_token_id == 256


def test_it_writes_recognisable_python_and_english() -> None:
    model = coterie.load("coterie-tiny")
    starts = ["class Reader:\n    def __init__(self, ", "This function returns a ", "def main():\n    "]
    outputs, _ = model.generate(starts, 160)
    python = outputs[0].text + outputs[2].text
    assert sum(word in python for word in ("self", "def ", "return", "    ", "if ", "(", "):")) >= 5, python
    words = re.findall(r"[a-z]{2,}", outputs[1].text)
    common = {
        "the",
        "of",
        "to",
        "is",
        "in",
        "and",
        "that",
        "string",
        "object",
        "value",
        "function",
        "for",
        "be",
        "with",
        "returns",
    }
    assert len(words) > 5 and sum(w in common for w in words) / len(words) > 0.25, outputs[1].text


def test_routers_agree_across_layers_far_more_than_chance(traces) -> None:
    from coterie.routing.affinity import mean_affinity

    trace = traces["heldout"]
    assert mean_affinity(trace) > 3 / trace.num_experts
    load = coterie.measure(trace).load
    assert (load.max(1) / load.mean(1)).max() < 4, "a collapsed router"


def test_plans_of_it_meet_their_bars_on_text_that_was_not_planned_on(traces) -> None:
    from coterie.placement.planner import PlanRequest, compare, plan

    two = plan(traces["calibration"], PlanRequest(coterie.Topology(1, 2), objective="hops", time_limit=60))
    assert two.objective.gap == 0 and two.seconds < 60
    for objective, cut in (("hops", 0.35), ("dispatch", 0.15)):
        made = plan(traces["calibration"], PlanRequest(coterie.Topology(1, 4), objective=objective, time_limit=6))
        plans = compare(made, traces["heldout"])
        assert plans["plan"][objective] <= (1 - cut) * plans["contiguous"][objective]
        assert plans["plan"]["load"] <= plans["contiguous"]["load"]
        assert made.objective.gap is not None


def test_locality_is_zero_nats_for_a_chain_and_all_of_them_for_noise() -> None:
    pairs = torch.eye(8)[torch.arange(800) % 4] + torch.eye(8)[torch.arange(800) % 4 + 4]
    assert locality_loss([pairs]) == pytest.approx(0, abs=0.1)
    rng = np.random.default_rng(0)
    noise = [torch.from_numpy(np.eye(8, dtype=np.float32)[rng.permuted(np.tile(np.arange(8), (4000, 1)), axis=1)[:, :2]].sum(1))
             for _ in range(3)]  # fmt: skip
    assert locality_loss(noise) == pytest.approx(0.6 * np.log(7) + 0.4 * np.log(8), abs=0.02)


def test_the_held_out_split_is_by_name() -> None:
    held = [Document(f"file{i}.py", "").held_out for i in range(2000)]
    assert held == [Document(f"file{i}.py", "other").held_out for i in range(2000)]
    assert 80 < sum(held) < 180
