"""A token's whole path through the experts, foretold before its first layer from what is read: the token and those before it.

After ExpertFlow (He et al. 2024), whose encoder is trained beforehand on a token's embedding. Here nothing is: the paths that
the last tokens took are kept, and looked up by their last one, two and three token ids, the longest match counting most, as in
text compression by partial matching (Cleary and Witten 1984). A ridge regression on embeddings, learned online, knew less and
cost more (docs/offload.md). Of a token that was not seen those with the nearest embeddings tell, where embeddings are known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from coterie.offload.predictors import Ids, Scores

Context = tuple[int, ...]  # token ids, the token's own first, then the one before it, and so on
ORDER = 3  # token ids that are looked up together, at most
VISITS = 8  # of each context, the last ones
TOKENS = 4096  # whose paths are kept
NEAR = 8  # tokens with embeddings alike that stand for one that was not seen
MOST = 4  # tokens of a step, from which on it is not foretold: together they pick nearly everything
CONTEXT_BYTES = 750  # of a token that is kept: its places in the tables, as Python's objects, and its embedding
Embed = Callable[[Sequence[int]], NDArray[np.float32]]  # token ids -> `[tokens, D]`


class WholePath:
    """As `predictors.Predictor`, told by `read` what comes. Memory: TOKENS * (CONTEXT_BYTES + 4 * layers * top_k) bytes.

    embed: the embeddings of tokens, or None.
    """

    name = "token"

    def __init__(self, layers: int, experts: int, tokens: int = TOKENS, embed: Embed | None = None) -> None:
        self.layers, self.experts, self.tokens, self.embed = layers, experts, tokens, embed
        self.unused = np.arange(layers, dtype=np.int32)[:, None] * (experts + 1)  # in the flat table: no expert of the layer
        self.paths = np.zeros((tokens, layers, 0), dtype=np.int32)  # by place in a ring, in the flat table; as wide as needed
        self.uses = np.full((layers, experts + 1), 1 / experts, dtype=np.float32)
        self.visits: dict[Context, list[int]] = {}  # places of the tokens that were read in a context
        self.contexts: list[Context] = [()] * tokens  # by place
        self.vectors: NDArray[np.float32] | None = None  # by place, embeddings of length 1
        self.next, self.here = 0, layers
        self.now: Ids = np.zeros(0, dtype=np.int64)  # places of the step's tokens
        self.picked: dict[int, NDArray[np.integer]] = {}  # by layer, of the step: put away when the next one is read
        self.foretold: NDArray[np.float64] | None = None  # of the step, `[layers, E]`

    def begin(self) -> None:
        """As `Predictor`."""

    def read(self, step: Sequence[Context]) -> None:
        """The tokens of the next step, before its first layer; none where they are not known."""
        self._put_away()
        self.foretold = sum(map(self._foretell, step)) if 0 < len(step) <= MOST else None  # type: ignore[assignment]
        step = step[-self.tokens :]
        self.now = (self.next + np.arange(len(step))) % self.tokens
        self.next = (self.next + len(step)) % self.tokens
        self.here = -1
        self.paths[self.now] = self.unused
        if self.embed is not None and step:
            self._keep_vectors(self.embed([context[0] for context in step]))
        for place, context in zip(self.now.tolist(), step, strict=True):
            self._register(place, context[:ORDER])

    def _register(self, place: int, context: Context) -> None:
        """Let a place be found by the ends of a context, and not any more by those of what was there before."""
        old = self.contexts[place]
        for length in range(1, len(old) + 1):
            found = self.visits[old[:length]]
            if found[0] == place:  # else it has been pushed out by later visits
                del found[0]
            if not found:
                del self.visits[old[:length]]
        self.contexts[place] = context
        for length in range(1, len(context) + 1):
            found = self.visits.setdefault(context[:length], [])
            found.append(place)
            del found[:-VISITS]

    def observe(self, layer: int, experts: Ids) -> None:
        """As `Predictor`; of a step of one token, or of a token that nobody told of."""
        if self._goes_on(layer) and len(self.now) == 1:
            self.picked[layer] = experts[None]

    def observe_each(self, layer: int, experts: NDArray[np.integer]) -> None:
        """What each token of the step picked, `[tokens, top_k]`, -1 where a slot is empty."""
        if self._goes_on(layer) and len(self.now) == len(experts[-self.tokens :]):
            self.picked[layer] = experts[-self.tokens :]

    def _goes_on(self, layer: int) -> bool:
        """Whether it is a step of the tokens at hand; one that nobody told of is none."""
        if layer <= self.here:
            self._put_away()
            self.now, self.foretold = self.now[:0], None
        self.here = layer
        return len(self.now) > 0

    def _put_away(self) -> None:
        """Write down the paths of the step, all layers at once: what a call costs counts here."""
        for width in {experts.shape[1] for experts in self.picked.values()}:
            layers = np.array([layer for layer, experts in self.picked.items() if experts.shape[1] == width])
            if width > self.paths.shape[2]:
                more = np.broadcast_to(self.unused, (self.tokens, self.layers, width - self.paths.shape[2]))
                self.paths = np.concatenate([self.paths, more], 2)
            picked = np.stack([self.picked[layer] for layer in layers.tolist()], 1)  # [tokens, layers, width]
            at = layers[:, None] * (self.experts + 1) + 1 + picked
            self.paths[self.now[:, None], layers, :width] = at
            np.add.at(self.uses.reshape(-1), at.reshape(-1), np.float32(1))
        self.picked = {}

    def scores(self, ahead: int) -> Scores:
        """As `Predictor`, within the token that was read; zeros beyond it."""
        layer = self.here + ahead
        if self.foretold is None or layer >= self.layers:
            return np.zeros(self.experts)
        found: Scores = self.foretold[layer]
        return found

    def _foretell(self, context: Context) -> NDArray[np.float64]:
        """`[layers, E]`: the mean path of each context's visits, each one more visit short of the mean of the shorter one's."""
        places: list[int] = []
        weights: list[float] = []
        rest = 1.0
        for length in range(min(len(context), ORDER), 0, -1):
            found = self.visits.get(context[:length], ())
            places += found
            weights += [rest / (len(found) + 1)] * len(found)
            rest /= len(found) + 1
        if not places and self.vectors is not None and self.embed is not None:
            places, weights, rest = self._nearest(self.embed(context[:1])[0])
        made: NDArray[np.float64] = rest * self.paths.shape[2] * self.uses[:, 1:] / self.uses[:, 1:].sum(1, keepdims=True)
        if places:
            at, size = self.paths[places], self.layers * (self.experts + 1)
            each = np.repeat(weights, at[0].size)
            made += np.bincount(at.reshape(-1), each, size).reshape(self.layers, -1)[:, 1:]
        return made

    def _keep_vectors(self, vectors: NDArray[np.float32]) -> None:
        if self.vectors is None:
            self.vectors = np.zeros((self.tokens, vectors.shape[1]), dtype=np.float32)
        self.vectors[self.now] = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-20)

    def _nearest(self, vector: NDArray[np.float32]) -> tuple[list[int], list[float], float]:
        """Places of the tokens with the most alike embeddings, weights, and what is left to what is usual: a half."""
        assert self.vectors is not None
        alike = self.vectors @ vector
        near = np.argpartition(-alike, min(NEAR, self.tokens - 1))[:NEAR]
        near = near[alike[near] > 0]
        weights = alike[near] / max(float(alike[near].sum()), 1e-20) / 2
        return near.tolist(), weights.tolist(), 0.5 if len(near) else 1.0
