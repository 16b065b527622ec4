"""`coterie cache-sim`: what each eviction policy makes of a recorded routing, beside Belady's optimum."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from tqdm import tqdm

from coterie.launch.commands import say
from coterie.launch.tables import table
from coterie.offload.predictors import AHEAD
from coterie.offload.simulate import Simulated, Simulation
from coterie.offload.whole_path import WholePath
from coterie.routing.errors import positive
from coterie.routing.trace import read_trace


def cache_sim(options: argparse.Namespace) -> dict[str, Any]:
    """One pool of slots for all layers, token by token; the fields of `--json` are the contract's (docs/formats.md)."""
    trace = read_trace(options.trace)
    if options.max_tokens is not None:
        trace = trace.select(np.arange(min(trace.tokens, positive("--max-tokens", options.max_tokens))))
    prior = None if options.prior is None else read_trace(options.prior)
    simulation = Simulation(trace, options.slots, prior)
    if simulation.contexts is None:
        say(f"{options.trace}: no token_ids, so {WholePath.name} is not played; coterie trace --token-ids records them")
    found: dict[str, Simulated] = {}
    for name in tqdm(simulation.names, desc="policies", disable=None):
        found[name] = simulation.run(name)
    foretold = {name: simulation.foretell(name) for name in tqdm(simulation.predictors, desc="predictors", disable=None)}
    policies = _policies(found)
    predictors = {
        name: {
            "recall": {str(d): r for d, r in one.recall.items()},
            "microseconds_per_layer": one.microseconds,
            **({} if one.before is None else {"recall_before_first_layer": one.before}),
        }
        for name, one in foretold.items()
    }
    if not options.json:
        share = f"{simulation.slots} of {trace.num_experts * len(trace.layer_ids)} experts in slots"
        say(f"{options.trace}: {trace.tokens} tokens, {len(trace.layer_ids)} layers, {share}")
        header = ["policy", "hit rate", "gap to Belady closed", "us a layer and token", "misses read ahead"]
        print(table(header, [[name, *policy.values(), *[""] * (4 - len(policy))] for name, policy in policies.items()]))
        header = ["predictor", *(f"recall {d} ahead" for d in AHEAD), "from before the first", "us a layer and token"]
        rows = [
            [n, *(one.recall.get(d, "") for d in AHEAD), "" if one.before is None else one.before, one.microseconds]
            for n, one in foretold.items()
        ]
        print("\n" + table(header, rows))
    return {"slots": simulation.slots, "tokens": trace.tokens, "policies": policies, "predictors": predictors}


def _policies(found: dict[str, Simulated]) -> dict[str, dict[str, float]]:
    """The contract's fields by policy, and `hidden` where something was read ahead."""
    low, high = found["lru"].hit_rate, found["belady"].hit_rate
    made = {}
    for name, one in found.items():
        made[name] = {
            "hit_rate": one.hit_rate,
            "gap_closed": (one.hit_rate - low) / (high - low) if high > low else 0.0,
            "microseconds_per_layer": one.microseconds,
        }
        if one.hidden is not None:
            made[name]["hidden"] = one.hidden
    return made
