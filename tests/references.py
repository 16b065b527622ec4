"""What transformers makes of prompts on one process, and plans that put every rank to the test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import coterie
from coterie.placement.plan import PlacementPlan, slots_from_assignment


def tokens(length: int, seed: int) -> list[int]:
    return torch.randint(3, 97, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def expected_texts(folder: Path, prompts: list[list[int]], new_tokens: int) -> tuple[list[list[int]], Any]:
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    texts = []
    for prompt in prompts:
        out = reference.generate(torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False)
        texts.append(out[0, len(prompt) :].tolist())
    return texts, reference


def uneven_plan(folder: Path, ranks: int, path: Path) -> PlacementPlan:
    """Different in every layer, ranks with different numbers of experts, one of them with none in the first layer."""
    from coterie.moe.families import inspect

    shape, _ = inspect(str(folder))
    rng = np.random.default_rng(len(folder.name))
    assignment = rng.integers(0, ranks, (len(shape.layer_ids), shape.num_experts))
    assignment[0][assignment[0] == 0] = 1
    slots = slots_from_assignment(assignment, ranks, shape.num_experts)
    plan = PlacementPlan(slots, shape.num_experts, shape.layer_ids, coterie.Topology(1, ranks), shape.name)
    coterie.save_plan(plan, path)
    return plan
