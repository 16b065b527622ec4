"""Which strategy runs which phase of a job: as asked, or chosen when the prompts are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from coterie.moe.batch import Batch, Request, SharedBatch
from coterie.moe.choose import Choice, Links, Load, check_group, decide, make_strategy, untried
from coterie.moe.coherent import FAMILIES, CoherentBatch, check_family
from coterie.moe.collectives import Group
from coterie.moe.families import ModelShape
from coterie.moe.generate import Executor
from coterie.moe.invariant import varying
from coterie.moe.layer import StepContext
from coterie.moe.queue import PREFILL_TOKENS
from coterie.moe.strategy import Strategy
from coterie.moe.traits import traits_of
from coterie.placement.plan import PlacementPlan
from coterie.routing.record import Recorder

if TYPE_CHECKING:
    from coterie.moe.rehearsal import Rehearsal

SHARE = 0.1  # of a job's time


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
        self.share = SHARE  # of a job's time, at most, that trying strategies may take, of prompts and of decode steps each
        self.without: frozenset[str] = frozenset()
        self._made: dict[str, Strategy] = {}
        self._weight_bytes, self._dense_seconds, self._on_disk = 0, 0.0, False
        self._rehearsed: dict[tuple[int, int], Rehearsal] = {}

    def strategy(self, name: str | None) -> Strategy:
        """The strategy object of that name; None: the one for calls outside `generate`."""
        chosen = name or ("local" if self.group.size == 1 else "all_to_all")
        if chosen not in self._made:
            self._made[chosen] = make_strategy(chosen, self.group)
        return self._made[chosen]

    def choice(
        self, requests: Sequence[Request], batch_size: int, model: Any, context: StepContext, homes: Sequence[int] | None = None
    ) -> Choice:
        """For these prompts. What was not asked for is predicted from measured links and from steps that are rehearsed.

        homes: the rank of each prompt, where that is known already.
        """
        if self.asked is not None or self.group.size == 1:
            name = self.strategy(self.asked).name
            return Choice("all_to_all" if name == "coherent" else name, name, {}, {})
        load = self._load(requests, batch_size)
        if self.links is None:
            self._measure(model)
        without = self.without if self.shape.config.model_type in FAMILIES else self.without | {"coherent"}
        if context.least_rows > 1:
            without |= varying(self.group.nodes)
        ranks = [i % self.group.size for i in range(len(requests))] if homes is None else homes
        rehearsal = self._rehearsal(load, model, context, [(r.token_ids, at) for r, at in zip(requests, ranks, strict=True)])
        return self._decided(load, without, rehearsal, homes is not None)

    def changed(self, plan: PlacementPlan) -> None:
        """From now on experts lie as `plan` says: what was rehearsed was another's."""
        self.plan = plan
        self._rehearsed.clear()

    def forget(self) -> None:
        """The next choice measures everything anew. Every rank must call it."""
        self.links = None
        self._rehearsed.clear()

    def _load(self, requests: Sequence[Request], batch_size: int) -> Load:
        ranks, count = self.group.size, len(requests)
        rows = max(1, min(batch_size, -(-count // ranks)))
        mean = sum(len(r.token_ids) for r in requests) / count
        prompt_tokens = max(1, min(PREFILL_TOKENS, int(mean * rows)))
        steps = sum(r.max_new_tokens for r in requests) / count
        at_once = min(1.0, min(batch_size, count) / (ranks * rows))
        return Load(prompt_tokens, rows, steps, at_once, -(-count // (ranks * rows)))

    def _decided(self, load: Load, without: frozenset[str], rehearsal: Rehearsal | None, at_home: bool) -> Choice:
        """As predicted, once all that promise about as much as the best were tried, too, if that pays.

        at_home: whether what was rehearsed was where it will run; else the plan knows better how much will be sent.
        """
        assert self._weight_bytes and self.links is not None
        traits = traits_of(self.shape, self.plan, self._weight_bytes, self._dense_seconds)
        if rehearsal is None:
            return decide(traits, self.links, self.group, load, without)
        if at_home or self.plan.homes is None:
            traits = rehearsal.seen
        choice = decide(traits, self.links, self.group, load, without, rehearsal.trial)
        while (names := untried(choice, rehearsal.trial, load)) and rehearsal.pays(load, len(names), self.share):
            rehearsal.compare([self.strategy(name) for name in names], rehearsal.affordable(load, self.share))
            choice = decide(traits, self.links, self.group, load, without, rehearsal.trial)
        return choice

    def _measure(self, model: Any) -> None:
        from coterie.moe.probe import dense_seconds_per_weight, free_bytes, measure

        self.links = measure(self.group, self.remember)
        self.group.free_bytes = free_bytes(self.links, self.group)
        weight = next(model.parameters())
        self._weight_bytes = weight.element_size()
        self._dense_seconds = dense_seconds_per_weight(weight.device, weight.dtype, self.group)
        self._on_disk = any(self.group.gather(any(hasattr(module, "coterie_cache") for module in model.modules())))

    def _rehearsal(
        self, load: Load, model: Any, context: StepContext, prompts: Sequence[tuple[tuple[int, ...], int]]
    ) -> Rehearsal | None:
        """Of steps about as large as these; None with experts on disk: it would fill the cache with what nobody asked for.

        prompts: token ids, and the rank that runs them.
        """
        from coterie.moe.rehearsal import MOST_TOKENS, Rehearsal

        if self._on_disk:
            return None
        size = load.decode.bit_length(), min(load.prefill, MOST_TOKENS).bit_length()
        if size not in self._rehearsed:
            assert self.links is not None
            traits = traits_of(self.shape, self.plan, self._weight_bytes, self._dense_seconds)
            first = self.strategy("all_to_all")
            own = [[ids for ids, at in prompts if at == rank] for rank in range(self.group.size)]
            self._rehearsed[size] = Rehearsal(model, context, first, traits, self.links, load.decode, load.prefill, own)
        return self._rehearsed[size]

    def executor(self, model: Any, context: StepContext, choice: Choice, recorder: Recorder | None) -> Executor:
        """What runs the model by this choice."""
        prefill = self.strategy(choice.prefill)
        if choice.decode == "coherent":
            return CoherentBatch(model, context, self.group, prefill)
        kind = SharedBatch if prefill.every_rank_has_all else Batch
        return kind(model, context, recorder, prefill, self.strategy(choice.decode))
