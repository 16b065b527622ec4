"""`coterie trace`: a model runs on all launched processes, within their memory; rank 0 writes which experts tokens visited."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from coterie.launch.commands import say
from coterie.launch.generating import Asked, begun, load_model
from coterie.launch.prompts import asked_prompts
from coterie.routing.errors import naming, positive
from coterie.routing.files import check_writable, files_of

if TYPE_CHECKING:
    from coterie.moe.collectives import Group


def trace(options: argparse.Namespace) -> dict[str, Any] | None:
    """Run a model and record its routing; only rank 0 prints."""
    from tqdm import tqdm

    from coterie.launch.memory import check_memory, within_budget

    with begun(options, _settle) as (group, asked, sizes):
        asked = within_budget(asked, sizes, options, group)
        check_memory(asked, sizes, options, group)
        model = load_model(asked, group)
        with tqdm(desc="trace", unit=" tokens", disable=True if group.rank else None) as bar:
            tokens = model.record(
                asked.prompts, options.out, options.max_new_tokens, options.phase, options.max_tokens, options.scenario,
                options.batch_size, on_tokens=bar.update, token_ids=options.token_ids,
            )  # fmt: skip
        if group.rank:
            return None
        layers, experts = len(model.shape.layer_ids), model.shape.num_experts
        say(f"{options.out}: {tokens} tokens, {layers} layers, {experts} experts, top-{model.shape.top_k}")
        return {"trace": str(options.out), "tokens": tokens, "layers": layers, "num_experts": experts}


def _settle(options: argparse.Namespace, group: Group) -> Asked:
    """Read and check all but the weights. Does not communicate."""
    from coterie.launch.memory import check_memory_options
    from coterie.moe.generate import Sampling
    from coterie.moe.prepare import prepare
    from coterie.moe.recording import recorded_phase
    from coterie.moe.text import Text

    recorded_phase(options.phase, options.max_new_tokens, options.max_tokens, options.scenario)
    positive("--batch-size", options.batch_size)
    check_memory_options(options)
    if group.rank == 0:
        check_writable(options.out, options.prompts, *files_of(options.model), *files_of(options.packed))
    prompts = asked_prompts(options)
    share = prepare(options.model, None, options.dtype, group.size, group.nodes, None, options.quantise, options.packed)
    text = Text(share.shape)
    with naming(options.prompts):
        requests = text.requests(prompts, options.max_new_tokens)
    return Asked(share, "all_to_all" if group.size > 1 else None, text, prompts, requests, Sampling(), batch_invariant=False)
