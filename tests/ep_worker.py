"""Run by test_processes.py on every rank: loads each model under each plan, generates, reports what it saw.

torchrun --nproc-per-node N tests/ep_worker.py JOB.json RESULT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import coterie
from coterie.launch.distributed import job, leave


def main(job_file: Path, result_file: Path) -> None:
    torch.set_num_threads(1)
    results = []
    with job() as group:
        for case in json.loads(job_file.read_text()):
            plan = coterie.read_plan(Path(case["plan"])) if case["plan"] else None
            model = coterie.load(case["model"], plan, dtype="float32", strategy=case.get("strategy"), group=group)
            loaded = group.gather(model.checkpoint.counter.bytes)
            prompts = [coterie.Prompt(token_ids=tuple(p)) for p in case["prompts"]]
            before = group.traffic.bytes
            outputs, statistics = model.generate(prompts, case["new_tokens"], batch_size=case["batch_size"])
            sent = sum(group.gather(group.traffic.bytes - before))
            again, _ = model.generate(prompts, case["new_tokens"], batch_size=case["batch_size"])
            mine = torch.tensor([case["prompts"][group.rank % len(case["prompts"])]])
            model.context.strategy = model.dispatcher.strategy("all_to_all")  # others want the same tokens on all ranks
            model.context.live = None
            with torch.inference_mode():
                logits = model.transformers(mine).logits[0, -1].tolist()
            results.append(
                {
                    "texts": [list(o.token_ids) for o in outputs],
                    "repeatable": outputs == again,
                    "bytes": loaded,
                    "rows": statistics.rows_sent,
                    "bytes_sent": sent,
                    "logits": group.gather(logits),
                    "experts": group.gather([m.local for m in map(_map, _modules(model))]),
                }
            )
        if group.rank == 0:
            result_file.write_text(json.dumps(results))


def _modules(model: coterie.Model) -> list[torch.nn.Module]:
    from coterie.routing.record import expert_modules

    return [module for _, module in expert_modules(model.transformers).values()]


def _map(module: torch.nn.Module):
    assert module.down_proj.shape[0] == len(module.coterie_layer.map.local)
    return module.coterie_layer.map


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave(0)
