"""What recorded routing of the same model teaches a cache before its first step: what is picked after what, and how often.

Only what is looked up by experts and tokens is learned; nothing is read.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from coterie.offload.cache import ExpertCache
from coterie.offload.policies import Tags
from coterie.offload.simulate import contexts_of, steps_of
from coterie.offload.whole_path import TOKENS
from coterie.routing.errors import require
from coterie.routing.trace import RoutingTrace

PATHS = 512  # of the last tokens: as many as `predictors.Path` keeps, and half a second for 26 layers of 64 experts


def check_prior(prior: RoutingTrace, num_experts: int, layer_ids: Sequence[int], top_k: int, vocabulary: int) -> None:
    """Raises InputError, naming the field, for a trace of another model's shape; its name may be another folder's."""
    known = {"num_experts": num_experts, "layer_ids": list(layer_ids), "top_k": top_k}
    for field, own in known.items():
        found = list(prior.layer_ids) if field == "layer_ids" else getattr(prior, field)
        require(found == own, f"--prior: {field}", found, f"{own}, as the model has")
    if prior.token_ids is not None:
        most = int(prior.token_ids.max())
        require(most < vocabulary, "--prior: token_ids", most, f"less than {vocabulary}, the model's vocabulary")


def teach(cache: ExpertCache, prior: RoutingTrace, local: Sequence[Collection[int]]) -> None:
    """Let the cache's policy and guesser follow the prior's last tokens. local: by layer, the experts that this rank computes.

    The policy is told what a cache like this one would have missed by its own choice, which so is the better one in the end.
    """
    prior = prior.select(np.arange(max(0, prior.tokens - TOKENS), prior.tokens))
    ids = prior.expert_ids
    here = np.zeros((prior.layers, cache.experts + 1), dtype=bool)  # the last for empty slots, -1
    for layer, experts in enumerate(local):
        here[layer, list(experts)] = True
    ids = np.where(here[np.arange(prior.layers)[None, :, None], ids], ids, -1)
    if prior.token_ids is not None:
        for context, picks in zip(contexts_of(prior), ids, strict=True):
            cache.guesser.token.read([context])
            for layer, picked in enumerate(picks):
                cache.guesser.token.observe_each(layer, picked[None])
    last = replace(prior, expert_ids=ids).select(np.arange(max(0, prior.tokens - PATHS), prior.tokens))
    tags = Tags(prior.layers * cache.experts, cache.slots)
    for token in steps_of(last):
        for layer, experts in enumerate(token):
            at = layer * cache.experts + experts
            absent = tags.absent(at)
            cache.policy.observe(layer, experts, len(absent))
            tags.admit(at, absent, cache.policy)
            cache.guesser.observe(layer, experts.tolist())
    cache.policy.emptied()
