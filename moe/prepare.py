"""What this rank is about to load, settled and checked before a byte of weights is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from coterie.moe.cached import MISSES, attach_cache, attach_embeddings, index_experts, misses_of
from coterie.moe.families import ModelShape, inspect
from coterie.moe.layer import IMPLEMENTATION
from coterie.moe.load import load_share
from coterie.moe.placement_map import check_plan, contiguous_plan
from coterie.moe.quantise import check_format, hold, kept_record, load_rounded, rounding_of, stacked_record
from coterie.offload.cache import ExpertCache
from coterie.offload.checkpoint import Checkpoint
from coterie.offload.copies import AS_STORED, Rounding
from coterie.offload.policies import DEFAULT, MAKERS
from coterie.offload.prior import check_prior, teach
from coterie.offload.sidecar import Sidecar, open_sidecar
from coterie.offload.slots import slot_bytes
from coterie.offload.store import ExpertStore
from coterie.offload.tiers import LEAST, HostTier
from coterie.offload.transfer import Record
from coterie.placement.plan import PlacementPlan
from coterie.routing.errors import InputError
from coterie.routing.record import expert_modules
from coterie.routing.trace import RoutingTrace, read_trace

OnBytes = Callable[[int, int], object]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Share:
    """A model under a plan. empty: its skeleton on the meta device; device: of this rank.

    quantise: the format that experts are rounded to (kernels/formats.py), or None. slots: how many experts this process holds
    at once, the others being read from disk when they are needed (moe/cached.py); None for all. packed: where these are read
    from, if not from the checkpoint; rounded as `quantise` says. prior: recorded routing to begin with (offload/prior.py).
    eviction: which policy says what gives way (offload/policies.py).
    Behind a GPU's slots: host_bytes of memory for those that were read, None for all; misses: what is done about what the GPU
    does not have (offload/tiers.py).
    """

    shape: ModelShape
    empty: Any
    checkpoint: Checkpoint
    plan: PlacementPlan
    dtype: torch.dtype
    device: torch.device
    quantise: str | None = None
    slots: int | None = None
    packed: Sidecar | None = None
    host_bytes: int | None = None
    misses: str = "fetch"
    prior: RoutingTrace | None = None
    eviction: str = DEFAULT

    def read(self, rank: int, on_bytes: OnBytes | None = None) -> Any:
        """The transformers model with the share of `rank` in it. on_bytes: told (bytes just read, bytes in all)."""
        experts = {layer: tuple(self.plan.experts_on(i, rank)) for i, layer in enumerate(self.shape.layer_ids)}
        if self.slots is not None:
            return self._cached(tuple(experts.values()), self.slots, on_bytes)
        if self.rounding is not None:
            return self._rounded(self.rounding, tuple(experts.values()), on_bytes)
        return load_share(self.shape, self.empty, self.checkpoint, experts, self.dtype, self.device, IMPLEMENTATION, on_bytes)

    @property
    def rounding(self) -> Rounding | None:
        """What `quantise` means for this model on this device."""
        return None if self.quantise is None else rounding_of(self.empty, self.quantise, self.device)

    def _dense(self, on_bytes: OnBytes | None, more: int = 0) -> Any:
        """The model without experts. more: bytes that will be read after it."""
        none: dict[int, tuple[int, ...]] = dict.fromkeys(self.shape.layer_ids, ())

        def told(count: int, whole: int) -> None:
            if on_bytes is not None:
                on_bytes(count, whole + more)

        return load_share(self.shape, self.empty, self.checkpoint, none, self.dtype, self.device, IMPLEMENTATION, told)

    def _rounded(self, rounding: Rounding, local: tuple[tuple[int, ...], ...], on_bytes: OnBytes | None) -> Any:
        """The dense part, and the experts `local` (by layer), each rounded as soon as it is read."""
        with closing(index_experts(self.shape, self.empty, self.checkpoint)) as store:
            layers = zip(local, store.records, strict=True)
            whole = sum(part.on_disk for here, layer in layers for expert in here for part in layer[expert].values())
            read = self._dense(on_bytes, whole)
            counter = self.checkpoint.counter
            if on_bytes is not None:
                counter.watch = partial(_told, on_bytes, counter.bytes + whole)
            try:
                load_rounded(read, store, rounding, local, self.dtype, self.device)
            finally:
                counter.watch = None
        return read

    def _cached(self, local: tuple[tuple[int, ...], ...], slots: int, on_bytes: OnBytes | None) -> Any:
        """The dense part, and the experts `local` (by layer) out of a cache."""
        store = self.store()
        read = self._dense(on_bytes)
        shapes = {name: part.shape for name, part in store.records[0][0].items()}
        dtypes = self._dtypes(read)
        source: ExpertStore | HostTier = store
        if self.device.type != "cpu":
            kept = self.host_slots(sum(map(len, local)))
            source = HostTier(store, kept, shapes, self.dtype, self.device.type == "cuda", dtypes)
        cache = ExpertCache(
            source, self.shape.num_experts, slots, shapes, self.dtype, self.shape.top_k, self.eviction, self.device,
            dtypes=dtypes,
        )  # fmt: skip
        attach_cache(read, cache, local)
        attach_embeddings(read, cache)
        if self.prior is not None:
            teach(cache, self.prior, local)
        modules = [module for _, module in expert_modules(read).values()]
        if self.rounding is not None:
            for module in modules:
                hold(module, cache.memory.stacked, self.rounding)
        if isinstance(source, HostTier):
            cache.misses = misses_of(self.misses, cache, modules[0])
        return read

    def store(self) -> ExpertStore:
        """What experts are read from, as slots hold them. Raises InputError where only a packed copy, not given, is so."""
        if self.packed is not None:
            return ExpertStore(self.packed.records, self.checkpoint.counter, self.packed.checksums)
        records = held_records(self)
        if records is None:
            raise InputError(not_packed("slots", self))
        return ExpertStore(records, self.checkpoint.counter, versions=self.checkpoint.versions)

    def _dtypes(self, model: Any) -> dict[str, torch.dtype]:
        """Of an expert's parts in slots, where it is not the model's."""
        if self.rounding is None:
            return {}
        return self.rounding.dtypes(stacked_record(next(iter(expert_modules(model).values()))[1]), self.dtype)

    def host_slots(self, whole: int) -> int:
        """How many experts the host keeps behind a GPU's slots. whole: this rank's experts, all layers together.

        Raises InputError for less room than reading and computing there need.
        """
        parts = kept_record(next(iter(expert_modules(self.empty).values()))[1], self.dtype, self.rounding).values()
        one = sum(slot_bytes(part.length, part.dtype) for part in parts)
        slots, least = whole if self.host_bytes is None else min(whole, self.host_bytes // one), min(whole, LEAST)
        if slots < least:
            found = f"found {self.host_bytes}, expected {least * one} or more: room for {least} experts"
            raise InputError(f"--host-memory (host_bytes): {found}")
        if self.misses == "cpu" and slots <= LEAST < whole:
            found = f"found cpu with room for {slots} experts on the host, expected more than {LEAST}: give more --host-memory"
            raise InputError(f"--misses: {found}")
        return max(slots, 1)  # a rank may have no expert at all


def _told(on_bytes: OnBytes, whole: int, count: int) -> None:
    on_bytes(count, whole)


def prepare(
    model: str | Path, plan: PlacementPlan | None, dtype: str, ranks: int, nodes: int = 1,
    device: str | torch.device | None = None, quantise: str | None = None, packed: str | Path | None = None,
) -> Share:  # fmt: skip
    """Look at MODEL and check the plan (by default experts in order) against it and `ranks` processes on `nodes` nodes.

    Raises InputError for a model, checkpoint, plan or folder of packed experts that is wrong or does not fit.
    """
    if quantise is not None:
        check_format(quantise)
    shape, empty = inspect(str(model))
    plan = contiguous_plan(shape, ranks, nodes) if plan is None else plan
    check_plan(plan, shape, ranks)
    target = device_of(device)
    checkpoint = Checkpoint.open(shape.folder)
    share = Share(shape, empty, checkpoint, plan, dtype_of(dtype, shape.config, target), target, quantise)
    return share if packed is None else replace(share, packed=_sidecar(share, Path(packed)))


def device_of(wish: str | torch.device | None) -> torch.device:
    """Where to load: as wished, else this process's GPU, else the CPU. A GPU by its number: each thread has its own default."""
    found = torch.device(wish if wish is not None else "cuda" if torch.cuda.is_available() else "cpu")
    return torch.device("cuda", torch.cuda.current_device()) if found.type == "cuda" and found.index is None else found


def _sidecar(share: Share, folder: Path) -> Sidecar:
    return open_sidecar(folder, share.checkpoint, _indexed_experts(share), share.rounding or AS_STORED)


def check_eviction(name: str, field: str = "eviction") -> None:
    """Raises InputError for a name that is no policy's. field: how it was given."""
    if name not in MAKERS:
        raise InputError(f"{field}: found {name!r}, expected {', '.join(MAKERS)}")


def check_slots(share: Share) -> None:
    """Raises InputError if so few experts at once do not make a layer, or something else needs them all or has no effect."""
    if share.misses not in MISSES:
        raise InputError(f"misses: found {share.misses!r}, expected {', '.join(MISSES)}")
    behind = "host_bytes" if share.host_bytes is not None else "misses" if share.misses != "fetch" else None
    if behind is not None and (share.slots is None or share.device.type == "cpu"):
        found = "without slots" if share.slots is None else "without a GPU"
        raise InputError(f"{behind}: found it {found}, expected slots on a GPU with it: it is about what lies behind them")
    if share.quantise is not None and share.misses != "fetch":
        raise InputError(f"misses: found {share.misses!r} with quantise, expected fetch: the host rounds in another order")
    check_eviction(share.eviction)
    if share.slots is None:
        if share.eviction != DEFAULT:
            raise InputError("eviction: found it without slots, expected slots with it: without them nothing gives way")
        if share.packed is not None:
            raise InputError(
                "packed: found it without slots, expected slots with it: without them no expert is read from there"
            )
        if share.prior is not None:
            raise InputError("prior: found it without slots, expected slots with it: without them no expert is read later")
        return
    if share.slots < share.shape.top_k:
        raise InputError(f"slots: found {share.slots}, expected at least {share.shape.top_k}: one token's experts in a layer")
    if needs_copy(share):
        raise InputError(not_packed("slots", share))


def known_prior(share: Share, trace: str | Path | RoutingTrace) -> Share:
    """The share with recorded routing of its model, or the file that it is in. Raises InputError for another model's."""
    found = trace if isinstance(trace, RoutingTrace) else read_trace(Path(trace))
    shape = share.shape
    check_prior(found, shape.num_experts, shape.layer_ids, shape.top_k, shape.config.get_text_config().vocab_size)
    return replace(share, prior=found)


_indexed: WeakKeyDictionary[Checkpoint, Sequence[Sequence[Record]]] = WeakKeyDictionary()  # experts, once they were asked for


def _indexed_experts(share: Share) -> Sequence[Sequence[Record]]:
    if share.checkpoint not in _indexed:
        with closing(index_experts(share.shape, share.empty, share.checkpoint)) as store:
            _indexed[share.checkpoint] = store.records
    return _indexed[share.checkpoint]


def held_records(share: Share) -> Sequence[Sequence[Record]] | None:
    """Every expert where the checkpoint has it as slots hold it; None where it has not."""
    records, rounding = _indexed_experts(share), share.rounding
    if rounding is None:
        coded = any(part.coded for layer in records for record in layer for part in record.values())
        return None if coded else records
    made: list[list[Record]] = []
    for layer in records:
        found = [record for one in layer if (record := rounding.in_place(one)) is not None]
        if len(found) < len(layer):
            return None
        made.append(found)
    return made


def needs_copy(share: Share) -> bool:
    """Whether experts can be read later only out of a packed copy, which is not given: the bytes stored are not a slot's."""
    if share.packed is not None or (share.quantise is None and not share.checkpoint.coded):
        return False
    return held_records(share) is None


def not_packed(field: str, share: Share) -> str:
    """Why that is so, and the way out."""
    option, other = "" if share.quantise is None else f" --quantise {share.quantise}", ""
    if share.quantise is None:
        why, how = "a checkpoint in fewer bits", "a copy in bfloat16, or rounded with --quantise"
        with suppress(InputError):  # of a GPU that has no fp8
            if held_records(replace(share, quantise="fp8")) is not None:
                other = "; --quantise fp8 needs none, for it is published so"
    else:
        why, how = "quantise", "a copy rounded beforehand"
    return (
        f"{field}: found less room than for all experts, with {why} but without packed, expected {how}: "
        f"coterie pack MODEL --out DIR{option}, then --packed DIR{other}"
    )


def dtype_of(name: str, config: Any, device: torch.device) -> torch.dtype:
    """What `--dtype` means for a model. Raises InputError for a name that is none."""
    if name == "auto":
        stored = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
        return torch.float32 if device.type == "cpu" or stored is None else stored
    if name not in DTYPES:
        raise InputError(f"--dtype: found {name!r}, expected auto, {', '.join(DTYPES)}")
    return DTYPES[name]
