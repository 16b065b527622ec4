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
| `foresight` | the same, by the hazard and by what predictors say of the next token (`offload/learned.py`) | |
| `coterie` | the default: `foresight` beside a shadow of `lru`, and as that while learning does not pay | |
| `belady` | what is needed last, known in hindsight: nobody can do better | Belady 1966 |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from coterie.offload.learned import Foresight, Reuse

HALF_LIFE = 32.0
Ids = NDArray[np.int64]
Scores = NDArray[np.float64] | NDArray[np.float32]


class EvictionPolicy(Protocol):
    """One or two methods, as the cache calls them."""

    name: str

    def observe(self, layer: int, experts: Ids, missing: int = 0) -> None:
        """A step's experts, each once, resident or not. Called before `keep`.

        missing: how many of them would not be, if nothing had been read ahead.
        """
        ...

    def keep(self) -> Scores:
        """How much each expert is worth keeping, `[layers * E]`: the lowest go first."""
        ...

    def gone(self, victims: Ids) -> None:
        """What was given up."""
        ...

    def emptied(self) -> None:
        """Nothing is resident any more; what was learned stays."""
        ...


class Indifferent:
    """What most policies make of what was given up."""

    def gone(self, victims: Ids) -> None:
        """Nothing."""

    def emptied(self) -> None:
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


class Adaptive:
    """`lru` at first, `foresight` once that misses less: the one not in use runs in a shadow of tags, as large as the cache.

    It takes over when the cache has missed so many more than the shadow that chance does not explain it: more than a sum of
    as many misses, each this way or that, strays in so many deviations. It takes more to leave `lru` than to go back to it,
    and each change of mind asks for twice the evidence.
    """

    name = "coterie"
    LEAVE, RETURN = 3.0, 1.0  # standard deviations

    def __init__(self, layers: int, experts: int, top_k: int, slots: int) -> None:
        self.experts = experts
        self.learned, self.lru = Foresight(layers, experts, top_k), Lru(layers, experts)
        self.learning = False  # which one is in use
        self.by_age = LruTags(slots)
        self.shadow = Tags(layers * experts, slots)  # of `learned` while `lru` is in use
        self.held = np.zeros(layers * experts, dtype=bool)
        self.debt, self.differences, self.patience = 0.0, 0, 2.0 * top_k

    def observe(self, layer: int, experts: Ids, missing: int = 0) -> None:
        """As `EvictionPolicy`."""
        self.learned.observe(layer, experts)
        self.lru.observe(layer, experts)
        at = layer * self.experts + experts
        self.held[at] = True
        if self.learning:
            others = self.by_age.use(at.tolist())
        else:
            absent = self.shadow.absent(at)
            self.shadow.admit(at, absent, self.learned)
            others = len(absent)
        self.debt = max(0.0, self.debt + missing - others)
        self.differences += abs(missing - others)
        deviations = self.RETURN if self.learning else self.LEAVE
        if self.debt > self.patience + deviations * self.differences**0.5:
            self.learning = not self.learning
            self.debt, self.differences, self.patience = 0.0, 0, 2 * self.patience
            self.shadow.resident, self.shadow.held = self.held.copy(), int(self.held.sum())
            self.by_age.start(self.lru.used)

    def keep(self) -> Scores:
        """As `EvictionPolicy`."""
        return self.learned.keep() if self.learning else self.lru.keep()

    def gone(self, victims: Ids) -> None:
        """As `EvictionPolicy`."""
        self.held[victims] = False

    def emptied(self) -> None:
        """As `EvictionPolicy`: the shadow is, too, and neither has missed anything yet."""
        self.held[:] = False
        self.shadow.resident[:], self.shadow.held = False, 0
        self.by_age.order.clear()
        self.debt, self.differences = 0.0, 0


class LruTags:
    """Which experts would be in `slots` slots if what was used longest ago gave way."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.order: dict[int, None] = {}  # oldest first

    def start(self, used: Scores) -> None:
        """With what was used last, `used` being when, below zero for never."""
        newest = np.argsort(used, kind="stable")[-self.slots :]
        self.order = dict.fromkeys(newest[used[newest] >= 0].tolist())

    def use(self, experts: list[int]) -> int:
        """How many of them were not there; all are, afterwards, and the newest."""
        before = len(self.order)
        for one in experts:
            self.order.pop(one, None)
        found = before - len(self.order)
        self.order.update(dict.fromkeys(experts))
        for _ in range(len(self.order) - self.slots):
            del self.order[next(iter(self.order))]
        return len(experts) - found


class Tags:
    """A cache without contents: which of `size` experts would be in `slots` slots."""

    def __init__(self, size: int, slots: int) -> None:
        self.resident = np.zeros(size, dtype=bool)
        self.slots, self.held = slots, 0

    def absent(self, at: Ids) -> Ids:
        """Those of `at` that are not there."""
        return at[~self.resident[at]]

    def admit(self, at: Ids, absent: Ids, policy: EvictionPolicy) -> None:
        """Let `absent` in, at the cost of what `policy` gives up; all of `at` stay, or as many as there are slots."""
        if len(at) > self.slots:
            victims = np.setdiff1d(self.resident.nonzero()[0], at[: self.slots])
            if len(victims):
                policy.gone(victims)
            self.resident[:] = False
            self.resident[at[: self.slots]] = True
            self.held = self.slots
            return
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
    candidates = resident.copy()
    candidates[needed] = False
    places = candidates.nonzero()[0]
    values = worth.take(places)
    if count <= 8:  # faster than to partition
        found = np.empty(count, dtype=np.int64)
        for i in range(count):
            found[i] = least = values.argmin()
            values[least] = np.inf
        return places.take(found)
    return places.take(np.argpartition(values, count - 1)[:count])


DEFAULT = "coterie"
MAKERS: dict[str, Callable[[int, int, int, int], EvictionPolicy]] = {
    "lru": lambda layers, experts, top_k, slots: Lru(layers, experts),
    "lfu": lambda layers, experts, top_k, slots: Lfu(layers, experts),
    "lfu_aged": lambda layers, experts, top_k, slots: Lfu(layers, experts, HALF_LIFE),
    "gdsf": lambda layers, experts, top_k, slots: Gdsf(layers, experts),
    "fixed": lambda layers, experts, top_k, slots: Fixed(layers, experts),
    "reuse": lambda layers, experts, top_k, slots: Reuse(layers, experts, top_k),
    "foresight": lambda layers, experts, top_k, slots: Foresight(layers, experts, top_k),
    "coterie": Adaptive,
}
