"""What each process of `coterie bench cluster` runs, in a network namespace: holds every side, measures when told to.

python -m coterie.launch.cluster_worker, with torchrun's environment. Commands are lines of JSON on standard input, the same
for every rank; rank 0 answers each with a line on standard output:
{"do": "load", "case": FOLDER, "model": MODEL, "sides": [...]}  loads all sides of a case, those of the last one are dropped
{"do": "cell", "prefill": L, "decode": N, "repeats": R}         measures all sides, taking turns
{"do": "transfer", "bytes": B}                                  what the links really carry
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from coterie.launch.cluster_sides import Loaded, Logits, Side, load_side
from coterie.launch.distributed import job, leave
from coterie.launch.netns import SENT
from coterie.launch.quiet import quiet_transformers
from coterie.launch.replay import Replay
from coterie.moe.collectives import Group
from coterie.routing.errors import InputError
from coterie.routing.record import expert_modules

WARM_UP = (2, 1)  # positions of prefill and decode steps that each side runs first, without counting


@dataclass(frozen=True)
class Turn:
    """One side's run of one cell on this rank. bytes: sent by this node, told by its first rank only, else 0.

    first, last: logits after the prompts and after the last step, by sequence. communication: seconds in the layers'
    collectives, 0 where that is not known. strategy, predicted, promised: as `Loaded` had them.
    """

    prefill_seconds: float
    decode_seconds: float
    prefill_bytes: int
    decode_bytes: int
    first: Logits
    last: Logits
    prefill_communication: float
    decode_communication: float
    decode_steps: int
    strategy: str | None
    predicted: dict[str, float]
    promised: dict[str, float]


class Worker:
    """This rank's sides and what they run on. token_ids: int64 `[sequences, positions]`."""

    def __init__(self, group: Group, local_rank: int) -> None:
        self.group = group
        self.counts_bytes = local_rank == 0
        self.sides: list[Side] = []
        self.loaded: dict[str, Loaded] = {}
        self.skipped: dict[str, str] = {}

    def load(self, case: str, model: str, sides: list[dict[str, Any]]) -> dict[str, Any]:
        """Which sides cannot be had, and why."""
        tensors = load_file(Path(case) / "case.safetensors")
        self.model, self.token_ids = model, tensors["token_ids"]
        self.replay = Replay(tensors.get("expert_ids"), self.token_ids)
        self.sides = [Side(**{**side, "homes": tuple(side["homes"])}) for side in sides]
        self.loaded, self.skipped = {}, {}
        for side in self.sides:
            self._load(side)
        return {"skipped": self.skipped}

    def _load(self, side: Side) -> None:
        try:
            self.loaded[side.name] = load_side(side, self.model, self.replay, self.group)
        except InputError as error:  # the same on every rank: what is asked for is
            self.skipped[side.name] = str(error)

    def cell(self, prefill: int, decode: int, repeats: int) -> dict[str, Any]:
        """Seconds and bytes by side, one entry per repeat, and how far the logits are from the first side's.

        Every turn is a job of its own: what is left to be chosen is chosen right before it.
        """
        sides = [side for side in self.sides if side.name in self.loaded]
        turns: dict[str, list[Turn]] = {side.name: [] for side in sides}
        for side in sides:
            self._choose(side, prefill, decode)
            self._turn(side, *WARM_UP)
        for repeat in range(repeats):
            for side in sides[repeat % len(sides) :] + sides[: repeat % len(sides)]:
                if not side.once:
                    self._choose(side, prefill, decode)
                turns[side.name].append(self._turn(side, prefill, decode))
        found: dict[str, dict[str, Any]] = {name: self._summary(those) for name, those in turns.items()}
        logits = {side.name: self._gathered(turns[side.name][-1]) for side in sides}
        first = logits[sides[0].name]
        for name, values in logits.items():
            found[name]["difference"] = float((values - first).abs().max() / first.abs().max())
            for told in ("strategy", "predicted", "promised"):
                found[name][told] = [getattr(turn, told) for turn in turns[name]]
            found[name]["communication"] = self._communication(self.loaded[name], turns[name])
        return {"sides": found, "skipped": self.skipped}

    def _choose(self, side: Side, prefill: int, decode: int) -> None:
        self.loaded[side.name].choose(side.homes, self.token_ids[:, : prefill + decode], prefill)

    @torch.inference_mode()
    def _turn(self, side: Side, prefill: int, decode: int) -> Turn:
        loaded = self.loaded[side.name]
        loaded.start(side.homes, self.token_ids[:, : prefill + decode], prefill)
        before = loaded.communication()
        with self._measured() as prefilling:
            first = last = loaded.prefill()
        between = loaded.communication()
        with self._measured() as decoding:
            for position in range(prefill, prefill + decode):
                last = loaded.decode(position)
        spent = between - before, loaded.communication() - between
        return Turn(prefilling.seconds, decoding.seconds, prefilling.bytes, decoding.bytes, first, last, *spent, decode,
                    loaded.strategy, loaded.predicted, loaded.promised)  # fmt: skip

    def _measured(self) -> _Measured:
        return _Measured(self.counts_bytes)

    def _summary(self, turns: list[Turn]) -> dict[str, Any]:
        """Over ranks: the slowest one's seconds, the sum of the nodes' bytes."""
        mine = torch.tensor(
            [[t.prefill_seconds, t.decode_seconds, t.prefill_bytes, t.decode_bytes] for t in turns], dtype=torch.float64
        )
        every = torch.stack(self.group.gather(mine))
        seconds, sent = every[:, :, :2].amax(0), every[:, :, 2:].sum(0)
        return {
            "prefill_seconds": seconds[:, 0].tolist(), "decode_seconds": seconds[:, 1].tolist(),
            "prefill_bytes": sent[:, 0].tolist(), "decode_bytes": sent[:, 1].tolist(),
        }  # fmt: skip

    def _gathered(self, turn: Turn) -> torch.Tensor:
        """All ranks' logits `[sequences, 2, vocabulary]`, of the prompts' last position and of the last step."""
        both: list[dict[int, torch.Tensor]] = [{}, {}]
        for said in self.group.gather((turn.first, turn.last)):
            for known, more in zip(both, said, strict=True):
                known.update(more)
        return torch.stack([torch.stack([known[s] for known in both]) for s in sorted(both[0])])

    def _communication(self, loaded: Loaded, turns: list[Turn]) -> dict[str, list[float]]:
        """Seconds in collectives per layer with experts and call, by phase and turn; of the rank that waits least."""
        layers = max(1, len(expert_modules(loaded.model)))  # a peer may have put its own in their place
        calls = max(1, turns[0].decode_steps) * layers
        mine = {"prefill": [t.prefill_communication / layers for t in turns],
                "decode": [t.decode_communication / calls for t in turns]}  # fmt: skip
        said = self.group.gather(mine)
        return {phase: [min(values) for values in zip(*(theirs[phase] for theirs in said), strict=True)] for phase in mine}

    def transfer(self, bytes: int) -> dict[str, Any]:
        """Bits per second that rank 0 gets through to the last rank, which is on another node."""
        message, last = torch.zeros(bytes, dtype=torch.uint8), self.group.size - 1
        for _ in range(2):  # the first one opens the connection
            dist.barrier()
            started = time.perf_counter()
            if self.group.rank == 0:
                dist.send(message, last)
            elif self.group.rank == last:
                dist.recv(message, 0)
            seconds = max(self.group.gather(time.perf_counter() - started if self.group.rank == last else 0.0))
        return {"bits_per_second": bytes * 8 / seconds}


class _Measured:
    """Seconds and bytes sent by this node between two points where all ranks meet."""

    def __init__(self, counts_bytes: bool) -> None:
        self.file = Path(SENT) if counts_bytes else None
        self.seconds, self.bytes = 0.0, 0

    def _sent(self) -> int:
        return int(self.file.read_text()) if self.file else 0

    def __enter__(self) -> _Measured:
        dist.barrier()
        self.before = self._sent()
        dist.barrier()
        self.started = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self.started
        dist.barrier()
        self.bytes = self._sent() - self.before


def commands() -> Iterator[dict[str, Any]]:
    """Those on standard input, to its end."""
    for line in sys.stdin:
        yield json.loads(line)


def main() -> None:
    """Answer commands until standard input ends."""
    torch.set_num_threads(1)
    quiet_transformers()
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    with job(transport="gloo"):  # the peers run on torch.distributed
        group = Group.current(int(os.environ["LOCAL_WORLD_SIZE"]))
        worker = Worker(group, int(os.environ["LOCAL_RANK"]))
        for command in commands():
            answer = getattr(worker, command.pop("do"))(**command)
            if group.rank == 0:
                print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
    leave(0)
