"""What decode with a part of the experts in memory can be expected to take: reading what is missing beside computing.

    seconds a token = max(weights touched / memory's rate, layers * top_k * (1 - hit rate) * bytes of an expert / link's rate)

Weights touched are the dense part and one token's experts; one sequence, short enough for its keys and values not to count.
The hit rate follows from routing: with even routing it is the share of experts in memory, whatever the policy; recorded routing
gives more (docs/offload.md), and `coterie cache-sim` tells of a trace.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Weights:
    """Of a model, bytes. dense: all but experts; expert: one of a layer; layers: those with experts, of `experts` each."""

    dense: float
    expert: float
    layers: int
    experts: int
    top_k: int

    @property
    def total(self) -> float:
        """All together."""
        return self.dense + self.layers * self.experts * self.expert

    def share(self, room: float) -> float:
        """How many of all experts fit beside the dense part in `room` bytes, 0 to 1; below 0 where not even that fits."""
        left = room - self.dense - self.top_k * self.expert
        return -1.0 if left < 0 else min(1.0, (room - self.dense) / (self.total - self.dense))

    def read(self, hit_rate: float) -> float:
        """Bytes to read for a token."""
        return self.layers * self.top_k * (1 - hit_rate) * self.expert

    def seconds(self, hit_rate: float, memory_rate: float, link_rate: float) -> float:
        """Of a token, at best. Rates in bytes a second."""
        return max((self.dense + self.read(0.0)) / memory_rate, self.read(hit_rate) / link_rate)
