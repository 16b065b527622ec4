"""Generation over data-parallel ranks that stay in step: every rank runs every step, with zero tokens if it has none.

Batches are continuous: a sequence that ends makes room for the next prompt. Each step begins with one small collective in
which the ranks tell how much room they have and how many sequences they run; the rest every rank can work out by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from coterie.moe.batch import Agreement, Request, Running, Scored
from coterie.moe.collectives import Group
from coterie.moe.queue import Queue
from coterie.moe.replanning import Boundary
from coterie.routing.errors import CoterieError, InputError

# Fields of a checkpoint's generation_config.json that are carried out, concern sampling (which the caller sets), or change no
# text. Any other that differs from its default is refused.
KNOWN_SETTINGS = {
    "eos_token_id", "bos_token_id", "pad_token_id", "repetition_penalty", "do_sample", "temperature", "top_k", "top_p", "min_p",
    "max_length", "max_new_tokens", "transformers_version", "use_cache", "return_dict_in_generate", "output_scores",
    "output_logits", "output_attentions", "output_hidden_states", "cache_implementation", "decoder_start_token_id",
    "num_return_sequences", "typical_p", "epsilon_cutoff", "eta_cutoff", "trust_remote_code", "_from_model_config",
}  # fmt: skip


LEAST_TEMPERATURE = 1e-6  # logits that are divided by less leave float32


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0 is greedy; seed and prompt number fix a sequence's draws on any rank."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 32:
            raise InputError(f"--seed: found {self.seed}, expected 0 to {(1 << 32) - 1}")
        if self.temperature != 0 and not LEAST_TEMPERATURE <= self.temperature < float("inf"):
            raise InputError(f"--temperature: found {self.temperature}, expected 0 (greedy), or {LEAST_TEMPERATURE:g} or more")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"--top-k: found {self.top_k}, expected 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"--top-p: found {self.top_p}, expected more than 0 and at most 1")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise InputError("--top-k, --top-p: have no effect on greedy text, expected --temperature above 0 beside them")


ENOUGH, NOTICE = 1, 2  # in a rank's word: wants to end; times its notice
OnToken = Callable[[int, int], None]  # (prompt index, token id), in order within a prompt


class Executor(Protocol):
    """What runs the model for the sequences at hand: `Batch`, or another way with the same methods."""

    sequences: list[Running]

    @property
    def running(self) -> int: ...  # noqa: D102

    def agree(self, size: int, word: int) -> Agreement: ...  # noqa: D102
    def prefill(self, assigned: Sequence[Sequence[Running]]) -> Scored: ...  # noqa: D102
    def decode(self, tokens: tuple[int, ...]) -> Scored: ...  # noqa: D102
    def settle(self, chosen: list[tuple[Running, int]], word: int) -> list[tuple[Running, int]]: ...  # noqa: D102
    def drop_finished(self) -> None: ...  # noqa: D102


class Generator:
    """Runs requests through a loaded model, in step with the other ranks."""

    def __init__(
        self, executor: Executor, group: Group, config: GenerationConfig, sampling: Sampling, on_token: OnToken | None = None,
        enough: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        self.executor = executor
        self.group = group
        self.sampling = sampling
        self.on_token = on_token
        self.enough = enough
        self.end_tokens = _end_tokens(config)
        self.processors = _processors(config, sampling)

    @torch.inference_mode()
    def run(
        self, requests: Sequence[Request], batch_size: int, homes: Sequence[int] | None = None, shared: bool = False,
        between: Callable[[list[Running]], None] | None = None, boundary: Boundary | None = None,
    ) -> list[Running]:  # fmt: skip
        """Generate; every rank calls it with the same requests. Returns those at home on this rank, as they ended.

        batch_size: sequences at once on a rank; shared: every rank runs all of them. between: called on every rank after
        each step with the sequences at home there that ended in it. boundary: what else is done between steps.
        """
        queue = Queue(requests, 1 if shared else self.group.size, homes)
        done: list[Running] = []
        traffic = self.group.traffic
        while True:
            traffic.step += 1
            rooms, running, words = self.executor.agree(batch_size, self._word(boundary))
            if any(word & ENOUGH for word in words) or not (any(running) or len(queue)):
                return done
            if boundary is not None:
                boundary.step([word // NOTICE for word in words])
            taken = queue.assign(rooms[: 1 if shared else None])
            if any(running):
                with traffic.span("decode"):
                    self._extend(self.executor.decode(running), boundary)
            if any(taken):
                newcomers = [[Running(request, home) for request in own] for home, own in enumerate(taken)]
                with traffic.span("prefill"):
                    self._extend(self.executor.prefill(newcomers), boundary)
            ended = [s for s in self.executor.sequences if s.finish_reason is not None and not s.reported]
            for sequence in ended:
                sequence.reported = True
            here = [s for s in ended if s.home == self.group.rank]
            done += here
            self.executor.drop_finished()
            if between is not None:
                between(here)

    def _word(self, boundary: Boundary | None) -> int:
        """What this rank tells the others: whether it has enough, and its notice."""
        return ENOUGH * self.enough() + NOTICE * (0 if boundary is None else boundary.notice())

    def _extend(self, scored: Scored, boundary: Boundary | None) -> None:
        """Prefill runs even for prompts that ask for no new token: recording wants their routing."""
        chosen = self._chosen([(s, logits) for s, logits in scored if s.request.max_new_tokens > 0])
        for sequence, _ in scored:
            if sequence.request.max_new_tokens == 0:
                sequence.finish_reason = "length"
        for sequence, token in self.executor.settle(chosen, self._word(boundary)):
            sequence.new_tokens.append(token)
            if token in self.end_tokens:
                sequence.finish_reason = "stop"
            elif len(sequence.new_tokens) >= sequence.request.max_new_tokens:
                sequence.finish_reason = "length"
            if self.on_token is not None and sequence.home == self.group.rank:
                self.on_token(sequence.request.index, token)

    def _chosen(self, scored: Scored) -> list[tuple[Running, int]]:
        """The next token of each; where nothing but logits decides, a GPU is asked once for all."""
        if scored and self.sampling.temperature == 0 and not self.processors:
            logits = torch.stack([row for _, row in scored])
            found = logits.argmax(-1, keepdim=True)  # a nan counts as the largest
            told = torch.cat([found, torch.isfinite(logits.gather(-1, found))], 1).tolist()
            for (sequence, _), (_, fine) in zip(scored, told, strict=True):
                _check_number(bool(fine), sequence)
            return [(sequence, token) for (sequence, _), (token, _) in zip(scored, told, strict=True)]
        return [(sequence, self._choose(sequence, logits)) for sequence, logits in scored]

    def _choose(self, sequence: Running, logits: torch.Tensor) -> int:
        """The next token. A draw depends on the seed, the prompt and the position, not on rank or batch."""
        seen = torch.tensor([[*sequence.request.token_ids, *sequence.new_tokens]], device=logits.device)
        _check_number(bool(torch.isfinite(logits.max())), sequence)
        scores = self.processors(seen, logits[None])[0]
        if self.sampling.temperature == 0:
            return int(scores.argmax())
        place = (self.sampling.seed, sequence.request.index, len(sequence.new_tokens))
        seed = int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0])
        generator = torch.Generator().manual_seed(seed >> 1)
        return int(torch.multinomial(scores.softmax(-1).cpu(), 1, generator=generator))


def _check_number(fine: bool, sequence: Running) -> None:
    """Raises CoterieError where what a model makes of a text is no number: any token would be made up."""
    if not fine:
        index, made = sequence.request.index, len(sequence.new_tokens)
        what = f"prompt {index} (counted from 0): after {made} new tokens the model's logits are no numbers"
        raise CoterieError(f"{what}: its weights are damaged, or its values leave the dtype; try --dtype bfloat16 or float32")


def _end_tokens(config: GenerationConfig) -> frozenset[int]:
    found = config.eos_token_id
    listed = [] if found is None else list(found) if isinstance(found, list | tuple) else [found]
    if not all(isinstance(token, int) for token in listed):
        raise InputError(f"generation_config.json: eos_token_id: found {found!r}, expected token ids")
    return frozenset(listed)


def not_sampled(config: GenerationConfig, sampling: Sampling) -> dict[str, Any]:
    """What the checkpoint says of sampling and `sampling` does not; nothing of greedy text."""
    if sampling.temperature == 0:
        return {}
    found = config.to_diff_dict()
    return {
        name: found[name]
        for name in ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
        if found.get(name) is not None and found[name] != getattr(sampling, name, None)
    }


def _processors(config: GenerationConfig, sampling: Sampling) -> LogitsProcessorList:
    plain = GenerationConfig().to_dict()
    for name, value in config.to_dict().items():
        default = value in (None, False, 0, plain.get(name)) or (name, value) == ("num_beams", 1)
        if name not in KNOWN_SETTINGS and not default:
            raise InputError(
                f"generation_config.json: {name}: found {value!r}, which coterie does not carry out; remove it from there"
            )
    penalty = config.repetition_penalty
    if penalty is not None and not (isinstance(penalty, int | float) and penalty > 0):
        raise InputError(f"generation_config.json: repetition_penalty: found {penalty!r}, expected a number above 0")
    chosen: list[LogitsProcessor] = []
    if penalty not in (None, 1.0):
        chosen.append(RepetitionPenaltyLogitsProcessor(float(penalty)))
    if sampling.temperature > 0:
        chosen.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k is not None:
            chosen.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p is not None:
            chosen.append(TopPLogitsWarper(sampling.top_p))
    return LogitsProcessorList(chosen)
