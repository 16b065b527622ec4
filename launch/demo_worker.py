"""What each of the demo's processes runs: both placements through the public API, compared with transformers' results.

torchrun --nproc-per-node 4 -m coterie.launch.demo_worker FOLDER
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import coterie
from coterie.launch.demo import NEW_TOKENS, until_end
from coterie.launch.distributed import job, leave
from coterie.launch.quiet import quiet_transformers
from coterie.moe.families import EMBEDDED
from coterie.routing.files import write_text

REPEATS = 3  # the two placements take turns; medians are reported


def main(folder: Path) -> None:
    """Rank 0 writes `job.json`."""
    reference = load_file(folder / "reference.safetensors")
    with job() as group:
        quiet_transformers()
        plans = {"contiguous": None, "plan": coterie.read_plan(folder / "plan.json")}
        models = {name: coterie.load(EMBEDDED, plan, dtype="float32", group=group) for name, plan in plans.items()}
        prompts = [coterie.Prompt(token_ids=tuple(row)) for row in reference["prompts"].tolist()]
        speed: dict[str, list[float]] = {name: [] for name in models}
        texts: list[Any] = []
        for _ in range(REPEATS):
            for name, model in models.items():
                outputs, figures = model.generate(prompts, NEW_TOKENS)
                speed[name].append(figures.new_tokens / figures.seconds)
                texts.append([list(o.token_ids) for o in outputs])
        difference = max(_logit_difference(model, reference, group) for model in models.values())
        if group.rank == 0:
            expected = [until_end(row, models["plan"]) for row in reference["text"].tolist()]
            liveliest = max(range(len(prompts)), key=lambda i: len(set(texts[-1][i])))
            sample = [
                models["plan"].text.decode(ids) for ids in (reference["prompts"][liveliest].tolist(), texts[-1][liveliest])
            ]
            result = {
                "tokens_per_second": {name: statistics.median(values) for name, values in speed.items()},
                "max_logit_difference": difference,
                "text_equal": all(text == expected for text in texts),
                "sample": dict(zip(("prompt", "text"), sample, strict=True)),
            }
            write_text(folder / "job.json", json.dumps(result))


def _logit_difference(model: coterie.Model, reference: dict[str, torch.Tensor], group: Any) -> float:
    """Over all ranks, each on its share of the prompts: largest difference relative to the largest logit."""
    rows = torch.arange(len(reference["prompts"])) % group.size == group.rank
    with torch.inference_mode():
        model.context.live = None
        logits = model.transformers(reference["prompts"][rows]).logits
    expected = reference["logits"]
    worst = (logits - expected[rows]).abs().max() / expected.abs().max() if rows.any() else torch.zeros(())
    return float(max(group.gather(float(worst))))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)
