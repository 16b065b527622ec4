"""What is worth reading before it is asked for, decided by how often such guesses were right.

Three guessers are followed: the next layer's own router, applied to the present layer's input (Eliseev and Mazur 2023), the
path through the experts so far (`predictors.Path`), and, where it is told what is read, the token with those before it
(`whole_path.WholePath`), which alone knows something before the first layer. Each guess is compared with what the layer then
asks for, whether it was carried out or not. The best one decides, and says of each expert how likely it is: on a disk that is
busy a wrong guess takes as long to read as a right one saves, on one that is idle next to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from coterie.offload.predictors import Path, Predictor, Scores, likeliest
from coterie.offload.whole_path import WholePath

WORTH = 0.5  # the chance from which on reading ahead pays, unless more is known of the disk
MEMORY = 256  # guesses that count


class Guesser:
    """Follows the steps of one token after another; `guess` in the middle of a step says what the next layer will ask for."""

    def __init__(self, layers: int, experts: int, path: Predictor | None = None) -> None:
        self.layers = layers
        self.path: Predictor = Path(layers, experts) if path is None else path
        self.token = WholePath(layers, experts)  # told by the cache: `read`, `observe_each`
        self.right = {"router": 0.75, "path": 0.5, "token": 0.5}  # share of guesses, as known beforehand
        self.made: tuple[int, dict[str, Sequence[int]]] | None = None
        self.here: int | None = None  # the layer observed last

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        """A step's experts, each once: the last guess is judged by them."""
        if self.made is not None and self.made[0] == layer:
            asked = set(experts)
            for name, guess in self.made[1].items():
                for one in guess:
                    self.right[name] += ((one in asked) - self.right[name]) / MEMORY
        self.made, self.here = None, layer
        self.path.observe(layer, np.asarray(experts, dtype=np.int64))

    def guess(self, layer: int, router: Sequence[int], count: int, ahead: int = 1, worth: float = WORTH) -> Sequence[int]:
        """The experts of `layer`, `ahead` layers on, whose chance is `worth` or more, likeliest first.

        router: that layer's own choice, if it was asked; count: how many the path is asked for.
        """
        guesses: dict[str, Sequence[int]] = {}
        scores: dict[str, Scores] = {}
        if self.here is not None and (self.here + ahead) % self.layers == layer:  # not after a token that was not finished
            scores["path"] = self.path.scores(ahead)
        if self.token.foretold is not None:
            scores["token"] = self.token.scores(ahead)
        for name, each in scores.items():
            guesses[name] = likeliest(each, count).tolist()
        if router:
            guesses["router"] = router
        if ahead == 1:
            self.made = layer, guesses
        best = max(guesses, key=self.right.__getitem__, default=None)
        if best is None:
            return ()
        if best == "router":  # it does not say of which of its guesses it is sure
            return router if self.right[best] >= worth else ()
        return [one for one in guesses[best] if scores[best][one] >= worth]
