"""Which strategy runs which phase of a job: as asked, or chosen when the prompts are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from coterie.moe.batch import Batch, Request, SharedBatch
from coterie.moe.choose import Choice, Links, Traits, Trial, check_group, decide, make_strategy, traits_of, untried
from coterie.moe.coherent import FAMILIES, CoherentBatch, check_family
from coterie.moe.collectives import Group
from coterie.moe.families import ModelShape
from coterie.moe.generate import Executor
from coterie.moe.layer import StepContext
from coterie.moe.queue import PREFILL_TOKENS
from coterie.moe.strategy import Strategy
from coterie.placement.plan import PlacementPlan
from coterie.routing.record import Recorder

if TYPE_CHECKING:
    from coterie.moe.rehearsal import Rehearsal


def check_strategy(asked: str | None, group: Group, shape: ModelShape) -> None:
    """Raises InputError unless the group and the model's family can be run by the strategy asked for."""
    check_group(asked, group)
    if asked == "coherent":
        check_family(shape.config)


class Dispatcher:
    """Makes strategies when they are needed: every rank must ask in the same order.

    asked: a strategy's name, or None to choose. links: what was measured, or None until the first choice. without: strategies
    that are not chosen, whatever they promise; the same on all ranks.
    """

    def __init__(self, shape: ModelShape, plan: PlacementPlan, group: Group, asked: str | None) -> None:
        self.shape = shape
        self.plan = plan
        self.group = group
        self.asked = asked
        self.links: Links | None = None
        self.remember = True  # links that an earlier job measured may be taken
        self.without: frozenset[str] = frozenset()
        self._made: dict[str, Strategy] = {}
        self._traits: Traits | None = None
        self._rehearsal: Rehearsal | None = None
        self._trial: Trial | None = None

    def strategy(self, name: str | None) -> Strategy:
        """The strategy object of that name; None: the one for calls outside `generate`."""
        chosen = name or ("local" if self.group.size == 1 else "all_to_all")
        if chosen not in self._made:
            self._made[chosen] = make_strategy(chosen, self.group)
        return self._made[chosen]

    def choice(self, requests: Sequence[Request], batch_size: int, model: Any, context: StepContext) -> Choice:
        """For these prompts. What was not asked for is predicted from measured links and from steps that are rehearsed."""
        if self.asked is not None or self.group.size == 1:
            name = self.strategy(self.asked).name
            return Choice("all_to_all" if name == "coherent" else name, name, {}, {})
        rows = max(1, min(batch_size, -(-len(requests) // self.group.size)))
        mean = sum(len(r.token_ids) for r in requests) / len(requests)
        prompt_tokens = max(1, min(PREFILL_TOKENS, int(mean * rows)))
        if self.links is None:
            self._measure(model, context, rows, prompt_tokens)
        without = self.without if self.shape.config.model_type in FAMILIES else self.without | {"coherent"}
        if context.least_rows > 1:  # batch-invariant: coherent does not keep blocks of rows
            without |= {"coherent"}
        steps = sum(r.max_new_tokens for r in requests) / len(requests)
        return self._decided(prompt_tokens, rows, steps, without)

    def _decided(self, prompt_tokens: int, rows: int, steps: float, without: frozenset[str]) -> Choice:
        """As predicted, once all that promise about as much as the best were tried, too."""
        assert self._traits is not None and self.links is not None
        sizes = prompt_tokens, rows
        choice = decide(self._traits, self.links, self.group, *sizes, steps, without, self._trial)
        while self._trial is not None and (names := untried(choice, self._trial, *sizes)):
            assert self._rehearsal is not None
            self._trial = self._rehearsal.compared([self.strategy(name) for name in names], self._trial)
            choice = decide(self._traits, self.links, self.group, *sizes, steps, without, self._trial)
        return choice

    def _measure(self, model: Any, context: StepContext, rows: int, prompt_tokens: int) -> None:
        from coterie.moe.probe import dense_seconds_per_weight, free_bytes, measure
        from coterie.moe.rehearsal import Rehearsal

        self.links = links = measure(self.group, self.remember)
        self.group.free_bytes = free_bytes(links, self.group)
        weight = next(model.parameters())
        seconds = dense_seconds_per_weight(weight.device, weight.dtype, self.group)
        self._traits = traits_of(self.shape, self.plan, weight.element_size(), seconds)
        on_disk = any(self.group.gather(any(hasattr(module, "coterie_cache") for module in model.modules())))
        if not on_disk:  # a rehearsal would fill the cache with experts that nobody asked for
            first = self.strategy("all_to_all")
            self._rehearsal = Rehearsal(model, context, first, self._traits, links, rows, prompt_tokens)
            self._trial = self._rehearsal.begin()

    def executor(self, model: Any, context: StepContext, choice: Choice, recorder: Recorder | None) -> Executor:
        """What runs the model by this choice."""
        prefill = self.strategy(choice.prefill)
        if choice.decode == "coherent":
            return CoherentBatch(model, context, self.group, prefill)
        kind = SharedBatch if prefill.every_rank_has_all else Batch
        return kind(model, context, recorder, prefill, self.strategy(choice.decode))
