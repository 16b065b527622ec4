"""Context-coherent decoding: a token stays on the rank where its experts are, instead of returning home in every layer.

The idea is ExFlow's (Yao et al., 2024), for one expert per token; this is its generalisation to any number. Every rank holds
the keys and values of all sequences, and a token's own are gathered once, after its step. In a layer, the rank that has a
token (its anchor) attends and routes; R are the ranks of its experts; the next anchor is the present one if in R, else the
member of R with the largest gate mass. One row goes to each of R but the anchor (the residual to the next anchor, the
normalised input to the others), one partial sum comes from each of R but the next anchor. With one expert per token nothing
has to be combined: one exchange per layer instead of two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from coterie.kernels.experts import compute_experts
from coterie.moe.batch import Agreement, Batch, Running, Scored
from coterie.moe.collectives import Group
from coterie.moe.dispatch import DispatchPlan, as_bytes, from_bytes, looked_up, needed_ranks, pack_rows, plan_rows, unpack_rows
from coterie.moe.layer import ExpertLayer, StepContext, stacked
from coterie.moe.shared_kv import SharedKV
from coterie.moe.strategy import Strategy
from coterie.routing.errors import InputError

# Families whose decoder layer is: residual + attention(norm), residual + block(norm), both norms named as in Llama.
FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "phimoe", "granitemoe", "glm4_moe")
HEADER_BYTES = 8  # of a row, beside its slots: which sequence, and its next anchor


def check_family(config: Any) -> None:
    """Raises InputError for families whose layers are built otherwise."""
    if config.model_type not in FAMILIES:
        raise InputError(
            f"--strategy: found 'coherent' for model_type {config.model_type!r}, expected one of {', '.join(FAMILIES)}; "
            f"all_to_all runs every family"
        )


def sliding_layers(config: Any) -> list[bool]:
    """Which decoder layers attend only to the last `config.sliding_window` tokens."""
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [kind == "sliding_attention" and getattr(config, "sliding_window", None) is not None for kind in kinds]


def next_anchor(target: torch.Tensor, weights: torch.Tensor, here: int, ranks: int) -> torch.Tensor:
    """Where each token goes, int64 `[T]`: nowhere if an expert of it is here (or it has none), else to the largest gate mass.

    target: int64 `[T, K]`, ranks of its experts, -1 for none; weights `[T, K]`. Of equal masses the lowest rank.
    """
    if target.shape[1] == 1:
        return target[:, 0].masked_fill(target[:, 0] < 0, here)
    mass = torch.zeros(len(target), ranks + 1, dtype=torch.float64, device=target.device)
    mass.scatter_add_(1, target + 1, weights.double())
    needed = needed_ranks(target, ranks)
    heaviest = torch.where(needed, mass[:, 1:], -torch.inf).argmax(1)
    return torch.where(needed[:, here] | ~needed.any(1), here, heaviest)


def plan_moves(
    target: torch.Tensor, where: torch.Tensor, weights: torch.Tensor, anchor: torch.Tensor, ranks: int
) -> DispatchPlan:
    """The rows of one layer: one to each rank of a token's experts, and one to its next anchor in any case."""
    if target.shape[1] == 1:  # the next anchor is the only one
        mine = where.masked_fill(target < 0, -1)
        return plan_rows(anchor[:, None], mine, weights, ranks)
    plan = plan_rows(
        torch.cat([target, anchor[:, None]], 1), torch.cat([where, torch.full_like(anchor[:, None], -1)], 1),
        torch.cat([weights.float(), torch.zeros_like(weights[:, :1], dtype=torch.float32)], 1), ranks,
    )  # fmt: skip
    return DispatchPlan(
        plan.token_of_row, plan.counts, plan.ids[:, :-1], plan.weights[:, :-1], plan.place, plan.tokens, plan.width
    )


@dataclass
class Step:
    """One decoding step. at: int64 `[n]`, which of the running sequences are on this rank; count: of all.

    masks: additive `[count, 1, 1, length]`, by whether the layer has a sliding window; rope: (cos, sin), `[count, 1, ...]`.
    """

    at: torch.Tensor
    count: int
    masks: dict[bool, torch.Tensor]
    rope: Any


class Stack(nn.Module):
    """All decoder layers as one: what a transformers model is given in place of its layers while it decodes coherently."""

    def __init__(self, layers: nn.ModuleList, slides: Sequence[bool], context: StepContext, group: Group, kv: SharedKV) -> None:
        super().__init__()
        self.parts = [_Layer(layer, sliding) for layer, sliding in zip(layers, slides, strict=True)]
        self.context = context
        self.group = group
        self.kv = kv
        self.step: Step | None = None

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """hidden_states `[n, 1, H]`, sequences that begin the step here; returns `[m, 1, H]`, those that end it here."""
        step = self.step
        assert step is not None
        hidden_states = hidden_states[: len(step.at)]
        for number, part in enumerate(self.parts):
            if len(step.at):
                hidden_states = part.attend(number, hidden_states, step, self.kv)
            if part.experts is None:
                hidden_states = part.finish(hidden_states) if len(step.at) else hidden_states
            else:
                hidden_states = self._visit(part, hidden_states, step)
        return hidden_states

    def _visit(self, part: _Layer, hidden: torch.Tensor, step: Step) -> torch.Tensor:
        """Through the experts of one layer, wherever they are; sets `step.at` to the sequences that are here then."""
        layer: ExpertLayer = part.experts.coterie_layer
        ranks, here, traffic = self.group.size, self.group.rank, self.group.traffic
        traffic.layer = layer.index
        rows = hidden[:, 0]
        normed = part.norm(rows) if len(rows) else rows
        ids, weights = part.route(normed, len(layer.map.destination))
        layer.context.count(layer.index, ids)
        target, where = looked_up(ids, layer.map.destination, layer.map.position)
        anchor = next_anchor(target, weights, here, ranks)
        plan = plan_moves(target, where, weights, anchor, ranks)
        to = torch.repeat_interleave(torch.arange(ranks), torch.tensor(plan.counts)).to(rows.device)
        moved = (anchor[plan.token_of_row] == to)[:, None]
        payload = torch.where(moved, rows[plan.token_of_row], normed[plan.token_of_row])
        header = torch.stack([step.at[plan.token_of_row], anchor[plan.token_of_row]], 1).to(torch.int32)
        message = torch.cat([as_bytes(header), pack_rows(payload, plan.ids, plan.weights)], 1)
        came, _ = self.group.exchange(message, plan.counts, step.count)
        out = self._compute(part, layer, came, weights.shape[1], hidden.dtype, step)
        traffic.layer = -1
        return out

    def _compute(
        self, part: _Layer, layer: ExpertLayer, came: torch.Tensor, top_k: int, dtype: torch.dtype, step: Step
    ) -> torch.Tensor:
        header = from_bytes(came[:, :HEADER_BYTES], torch.int32).long()
        payload, ids, weights = unpack_rows(came[:, HEADER_BYTES:], top_k, dtype)
        sequence, anchor = header[:, 0], header[:, 1]
        stays = anchor == self.group.rank
        residual = payload[stays]
        x = payload.clone()
        normed = part.norm(residual) if len(residual) else residual
        x[stays] = normed
        with self.group.traffic.span("experts"):
            y = compute_experts(stacked(part.experts), x, ids, weights)
        total = self._combine(y, sequence, anchor, stays, step.count) if top_k > 1 else y[stays]
        step.at, order = sequence[stays].sort()
        if not len(order):
            return residual[:, None]
        self.context.routed = total[order]
        try:
            return part.finish(residual[order][:, None], normed[order][:, None])
        finally:
            self.context.routed = None

    def _combine(
        self, y: torch.Tensor, sequence: torch.Tensor, anchor: torch.Tensor, stays: torch.Tensor, count: int
    ) -> torch.Tensor:
        """Partial sums to the next anchors; there summed in float32 in the order of ranks: `[stays, H]`."""
        away = (~stays).nonzero()[:, 0]
        away = away[anchor[away].argsort(stable=True)]
        send = torch.bincount(anchor[away], minlength=self.group.size).tolist()
        message = torch.cat([as_bytes(sequence[away].to(torch.int32)[:, None]), as_bytes(y[away])], 1)
        came, receive = self.group.exchange(message, send, count, "combine")
        theirs = torch.split(from_bytes(came[:, :4], torch.int32).long()[:, 0], list(receive))
        parts = torch.split(from_bytes(came[:, 4:], y.dtype), list(receive))
        place = torch.zeros(count, dtype=torch.int64, device=y.device)
        place[sequence[stays]] = torch.arange(int(stays.sum()), device=y.device)
        total = torch.zeros(int(stays.sum()), y.shape[1], dtype=torch.float32, device=y.device)
        for rank in range(self.group.size):
            if rank == self.group.rank:
                total += y[stays].float()
            elif len(theirs[rank]):
                total[place[theirs[rank]]] += parts[rank].float()
        return total.to(y.dtype)


class _Layer:
    """The parts of one decoder layer."""

    def __init__(self, layer: Any, sliding: bool) -> None:
        self.layer = layer
        self.norm = layer.post_attention_layernorm
        self.block = layer.block_sparse_moe if hasattr(layer, "block_sparse_moe") else layer.mlp
        self.experts: Any = next((m for m in self.block.modules() if hasattr(m, "coterie_layer")), None)
        self.router: Any = getattr(self.block, "gate", None) or getattr(self.block, "router", None)
        self.scale = getattr(layer, "residual_multiplier", 1.0)
        self.sliding = sliding

    def attend(self, number: int, hidden: torch.Tensor, step: Step, kv: SharedKV) -> torch.Tensor:
        out, _ = self.layer.self_attn(
            hidden_states=self.layer.input_layernorm(hidden), attention_mask=step.masks[self.sliding][step.at],
            position_embeddings=tuple(part[step.at] for part in step.rope), past_key_values=kv.view(step.at),
        )  # fmt: skip
        attended: torch.Tensor = hidden + out * self.scale
        return attended

    def route(self, normed: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids, weights) `[n, K]`; ids outside the model's experts become -1."""
        _, weights, ids = self.router(normed)
        return ids.masked_fill((ids < 0) | (ids >= experts), -1), weights

    def finish(self, residual: torch.Tensor, normed: torch.Tensor | None = None) -> torch.Tensor:
        """The second half of the layer, `[n, 1, H]`; the experts answer what `StepContext.routed` says."""
        out = self.block(self.norm(residual) if normed is None else normed)
        finished: torch.Tensor = residual + (out[0] if isinstance(out, tuple) else out) * self.scale
        return finished


class CoherentBatch:
    """All running sequences of all ranks, on every rank; prefill on their homes by `prefill_by`."""

    def __init__(self, model: Any, context: StepContext, group: Group, prefill_by: Strategy) -> None:
        self.model = model
        self.prefill_by = prefill_by
        self.context = context
        self.group = group
        self.inner = model.get_decoder()
        self.kv = SharedKV(len(self.inner.layers), next(model.parameters()).device)
        self.stack = Stack(self.inner.layers, sliding_layers(model.config), context, group, self.kv)
        self.sequences: list[Running] = []
        self.device = next(model.parameters()).device
        self.anchors = torch.zeros(0, dtype=torch.int64, device=self.device)
        self.words: tuple[int, ...] | None = None  # that ranks told each other with the last tokens

    def agree(self, size: int, word: int) -> Agreement:
        """As `Batch.agree`; asked for only before the first step, since every rank knows all sequences.

        Later words are those that came with the last tokens.
        """
        words = tuple(w for (w,) in self.group.agree([word])) if self.words is None else self.words
        rooms = tuple(size - sum(s.home == rank for s in self.sequences) for rank in range(self.group.size))
        return Agreement(rooms, (self.running,) * self.group.size, words)

    @property
    def running(self) -> int:
        """Sequences of all ranks that `decode` will extend."""
        return len(self.sequences)

    def prefill(self, assigned: Sequence[Sequence[Running]]) -> Scored:
        """The newcomers on their homes; then their keys and values on every rank."""
        home = Batch(self.model, self.context, prefill=self.prefill_by)
        home.decodes = False
        scored = home.prefill(assigned)
        newcomers = [s for taken in assigned for s in taken]
        lengths = [[len(s.request.token_ids) for s in taken] for taken in assigned]
        self.kv.add(self.group, home.cache, home.mask, lengths)
        self.sequences += newcomers
        homes = torch.tensor([s.home for s in newcomers], dtype=torch.int64, device=self.device)
        self.anchors = torch.cat([self.anchors, homes])
        for sequence in newcomers:
            if sequence.request.max_new_tokens == 0:
                sequence.finish_reason = "length"
        return scored

    def decode(self, tokens: tuple[int, ...]) -> Scored:
        """One token of every sequence: logits of those whose token ended its way here."""
        at = (self.anchors == self.group.rank).nonzero()[:, 0]
        last = torch.tensor([s.new_tokens[-1] for s in self.sequences], device=self.device)
        positions = torch.tensor(
            [[len(s.request.token_ids) + len(s.new_tokens) - 1] for s in self.sequences], device=self.device
        )
        self.stack.step = step = self._step(at, positions)
        fed = at if len(at) else torch.zeros(1, dtype=torch.int64, device=self.device)  # a row that the stack leaves out
        none = torch.zeros((len(fed), 1, 1, 1), device=self.device)
        with self._coherently():
            out = self.model(
                input_ids=last[fed][:, None], attention_mask=none, position_ids=positions[fed], use_cache=False
            )  # fmt: skip
        self.anchors[:] = -1
        self.anchors[step.at] = self.group.rank
        return [(self.sequences[i], row) for i, row in zip(step.at.tolist(), out.logits[:, -1].float(), strict=True)]

    def _step(self, at: torch.Tensor, positions: torch.Tensor) -> Step:
        rope = self.inner.rotary_emb(self.inner.embed_tokens.weight[:1, None], positions)
        dtype = self.inner.embed_tokens.weight.dtype
        window = getattr(self.model.config, "sliding_window", None)
        masks = {False: self.kv.mask(None, dtype), True: self.kv.mask(window, dtype)}
        return Step(at, len(self.sequences), masks, rope)

    def settle(self, chosen: list[tuple[Running, int]], word: int) -> list[tuple[Running, int]]:
        """The tokens of all sequences, whichever rank chose them; with them go the step's keys and values, and the words."""
        number = {id(s): i for i, s in enumerate(self.sequences)}
        settled, self.words = self.kv.spread(self.group, {number[id(s)]: token for s, token in chosen}, word)
        places, ranks = (torch.tensor([s[n] for s in settled], dtype=torch.int64, device=self.device) for n in (0, 2))
        self.anchors[places] = ranks
        return [(self.sequences[i], token) for i, token, _ in settled]

    def drop_finished(self) -> None:
        """Forget finished sequences and their keys and values."""
        kept = [i for i, s in enumerate(self.sequences) if s.finish_reason is None]
        if len(kept) < len(self.sequences):
            self.sequences = [self.sequences[i] for i in kept]
            self.anchors = self.anchors[kept]
            self.kv.select(torch.tensor(kept, dtype=torch.int64, device=self.device))

    @contextmanager
    def _coherently(self) -> Iterator[None]:
        layers = self.inner.layers
        self.inner.layers = nn.ModuleList([self.stack])
        try:
            yield
        finally:
            self.inner.layers = layers
