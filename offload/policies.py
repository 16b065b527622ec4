"""Which expert gives way when another is needed: eviction policies, the same objects in the cache and in its simulator.

Experts are numbered `layer * E + expert`; one pool of slots holds experts of all layers. A step is one layer of one token
(or of one batch). A policy sees every step, whatever was cached, and is asked for victims among what is resident.

| name | gives up | from |
|---|---|---|
| `lru` | what was used longest ago | |
| `lfu` | what was used least often, of equals the older | |
| `lfu_aged` | the same with counts that halve every `HALF_LIFE` tokens | |
| `gdsf` | least count above the value of the last one given up (Greedy-Dual-Size-Frequency, equal sizes) | Cherkasova 1998 |
| `fixed` | never what the prefill used most (CoreInfer's experts fixed at prefill), else as `lru` | Wang et al. 2024 |
| `reuse` | what is expected back last, by a hazard learned online | |
| `coterie` | the default: `reuse` beside a shadow of `lru`, and as that while learning does not pay | |
| `belady` | what is needed last, known in hindsight: nobody can do better | Belady 1966 |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

HALF_LIFE = 32.0
Ids = NDArray[np.int64]
Scores = NDArray[np.float64]


class EvictionPolicy(Protocol):
    """One or two methods, as the cache calls them."""

    name: str

    def observe(self, layer: int, experts: Ids, missing: int = 0) -> None:
        """A step's experts, each once, resident or not; how many of them were not. Called before `keep`."""
        ...

    def keep(self) -> Scores:
        """How much each expert is worth keeping, `[layers * E]`: the lowest go first."""
        ...

    def gone(self, victims: Ids) -> None:
        """What was given up."""
        ...


class Indifferent:
    """What most policies make of what was given up."""

    def gone(self, victims: Ids) -> None:
        """Nothing."""


class Lru(Indifferent):
    """By the time of the last use."""

    name = "lru"

    def __init__(self, layers: int, experts: int) -> None:
        self.experts = experts
        self.now = 0
        self.used = np.full(layers * experts, -1.0)

    def observe(self, layer: int, experts: Ids, missing: int = 0) -> None:
        """As `EvictionPolicy`."""
        self.now += 1
        self.used[layer * self.experts + experts] = self.now

    def keep(self) -> Scores:
        """As `EvictionPolicy`."""
        return self.used


class Lfu(Lru):
    """By the number of uses, which may lose value as tokens go by; of equals the older goes."""

    name = "lfu"

    def __init__(self, layers: int, experts: int, half_life: float | None = None) -> None:
        super().__init__(layers, experts)
        self.name = "lfu" if half_life is None else "lfu_aged"
        self.count = np.zeros(layers * experts)
        self.gain = 1.0
        self.growth = 1.0 if half_life is None else 2 ** (1 / (half_life * layers))

    def observe(self, layer: int, experts: Ids, missing: int = 0) -> None:
        """As `EvictionPolicy`. Later uses weigh more, instead of all earlier ones less at every step."""
        super().observe(layer, experts)
        self.gain *= self.growth
        self.count[layer * self.experts + experts] += self.gain
        if self.gain > 1e100:
            self.count /= self.gain
            self.gain = 1.0

    def keep(self) -> Scores:
        """As `EvictionPolicy`."""
        return self.count + self.used / (self.now + 1) * 1e-9 * self.gain


class Gdsf(Lfu):
    """Count of uses on top of the value that the last victim had."""

    name = "gdsf"

    def __init__(self, layers: int, experts: int) -> None:
        super().__init__(layers, experts)
        self.name, self.floor = "gdsf", 0.0
        self.value = np.zeros(layers * experts)

    def observe(self, layer: int, experts: Ids, missing: int = 0) -> None:
        """As `EvictionPolicy`."""
        super().observe(layer, experts)
        at = layer * self.experts + experts
        self.value[at] = self.floor + self.count[at]

    def keep(self) -> Scores:
        """As `EvictionPolicy`."""
        return self.value

    def gone(self, victims: Ids) -> None:
        """What was given up raises the floor for what comes."""
        self.floor = max(self.floor, float(self.value[victims].max()))


class Fixed(Lru):
    """What the first tokens used most stays; the rest is by age. tokens: how many of them; share: of all experts."""

    name = "fixed"

    def __init__(self, layers: int, experts: int, tokens: int = 16, share: float = 0.1) -> None:
        super().__init__(layers, experts)
        self.count = np.zeros(layers * experts)
        self.steps, self.stays = tokens * layers, int(share * layers * experts)
        self.bonus = np.zeros(layers * experts)

    def observe(self, layer: int, experts: Ids, missing: int = 0) -> None:
        """As `EvictionPolicy`."""
        super().observe(layer, experts)
        if self.now <= self.steps:
            self.count[layer * self.experts + experts] += 1
            if self.now == self.steps and self.stays:
                self.bonus[np.argsort(-self.count, kind="stable")[: self.stays]] = 1e15

    def keep(self) -> Scores:
        """As `EvictionPolicy`."""
        return self.used + self.bonus


class Reuse(Indifferent):
    """By when an expert is expected back: the wait for its layer's next turn, and 1 / p - 1 tokens beyond that.

    p, the chance that its layer picks it in the next token, is a hazard learned online, for all layers together: how often
    experts were picked that had the same age (tokens since the last use) and the same rate of use so far. It is what decides
    between recency and frequency, by what the routing at hand shows.
    """

    name = "reuse"
    AGES = np.array([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 1024])
    RATES = np.array([0.01, 0.02, 0.03, 0.045, 0.065, 0.09, 0.125, 0.18, 0.25, 0.35, 0.5])

    def __init__(self, layers: int, experts: int, top_k: int) -> None:
        self.layers, self.experts = layers, experts
        self.prior = top_k / experts
        self.tokens = np.zeros(layers)
        self.age = np.full((layers, experts), 1e6)
        self.rate = np.full((layers, experts), self.prior)
        cells = (len(self.AGES) + 1, len(self.RATES) + 1)
        self.seen, self.picked = np.zeros(cells), np.zeros(cells)
        self.back = np.empty((layers, experts))  # tokens until an expert is expected back, from its layer's next turn on
        turns = (np.arange(layers)[None, :] - np.arange(layers)[:, None] - 1) % layers
        self.wait = -(turns / layers)[:, :, None]  # by the layer at hand: tokens until each layer's next turn, below zero
        self.here = 0
        self._cells = np.zeros((layers, experts), dtype=np.int64)
        for layer in range(layers):
            self._predict(layer)

    def observe(self, layer: int, experts: Ids, missing: int = 0) -> None:
        """As `EvictionPolicy`."""
        self.here = layer
        cells = self._cells[layer]
        self.seen.reshape(-1)[:] += np.bincount(cells, minlength=self.seen.size)
        self.picked.reshape(-1)[:] += np.bincount(cells[experts], minlength=self.seen.size)
        if layer == 0:
            self.seen *= 0.999
            self.picked *= 0.999
        self.tokens[layer] += 1
        weight = max(1 / (self.tokens[layer] + 4), 1 / 64)
        self.age[layer] += 1
        self.age[layer, experts] = 1
        self.rate[layer] *= 1 - weight
        self.rate[layer, experts] += weight
        self._predict(layer)

    def _predict(self, layer: int) -> None:
        ages, rates = np.searchsorted(self.AGES, self.age[layer]), np.searchsorted(self.RATES, self.rate[layer])
        self._cells[layer] = ages * self.seen.shape[1] + rates
        cells, rate = self._cells[layer], self.rate[layer]
        trust = 8.0  # observations that the rate itself counts for
        chance = (self.picked.reshape(-1)[cells] + trust * rate) / (self.seen.reshape(-1)[cells] + trust)
        self.back[layer] = 1 / np.maximum(chance, 1e-6)

    def keep(self) -> Scores:
        """As `EvictionPolicy`: minus the expected time until the next use, in tokens."""
        scores: Scores = (self.wait[self.here] - self.back).reshape(-1)
        return scores


class Adaptive(Indifferent):
    """`reuse`, or `lru` where that misses less: the one not in use runs in a shadow of tags alone, as large as the cache.

    It takes over when the cache has missed so many more than the shadow that chance does not explain it; each change of mind
    asks for twice the evidence.
    """

    name = "coterie"

    def __init__(self, layers: int, experts: int, top_k: int, slots: int) -> None:
        self.experts = experts
        self.using: EvictionPolicy = Reuse(layers, experts, top_k)
        self.other: EvictionPolicy = Lru(layers, experts)
        self.shadow = Tags(layers * experts, slots)
        self.debt, self.patience = 0.0, 4.0 * top_k

    def observe(self, layer: int, experts: Ids, missing: int = 0) -> None:
        """As `EvictionPolicy`."""
        self.using.observe(layer, experts)
        self.other.observe(layer, experts)
        at = layer * self.experts + experts
        absent = self.shadow.absent(at)
        self.shadow.admit(at, absent, self.other)
        self.debt = max(0.0, self.debt + missing - len(absent))
        if self.debt > self.patience:
            self.using, self.other = self.other, self.using
            self.debt, self.patience = 0.0, 2 * self.patience

    def keep(self) -> Scores:
        """As `EvictionPolicy`."""
        return self.using.keep()


class Tags:
    """A cache without contents: which of `size` experts would be in `slots` slots."""

    def __init__(self, size: int, slots: int) -> None:
        self.resident = np.zeros(size, dtype=bool)
        self.slots, self.held = slots, 0

    def absent(self, at: Ids) -> Ids:
        """Those of `at` that are not there."""
        return at[~self.resident[at]]

    def admit(self, at: Ids, absent: Ids, policy: EvictionPolicy) -> None:
        """Let `absent` in, at the cost of what `policy` gives up; all of `at` stay."""
        over = self.held + len(absent) - self.slots
        if over > 0:
            victims = lowest(policy.keep(), self.resident, at, over)
            policy.gone(victims)
            self.resident[victims] = False
            self.held -= over
        self.resident[absent] = True
        self.held += len(absent)


def lowest(worth: Scores, resident: NDArray[np.bool_], needed: Ids, count: int) -> Ids:
    """The `count` resident experts of least worth, those `needed` now left out."""
    masked = np.where(resident, worth, np.inf)
    masked[needed] = np.inf
    if count == 1:
        return np.array([masked.argmin()])
    return np.argpartition(masked, count - 1)[:count]


MAKERS: dict[str, Callable[[int, int, int, int], EvictionPolicy]] = {
    "lru": lambda layers, experts, top_k, slots: Lru(layers, experts),
    "lfu": lambda layers, experts, top_k, slots: Lfu(layers, experts),
    "lfu_aged": lambda layers, experts, top_k, slots: Lfu(layers, experts, HALF_LIFE),
    "gdsf": lambda layers, experts, top_k, slots: Gdsf(layers, experts),
    "fixed": lambda layers, experts, top_k, slots: Fixed(layers, experts),
    "reuse": lambda layers, experts, top_k, slots: Reuse(layers, experts, top_k),
    "coterie": Adaptive,
}
