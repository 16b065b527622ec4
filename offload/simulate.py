"""A recorded routing through a cache of experts: the very policies of the real one, and what hindsight could do."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coterie.offload.policies import DEFAULT, MAKERS, EvictionPolicy, Indifferent, Tags
from coterie.offload.predictors import AHEAD, PREDICTORS, Predictor, Transition, likeliest
from coterie.offload.whole_path import ORDER, Context, WholePath
from coterie.routing.errors import InputError, require
from coterie.routing.trace import RoutingTrace

Steps = list[list[NDArray[np.int64]]]


@dataclass(frozen=True)
class Simulated:
    """hit_rate: 1 - transfers / requests; microseconds: CPU time of policy and predictor, per layer and token.

    hidden: of the experts that had to be read for a step, the share that was read ahead; None without a predictor.
    """

    hit_rate: float
    microseconds: float
    hidden: float | None = None


@dataclass(frozen=True)
class Foretold:
    """recall: by distance in layers, the share of a layer's experts among as many that were expected; within a token.

    microseconds: CPU time to see a step and to score the next layer, per layer and token. before: the share over all layers
    from before the first; None for a predictor that knows nothing of a token then.
    """

    recall: dict[int, float]
    microseconds: float
    before: float | None = None


def steps_of(trace: RoutingTrace) -> Steps:
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


def simulate(
    steps: Steps, experts: int, slots: int, policy: EvictionPolicy, ahead: Predictor | None = None,
    begins: NDArray[np.bool_] | None = None, contexts: Sequence[Context] | None = None,
) -> Simulated:  # fmt: skip
    """Token by token, layer by layer; experts of the step at hand stay.

    ahead: after a step, as many experts of the next layer as this one picked are expected, and those missing are read into
    the same slots. They stay until that layer's turn, then they are like any other. begins: where sequences do, by token.
    contexts: what was read, by token, for a `WholePath`, which so also knows the first layer before its turn.
    """
    layers = len(steps[0]) if steps else 0
    tags, spent = Tags(layers * experts, slots), 0.0
    waiting = np.zeros(layers * experts, dtype=bool)  # read ahead, not asked for yet
    transfers = requests = missed = in_time = 0
    for number, token in enumerate(steps):
        if ahead is not None and begins is not None and begins[number]:
            ahead.begin()
        if contexts is not None and isinstance(ahead, WholePath):
            began = time.process_time()
            ahead.read([contexts[number]])
            expected = likeliest(ahead.scores(1), len(token[0]))
            spent += time.process_time() - began
            read = _read_ahead(tags, policy, expected[:0], expected)
            waiting[read] = True
            transfers += len(read)
        for layer, picked in enumerate(token):
            at = layer * experts + picked
            missing = tags.absent(at)
            requests += len(at)
            missed += len(missing)
            began = time.process_time()
            policy.observe(layer, picked, len(missing) + int(waiting[at].sum()))  # as if nothing had been read ahead
            tags.admit(at, missing, policy)
            if ahead is not None:
                ahead.observe(layer, picked)
                following = (layer + 1) % layers
                expected = following * experts + likeliest(ahead.scores(1), len(picked))
            spent += time.process_time() - began
            if ahead is not None:
                in_time += int(waiting[at].sum())
                waiting[layer * experts : (layer + 1) * experts] = False
                read = _read_ahead(tags, policy, at, expected)
                waiting[read] = True
                transfers += len(read)
    count, needed = max(1, len(steps) * layers), in_time + missed
    hidden = None if ahead is None else in_time / needed if needed else 0.0
    return Simulated(1 - (transfers + missed) / requests if requests else 0.0, 1e6 * spent / count, hidden)


def _read_ahead(tags: Tags, policy: EvictionPolicy, at: NDArray[np.int64], expected: NDArray[np.int64]) -> NDArray[np.int64]:
    """Those of `expected` that are missing, the likeliest first, as far as there is room beside what is needed `at` hand."""
    missing = tags.absent(expected)
    kept = np.union1d(at, np.setdiff1d(expected, missing))
    missing = missing[: max(0, tags.slots - len(kept))]
    tags.admit(np.concatenate([kept, missing]), missing, policy)
    return missing


def foretell(
    steps: Steps, predictor: Predictor, begins: NDArray[np.bool_], contexts: Sequence[Context] | None = None
) -> Foretold:
    """What a predictor knows beforehand. contexts: as in `simulate`."""
    layers, spent = len(steps[0]), 0.0
    distances = [d for d in AHEAD if d < layers]
    found, asked = dict.fromkeys((*distances, 0), 0), dict.fromkeys((*distances, 0), 0)  # by distance, 0: from before the first

    def judge(distance: int, ahead: int, wanted: NDArray[np.int64]) -> None:
        asked[distance] += len(wanted)
        found[distance] += len(np.intersect1d(wanted, likeliest(predictor.scores(ahead), len(wanted))))

    for number, (token, begin) in enumerate(zip(steps, begins, strict=True)):
        if begin:
            predictor.begin()
        if contexts is not None and isinstance(predictor, WholePath):
            began = time.process_time()
            predictor.read([contexts[number]])
            spent += time.process_time() - began
            for layer, wanted in enumerate(token):
                judge(0, layer + 1, wanted)
        for layer, picked in enumerate(token):
            began = time.process_time()
            predictor.observe(layer, picked)
            predictor.scores(1)
            spent += time.process_time() - began
            for distance in distances:
                if layer + distance < layers:
                    judge(distance, distance, token[layer + distance])
    before = found[0] / asked[0] if asked[0] else None
    return Foretold({d: found[d] / max(1, asked[d]) for d in distances}, 1e6 * spent / (len(steps) * layers), before)


class Belady(Indifferent):
    """Knows all steps beforehand."""

    name = "belady"

    def __init__(self, steps: Steps, experts: int) -> None:
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
    """A trace and a number of slots; `prior`: a trace of the same model that `transition` may know from the start.

    Raises InputError for a trace without tokens, less slots than one layer's picks, a prior of another shape.
    """

    def __init__(self, trace: RoutingTrace, share: float, prior: RoutingTrace | None = None) -> None:
        if not trace.expert_ids.size:
            raise InputError("trace: found no tokens, expected some")
        self.layers, self.top_k = trace.expert_ids.shape[1:]
        self.experts = trace.num_experts
        self.slots = slots_for(share, self.layers, self.experts, self.top_k)
        self.steps, self.begins = steps_of(trace), begins_of(trace)
        if prior is not None:
            for name in ("model", "num_experts", "layer_ids"):
                found, own = getattr(prior, name), getattr(trace, name)
                alike = found == own or (name == "model" and "" in (found, own))
                require(alike, f"--prior: {name}", repr(found), f"{own!r}, as the trace has")
        self.prior = prior
        self.contexts = None if trace.token_ids is None else contexts_of(trace)
        self.predictors = (*PREDICTORS, *(() if self.contexts is None else (WholePath.name,)))
        self.names = (*MAKERS, *(f"{DEFAULT}+{name}" for name in self.predictors), "belady")

    def run(self, name: str) -> Simulated:
        """One policy, and a predictor after a plus sign, from an empty cache."""
        if name == "belady":
            return simulate(self.steps, self.experts, self.slots, Belady(self.steps, self.experts))
        evicting, _, ahead = name.partition("+")
        policy = MAKERS[evicting](self.layers, self.experts, self.top_k, self.slots)
        predictor = self.predictor(ahead) if ahead else None
        return simulate(self.steps, self.experts, self.slots, policy, predictor, self.begins, self.contexts)

    def foretell(self, name: str) -> Foretold:
        """A predictor alone."""
        return foretell(self.steps, self.predictor(name), self.begins, self.contexts)

    def predictor(self, name: str) -> Predictor:
        """A new one, which knows the prior if it can."""
        if name == WholePath.name:
            return WholePath(self.layers, self.experts)
        made = PREDICTORS[name](self.layers, self.experts)
        if self.prior is not None and isinstance(made, Transition):
            made.learn(steps_of(self.prior), begins_of(self.prior))
        return made


def begins_of(trace: RoutingTrace) -> NDArray[np.bool_]:
    """Where another sequence than the token before's is at hand."""
    return np.append(True, trace.sequence_ids[1:] != trace.sequence_ids[:-1])


def contexts_of(trace: RoutingTrace) -> list[Context]:
    """By token its id and those before it in its sequence, as far as they were recorded one after another."""
    assert trace.token_ids is not None
    last: dict[int, tuple[int, Context]] = {}  # by sequence, position and context
    found: list[Context] = []
    for sequence, position, token in zip(
        trace.sequence_ids.tolist(), trace.positions.tolist(), trace.token_ids.tolist(), strict=True
    ):
        before, context = last.get(sequence, (-1, ()))
        found.append((token, *(context if position == before + 1 else ()))[:ORDER])
        last[sequence] = position, found[-1]
    return found
