"""Eviction policies that learn online when an expert is expected back; `offload/policies.py` lists them.

Both rank experts by the wait for their layer's next turn and 1 / p - 1 tokens beyond that, p being the chance that the layer
picks the expert at its next turn. They differ in what they know of p. What can wait is done for all layers at once, when a
token is complete: at these sizes the number of calls is what costs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from coterie.offload.predictors import Ids, Path, Transition


class Reuse:
    """p is a hazard learned online, for all layers together: how often experts were picked of the same age and rate of use.

    Age is in tokens since the last use. It so weighs recency against frequency by what the routing at hand shows.
    """

    name = "reuse"
    AGES = np.array([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 1024])
    RATES, LOWEST, RATIO = 12, 0.01, 1.48  # classes of rates: below the lowest, and by that ratio above it
    TRUST = 8.0  # observations that a cell's own rate counts for
    FADE = 0.999  # of what was counted, by token
    EAGER = 32  # tokens that are all learned from; of later ones every other, to save time
    RARE = 1e-4  # a chance or rate below this is taken for this

    def __init__(self, layers: int, experts: int, top_k: int) -> None:
        self.layers, self.experts, self.prior = layers, experts, top_k / experts
        self.here, self.tokens = layers, 0
        self.age = np.full((layers, experts), self.AGES[-1] + 1)
        self._age_class = np.searchsorted(self.AGES, np.arange(self.AGES[-1] + 2)) * self.RATES
        self.rate = np.full((layers, experts), self.prior, dtype=np.float32)
        self.gain = 1.0  # of the rate at one use
        self.picks = np.zeros((layers, experts), dtype=bool)  # of this token
        self.cells = np.zeros((layers, experts), dtype=np.int64)  # what age and rate make of each expert, by its last turn
        self.before = self.cells.copy()  # the same by the turn before
        self._bounds = (self.LOWEST * self.RATIO ** np.arange(self.RATES - 1)).astype(np.float32)
        size = (len(self.AGES) + 1) * self.RATES
        self.seen, self.picked = np.zeros(size), np.zeros(size)
        self.nominal = np.tile(self.LOWEST * self.RATIO ** (np.arange(self.RATES) - 0.5), len(self.AGES) + 1)
        self.odds = np.log(self.nominal / (1 - self.nominal)).astype(np.float32)
        self.worth = np.empty((layers, experts), dtype=np.float32)  # minus tokens from this one's start to the next use
        self.worth[:] = -np.arange(layers)[:, None] / layers - 1 / self.prior
        self._place()

    def gone(self, victims: Ids) -> None:
        """As `EvictionPolicy`: nothing."""

    def emptied(self) -> None:
        """As `EvictionPolicy`: nothing."""

    def observe(self, layer: int, experts: Ids, missing: int = 0) -> None:
        """As `EvictionPolicy`."""
        if layer <= self.here:
            self._next_token()
        self.here = layer
        self.picks[layer, experts] = True
        rate = self.rate[layer].take(experts) + np.float32(self.gain)
        self.rate[layer, experts] = rate
        self.cells[layer, experts] = self._bounds.searchsorted(rate)  # of the first age
        self._expect(layer, experts)

    def keep(self) -> NDArray[np.float32]:
        """As `EvictionPolicy`."""
        return self.worth.reshape(-1)

    def _expect(self, layer: int, experts: Ids) -> None:
        back = np.exp(-self.odds.take(self.cells[layer]))
        back += 1
        np.subtract(-layer / self.layers, back, out=self.worth[layer])

    def _next_token(self) -> None:
        """Learn from the token that is complete; all are a token older."""
        if self.tokens > 1 and (self.tokens < self.EAGER or self.tokens % 2):
            self._learn()
        self.tokens += 1
        self.worth += 1
        self.gain = max(1 / (self.tokens + 4), 1 / 64)
        self.age[self.picks] = 1
        np.minimum(self.age + 1, self.AGES[-1] + 1, out=self.age)
        self.rate *= np.float32(1 - self.gain)
        np.maximum(self.rate, self.RARE, out=self.rate)
        self.before[:] = self.cells
        self.picks[:] = False
        self._place()

    def _learn(self) -> None:
        """The chance of every cell."""
        size = len(self.seen)
        self.seen = self.seen * self.FADE + np.bincount(self.before.reshape(-1), minlength=size)
        self.picked = self.picked * self.FADE + np.bincount(self.before[self.picks], minlength=size)
        chance = (self.picked + self.TRUST * self.nominal) / (self.seen + self.TRUST)
        chance = np.minimum(np.maximum(chance, self.RARE), 1 - self.RARE)
        self.odds = np.log(chance / (1 - chance)).astype(np.float32)

    def _place(self) -> None:
        """The cells of what the layers' next turns will leave aside."""
        self._age_class.take(self.age, out=self.cells, mode="clip")
        rates = np.log(self.rate / np.float32(self.LOWEST / self.RATIO)) * np.float32(1 / np.log(self.RATIO))
        self.cells += np.minimum(np.maximum(rates, 0, out=rates), self.RATES - 1, out=rates).astype(np.int64)


class Foresight(Reuse):
    """p from the hazard and from what predictors say of the layer's next turn, weighed by a logistic regression online.

    Evidence, as log odds or as the log of a ratio to the rate of use: the hazard; the rate over the whole run; what followed
    the experts at hand at the next token of the same layer (`Transition`); what the tokens took that came after those most
    like the present one (`Path`). The weights start at the hazard alone, and follow Newton steps, one per token, in which
    older tokens count less and less.
    """

    name = "foresight"
    STRENGTH = 500.0  # of the weights to start with, in the curvature of the loss
    FORGET = 0.9995  # by layer
    FAR = np.float32(60.0)  # log odds against a use are at most this

    def __init__(self, layers: int, experts: int, top_k: int) -> None:
        super().__init__(layers, experts, top_k)
        self.following, self.path = Transition(layers, experts, (layers,)), Path(layers, experts, every=3)
        self.evidence = np.zeros((5, layers, experts), dtype=np.float32)
        self.evidence[0] = 1
        self.back = np.full((layers, experts), 1 / self.prior, dtype=np.float32)  # (1 - p) / p
        self.former = self.evidence.copy(), self.back.copy()  # by the turn before
        self._rests = np.zeros((2, 1), dtype=np.float32)
        self.weights = np.array([0, 1, 0, 0, 0], dtype=np.float32)
        self.curvature = self.STRENGTH * np.eye(5)

    def _expect(self, layer: int, experts: Ids) -> None:
        self.following.observe(layer, experts)
        self.path.observe(layer, experts)
        evidence = self.evidence[:, layer]
        self.odds.take(self.cells[layer], out=evidence[1], mode="clip")
        evidence[3], self._rests[0] = self.following.evidence(self.layers)
        evidence[4], self._rests[1] = self.path.evidence(self.layers)
        ratios = evidence[3:]
        ratios /= self.rate[layer]
        ratios += self._rests
        np.log(ratios, out=ratios)
        back = self.back[layer]
        np.exp(np.minimum(-self.weights @ evidence, self.FAR), out=back)
        np.subtract(-1 - layer / self.layers, back, out=self.worth[layer])

    def _learn(self) -> None:
        super()._learn()
        evidence, chance = self.former[0].reshape(5, -1), 1 / (1 + self.former[1].reshape(-1))
        slope = evidence @ (self.picks.reshape(-1) - chance)
        kept = self.FORGET**self.layers
        self.curvature = kept * self.curvature + (1 - kept) * self.STRENGTH * np.eye(5)
        self.curvature += (evidence * (chance * (1 - chance))) @ evidence.T
        self.weights += np.linalg.solve(self.curvature, slope)

    def _next_token(self) -> None:
        super()._next_token()
        self.former, self.evidence, self.back = (self.evidence, self.back), *self.former
        np.log(self.following.uses / (self.tokens + self.following.TRUST), out=self.evidence[2])
