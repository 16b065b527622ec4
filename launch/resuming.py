"""What `--out` and `--resume` find on disk: nothing, a journal that a stopped run left, or the complete output."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from coterie.launch.commands import say
from coterie.moe.journal import REMOVE, Journal, check_header, digest, journal_of
from coterie.routing.errors import InputError
from coterie.routing.files import sha256

if TYPE_CHECKING:
    from coterie.launch.generating import Asked


class Resuming:
    """On rank 0. path: of the journal, None without `--out`; header: what of it is known before the weights are."""

    def __init__(self, options: argparse.Namespace, asked: Asked) -> None:
        self.options = options
        self.asked = asked
        self.path = None if options.out is None else journal_of(options.out)
        self.header = _header(asked, options.max_new_tokens)

    def complete(self) -> bool:
        """Whether there is nothing left to do. Raises InputError if what is there belongs to something else."""
        if self.path is None:
            return False
        if self.path.exists():
            if not self.options.resume:
                raise InputError(
                    f"{self.path}: a stopped run left it, expected none; --resume continues that run, "
                    f"removing the file starts over"
                )
            check_header(self.path, self.header)
            return False
        if not self.options.resume:
            return False
        if not self.options.out.exists():
            say(f"{self.options.out}: nothing to resume yet: begins")
            return False
        self._check_output()
        say(f"{self.options.out}: complete, nothing to do")
        return True

    def open(self, weights: str) -> Journal | None:
        """The journal to go on with. weights: `offline.fingerprint`."""
        if self.path is None:
            return None
        header = {**self.header, "weights": weights}
        if not (self.options.resume and self.path.exists()):
            return Journal.begin(self.path, header)
        journal = Journal.resume(self.path, header, len(self.asked.requests))
        for index in journal.finished:
            entry = journal.entry(index)
            if not self._possible(list(entry.token_ids), index, entry.finish_reason):
                journal.close()
                found = f"{len(entry.token_ids)} tokens that cannot be those of prompt {index} (counted from 0)"
                raise InputError(f"{self.path}: found {found}, expected what a run has written; {REMOVE}")
        torn = f", {journal.dropped} bytes of a line that the stop cut short dropped" if journal.dropped else ""
        say(f"{self.path}: {len(journal.finished)} of {len(self.asked.requests)} prompts are finished{torn}")
        return journal

    def outputs(self, ranks: int) -> dict[str, Any]:
        """What `--json` prints of a complete output that was there already: nothing was run."""
        stats = dict.fromkeys(("tokens_per_second", "strategy", "hit_rate", "peak_memory_bytes"))
        done = {"prompt_tokens": 0, "new_tokens": 0, "seconds": 0.0, "ranks": ranks, "bytes_read": 0, "rows_sent": 0}
        return {"outputs": list(self._rows()) if self.options.json else [], "stats": {**done, **stats}}

    def _rows(self) -> Iterator[Any]:
        out = self.options.out
        try:
            with out.open(encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    try:
                        yield json.loads(line)
                    except (ValueError, RecursionError) as error:
                        raise InputError(f"{out}: line {number}: is not JSON; {REPLACE}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{out}: cannot be read: {error}") from error

    def _check_output(self) -> None:
        """Every line must be what its prompt's own tokens would be written as; how they were sampled it does not say."""
        out, count = self.options.out, 0
        for count, row in enumerate(self._rows(), 1):
            if count > len(self.asked.requests) or not self._fits(row, count - 1):
                raise InputError(f"{out}: line {count}: is no output of prompt {count} with these settings; {REPLACE}")
        if count < len(self.asked.requests):
            raise InputError(f"{out}: found {count} outputs, expected {len(self.asked.requests)}, one a prompt; {REPLACE}")

    def _fits(self, row: Any, index: int) -> bool:
        ids = row.get("token_ids") if isinstance(row, dict) else None
        reason = row.get("finish_reason") if isinstance(row, dict) else None
        return self._possible(ids, index, reason) and bool(row == self.asked.row(index, tuple(ids or ()), str(reason)))

    def _possible(self, ids: Any, index: int, reason: Any) -> bool:
        """Whether these can be the new tokens of a finished prompt."""
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < self.asked.text.vocabulary for i in ids):
            return False
        limit = self.asked.requests[index].max_new_tokens
        return (reason == "length" and len(ids) == limit) or (reason == "stop" and 0 < len(ids) <= limit)


REPLACE = "give another --out, or leave --resume out to replace it"


def _header(asked: Asked, max_new_tokens: int) -> dict[str, Any]:
    """All that decides the text: a journal of other settings is not continued."""
    folder, shape, sampling = asked.share.shape.folder, asked.share.shape, asked.sampling
    generation = folder / "generation_config.json"
    return {
        "model": shape.name,
        "config": sha256(folder / "config.json"),
        "generation_config": sha256(generation) if generation.is_file() else None,
        "dtype": str(asked.share.dtype).removeprefix("torch."),
        "max_new_tokens": max_new_tokens,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        "batch_invariant": asked.batch_invariant,
        "quantise": asked.share.quantise,
        "prompt_count": len(asked.prompts),
        "prompts": digest(asked.prompts, asked.requests),
    }
