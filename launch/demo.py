"""`coterie demo`: trace, plan, run on several processes, check against transformers, report. No network, one to two minutes."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import coterie
from coterie.launch.commands import say
from coterie.launch.show import check_plotting, write_report
from coterie.launch.tables import table
from coterie.moe.collectives import Group
from coterie.moe.families import EMBEDDED, EMBEDDED_FOLDER, inspect
from coterie.placement.plan import PlacementPlan, save_plan
from coterie.placement.planner import PlanRequest, baseline_plan, compare, plan_whole
from coterie.placement.topology import Topology
from coterie.routing.errors import CoterieError, InputError
from coterie.routing.files import write_text
from coterie.routing.trace import RoutingTrace, read_trace

EXPERTS = 16  # of coterie-tiny, in a layer
NEW_TOKENS = 48
OFFLOAD_SHARE = 0.25  # of all experts: those that are in memory at once when the rest stays on disk
LOGIT_TOLERANCE = 1e-4  # relative to the largest logit, in float32
PLAN_SECONDS = 12.0
JOB_SECONDS = 300
END_SECONDS = 10.0  # for the launcher, to end its workers


def demo(options: argparse.Namespace) -> dict[str, Any]:
    """The whole tour; raises CoterieError if text or logits differ from transformers' own."""
    try:
        return _tour(options)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; what was made until then is in {options.out}") from None


def _tour(options: argparse.Namespace) -> dict[str, Any]:
    from tqdm import tqdm

    from coterie.launch.quiet import quiet_transformers

    started = time.perf_counter()
    if not 2 <= options.ranks <= EXPERTS:
        raise InputError(f"--ranks: found {options.ranks}, expected 2 to {EXPERTS}, as many as coterie-tiny has experts")
    check_plotting()
    folder = _folder(options.out)
    files = {name: folder / name for name in ("trace.safetensors", "heldout.safetensors", "plan.json", "report.html")}
    with tqdm(total=7, bar_format="{desc:<52}{bar}{n_fmt}/{total_fmt} [{elapsed}]", disable=None) as bar:
        stage = _stages(bar)
        stage("loading coterie-tiny, a real Mixture-of-Experts model")
        quiet_transformers()
        recorded, held_out = _trace(files, EMBEDDED_FOLDER, stage)
        stage(f"planning for {options.ranks} ranks with HiGHS")
        plan = plan_whole(
            recorded, PlanRequest(Topology(1, options.ranks), time_limit=PLAN_SECONDS, workers=1), (files["trace.safetensors"],)
        )
        save_plan(plan, files["plan.json"])
        stage("the same prompts through plain transformers")
        _reference(EMBEDDED_FOLDER, folder)
        stage(f"running on {options.ranks} processes, twice")
        measured = _run_job(folder, options.ranks)
        stage("with a quarter of the experts in memory, the rest on disk")
        offload = _offload(folder)
        stage("drawing the report")
        write_report(files["report.html"], plan, held_out)
        bar.update()
    plans = compare(plan, held_out)
    result = {
        "model": str(EMBEDDED_FOLDER),
        "trace": str(files["trace.safetensors"]), "held_out_trace": str(files["heldout.safetensors"]),
        "plan": str(files["plan.json"]), "report": str(files["report.html"]), "plans": plans,
        "tokens_per_second": measured["tokens_per_second"], "max_logit_difference": measured["max_logit_difference"],
        "text_equal": measured["text_equal"], "offload": offload, "seconds": time.perf_counter() - started,
    }  # fmt: skip
    if not options.json:
        _print(result, plan, held_out, measured["sample"])
    near = measured["max_logit_difference"] <= LOGIT_TOLERANCE  # which NaN is not
    if not (measured["text_equal"] and near and offload["text_equal"]):
        raise CoterieError(
            f"demo: text equal: {measured['text_equal']}, with experts on disk {offload['text_equal']}, both expected; "
            f"largest logit difference {measured['max_logit_difference']:.2e}, at most {LOGIT_TOLERANCE:g}; see {folder}"
        )
    return result


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out: {path}: cannot be made a folder: {error.strerror}") from error
    return path.resolve()


def _stages(bar: Any) -> Callable[[str], None]:
    """Opens the next stage: on the bar of a terminal, or as a line where there is none."""
    opened = 0

    def stage(text: str) -> None:
        nonlocal opened
        if bar.disable:
            say(text)
        else:
            bar.update(1 if opened else 0)
            bar.set_description_str(text)
        opened += 1

    return stage


def _trace(files: dict[str, Path], model_folder: Path, stage: Callable[[str], None]) -> tuple[RoutingTrace, RoutingTrace]:
    from coterie.launch.prompts import read_prompts

    model = coterie.load(EMBEDDED, dtype="float32", device="cpu")
    stage("recording which experts its tokens visit")
    for prompts, out in (("calibration", "trace.safetensors"), ("heldout", "heldout.safetensors")):
        model.record(read_prompts(model_folder / "prompts" / f"{prompts}.jsonl"), files[out], scenario=prompts)
    return read_trace(files["trace.safetensors"]), read_trace(files["heldout.safetensors"])


def _reference(model_folder: Path, folder: Path) -> None:
    """transformers' own greedy text and logits, on one process, without any code of ours."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    lines = (model_folder / "prompts" / "generate.jsonl").read_text().splitlines()
    ids = tokenizer([json.loads(line)["prompt"] for line in lines], return_tensors="pt", padding=True).input_ids
    with torch.inference_mode():
        text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
        logits = model(ids).logits
    save_file(
        {"prompts": ids, "text": text[:, ids.shape[1] :].contiguous(), "logits": logits},
        folder / "reference.safetensors",
    )


def _offload(folder: Path) -> dict[str, Any]:
    """One sequence at a time out of a cache of experts. memory_bytes: of the weights in memory, dense part and slots."""
    from safetensors.torch import load_file

    reference = load_file(folder / "reference.safetensors")
    shape, _ = inspect(EMBEDDED)
    slots = round(OFFLOAD_SHARE * shape.num_experts * len(shape.layer_ids))
    model = coterie.load(EMBEDDED, dtype="float32", device="cpu", group=Group(), slots=slots)
    assert model.cache is not None
    prompts = [coterie.Prompt(token_ids=tuple(row)) for row in reference["prompts"].tolist()]
    outputs, figures = model.generate(prompts, NEW_TOKENS, batch_size=1)
    expected = [until_end(row, model) for row in reference["text"].tolist()]
    held = [*model.transformers.parameters(), *model.cache.pools.values()]
    return {
        "memory_bytes": sum(tensor.nbytes for tensor in held),
        "hit_rate": figures.hit_rate,
        "text_equal": [list(output.token_ids) for output in outputs] == expected,
    }


def until_end(row: list[int], model: coterie.Model) -> list[int]:
    """transformers pads a finished row; ours stops at the end token."""
    end = model.transformers.generation_config.eos_token_id
    return row[: row.index(end) + 1] if end in row else row


def _run_job(folder: Path, ranks: int) -> dict[str, Any]:
    root = str(Path(coterie.__file__).resolve().parent.parent)
    paths = [root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p), "OMP_NUM_THREADS": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # the tour is the same everywhere
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
               "-m", "coterie.launch.demo_worker", str(folder)]  # fmt: skip
    job = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        log, _ = job.communicate(timeout=JOB_SECONDS)
    except subprocess.TimeoutExpired as error:
        _end(job)
        write_text(folder / "job.log", job.communicate()[0])
        message = f"demo: the {ranks} processes did not end within {JOB_SECONDS} s; see {folder / 'job.log'}"
        raise CoterieError(message) from error
    finally:
        _end(job)
    result = folder / "job.json"
    if job.returncode or not result.is_file():
        write_text(folder / "job.log", log)
        raise CoterieError(f"demo: the {ranks} processes failed with exit code {job.returncode}; see {folder / 'job.log'}")
    found: dict[str, Any] = json.loads(result.read_text())
    result.unlink()
    return found


def _end(job: subprocess.Popen[str]) -> None:
    """End the launcher, which ends its workers, each in a session of its own; what does not end in time is killed."""
    if job.poll() is not None:
        return
    workers = Path(f"/proc/{job.pid}/task/{job.pid}/children")
    known = workers.read_text().split() if workers.is_file() else []
    job.terminate()
    with suppress(subprocess.TimeoutExpired):
        job.wait(END_SECONDS)
    for pid in (job.pid, *map(int, known)):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
    job.wait()


def company(plan: PlacementPlan, trace: RoutingTrace) -> list[str]:
    """Lines for people: the layer where the plan brings most of a token's experts together, who is where, and one reason."""
    contiguous = baseline_plan("contiguous", trace, plan.topology, plan.strategy)
    shares = [_together(made.holds(), trace.expert_ids) for made in (contiguous, plan)]
    layer = int(np.argmax(shares[1] - shares[0]))
    picked = (trace.expert_ids[:, layer, :, None] == np.arange(plan.num_experts)).any(1).astype(float)
    both = picked.T @ picked / len(picked)
    rank_of = plan.holds()[layer].argmax(1)
    inside = np.triu(rank_of[:, None] == rank_of[None], 1)
    by_chance = np.outer(picked.mean(0), picked.mean(0))
    first, second = np.unravel_index(np.argmax(np.where(inside, both - by_chance, -1.0)), both.shape)
    ranks = "; ".join(f"rank {r}: {' '.join(map(str, plan.experts_on(layer, r)))}" for r in range(plan.ranks))
    who = f"{f'experts of layer {plan.layer_ids[layer]}':<29} {ranks}"
    if not inside.any():  # an expert a rank
        return [who]
    return [
        who,
        f"{'one reason':<29} {both[first, second]:.0%} of tokens pick both {first} and {second}, "
        f"{by_chance[first, second]:.1%} if picks were independent",
        f"{'both experts on one rank':<29} for {shares[1][layer]:.0%} of tokens, {shares[0][layer]:.0%} if dealt in order",
    ]


def _together(holds: NDArray[np.bool_], ids: NDArray[np.int16]) -> NDArray[np.float64]:
    """By layer the share of tokens whose experts are all on one rank. holds `[L, E, R]`; ids `[T, L, K]`."""
    found = [holds[layer][ids[:, layer]].all(1).any(1).mean() for layer in range(ids.shape[1])]
    return np.array(found)


def _print(result: dict[str, Any], plan: PlacementPlan, held_out: RoutingTrace, sample: dict[str, str]) -> None:
    plans, speed = result["plans"], result["tokens_per_second"]
    fields = ("remote_rows", "busiest_rank", "load")
    rows = [[name, *(plans[name][f] for f in fields), speed[name]] for name in ("contiguous", "plan")]
    gap = "" if plan.objective.gap is None else f" (proven within {plan.objective.gap:.1%} of the optimum)"
    saved = 1 - plans["plan"]["remote_rows"] / plans["contiguous"]["remote_rows"]
    print(f"\ncoterie-tiny on {plan.ranks} ranks, judged on text that neither the model nor the planner saw{gap}\n")
    print(table(["placement", "rows sent / token / layer", "busiest rank", "load", "tokens/s"], rows))
    print()
    print("\n".join(company(plan, held_out)))
    print(f"\nrows saved by the plan        {saved:.1%}")
    print(f"text equal to transformers'   {'yes, to the last token' if result['text_equal'] else 'NO'}")
    print(f"largest logit difference      {result['max_logit_difference']:.1e} of the largest logit")
    offload = result["offload"]
    same = "same text" if offload["text_equal"] else "OTHER TEXT"
    held = f"{offload['memory_bytes'] / 1e6:.1f} MB of weights in memory"
    print(f"a quarter of the experts      {held}, {offload['hit_rate']:.0%} of requests found there, {same}")
    print(f"report                        {result['report']}")
    print(f"took                          {result['seconds']:.0f} s")
    print(f"\nit wrote: {sample['prompt']!r}\n      ->  {sample['text']!r}")
