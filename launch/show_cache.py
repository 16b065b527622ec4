"""Pictures of the cache of experts: what a trace promises, and what a run did."""

from __future__ import annotations

import numpy as np

from coterie.launch.show import picture_axes, section, svg
from coterie.offload.simulate import Simulation
from coterie.routing.trace import RoutingTrace

SHARES = (0.06, 0.125, 0.25, 0.5, 0.75)
POLICIES = ("belady", "coterie", "lru")
MOST_PICKS = 60_000  # of (token, layer): what takes a few seconds


def promised(trace: RoutingTrace) -> str | None:
    """Hit rates by how many experts fit, on the first tokens; None for a trace too small for a cache."""
    tokens = max(1, min(trace.tokens, MOST_PICKS // (len(SHARES) * len(POLICIES) * trace.layers)))
    few = trace.select(np.arange(tokens))
    shares = [share for share in SHARES if round(share * trace.layers * trace.num_experts) >= trace.top_k]
    if not shares or tokens < 2:
        return None
    figure, axes = picture_axes(1, 1, 8, 3)
    for policy in POLICIES:
        rates = [100 * Simulation(few, share).run(policy).hit_rate for share in shares]
        axes[0].plot([100 * share for share in shares], rates, marker="o", label=policy)
    axes[0].set(xlabel="% of all experts in memory", ylabel="% found there", ylim=(0, 100))
    axes[0].legend(fontsize=8)
    text = f"One token at a time, {tokens} of them, one pool for all layers; belady knows the future, coterie is the default."
    return section("What a cache of experts would find", text, svg(figure))


def happened(samples: list[list[list[float]]]) -> str:
    """By rank and step: seconds since the first, and since the run began requests, transfers, bytes and seconds stalled."""
    figure, axes = picture_axes(3, 1, 10, 6)
    for rank, of_rank in enumerate(samples):
        steps = np.diff(np.array(of_rank), axis=0)
        time, requests, transfers, count, stalled = steps.T if len(steps) else np.zeros((5, 0))
        at, length = np.cumsum(time), np.maximum(time, 1e-9)
        name = f"rank {rank}" if len(samples) > 1 else None
        axes[0].plot(at, 100 * (1 - transfers / np.maximum(requests, 1)), label=name, lw=1)
        axes[1].plot(at, count / length / 1e6, lw=1)
        axes[2].plot(at, 100 * np.minimum(stalled / length, 1), lw=1)
    for axis, label in zip(axes, ("% of requests found", "MB/s read", "% of the time waiting"), strict=True):
        axis.set(ylabel=label, ylim=(0, None))
    axes[-1].set(xlabel="seconds")
    if len(samples) > 1:
        axes[0].legend(fontsize=7, ncols=4)
    return section(
        "The cache of experts", "Step by step: hits, what was read, and how long reads were waited for.", svg(figure)
    )
