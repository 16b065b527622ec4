"""Models whose experts stay on disk: the same bits as with all of them in memory, whatever the room; faults; memory."""

from __future__ import annotations

import gc
import json
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import thread_ranks
import torch
from cached_models import PROMPTS, Ready, logits, model
from conftest import ROOT
from jobs import until_finished
from lines import Child
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, make_model

import coterie
from coterie.launch.cli import main
from coterie.launch.memory import parse_bytes
from coterie.moe.cached import _check_alike, _order, index_experts
from coterie.moe.collectives import Group
from coterie.moe.journal import journal_of
from coterie.moe.prepare import prepare
from coterie.offload.cache import ExpertCache
from coterie.offload.checkpoint import ReadCounter
from coterie.offload.policies import MAKERS
from coterie.offload.store import ExpertStore
from coterie.offload.transfer import Part, Piece
from coterie.routing.errors import CoterieError, InputError
from coterie.routing.record import expert_modules

EVERY_ROOM = ("qwen3_moe", "gpt_oss", "jamba")


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_the_residents_to_the_bit_at_every_room(family: Path, dtype: str) -> None:
    resident = model(family, None, dtype)
    right = logits(resident)
    top_k, total = resident.shape.top_k, resident.shape.num_experts * len(resident.shape.layer_ids)
    other = (top_k + 1, total) if family.name[:-1] in EVERY_ROOM else ()  # arithmetic, the same in all families
    for slots in (top_k, total // 2, *other):
        made = model(family, slots, dtype)
        for got, expected in zip(logits(made), right, strict=True):
            assert torch.equal(got, expected), slots
        found = made.cache.statistics
        assert 0 < found.transfers - found.prefetched <= (total if slots == total else found.requests)
        made.cache.store.close()


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_logits_are_the_residents_wherever_a_file_lets_an_expert_begin(kind: str, dtype: str, tmp_path: Path) -> None:
    """Experts large enough to be read right into slots, in several files whose headers differ in length."""
    whole = make_model(kind, tmp_path / "whole", dtype=dtype, hidden_size=192, intermediate_size=320, moe_intermediate_size=320)
    weights = load_file(whole / "model.safetensors")
    folder, files = tmp_path / kind, {}
    folder.mkdir()
    for number in range(5):  # an expert's parts in one file
        part = {n: t for n, t in weights.items() if sum(int(digits) for digits in re.findall(r"\.(\d+)\.", n)) % 5 == number}
        file = f"model-{number + 1:05d}-of-00005.safetensors"
        save_file(part, folder / file, metadata={"format": "pt", "said": "x" * (24 * number)})
        files |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "config.json").write_text((whole / "config.json").read_text())
    resident = model(folder, None, dtype)
    right, total = logits(resident), resident.shape.num_experts * len(resident.shape.layer_ids)
    for slots in (resident.shape.top_k, total // 2):
        made = model(folder, slots, dtype)
        store, experts = made.cache.store, resident.shape.num_experts
        assert len({store.shifts(layer, e) for layer in range(len(store.records)) for e in range(experts)}) > 2
        assert all(torch.equal(got, expected) for got, expected in zip(logits(made), right, strict=True)), slots
        into = made.cache.memory.place(0, store.shifts(0, 0))
        requests = store._transfer(0, 0, into).requests
        assert all(request.direct for request in requests)
        assert any(request.tail for request in requests) == (kind == "mixtral" or made.cache.memory.moving is False)
        store.close()


def test_an_expert_is_read_in_place_and_byte_for_byte(family: Path) -> None:
    share = prepare(family, None, "float32", 1)
    store = index_experts(share.shape, share.empty, share.checkpoint)
    resident = model(family, None)
    for layer, (_, module) in enumerate(expert_modules(resident.transformers).values()):
        for expert in (0, share.shape.num_experts - 1):
            into = {name: torch.full(part.shape, float("nan")) for name, part in store.records[layer][expert].items()}
            before = store.counter.bytes
            store.start(layer, expert, into).result()
            assert store.counter.bytes - before == sum(p.numel() * 4 for p in into.values())
            for name, found in into.items():
                assert torch.equal(found, getattr(module, name)[expert]), (layer, expert, name)
    store.close()


def least_megabytes(refusal: str) -> float:
    found = re.search(r"--memory: found 1.0 KB, expected ([0-9.]+) MB or more", refusal)
    assert found is not None, refusal
    return float(found[1])


def test_ctrl_c_ends_a_run_with_experts_on_disk(tmp_path: Path) -> None:
    folder = make_model("qwen3_moe", tmp_path, hidden_size=256, moe_intermediate_size=2048, head_dim=64)
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"token_ids": [n % 90 + 1, 5]}) + "\n" for n in range(2000)))
    command = [sys.executable, "-m", "coterie", "generate", str(folder), "--prompts", str(tmp_path / "p.jsonl")]
    command += ["--max-new-tokens", "20", "--batch-size", "1", "--out", str(tmp_path / "o.jsonl")]
    refused = subprocess.run([*command, "--memory", "1k"], capture_output=True, text=True, cwd=ROOT)
    run = subprocess.Popen(
        [*command, "--memory", f"{least_megabytes(refused.stderr) + 15}MB"], cwd=ROOT, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        until_finished(journal_of(tmp_path / "o.jsonl"), 1, run)
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=60)
    finally:
        run.kill()
    assert "experts at once, the others on disk" in said
    assert run.returncode == 1 and "Traceback" not in said and "interrupted; --resume continues" in said


@pytest.mark.parametrize("slots", [3, 4, 5, 9, 23])
def test_slots_hold_what_they_say_whatever_was_expected(slots: int, tmp_path: Path) -> None:
    """Thousands of steps with right and wrong expectations, of more and of fewer experts than the step before."""
    layers, experts = 4, 6
    values = torch.arange(layers * experts * 2000, dtype=torch.float32)
    (tmp_path / "f").write_bytes(values.numpy().tobytes())
    records = [
        [
            {"w": Part(torch.float32, (2000,), (Piece(tmp_path / "f", 8000 * (layer * experts + e), 8000),))}
            for e in range(experts)
        ]
        for layer in range(layers)
    ]
    cache = ExpertCache(ExpertStore(records, ReadCounter()), experts, slots, {"w": (2000,)}, torch.float32, 3)
    rng = np.random.default_rng(slots)
    for step in range(3000):
        layer = step % layers
        picked = rng.permutation(experts)[: rng.integers(1, 4)].tolist()
        cache.announce(layer, picked)
        guess = rng.permutation(experts)[: rng.integers(0, 4)].tolist()
        cache.expect((layer + 1) % layers, lambda guess=guess: guess, sure=bool(rng.integers(0, 2)))
        came = []
        for group in cache.arrivals(layer, picked):
            for position, slot in group:
                first = (layer * experts + picked[position]) * 2000
                assert cache.pools["w"][slot][[0, 1999]].tolist() == [first, first + 1999], step
                came.append(position)
        assert sorted(came) == list(range(len(picked)))
        held = cache.slot_of[cache.slot_of >= 0].tolist()
        assert sorted(held + cache.free) == list(range(slots)) and len(cache.coming) <= slots
    assert (slots >= 4) <= cache.statistics.prefetched < cache.statistics.transfers
    cache.store.close()


def test_the_default_policy_learns_although_guesses_are_read_ahead() -> None:
    """Experts that were read ahead in time are no hits of the policy: else it would never find that lru does worse."""
    layers, experts, top_k = 6, 16, 2
    rng = np.random.default_rng(0)
    hot = [rng.permutation(experts)[:4] for _ in range(layers)]  # more than lru keeps, fewer than there are slots
    transfers = {}
    for policy in ("lru", "coterie"):
        cache = ExpertCache(Ready(layers, experts), experts, 24, {"w": (1,)}, torch.float32, top_k, policy)
        rng = np.random.default_rng(1)
        for _ in range(300):
            picks = [
                rng.choice(hot[layer] if rng.random() < 0.8 else experts, top_k, replace=False).tolist()
                for layer in range(layers)
            ]
            for layer, picked in enumerate(picks):
                cache.announce(layer, picked)
                if layer + 1 < layers:
                    cache.expect(layer + 1, lambda then=picks[layer + 1]: then, sure=True)
                assert sorted(place for group in cache.arrivals(layer, picked) for place, _ in group) == [0, 1]
        transfers[policy] = cache.statistics.transfers
    assert cache.policy.learning
    assert transfers["coterie"] < 0.9 * transfers["lru"]


def test_reads_that_cannot_begin_cost_no_slot_and_never_hang() -> None:
    store = Ready(2, 6)
    cache = ExpertCache(store, 6, 3, {"w": (1,)}, torch.float32, 2)
    for _ in range(5):
        store.broken = True
        with pytest.raises(CoterieError, match="no disk"):
            cache.announce(0, [0, 1])
            list(cache.arrivals(0, [0, 1]))
        store.broken = False
        cache.announce(1, [4, 5])
        assert sorted(place for group in cache.arrivals(1, [4, 5]) for place, _ in group) == [0, 1]
        cache.announce(0, [2, 3])
        assert sorted(place for group in cache.arrivals(0, [2, 3]) for place, _ in group) == [0, 1]


def test_a_step_that_failed_keeps_no_other_thread_out() -> None:
    store, failures = Ready(1, 4), []
    cache = ExpertCache(store, 4, 4, {"w": (1,)}, torch.float32, 2)
    store.broken = True

    def fail() -> None:
        try:
            cache.announce(0, [0, 1])
        except CoterieError as error:
            failures.append(str(error))

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    assert failures == ["no disk"]
    store.broken = False
    cache.announce(0, [0, 1])
    assert sorted(place for group in cache.arrivals(0, [0, 1]) for place, _ in group) == [0, 1]


def test_experts_of_another_shape_are_refused_whatever_their_size(tmp_path: Path) -> None:
    folder = make_model("qwen3_moe", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "experts" in name and name.endswith("down_proj.weight"):
            tensors[name] = tensor.T.contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        InputError, match=r"expert 0 of .*down_proj: found \[\d+, \d+\], expected shape .*does config\.json fit"
    ):
        coterie.load(folder, slots=6)


def test_a_cached_model_loaded_in_inference_mode_runs_outside_of_it(tmp_path: Path) -> None:
    folder = make_model("qwen3_moe", tmp_path)
    right = logits(coterie.load(folder, dtype="bfloat16"), 1)
    with torch.inference_mode():
        made = coterie.load(folder, dtype="bfloat16", slots=4)
    assert all(torch.equal(a, b) for a, b in zip(logits(made, 1), right, strict=True))


def test_one_thread_at_a_time_computes_with_experts_on_disk(tmp_path: Path) -> None:
    """Another is refused, and never gets wrong values."""
    folder = make_model("qwen3_moe", tmp_path)
    resident, made = model(folder, None), model(folder, 3)
    right = logits(resident, 0)
    told: list[str] = []

    def run() -> None:
        for _ in range(8):
            try:
                same = all(torch.equal(a, b) for a, b in zip(logits(made, 0), right, strict=True))
                told.append("right" if same else "wrong")
            except CoterieError as error:
                told.append(str(error))

    threads = [threading.Thread(target=run, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert "right" in told and "wrong" not in told
    assert all("one thread at a time" in one for one in told if one != "right")
    assert all(torch.equal(a, b) for a, b in zip(logits(made, 0), right, strict=True))


def test_what_a_step_will_read_is_refused_to_another_thread_too(tmp_path: Path) -> None:
    """As `generate` does before the first layer: what is read ahead there takes slots from which another thread computes."""
    made = model(make_model("qwen3_moe", tmp_path), 3)
    cache, refused = made.cache, []
    cache.announce(0, [0, 1])

    def other() -> None:
        try:
            cache.read([(5, 1, 2)])
        except CoterieError as error:
            refused.append(str(error))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join(60)
    list(cache.arrivals(0, [0, 1]))
    assert refused and "one thread at a time" in refused[0]
    assert all(torch.equal(a, b) for a, b in zip(logits(made, 0), logits(model(tmp_path, None), 0), strict=True))


def test_two_threads_do_not_generate_with_one_model(tmp_path: Path) -> None:
    made, told = coterie.load(make_model("qwen3_moe", tmp_path)), []

    def other() -> None:
        try:
            made.generate([coterie.Prompt(token_ids=(4,))], 2)
        except CoterieError as error:
            told.append(str(error))

    def first_token(index: int, token: int) -> None:
        if not told:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join(60)

    made.generate([coterie.Prompt(token_ids=(1, 2, 3))], 3, on_token=first_token)
    assert told and "this model is generating already" in told[0]
    assert made.generate([coterie.Prompt(token_ids=(1, 2, 3))], 3)[0]


def test_a_checkpoint_whose_experts_cannot_be_read_one_by_one_is_named() -> None:
    odd = SimpleNamespace(source_patterns=["experts.*.packed"], operations=[SimpleNamespace(dim=0)])
    with pytest.raises(InputError, match=r"m\.safetensors: tensor 'x': cannot be read expert by expert"):
        _order("m.safetensors: tensor 'x'", "experts.*.packed", [odd])


def test_experts_of_other_shapes_in_other_layers_are_refused(tmp_path: Path) -> None:
    share = prepare(make_model("qwen3_moe", tmp_path), None, "float32", 1)
    store = index_experts(share.shape, share.empty, share.checkpoint)
    records = [list(layer) for layer in store.records]
    records[1] = [
        {name: replace(part, shape=(part.shape[0] * 2, *part.shape[1:])) for name, part in r.items()} for r in records[1]
    ]
    with pytest.raises(InputError, match=r"layer 1: \w+: found experts of shape .*, expected .* as in layer 0"):
        _check_alike(share.shape, records)


def test_generate_within_a_budget_writes_the_same_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a process of its own: the budget is that of the whole process."""
    folder = make_model("qwen3_moe", tmp_path / "m", hidden_size=256, moe_intermediate_size=2048, head_dim=64)
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"token_ids": row}) + "\n" for row in PROMPTS.tolist()))

    arguments = ["generate", str(folder), "--prompts", str(tmp_path / "p.jsonl"), "--json", "--max-new-tokens", "8"]
    assert main(arguments) == 0
    alone = json.loads(capsys.readouterr().out)
    with Child() as child:
        refused = child.run(*arguments, "--memory", "1k")
        assert refused.returncode == 2, refused.stderr
        budget = least_megabytes(refused.stderr) + 15
        ran = child.run(*arguments, "--memory", f"{budget}MB", "--trace-events", str(tmp_path / "t.json"))
        fits = child.run(*arguments, "--memory", "64GiB", "--dry-run")
    cached = json.loads(ran.stdout)
    assert cached["outputs"] == alone["outputs"] and alone["stats"]["hit_rate"] is None
    assert cached["stats"]["hit_rate"] < 1 and "experts at once, the others on disk" in ran.stderr
    assert cached["stats"]["peak_memory_bytes"] < 1.03 * budget * 1e6
    assert cached["stats"]["bytes_read"] > alone["stats"]["bytes_read"]
    steps = json.loads((tmp_path / "t.json").read_text())["coterie"]["cache"][0]
    assert len(steps) == 8 and steps[-1][4] > steps[0][4] >= 0  # a prefill and seven tokens; seconds that reads were waited for
    assert main(["show", str(tmp_path / "t.json"), "--out", str(tmp_path / "r.html")]) == 0
    assert "MB/s read" in (tmp_path / "r.html").read_text()
    assert "all experts fit" in fits.stderr


def test_ranks_with_a_cache_each_write_what_one_does(tmp_path: Path) -> None:
    folder = make_model("mixtral", tmp_path)
    alone = model(folder, None)
    prompts = [coterie.Prompt(token_ids=tuple(row)) for row in PROMPTS.tolist()]
    right = [o.token_ids for o in alone.generate(prompts, 6)[0]]

    def run(group: Group) -> list[tuple[int, ...]]:
        made = thread_ranks.load(folder, group=group, slots=3)
        return [o.token_ids for o in made.generate(prompts, 6)[0]]

    assert all(found == right for found in thread_ranks.on_ranks(2, run))


@pytest.mark.parametrize(
    ("text", "count"), [("2GiB", 2 << 30), ("500MB", 500_000_000), ("1.5g", 1_500_000_000), ("4096", 4096), ("1 KiB", 1024)]
)
def test_sizes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "0", "-1", "2 XB", "1e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"--memory: found .*, expected a size such as 2GiB"):
        parse_bytes(text)


def test_what_does_not_go_with_experts_on_disk_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_model("qwen3_moe", tmp_path)
    with pytest.raises(InputError, match="slots: found 2, expected at least 3"):
        coterie.load(folder, slots=2)
    with pytest.raises(InputError, match="--replan: found it with experts on disk, expected all in memory"):
        coterie.load(folder, slots=3).follow("auto", print)
    assert main(["generate", "coterie-tiny", "--prompt", "x", "--memory", "1GB", "--replan", "auto"]) == 2
    assert "--memory: found it with --replan" in capsys.readouterr().err


def test_a_model_that_was_closed_has_given_its_files_and_threads_back(tmp_path: Path) -> None:
    def mine() -> tuple[int, int]:
        gc.collect()
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

    folder = make_model("mixtral", tmp_path / "model")
    coterie.load(folder, slots=6).close()  # what torch opens once
    before = mine()
    with coterie.load(folder, slots=6) as made:
        texts, _ = made.generate([coterie.Prompt(token_ids=(5, 7, 9))], 4)
        assert len(texts[0].token_ids) == 4 and mine() > before
    assert mine() == before
    with pytest.raises(CoterieError, match=r"experts cannot be read any more: the model was closed"):
        made.generate([coterie.Prompt(token_ids=(50, 3, 60, 11, 12, 13, 14, 15))], 8)


@pytest.mark.parametrize("eviction", ["lru", "gdsf", "fixed", "coterie"])
def test_text_is_the_residents_under_any_policy(eviction: str, tmp_path: Path) -> None:
    folder = make_model("qwen3_moe", tmp_path / "model")
    prompt = coterie.Prompt(token_ids=(5, 7, 9, 11))
    right = coterie.load(folder).generate([prompt], 12)[0][0].token_ids
    with coterie.load(folder, slots=5, eviction=eviction) as made:
        assert type(made.cache.policy) is type(MAKERS[eviction](3, 8, 3, 5))
        assert made.generate([prompt], 12)[0][0].token_ids == right


def test_a_policy_that_is_none_or_has_no_effect_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_model("qwen3_moe", tmp_path / "model")
    (tmp_path / "p.jsonl").write_text('{"token_ids": [5, 6]}\n')
    line = ["generate", str(folder), "--prompts", str(tmp_path / "p.jsonl"), "--max-new-tokens", "2"]
    assert main([*line, "--eviction", "mru"]) == 2
    assert "--eviction: found 'mru', expected lru, lfu" in capsys.readouterr().err
    assert main([*line, "--eviction", "lru"]) == 2
    assert "--eviction: found it where all experts fit, expected --memory with it" in capsys.readouterr().err
    with pytest.raises(InputError, match="eviction: found it without slots"):
        coterie.load(folder, eviction="lru")
