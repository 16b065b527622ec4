"""Models whose experts come out of a cache, and what they compute."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

from coterie.moe.collectives import Group
from coterie.moe.model import Model, assembled
from coterie.moe.prepare import prepare
from coterie.offload.store import Wanted, start_each
from coterie.offload.transfer import Part, Piece
from coterie.routing.errors import CoterieError

PROMPTS = torch.randint(1, 97, (8, 9), generator=torch.Generator().manual_seed(0))


def model(folder: Path, slots: int | None, dtype: str = "float32") -> Model:
    share = replace(prepare(folder, None, dtype, 1), slots=slots)
    return assembled(share, share.read(0), None, Group())


@torch.no_grad()
def logits(made, steps: int = 4) -> list[torch.Tensor]:
    """Of a prefill of eight sequences and of one, and of the steps after each."""
    found = []
    for ids in (PROMPTS, PROMPTS[:1]):
        out = made.transformers(ids, use_cache=True)
        found.append(out.logits)
        for step in range(steps):
            out = made.transformers(ids[:, step : step + 1], past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits)
    return found


class Ready:
    """A store whose experts are there at once, all zeros; fails while `broken`."""

    def __init__(self, layers: int, experts: int) -> None:
        record = {"w": Part(torch.float32, (1,), (Piece(Path("w"), 0, 4),))}
        self.records, self.broken, self.files = [[record] * experts] * layers, False, SimpleNamespace(block=512)

    def shifts(self, *expert: int) -> tuple[int, ...]:
        return (0,)

    def start(self, *args: object) -> Future[None]:
        if self.broken:
            raise CoterieError("no disk")
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()
        future.set_result(None)
        return future

    def start_many(self, experts: Sequence[Wanted], ahead: bool = False) -> list[Future[None]]:
        return start_each(self.start, experts, ahead)
