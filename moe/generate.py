"""Generation over data-parallel ranks that stay in step: every rank runs every step, with zero tokens if it has none.

Static batches for now: each rank takes its prompts in batches, left-padded; finished rows stay in the batch but their
tokens are no longer dispatched. A step ends when all ranks agree on whether anyone still has something to do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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

from coterie.moe.collectives import Group
from coterie.moe.layer import StepContext
from coterie.routing.errors import InputError
from coterie.routing.record import Recorder

# Fields of a checkpoint's generation_config.json that are carried out, concern sampling (which the caller sets), or change no
# text. Any other that differs from its default is refused.
KNOWN_SETTINGS = {
    "eos_token_id", "bos_token_id", "pad_token_id", "repetition_penalty", "do_sample", "temperature", "top_k", "top_p", "min_p",
    "max_length", "max_new_tokens", "transformers_version", "use_cache", "return_dict_in_generate", "output_scores",
    "output_logits", "output_attentions", "output_hidden_states", "cache_implementation", "decoder_start_token_id",
    "num_return_sequences", "typical_p", "epsilon_cutoff", "eta_cutoff", "trust_remote_code", "_from_model_config",
}  # fmt: skip


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
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"--temperature: found {self.temperature}, expected 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"--top-k: found {self.top_k}, expected 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"--top-p: found {self.top_p}, expected more than 0 and at most 1")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise InputError("--top-k, --top-p: have no effect on greedy text, expected --temperature above 0 beside them")


@dataclass(frozen=True)
class Request:
    """One prompt. index: its place among all prompts, which is also its sequence id; token_ids: at least one."""

    index: int
    token_ids: tuple[int, ...]
    max_new_tokens: int


@dataclass
class Running:
    """A request being generated. finish_reason: `stop` (end token) or `length`, None while running."""

    request: Request
    new_tokens: list[int]
    finish_reason: str | None = None
    generator: torch.Generator | None = None


OnToken = Callable[[int, int], None]  # (prompt index, token id), in order within a prompt


class Generator:
    """Runs requests through a loaded model, in step with the other ranks."""

    def __init__(
        self, model: Any, group: Group, context: StepContext, sampling: Sampling, recorder: Recorder | None = None,
        on_token: OnToken | None = None,
    ) -> None:  # fmt: skip
        self.model = model
        self.group = group
        self.context = context
        self.sampling = sampling
        self.recorder = recorder
        self.on_token = on_token
        self.end_tokens = _end_tokens(model.generation_config)
        self.processors = _processors(model.generation_config, sampling)
        self.device = next(model.parameters()).device

    @torch.inference_mode()
    def run(self, requests: Sequence[Request], batch_size: int) -> list[Running]:
        """Generate this rank's share; other ranks must call it too, whatever they have. Results in the order given."""
        done: list[Running] = []
        batches = [requests[i : i + batch_size] for i in range(0, len(requests), batch_size)]
        try:
            for number in range(self.group.maximum(len(batches))):
                sequences = [self._open(r) for r in (batches[number] if number < len(batches) else [])]
                self._generate(sequences)
                done += sequences
        finally:
            self.context.live = None  # the transformers model stays usable by itself
        return done

    def _open(self, request: Request) -> Running:
        generator = None
        if self.sampling.temperature > 0:
            generator = torch.Generator().manual_seed(self.sampling.seed * 1_000_003 + request.index)
        finished = "length" if request.max_new_tokens == 0 else None
        return Running(request, [], finished, generator)

    def _generate(self, sequences: list[Running]) -> None:
        ids, mask = _pad([s.request.token_ids for s in sequences], self.device)
        cache = None  # the model makes the kind it needs
        # Prefill runs even for prompts that ask for no new token: recording wants their routing.
        live = torch.tensor([True] * len(sequences) or [False], device=self.device)
        while True:
            logits, cache = self._forward(ids, mask, cache, live, [s.request.index for s in sequences] or [0])
            for row, sequence in enumerate(sequences):
                if sequence.finish_reason is None:
                    self._extend(sequence, logits[row])
            running = [s.finish_reason is None for s in sequences]
            if not self.group.any(any(running) and not self._enough()):
                return
            live = torch.tensor(running or [False], device=self.device)
            ids = torch.tensor([[s.new_tokens[-1] if s.new_tokens else 0] for s in sequences] or [[0]], device=self.device)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)

    def _enough(self) -> bool:
        return self.recorder is not None and self.recorder.full

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor, cache: Any, live: torch.Tensor, sequence_ids: list[int]
    ) -> tuple[torch.Tensor, Any]:
        """Logits `[rows, vocabulary]` of each row's last position, and the cache with this step in it."""
        length = ids.shape[1]
        self.context.live = (live[:, None] & mask[:, -length:].bool()).reshape(-1)
        if self.recorder is not None:
            self.recorder.sequences, self.recorder.live = sequence_ids, live
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -length:]
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1].float(), out.past_key_values

    def _extend(self, sequence: Running, logits: torch.Tensor) -> None:
        seen = torch.tensor([[*sequence.request.token_ids, *sequence.new_tokens]], device=logits.device)
        scores = self.processors(seen, logits[None])[0]
        if sequence.generator is None:
            token = int(scores.argmax())
        else:
            token = int(torch.multinomial(scores.softmax(-1).cpu(), 1, generator=sequence.generator))
        sequence.new_tokens.append(token)
        if token in self.end_tokens:
            sequence.finish_reason = "stop"
        elif len(sequence.new_tokens) >= sequence.request.max_new_tokens:
            sequence.finish_reason = "length"
        if self.on_token is not None:
            self.on_token(sequence.request.index, token)


def share(requests: Sequence[Request], group: Group) -> list[Request]:
    """This rank's prompts: prompt i lives on rank i modulo the number of ranks, as the planner assumes."""
    return [r for r in requests if r.index % group.size == group.rank]


def _pad(prompts: list[tuple[int, ...]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded ids and mask, int64 `[rows, longest]`; a rank without prompts gets one token, which is not live."""
    if not prompts:
        return torch.zeros((1, 1), dtype=torch.int64, device=device), torch.ones((1, 1), dtype=torch.int64, device=device)
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(p)) + list(p) for p in prompts]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _end_tokens(config: GenerationConfig) -> frozenset[int]:
    found = config.eos_token_id
    listed = [] if found is None else list(found) if isinstance(found, list | tuple) else [found]
    if not all(isinstance(token, int) for token in listed):
        raise InputError(f"generation_config.json: eos_token_id: found {found!r}, expected token ids")
    return frozenset(listed)


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
    if config.repetition_penalty not in (None, 1.0):
        chosen.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if sampling.temperature > 0:
        chosen.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k is not None:
            chosen.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p is not None:
            chosen.append(TopPLogitsWarper(sampling.top_p))
    return LogitsProcessorList(chosen)
