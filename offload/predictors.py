"""Which experts come next: predictors, as `cache-sim` plays them and as the default eviction policy uses them.

A step is one layer of one token (or of one batch: its experts are then the union). A predictor sees every step, in order,
and says at any of them which experts of the layers ahead are likely: `ahead` 1 is the next layer, `layers` the same layer of
the next token.

| name | expects | from |
|---|---|---|
| `popularity` | what the layer picked most so far | |
| `transition` | what followed the experts at hand so far, by a matrix expert -> expert for each distance | |
| `path` | what the tokens took whose path up to here was most like this one's | |
| `activation` | what the earlier sequence picked whose counts are nearest by cosine | MoE-Infinity, Xue et al. 2024 |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Scores = NDArray[np.float64] | NDArray[np.float32]
AHEAD = (1, 2, 3)  # distances that `cache-sim` reports on


def likeliest(scores: NDArray[np.floating], count: int) -> NDArray[np.int64]:
    """The `count` experts with the highest scores `[E]` above zero, the highest first."""
    if not count:
        return np.zeros(0, dtype=np.int64)
    top = np.argpartition(scores, -count)[-count:]
    top = top[np.argsort(-scores[top], kind="stable")]
    return top[scores[top] > 0]


class Predictor(Protocol):
    """Sees every step, and answers in the middle of a token."""

    name: str

    def begin(self) -> None:
        """A new sequence starts with the next step; called where this is known."""
        ...

    def observe(self, layer: int, experts: Ids) -> None:
        """A step's experts, each once."""
        ...

    def scores(self, ahead: int) -> Scores:
        """How likely each expert is `ahead` layers on, `[E]`, 0 or more: comparable within the layer alone."""
        ...


class Popularity:
    """By counts of uses."""

    name = "popularity"

    def __init__(self, layers: int, experts: int) -> None:
        self.layers, self.here = layers, 0
        self.count = np.zeros((layers, experts))

    def begin(self) -> None:
        """As `Predictor`."""

    def observe(self, layer: int, experts: Ids) -> None:
        """As `Predictor`."""
        self.here = layer
        self.count[layer, experts] += 1

    def scores(self, ahead: int) -> Scores:
        """As `Predictor`."""
        found: Scores = self.count[(self.here + ahead) % self.layers]
        return found


class Transition:
    """By how often an expert followed each of those at hand: counts `[layers, E, E]` for every distance asked for.

    What a token did is counted when it is complete, for all layers at once.
    """

    name = "transition"
    TRUST = 4.0  # uses that an expert's row needs to count for half

    def __init__(self, layers: int, experts: int, distances: Sequence[int] = AHEAD) -> None:
        self.layers, self.experts, self.here = layers, experts, layers
        self.counts = {d: np.zeros((layers, experts, experts), dtype=np.float32) for d in distances if d <= layers}
        self.uses = np.full((layers, experts), self.TRUST / experts, dtype=np.float32)
        self._weigh()
        self.token: dict[int, Ids] = {}  # by layer
        self.last: dict[int, Ids] = {}

    def begin(self) -> None:
        """As `Predictor`: what comes first in a sequence follows nothing."""
        self._complete()
        self.last = {}

    def observe(self, layer: int, experts: Ids) -> None:
        """As `Predictor`."""
        if layer <= self.here:
            self._complete()
        self.here, self.token[layer] = layer, experts

    def _complete(self) -> None:
        for distance, counts in self.counts.items():
            alike: dict[tuple[int, int], list[tuple[int, Ids, Ids]]] = {}  # of the same numbers of experts
            for layer, experts in self.token.items():
                source = layer - distance
                before = self.token.get(source) if source >= 0 else self.last.get(source % self.layers)
                if before is not None:
                    pair = source % self.layers * self.experts, before, experts
                    alike.setdefault((len(before), len(experts)), []).append(pair)
            for pairs in alike.values():
                rows = np.array([row for row, _, _ in pairs])[:, None] + np.array([before for _, before, _ in pairs])
                counts.reshape(-1)[rows[:, :, None] * self.experts + np.array([then for _, _, then in pairs])[:, None]] += 1
        if self.token:
            self.uses.reshape(-1)[np.concatenate([layer * self.experts + at for layer, at in self.token.items()])] += 1
            self.last, self.token = self.token, {}
            self._weigh()
        self.here = self.layers

    def _weigh(self) -> None:
        """What a use of each expert says."""
        self.weight = 1 / (self.uses + np.float32(self.TRUST))

    def learn(self, steps: Sequence[Sequence[Ids]], begins: NDArray[np.bool_], worth: float = 64.0) -> None:
        """Start from a recording: by token and layer the experts, and where sequences begin. It counts for `worth` tokens."""
        for token, begin in zip(steps, begins, strict=True):
            if begin:
                self.begin()
            for layer, experts in enumerate(token):
                self.observe(layer, experts)
        self.begin()
        scale = np.float32(min(1.0, worth / max(1, len(steps))))
        for counts in (*self.counts.values(), self.uses):
            counts *= scale
        self._weigh()

    def scores(self, ahead: int) -> Scores:
        """As `Predictor`: the mean over the experts at hand of the share of their uses that led there, rare ones shrunk."""
        return self.evidence(ahead)[0]

    def evidence(self, ahead: int) -> tuple[Scores, float]:
        """The scores, and how much of 1 is left to what was known without: all of it where nothing was seen."""
        at = self.token.get(self.here)
        if at is None or not len(at):
            return np.zeros(self.experts, dtype=np.float32), 1.0
        weights = self.weight[self.here].take(at)
        found: Scores = (weights / len(at)) @ self.counts[ahead][self.here].take(at, 0)
        return found, self.TRUST * float(np.add.reduce(weights)) / len(at)


class Path:
    """By the tokens whose path was most alike, of the last `tokens` ones: the share of their weight that each expert has.

    Alike is how many of the experts at hand an earlier token had in the same layer, as a share, summed over the layers and
    tokens so far with less weight the longer ago (`fade` a layer); a match so runs on from one token to the next. To save
    time only every `every`th layer is looked at. Those within `margin` of the best count by e^(sharpness * alike); the
    margin follows how many these are.
    """

    name = "path"
    FEW, MANY, MOST = 8, 32, 64

    def __init__(
        self, layers: int, experts: int, tokens: int = 512, fade: float = 0.9, sharpness: float = 1.5, every: int = 1
    ) -> None:
        self.layers, self.tokens, self.every = layers, tokens, every
        self.fade, self.sharpness = np.float32(fade), np.float32(sharpness)
        self.by_expert = np.zeros((layers, experts, tokens), dtype=np.uint8)
        self.by_token = np.zeros((layers, tokens, experts), dtype=np.uint8)
        self.alike = np.full(tokens, -np.inf, dtype=np.float32)
        self.here, self.now, self.seen, self.margin = layers, tokens - 1, 0, 2.0
        self._found: tuple[Ids, Ids, NDArray[np.float32], float] | None = None

    def begin(self) -> None:
        """As `Predictor`."""

    def observe(self, layer: int, experts: Ids) -> None:
        """As `Predictor`."""
        if layer <= self.here:
            self._next_token()
        self.by_token[layer, self.now, experts] = 1
        self.here = layer
        if layer % self.every:
            return
        self.alike *= self.fade
        if len(experts):
            kind = np.uint8 if len(experts) < 256 else np.uint16
            self.alike += np.add.reduce(self.by_expert[layer].take(experts, 0), 0, kind) * np.float32(1 / len(experts))
        self.alike[self.now] = -np.inf  # not like itself
        self._found = None

    def _next_token(self) -> None:
        self.by_expert[:, :, self.now] = self.by_token[:, self.now]
        self.now = (self.now + 1) % self.tokens
        self.by_token[:, self.now] = 0
        self.alike = np.roll(self.alike, 1)  # who was like the last token has a successor that may be like this one
        self.seen += 1
        if self.seen <= self.tokens:
            self.alike[0] = 0  # the first token follows none

    def scores(self, ahead: int) -> Scores:
        """As `Predictor`."""
        return self.evidence(ahead)[0]

    def evidence(self, ahead: int) -> tuple[Scores, float]:
        """The scores, and how much of 1 is left to what was known without."""
        if self._found is None:
            self._found = self._nearest()
        places, successors, weights, rest = self._found
        layer = self.here + ahead
        if layer >= self.layers:
            places, layer = successors, layer - self.layers
        found: Scores = weights @ self.by_token[layer].take(places, 0).astype(np.float32)
        return found, rest

    def _nearest(self) -> tuple[Ids, Ids, NDArray[np.float32], float]:
        """Places, the next tokens' places, weights, and what is left: as if one more, as good as the best, knew nothing."""
        best = np.maximum.reduce(self.alike)
        if best == -np.inf:
            nothing = np.zeros(0, dtype=np.int64)
            return nothing, nothing, np.zeros(0, dtype=np.float32), 1.0
        places = (self.alike >= best - self.margin).nonzero()[0][: self.MOST]
        if len(places) > self.MANY:
            self.margin *= 0.9
        elif len(places) < self.FEW:
            self.margin = min(2.0, 1.1 * self.margin)
        weights = np.exp(self.sharpness * (self.alike.take(places) - best))
        rest = 1 / (1 + float(np.add.reduce(weights)))
        weights *= np.float32(rest)
        return places, (places + 1) % self.tokens, weights, rest


class Activation:
    """By the earlier sequence most like this one: counts of uses `[layers, E]` a sequence, compared by cosine.

    Of at most `sequences` kept the one most like the newest gives way to it. Before there is any, by this sequence's counts.
    """

    name = "activation"

    def __init__(self, layers: int, experts: int, sequences: int = 64) -> None:
        self.layers, self.experts, self.here = layers, experts, 0
        self.kept = np.zeros((layers * experts, sequences), dtype=np.float32)  # each of length 1
        self.held = 0
        self.current = np.zeros(layers * experts, dtype=np.float32)
        self.alike = np.zeros(sequences, dtype=np.float32)  # inner products with the present sequence

    def begin(self) -> None:
        """As `Predictor`: the sequence so far is kept."""
        if self.current.any():
            full = self.held == self.kept.shape[1]
            place = int(self.alike.argmax()) if full else self.held
            self.kept[:, place] = self.current / np.linalg.norm(self.current)
            self.held = min(self.held + 1, self.kept.shape[1])
        self.current[:] = 0
        self.alike[:] = 0

    def observe(self, layer: int, experts: Ids) -> None:
        """As `Predictor`."""
        at = layer * self.experts + experts
        self.here = layer
        self.current[at] += 1
        self.alike += self.kept[at].sum(0)

    def scores(self, ahead: int) -> Scores:
        """As `Predictor`."""
        layer = (self.here + ahead) % self.layers
        rows = slice(layer * self.experts, (layer + 1) * self.experts)
        return self.kept[rows, int(self.alike.argmax())] if self.held else self.current[rows]


PREDICTORS: dict[str, Callable[[int, int], Predictor]] = {
    "popularity": Popularity,
    "transition": Transition,
    "path": Path,
    "activation": Activation,
}
