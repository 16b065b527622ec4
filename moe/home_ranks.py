"""Carrying out a plan's homes: by the prompts' token ids, or by which experts their first tokens use, which are run once.

The rule is `placement/homes.py`'s, the one `evaluate` applies to a trace. All ranks run this pass in step, prompts of similar
length beside each other, and rank 0's answer is everybody's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coterie.moe.batch import Request
from coterie.moe.choose import Choice
from coterie.moe.generate import Sampling
from coterie.placement.homes import Homes, placed, shares
from coterie.routing.record import Recorder

if TYPE_CHECKING:
    from coterie.moe.model import Model


@dataclass(frozen=True)
class HomeRanks:
    """ranks: the home of each request, in order. What it took: tokens run by all ranks, rows sent by this one, seconds."""

    ranks: tuple[int, ...]
    tokens: int
    rows: int
    seconds: float


class UseCounter:
    """Takes what a `Recorder` sees and counts the watched experts. counts: int64 `[sequences, watched]`."""

    def __init__(self, experts: Sequence[tuple[int, int]], layer_ids: Sequence[int], sequences: Sequence[int]) -> None:
        self.tokens = 0
        self.sequences = np.sort(np.asarray(sequences, dtype=np.int64))
        self.counts = np.zeros((len(sequences), len(experts)), dtype=np.int64)
        self._layers = np.array([layer_ids.index(layer) for layer, _ in experts], dtype=np.int64)
        self._experts = np.array([expert for _, expert in experts], dtype=np.int64)

    def append(
        self, expert_ids: NDArray[Any], router_weights: NDArray[Any], sequence_ids: NDArray[Any], positions: NDArray[Any],
        token_ids: NDArray[Any],
    ) -> None:  # fmt: skip
        """expert_ids `[tokens, layers, top_k]`, sequence_ids `[tokens]`; the rest does not matter here."""
        used = (expert_ids[:, self._layers] == self._experts[None, :, None]).sum(2)
        np.add.at(self.counts, np.searchsorted(self.sequences, sequence_ids), used)
        self.tokens += len(expert_ids)


def find_home_ranks(
    model: Model, homes: Homes, requests: Sequence[Request], batch_size: int, strategy: str = "all_to_all"
) -> HomeRanks:
    """The home rank of every request under the model's plan. Every rank calls it with the same requests.

    strategy: the name of the one that runs prompts, where any has to be run.
    """
    started, rows = time.perf_counter(), model.group.traffic.rows
    by_index = sorted(requests, key=lambda r: r.index)
    looked = [Request(r.index, r.token_ids[: homes.tokens], 0) for r in by_index]
    used, tokens = _used(model, homes, looked, batch_size, strategy)
    said = None
    if model.group.rank == 0:
        found = placed(homes, used, np.array([_routed_tokens(r) for r in by_index]))
        said = dict(zip((r.index for r in by_index), found.tolist(), strict=True))
    home_of = model.group.gather(said)[0]
    took = (model.group.traffic.rows - rows, time.perf_counter() - started)
    return HomeRanks(tuple(home_of[r.index] for r in requests), tokens, *took)


def _used(model: Model, homes: Homes, looked: list[Request], batch_size: int, strategy: str) -> tuple[NDArray[np.float64], int]:
    """How often looked-at tokens are, or use, what is watched, `[requests, watched]`; and how many were run for it."""
    lengths = np.array([len(r.token_ids) for r in looked])
    if homes.token_ids is not None:
        ids = np.concatenate([np.asarray(r.token_ids, dtype=np.int64) for r in looked])
        return shares(homes.token_ids, ids, np.repeat(np.arange(len(looked)), lengths)), 0
    counter = UseCounter(homes.experts, model.shape.layer_ids, [r.index for r in looked])
    _run(model, looked, batch_size, Choice(strategy, strategy, {}, {}), counter)
    counts = np.sum([_dense(part, counter.counts) for part in model.group.gather(_sparse(counter.counts))], axis=0)
    return counts / lengths[:, None], int(lengths.sum())


def _run(model: Model, looked: list[Request], batch_size: int, choice: Choice, counter: UseCounter) -> None:
    """Prompts of similar length next to each other, dealt out over the ranks."""
    order = sorted(looked, key=lambda r: (len(r.token_ids), r.index))
    dealt = [place % model.group.size for place in range(len(order))]
    recorder = Recorder(model.transformers, counter, model.shape.num_experts, "prefill", None)
    with recorder.attached():
        model.run(order, batch_size, Sampling(), choice, recorder=recorder, homes=dealt)


def _routed_tokens(request: Request) -> int:
    """The most tokens of a request that go through the layers: the last new one does not."""
    return len(request.token_ids) + max(request.max_new_tokens - 1, 0)


def _sparse(counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    rows = np.flatnonzero(counts.any(1))
    return rows, counts[rows].astype(np.int32)


def _dense(part: tuple[NDArray[np.int64], NDArray[np.int32]], like: NDArray[np.int64]) -> NDArray[np.int64]:
    rows, counts = part
    whole = np.zeros_like(like)
    whole[rows] = counts
    return whole
