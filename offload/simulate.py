"""A recorded routing through a cache of experts: the very policies of the real one, and what hindsight could do."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coterie.offload.policies import MAKERS, EvictionPolicy, Indifferent, Tags
from coterie.routing.errors import InputError, require
from coterie.routing.trace import RoutingTrace


@dataclass(frozen=True)
class Simulated:
    """hit_rate: 1 - transfers / requests; microseconds: of the policy's own work, per layer and token."""

    hit_rate: float
    microseconds: float


def steps_of(trace: RoutingTrace) -> list[list[NDArray[np.int64]]]:
    """By token and layer the experts picked, each once, empty slots left out."""
    ids = np.sort(trace.expert_ids.astype(np.int64), axis=2)
    fresh = np.concatenate([ids[..., :1] >= 0, (ids[..., 1:] != ids[..., :-1]) & (ids[..., 1:] >= 0)], axis=2)
    return [[row[new] for row, new in zip(token, keep, strict=True)] for token, keep in zip(ids, fresh, strict=True)]


def slots_for(share: float, layers: int, experts: int, top_k: int) -> int:
    """A share of all experts of all layers. Raises InputError for one that holds less than a layer's picks."""
    require(0 < share <= 1, "--slots", share, "more than 0 and at most 1")
    slots = round(share * layers * experts)
    require(
        slots >= top_k, "--slots", f"{share} ({slots} experts)", f"at least {top_k} experts: those of one token in one layer"
    )
    return slots


def simulate(steps: list[list[NDArray[np.int64]]], experts: int, slots: int, policy: EvictionPolicy) -> Simulated:
    """Token by token, layer by layer; experts of the step at hand stay."""
    layers = len(steps[0]) if steps else 0
    tags, spent = Tags(layers * experts, slots), 0.0
    transfers = requests = 0
    for token in steps:
        for layer, picked in enumerate(token):
            at = layer * experts + picked
            missing = tags.absent(at)
            requests += len(at)
            transfers += len(missing)
            began = time.perf_counter()
            policy.observe(layer, picked, len(missing))
            tags.admit(at, missing, policy)
            spent += time.perf_counter() - began
    count = max(1, len(steps) * layers)
    return Simulated(1 - transfers / requests if requests else 0.0, 1e6 * spent / count)


class Belady(Indifferent):
    """Knows all steps beforehand."""

    name = "belady"

    def __init__(self, steps: list[list[NDArray[np.int64]]], experts: int) -> None:
        layers = len(steps[0]) if steps else 0
        self.experts, self.step = experts, 0
        self.coming = np.full(layers * experts, np.inf)
        self.next_uses: list[NDArray[np.float64]] = []
        for number in range(len(steps) * layers - 1, -1, -1):
            token, layer = divmod(number, layers)
            at = layer * experts + steps[token][layer]
            self.next_uses.append(self.coming[at])
            self.coming[at] = number
        self.next_uses.reverse()

    def observe(self, layer: int, experts: NDArray[np.int64], missing: int = 0) -> None:
        """As `EvictionPolicy`."""
        self.coming[layer * self.experts + experts] = self.next_uses[self.step]
        self.step += 1

    def keep(self) -> NDArray[np.float64]:
        """As `EvictionPolicy`."""
        return -self.coming


class Simulation:
    """A trace and a number of slots. Raises InputError for a trace without tokens, or less slots than one layer's picks."""

    def __init__(self, trace: RoutingTrace, share: float) -> None:
        if not trace.expert_ids.size:
            raise InputError("trace: found no tokens, expected some")
        self.layers, self.top_k = trace.expert_ids.shape[1:]
        self.experts = trace.num_experts
        self.slots = slots_for(share, self.layers, self.experts, self.top_k)
        self.steps = steps_of(trace)
        self.names = (*MAKERS, "belady")

    def run(self, name: str) -> Simulated:
        """One policy, from an empty cache."""
        if name == "belady":
            return simulate(self.steps, self.experts, self.slots, Belady(self.steps, self.experts))
        policy = MAKERS[name](self.layers, self.experts, self.top_k, self.slots)
        return simulate(self.steps, self.experts, self.slots, policy)
