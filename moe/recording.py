"""Recording routing while a model runs, on one rank or several: each runs its share of the prompts, rank 0 writes the trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from coterie.moe.batch import Request
from coterie.moe.choose import Choice
from coterie.moe.generate import Sampling
from coterie.routing.errors import InputError
from coterie.routing.files import check_writable
from coterie.routing.record import Recorder, Rows, TraceWriter
from coterie.routing.trace import check_scenario

if TYPE_CHECKING:
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
        check_writable(out)
        model.text.warn_of_length(requests)
    alone = group.size == 1
    with ExitStack() as stack:
        writer = None
        if group.rank == 0:
            writer = TraceWriter(out, metadata, len(shape.layer_ids), shape.top_k, token_ids)
            stack.callback(writer.discard)
        rows = Rows()
        sink = writer if alone and writer is not None else rows
        recorder = Recorder(model.transformers, sink, shape.num_experts, metadata["phase"], max_tokens if alone else None)
        chosen = model.dispatcher.strategy(None if alone else "all_to_all").name
        choice, told, together = Choice(chosen, chosen, {}, {}), 0, batch_size * group.size
        stack.enter_context(recorder.attached())
        for first in range(0, len(requests), together):
            model.run(requests[first : first + together], batch_size, Sampling(), choice, recorder=recorder)
            recorded = group.gather(rows.taken())
            if writer is not None and not alone:
                _write(recorded, writer, max_tokens)
            tokens = group.gather(None if writer is None else writer.tokens)[0]
            if on_tokens is not None:
                on_tokens(tokens - told)
            told = tokens
            if max_tokens is not None and tokens >= max_tokens:
                break
        decoded = any(group.gather(recorder.decoded))
        if writer is not None:
            if writer.metadata["phase"] == "mixed" and not decoded:  # --max-tokens was reached before
                writer.metadata["phase"] = "prefill"
            writer.close()
    return int(told)


def _write(parts: Sequence[tuple[NDArray[Any], ...] | None], writer: TraceWriter, max_tokens: int | None) -> None:
    """What the ranks recorded, rank after rank, as far as it is wanted."""
    for columns in parts:
        if columns is not None:
            left = None if max_tokens is None else max_tokens - writer.tokens
            writer.append(*(column[:left] for column in columns))
