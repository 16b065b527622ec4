"""What recorded routing of the same model teaches a cache before its first step: what is picked after what, and how often.

Only what is looked up by experts and tokens is learned; nothing is read.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from coterie.offload.cache import ExpertCache
from coterie.offload.policies import LruTags
from coterie.offload.simulate import begins_of, contexts_of, steps_of
from coterie.offload.whole_path import TOKENS
from coterie.routing.errors import require
from coterie.routing.trace import RoutingTrace

PATHS = 512  # of the last tokens: as many as `predictors.Path` keeps, and half a second for 26 layers of 64 experts


def check_prior(prior: RoutingTrace, num_experts: int, layer_ids: Sequence[int]) -> None:
    """Raises InputError, naming the field, for a trace of another model's shape, or one without tokens."""
    require(prior.num_experts == num_experts, "--prior: num_experts", prior.num_experts, f"{num_experts}, as the model has")
    found, own = list(prior.layer_ids), list(layer_ids)
    require(found == own, "--prior: layer_ids", found, f"{own}, as the model has")
    require(len(prior.expert_ids) > 0, "--prior", "no tokens", "some")


def teach(cache: ExpertCache, prior: RoutingTrace, local: Sequence[Collection[int]]) -> None:
    """Let the cache's policy and guesser follow the prior's last tokens. local: by layer, the experts that this rank computes.

    The policy is told what the least recently used would have missed, so that it begins with whichever missed less.
    """
    ids = prior.expert_ids
    here = np.zeros((ids.shape[1], cache.experts + 1), dtype=bool)  # the last for empty slots, -1
    for layer, experts in enumerate(local):
        here[layer, list(experts)] = True
    ids = np.where(here[np.arange(ids.shape[1])[None, :, None], ids], ids, -1)
    if prior.token_ids is not None:
        for context, picks in zip(contexts_of(prior)[-TOKENS:], ids[-TOKENS:], strict=True):
            cache.guesser.token.read([context])
            for layer, picked in enumerate(picks):
                cache.guesser.token.observe_each(layer, picked[None])
    last = replace(prior, expert_ids=ids)
    tags, steps, begins = LruTags(cache.slots), steps_of(last)[-PATHS:], begins_of(last)[-PATHS:]
    for token, begin in zip(steps, begins, strict=True):
        if begin:
            cache.guesser.path.begin()
        for layer, experts in enumerate(token):
            if len(experts):
                missing = tags.use((layer * cache.experts + experts).tolist())
                cache.policy.observe(layer, experts, missing)
                cache.guesser.observe(layer, experts.tolist())
    cache.policy.gone(np.flatnonzero(cache.slot_of < 0))
