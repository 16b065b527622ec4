"""The sequences that one rank is generating, and their keys and values: continuous batching.

Rows are left-padded to the longest. Newcomers are prefilled by themselves and then join; finished sequences leave, and
padding that no row needs any more goes with them. Models with state other than keys and values (Mamba, convolutions) run a
batch to its end before the next begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from coterie.moe.invariant import full_blocks
from coterie.moe.kv import GrowingCache
from coterie.moe.layer import StepContext
from coterie.moe.strategy import Strategy
from coterie.offload.whole_path import ORDER
from coterie.routing.record import Recorder

ATTENTION = {"attention", "full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True)
class Request:
    """One prompt. index: its place among all prompts, which is also its sequence id; token_ids: at least one."""

    index: int
    token_ids: tuple[int, ...]
    max_new_tokens: int


@dataclass
class Running:
    """A request being generated. finish_reason: `stop` (end token) or `length`, None while running.

    home: the rank that reports it. reported: whether its end has been told to whoever asked.
    """

    request: Request
    home: int = 0
    new_tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    reported: bool = False


class Agreement(NamedTuple):
    """What ranks know of each other before a step, by rank: newcomers each has room for, sequences it runs, what it tells."""

    rooms: tuple[int, ...]
    running: tuple[int, ...]
    words: tuple[int, ...]


Scored = list[tuple[Running, torch.Tensor]]  # sequences with the logits `[vocabulary]` of their next token


def keeps_only_attention(config: Any) -> bool:
    """Whether a model's whole state is keys and values."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ()
    return set(kinds) <= ATTENTION


class Batch:
    """This rank's running sequences. Every rank calls `prefill` and `decode` together, whether or not it has any."""

    def __init__(
        self, model: Any, context: StepContext, recorder: Recorder | None = None, prefill: Strategy | None = None,
        decode: Strategy | None = None,
    ) -> None:  # fmt: skip
        self.model = model
        self.context = context
        self.prefill_by = prefill or context.strategy
        self.decode_by = decode or self.prefill_by
        self.group = self.prefill_by.group
        self.recorder = recorder
        self.device = next(model.parameters()).device
        self.joinable = keeps_only_attention(model.config)
        self.decodes = True  # or else keys and values of prompts are handed over, and no more room is kept
        self.sequences: list[Running] = []
        self.mask = torch.zeros((0, 0), dtype=torch.int64, device=self.device)
        self.cache: Any = None

    def room(self, size: int) -> int:
        """How many newcomers may be prefilled now, of `size` at most that run together."""
        return size - len(self.sequences) if self.joinable or not self.sequences else 0

    @property
    def running(self) -> int:
        """Sequences that `decode` will extend."""
        return sum(s.finish_reason is None for s in self.sequences)

    def prefill(self, assigned: Sequence[Sequence[Running]]) -> Scored:
        """Run the newcomers' prompts and take them into the batch. assigned: the newcomers of every rank."""
        newcomers, tokens = self._mine(assigned)
        self.context.strategy = self.prefill_by
        ids, mask = padded([s.request.token_ids for s in newcomers], self.device)
        live = torch.full((len(ids),), bool(newcomers), device=self.device)
        more = [max(0, s.request.max_new_tokens - 1) if self.decodes else 0 for s in newcomers]
        most = max((len(s.request.token_ids) + n for s, n in zip(newcomers, more, strict=True)), default=1)
        cache = GrowingCache(most) if self.joinable else None
        logits, cache = self._forward(ids, mask, cache, live, tokens, newcomers)
        if newcomers:
            self.mask, self.cache = joined(self.mask, self.cache, mask, cache) if self.sequences else (mask, cache)
            self.sequences += newcomers
        return list(zip(newcomers, logits, strict=False))

    def _mine(self, assigned: Sequence[Sequence[Running]]) -> tuple[Sequence[Running], tuple[int, ...]]:
        """(this rank's newcomers, prompt tokens of every rank)."""
        return assigned[self.group.rank], tuple(sum(len(s.request.token_ids) for s in taken) for taken in assigned)

    def decode(self, tokens: tuple[int, ...]) -> Scored:
        """One more token of every running sequence. tokens: running sequences of every rank."""
        self.context.strategy = self.decode_by
        last = [[s.new_tokens[-1] if s.new_tokens else 0] for s in self.sequences]
        live = torch.tensor([s.finish_reason is None for s in self.sequences] or [False], device=self.device)
        if last:
            ids = torch.tensor(last, device=self.device)
            self.mask = F.pad(self.mask, (0, 1), value=1)
            logits, self.cache = self._forward(ids, self.mask, self.cache, live, tokens, self.sequences)
        else:
            logits, _ = self._forward(*padded([], self.device), None, live, tokens, [])
        return [(s, row) for s, row in zip(self.sequences, logits, strict=False) if s.finish_reason is None]

    def settle(self, chosen: list[tuple[Running, int]], word: int) -> list[tuple[Running, int]]:
        """The tokens by which this rank's sequences grow, from those that it chose: the same ones. word: see `agree`."""
        return chosen

    def agree(self, size: int, word: int) -> Agreement:
        """How every rank stands before a step, of `size` sequences at most; word: what this rank tells the others."""
        return Agreement(*zip(*self.group.agree([self.room(size), self.running, word]), strict=True))

    def drop_finished(self) -> None:
        """Forget finished sequences; where they cannot leave alone, when all are finished."""
        kept = [row for row, s in enumerate(self.sequences) if s.finish_reason is None]
        if len(kept) == len(self.sequences) or (kept and not self.joinable):
            return
        self.sequences = [self.sequences[row] for row in kept]
        if kept:
            self.mask, self.cache = selected(self.mask, self.cache, torch.tensor(kept, device=self.device))
        else:
            self.mask, self.cache = self.mask[:0, :0], None

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor, cache: Any, live: torch.Tensor, tokens: tuple[int, ...],
        sequences: Sequence[Running],
    ) -> tuple[torch.Tensor, Any]:  # fmt: skip
        """Logits `[rows, vocabulary]` of each row's last position, and the cache with this step in it."""
        length = ids.shape[1]
        runs = (live[:, None] & mask[:, -length:].bool()).reshape(-1)
        self.context.live = None if bool(runs.all()) else runs.nonzero()[:, 0]  # once a step: a GPU is waited for
        self.context.tokens = tokens
        if self.recorder is not None:
            self.recorder.sequences, self.recorder.live = [s.request.index for s in sequences] or [0], live
        if self.context.told is not None:
            self.context.told(contexts(sequences, live.tolist(), mask[:, -length:].sum(1).tolist()))
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -length:]
        with full_blocks((mask == 0).sum(1).tolist()) if self.context.least_rows > 1 else nullcontext():
            out = self.model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
                logits_to_keep=1,
            )  # fmt: skip
        return out.logits[:, -1].float(), out.past_key_values


class SharedBatch(Batch):
    """The same sequences on every rank: all take the tokens that rank 0 chose, so that they cannot drift apart."""

    def _mine(self, assigned: Sequence[Sequence[Running]]) -> tuple[Sequence[Running], tuple[int, ...]]:
        return assigned[0], (sum(len(s.request.token_ids) for s in assigned[0]),) * self.group.size

    def settle(self, chosen: list[tuple[Running, int]], word: int) -> list[tuple[Running, int]]:
        """As rank 0 chose."""
        said = self.group.agree([token for _, token in chosen])[0] if chosen else ()
        return [(sequence, token) for (sequence, _), token in zip(chosen, said, strict=True)]


def contexts(sequences: Sequence[Running], live: Sequence[bool], counts: Sequence[int]) -> list[tuple[int, ...]]:
    """Of the last `counts` tokens of each live sequence, in order: the token's id and those before it, the newest first."""
    found: list[tuple[int, ...]] = []
    for sequence, runs, count in zip(sequences, live, counts, strict=False):
        if runs:
            tokens = (*sequence.request.token_ids, *sequence.new_tokens)
            ends = range(len(tokens) - count + 1, len(tokens) + 1)
            found += [tokens[max(0, end - ORDER) : end][::-1] for end in ends]
    return found


def padded(prompts: list[tuple[int, ...]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded ids and mask, int64 `[rows, longest]`; a rank without prompts gets one token, which is not live."""
    if not prompts:
        return torch.zeros((1, 1), dtype=torch.int64, device=device), torch.ones((1, 1), dtype=torch.int64, device=device)
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(p)) + list(p) for p in prompts]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def joined(mask: torch.Tensor, cache: Any, new_mask: torch.Tensor, new_cache: Any) -> tuple[torch.Tensor, Any]:
    """Two left-padded batches as one, with the first one's rows first. Empties both caches, layer by layer."""
    longest = max(mask.shape[1], new_mask.shape[1])
    whole = torch.cat([F.pad(m, (longest - m.shape[1], 0)) for m in (mask, new_mask)])
    made = GrowingCache(max(cache.most, new_cache.most))
    for index, (old, new) in enumerate(zip(cache.layers, new_cache.layers, strict=True)):
        both = [[F.pad(t, (0, 0, longest - t.shape[2], 0)) for t in (la.keys, la.values)] for la in (old, new)]
        old.reset()
        new.reset()
        made.update(torch.cat([both[0][0], both[1][0]]), torch.cat([both[0][1], both[1][1]]), index)
    return whole, made


def selected(mask: torch.Tensor, cache: Any, rows: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Some rows of a left-padded batch, without the padding that is common to them. Empties the cache, layer by layer."""
    kept = mask[rows]
    first = int(kept.bool().any(0).int().argmax())
    made = GrowingCache(cache.most)
    for index, layer in enumerate(cache.layers):
        keys, values = layer.keys[rows, :, first:], layer.values[rows, :, first:]
        layer.reset()
        made.update(keys, values, index)
    return kept[:, first:], made
