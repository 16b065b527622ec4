"""The score of `time` for the local search: 2T + Q of one layer from the rows and the load of every rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from coterie.placement.cost import expert_seconds, latency, layer_seconds
from coterie.placement.scenarios import Scenario
from coterie.placement.topology import Topology

Array = NDArray[np.float64]
TIE = 1e-3


class LayerTime:
    """Seconds per layer for a batch of all tokens of a mixture of scenarios, every home equally likely."""

    def __init__(self, topology: Topology, scenarios: Sequence[Scenario], weights: Sequence[float]) -> None:
        traces = [s.trace for s in scenarios]
        assert all(t is not None for t in traces)
        self.t = topology
        self.tokens = float(sum(w * t.tokens for w, t in zip(weights, traces, strict=True) if t is not None))
        self.phase = traces[0].phase if traces[0] is not None and len({t.phase for t in traces if t}) == 1 else "mixed"
        self.layers = len(scenarios[0].load)
        self.compute, self.read = expert_seconds(topology, self.phase, self.layers)
        mixed = sum(w * (s.load > 0) for w, s in zip(weights, scenarios, strict=True))
        load = sum(w * s.load for w, s in zip(weights, scenarios, strict=True))
        # What an expert adds to its rank's time; a rank's experts add up.
        self.weight: Array = np.maximum(np.asarray(load) * self.compute, np.asarray(mixed) * self.read[:, None])

    def score(self, rows: Array, load: Array) -> Array:
        """Seconds `[n]`; rows `[n, ranks]`: received per token of the mixture; load `[n, ranks]`: sums of `weight`."""
        t = self.t
        per_home = rows * self.tokens / max(t.ranks - 1, 1)  # from each other rank
        total = per_home.sum(1, keepdims=True)
        near, far = t.ranks_per_node - 1, t.ranks - t.ranks_per_node
        by_node = per_home.reshape(len(rows), t.nodes, t.ranks_per_node).sum(2)
        own = np.repeat(by_node, t.ranks_per_node, axis=1)
        within = np.maximum((per_home * near).max(1), (own - per_home).max(1))
        between = np.maximum((by_node * far).max(1), ((total - by_node) * t.ranks_per_node).max(1))
        slowest = np.maximum(within / t.within.bytes_per_second, between / t.between.bytes_per_second) * t.row_bytes
        mean = per_home.mean(1) * near * t.row_bytes / t.within.bytes_per_second  # settles what the slowest leaves open
        return np.asarray(2 * (latency(t) + slowest) + load.max(1) + TIE * mean)

    def of_copies(self, layer: int, sent: Array, pairs: Array, touched: Array) -> float:
        """The same of copies: sent `[ranks, ranks]` rows and pairs `[ranks]` per token, touched `[ranks]` experts."""
        topology = self.t.of_layer(layer)
        seconds = layer_seconds(sent[None] * self.tokens, pairs[None] * self.tokens, touched[None], self.phase, topology)
        return float(seconds[0])
