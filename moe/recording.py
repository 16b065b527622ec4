"""Recording routing while a model runs, on one rank or several: each runs its share of the prompts, rank 0 writes the trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coterie.moe.batch import Request
from coterie.moe.choose import Choice
from coterie.moe.generate import Sampling
from coterie.routing.errors import CoterieError, InputError
from coterie.routing.files import check_writable
from coterie.routing.record import Recorder, Rows, TraceWriter
from coterie.routing.trace import check_scenario

if TYPE_CHECKING:
    from coterie.moe.collectives import Group
    from coterie.moe.model import Model


def recorded_phase(phase: str | None, max_new_tokens: int, max_tokens: int | None, scenario: str) -> str:
    """The phase that `Model.record` records, by default whatever is run. Raises InputError for what it would refuse."""
    if max_new_tokens < 0 or max_new_tokens == 1:
        raise InputError(f"--max-new-tokens: found {max_new_tokens}, expected 0 or 2 and more: the last token is not routed")
    phase = phase or ("mixed" if max_new_tokens else "prefill")
    if phase in ("decode", "mixed") and max_new_tokens < 2:
        raise InputError(f"--phase: found {phase!r} with {max_new_tokens} new tokens, expected --max-new-tokens of 2 or more")
    if phase == "prefill" and max_new_tokens:
        raise InputError(f"--phase: found 'prefill' with {max_new_tokens} new tokens, expected --max-new-tokens 0, or mixed")
    if max_tokens is not None and max_tokens < 1:
        raise InputError(f"--max-tokens: found {max_tokens}, expected 1 or more")
    check_scenario(scenario)
    return phase


def record(
    model: Model, requests: Sequence[Request], out: Path, metadata: dict[str, str], max_tokens: int | None, batch_size: int,
    on_tokens: Callable[[int], object] | None, token_ids: bool,
) -> int:  # fmt: skip
    """Run the requests, so many at once on every rank, and write the trace `out`; the number of tokens, on all ranks.

    metadata: `routing.record.metadata_for`, whose phase is what is recorded. Tokens are routed where attention runs, so on
    several ranks the strategy is one under which they come back there: `all_to_all`.
    """
    group, shape = model.group, model.shape
    if group.rank == 0:
        model.text.warn_of_length(requests)
    alone = group.size == 1
    trace = _Trace(group, {request.index: len(request.token_ids) for request in requests}, max_tokens)
    trace.open(lambda: TraceWriter(out, metadata, len(shape.layer_ids), shape.top_k, token_ids), out)
    try:
        rows = Rows()
        sink = trace.writer if alone and trace.writer is not None else rows
        recorder = Recorder(model.transformers, sink, shape.num_experts, metadata["phase"], max_tokens if alone else None)
        chosen = model.dispatcher.strategy(None if alone else "all_to_all").name
        choice, told, together = Choice(chosen, chosen, {}, {}), 0, batch_size * group.size
        with recorder.attached():
            for first in range(0, len(requests), together):
                model.run(requests[first : first + together], batch_size, Sampling(), choice, recorder=recorder)
                tokens = trace.add(rows)
                if on_tokens is not None:
                    on_tokens(tokens - told)
                told = tokens
                if max_tokens is not None and tokens >= max_tokens:
                    break
        trace.close(recorder.decoded)
    finally:
        trace.discard()
    return told


class _Trace:
    """The trace that rank 0 writes, and all ranks make: what fails there fails on all of them, so that none waits.

    lengths: of the prompts, by sequence. max_tokens: as many as are wanted, None for all.
    """

    def __init__(self, group: Group, lengths: Mapping[int, int], max_tokens: int | None) -> None:
        self.group, self.lengths, self.max_tokens = group, lengths, max_tokens
        self.writer: TraceWriter | None = None
        self._generated = False  # whether what came from several ranks holds a token that was generated

    def open(self, made: Callable[[], TraceWriter], out: Path) -> None:
        """Begin to write."""

        def work() -> None:
            check_writable(out)
            self.writer = made()

        self._by_first(work)

    def add(self, rows: Rows) -> int:
        """Write what the ranks have recorded since, rank after rank; how many tokens there are then, on all ranks."""
        parts = self.group.gather(rows.taken())
        self._by_first(lambda: self._write(parts))
        tokens: int = self.group.gather(None if self.writer is None else self.writer.tokens)[0]
        return tokens

    def close(self, generated: bool) -> None:
        """It is complete. generated: whether this rank, if it is the only one, recorded a token that was generated."""

        def work() -> None:
            assert self.writer is not None
            if self.writer.metadata["phase"] == "mixed" and not (self._generated if self.group.size > 1 else generated):
                self.writer.metadata["phase"] = "prefill"  # max_tokens was reached before
            self.writer.close()

        self._by_first(work)

    def discard(self) -> None:
        """Leave no pieces."""
        if self.writer is not None:
            self.writer.discard()

    def _write(self, parts: Sequence[tuple[NDArray[Any], ...] | None]) -> None:
        assert self.writer is not None
        for columns in parts:
            if columns is None:
                continue
            left = None if self.max_tokens is None else self.max_tokens - self.writer.tokens
            experts, weights, sequences, places, read = (column[:left] for column in columns)
            self.writer.append(experts, weights, sequences, places, read)
            ends = [self.lengths[sequence] for sequence in sequences.tolist()]
            self._generated |= bool((places >= np.array(ends, dtype=np.int64)).any())

    def _by_first(self, work: Callable[[], None]) -> None:
        failure, own = None, None
        if self.group.rank == 0:
            try:
                work()
            except CoterieError as error:
                failure, own = (type(error), str(error)), error
        if (said := self.group.gather(failure)[0]) is not None:
            raise said[0](said[1]).known(alone=False) from own
