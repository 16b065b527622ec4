"""What is worth reading before it is asked for, decided by how often such guesses were right.

Three guessers are followed: the next layer's router, applied to the present layer's input (Eliseev and Mazur 2023), the
path through the experts so far (`predictors.Path`), and, where it is told what is read, the token with those before it
(`whole_path.WholePath`), which alone knows something before the first layer. Each guess is compared with what the layer then
asks for, whether it was carried out or not. The best one decides, and says of each expert how likely it is: a wrong guess takes
as long to read as a right one saves, and on a disk that is busy it also holds up what is needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from coterie.offload.predictors import Path, Predictor, Scores, likeliest
from coterie.offload.whole_path import WholePath

Guess = tuple[int, int, bool]  # an expert, its grade, whether it was not there

WORTH = 0.5  # the chance from which on reading ahead pays, unless more is known of the disk
MEMORY = 256  # guesses that count
NEARLY, SELDOM = 0.1, 8  # a router that is not nearly as often right as the others is asked in every eighth layer
GRADES, GRADE_MEMORY = 8, 64  # of a guess, by its score or, where it has none, its place; and how many of each count


class Guesser:
    """Follows the steps of one token after another; `guess` in the middle of a step says what the next layer will ask for."""

    def __init__(self, layers: int, experts: int, path: Predictor | None = None) -> None:
        self.layers = layers
        self.path: Predictor = Path(layers, experts) if path is None else path
        self.token = WholePath(layers, experts)  # told by the cache: `read`, `observe_each`
        self.right = {"router": 0.75, "path": 0.5, "token": 0.5}  # share of guesses, as known beforehand
        self.chance = {name: [share] * GRADES for name, share in self.right.items()}  # of experts that were not there, by grade
        self.made: tuple[int, dict[str, list[Guess]]] | None = None
        self.here: int | None = None  # the layer observed last
        self.asked = 0

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        """A step's experts, each once: the last guess is judged by them."""
        if self.made is not None and self.made[0] == layer:
            asked = set(experts)
            for name, guesses in self.made[1].items():
                chance = self.chance[name]
                for one, grade, absent in guesses:
                    self.right[name] += ((one in asked) - self.right[name]) / MEMORY
                    if absent:
                        chance[grade] += ((one in asked) - chance[grade]) / GRADE_MEMORY
        self.made, self.here = None, layer
        self.path.observe(layer, np.asarray(experts, dtype=np.int64))

    def asks(self) -> bool:
        """Whether the router is worth asking: it is nearly as often right as what costs nothing, or it is time to see."""
        self.asked += 1
        others = max(self.right["path"], self.right["token"])
        return self.right["router"] > others - NEARLY or self.asked % SELDOM == 0

    def guess(
        self, layer: int, router: Sequence[int], count: int, ahead: int = 1, worth: float = WORTH,
        absent: NDArray[np.bool_] | None = None,
    ) -> list[int]:  # fmt: skip
        """The experts of `layer`, `ahead` layers on, whose chance to be asked for is `worth` or more, likeliest first.

        router: that layer's own choice, if it was asked; count: how many the others are asked for; absent: of all experts,
        those that would have to be read; None: all. Only those are named.
        """
        known: list[str] = []
        if self.here is not None and (self.here + ahead) % self.layers == layer:  # not after a token that was not finished
            known.append("path")
        if self.token.foretold is not None:
            known.append("token")
        if router:
            known.append("router")
        known.sort(key=self.right.__getitem__, reverse=True)
        guesses: dict[str, list[Guess]] = {}
        for name in known if ahead == 1 else known[:1]:  # of the next layer all are compared with what it then asks for
            if name == "router":
                guesses[name] = _placed(router, absent)
            else:
                guesses[name] = _graded((self.path if name == "path" else self.token).scores(ahead), count, absent)
        if ahead == 1:
            self.made = layer, guesses
        if not known:
            return []
        best = known[0]
        chance = self.chance[best]
        return [one for one, grade, away in guesses[best] if away and chance[grade] >= worth]


def _placed(router: Sequence[int], absent: NDArray[np.bool_] | None) -> list[Guess]:
    """A router's picks, likeliest first, graded by their place."""
    away = [True] * len(router) if absent is None else absent[list(router)].tolist()
    return [(one, min(place, GRADES - 1), gone) for place, (one, gone) in enumerate(zip(router, away, strict=True))]


def _graded(scores: Scores, count: int, absent: NDArray[np.bool_] | None) -> list[Guess]:
    """The likeliest, each with the grade of its score, a share of 1, and whether it is absent."""
    found = likeliest(scores, count)
    grades = np.minimum(scores[found] * GRADES, GRADES - 1).astype(np.int64)
    away = np.ones(len(found), dtype=bool) if absent is None else absent[found]
    return list(zip(found.tolist(), grades.tolist(), away.tolist(), strict=True))
