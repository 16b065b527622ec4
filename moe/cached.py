"""A model whose experts stay on disk: the dense part is loaded, and all layers' experts come from one cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming, rename_source_key

from coterie.moe.families import ModelShape
from coterie.moe.layer import stacked
from coterie.moe.load import WEIGHT_DTYPES, expert_in
from coterie.moe.routers import Choose, choice_of, router_in
from coterie.offload.cache import ExpertCache
from coterie.offload.checkpoint import Checkpoint, TensorPlace, TensorSlice
from coterie.offload.coded import check_known
from coterie.offload.store import ExpertStore
from coterie.offload.tiers import HostTier, Misses
from coterie.offload.transfer import Part, Piece
from coterie.routing.errors import InputError
from coterie.routing.record import expert_modules

EMBEDDING = 32  # dimensions in which tokens are compared
LOOK_AHEAD_TOKENS = 4  # of more, what the routers would pick is no guess


@dataclass(frozen=True)
class LayerCache:
    """One layer's view of the cache. local: the model's numbers of the experts that this rank computes, by place.

    following: the next layer, None for the last one; router: weights of this layer's own `[E, H]`, and how it chooses by them,
    None where it has none that are so simple.
    """

    cache: ExpertCache
    layer: int
    local: tuple[int, ...]
    router: torch.Tensor | None = None
    choose: Choose | None = None
    following: LayerCache | None = None

    def look_ahead(self, x: torch.Tensor, ids: torch.Tensor) -> None:
        """Expect in the next layer what its router would pick for x `[T, H]`, this layer's input; ids `[T, K]` are this one's.

        The state changes little from one layer to the next: three in four of the experts are those (Eliseev and Mazur 2023).
        Many tokens together pick nearly all that they could: what most of them would comes first. The router is asked once this
        layer's own experts are being read.
        """
        following, picks = self.following, ids.cpu().numpy()
        elsewhere = len(self.local) < self.cache.experts
        self.cache.routed(self.layer, np.where(np.isin(picks, self.local), picks, -1) if elsewhere else picks)
        if following is None:
            return
        sure = len(x) > LOOK_AHEAD_TOKENS

        def picked() -> list[int]:
            if following.choose is None or not (sure or self.cache.guesser.asks()):
                return []
            chosen = following.choose(x).flatten()
            if len(x) > 1:
                times = torch.bincount(chosen, minlength=self.cache.experts)
                chosen = times.argsort(descending=True, stable=True)[: int((times > 0).sum())]
            here = set(following.local)
            return [expert for expert in chosen.tolist() if expert in here]

        self.cache.expect(following.layer, picked, sure)

    @property
    def experts(self) -> int:
        """How many can be asked for."""
        return len(self.local)

    def announce(self, places: Sequence[int]) -> None:
        """All that a step asks for, by place."""
        self.cache.announce(self.layer, [self.local[p] for p in places])

    def arrivals(self, places: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
        """(position in `places`, slot) as they come; `ExpertCache.arrivals`."""
        return self.cache.arrivals(self.layer, [self.local[p] for p in places])

    def on_host(self, places: Sequence[int], rows: Sequence[int]) -> AbstractContextManager[dict[int, int]]:
        """Which are to be computed on the host, by position in `places`, and in which of its slots; `ExpertCache.on_host`."""
        return self.cache.on_host(self.layer, [self.local[p] for p in places], rows)


def index_experts(shape: ModelShape, empty: nn.Module, checkpoint: Checkpoint) -> ExpertStore:
    """Every expert's bytes in the checkpoint, in place: stacked along dimension 0, or a tensor per expert and projection.

    Raises InputError, naming the tensor, for weights that would have to be converted otherwise, or are missing.
    """
    transforms = get_model_conversion_mapping(empty)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state = empty.state_dict()
    place_of = {name: index for index, name in enumerate(shape.expert_names.values())}
    found: dict[tuple[int, int, str], dict[int, _Found]] = {}
    for name, place in checkpoint.tensors.items():
        target, pattern = rename_source_key(name, renamings, converters, empty.base_model_prefix, state)
        module, _, parameter = target.rpartition(".")
        if module not in place_of or target not in state or state[target].ndim == 0:
            continue
        check_known(name, place)
        if place.dtype not in WEIGHT_DTYPES:
            raise InputError(f"{place.file}: tensor {name!r}: found {place.dtype}, expected float32, bfloat16 or float16")
        layer = place_of[module]
        if pattern is not None and "*" in pattern:
            order = _order(f"{place.file}: tensor {name!r}", pattern, converters)
            piece = Piece(place.file, place.offset, place.length)
            coded = None if place.code is None else checkpoint.slice(name)
            found.setdefault((layer, expert_in(name), parameter), {})[order] = _Found(place, piece, coded)
        elif place.shape[:1] == (shape.num_experts,) and pattern is None:
            size = place.length // shape.num_experts
            for expert in range(shape.num_experts):
                piece = Piece(place.file, place.offset + expert * size, size)
                coded = None if place.code is None else checkpoint.slice(name, (expert,))
                found.setdefault((layer, expert, parameter), {})[0] = _Found(place, piece, coded)
        else:
            raise _not_by_expert(f"{place.file}: tensor {name!r}")
    records = [
        [_record(shape, state, module, layer, expert, found) for expert in range(shape.num_experts)]
        for layer, module in enumerate(shape.expert_names.values())
    ]
    _check_alike(shape, records)
    return ExpertStore(records, checkpoint.counter, versions=checkpoint.versions)


def _check_alike(shape: ModelShape, records: Sequence[Sequence[Mapping[str, Part]]]) -> None:
    """Raises InputError unless all layers' experts are of one shape: any of them may come to lie in any slot."""
    first = {name: part.shape for name, part in records[0][0].items()}
    for layer, of_layer in zip(shape.layer_ids, records, strict=True):
        for name, part in of_layer[0].items():
            if part.shape != first.get(name):
                raise InputError(
                    f"{shape.folder}: layer {layer}: {name}: found experts of shape {list(part.shape)}, expected "
                    f"{list(first.get(name, ()))} as in layer {shape.layer_ids[0]}; on disk they must be alike"
                )


def _order(tensor: str, pattern: str, converters: list[Any]) -> int:
    """Which of the tensors put together this one is. Raises InputError for conversions other than stacking and joining."""
    for converter in converters:
        sources = list(converter.source_patterns)
        if pattern not in sources:
            continue
        kinds = [(type(op), getattr(op, "dim", None)) for op in converter.operations]
        if kinds == [(MergeModulelist, 0)] or kinds == [(MergeModulelist, 0), (Concatenate, 1)]:
            return sources.index(pattern)
        break
    raise _not_by_expert(tensor)


def _not_by_expert(tensor: str) -> InputError:
    why = "cannot be read expert by expert, which --quantise, and memory for less than all experts, need"
    return InputError(
        f"{tensor}: {why}; run without --quantise, with --memory for all experts, on more ranks or a larger machine"
    )


@dataclass(frozen=True)
class _Found:
    """A tensor with a piece of an expert's parameter. coded: what that is worked out from, if it is not the piece itself."""

    place: TensorPlace
    piece: Piece
    coded: TensorSlice | None


def _record(
    shape: ModelShape, state: dict[str, Any], module: str, layer: int, expert: int,
    found: dict[tuple[int, int, str], dict[int, _Found]],
) -> dict[str, Part]:  # fmt: skip
    made = {}
    for parameter in [n.rpartition(".")[2] for n in state if n.rpartition(".")[0] == module and state[n].ndim > 1]:
        pieces = found.get((layer, expert, parameter), {})
        row = tuple(state[f"{module}.{parameter}"].shape[1:])
        dtypes = {one.place.dtype for one in pieces.values()}
        shapes = [_shape_of(one.place, one.piece) for one in pieces.values()]
        joined = [(sum(s[0] for s in shapes), *rest) for rest in {s[1:] for s in shapes}]
        if len(dtypes) != 1 or joined != [row]:
            found_here = " and ".join(str(list(s)) for s in shapes) or "nothing"
            raise InputError(
                f"{shape.folder}: expert {expert} of {module}.{parameter}: found {found_here}, expected shape {list(row)} in "
                f"one dtype; does config.json fit the weights?"
            )
        in_order = [pieces[i] for i in sorted(pieces)]
        coded = tuple(one.coded for one in in_order if one.coded is not None)
        made[parameter] = Part(next(iter(dtypes)), row, tuple(one.piece for one in in_order), coded)
    return made


def _shape_of(place: TensorPlace, piece: Piece) -> tuple[int, ...]:
    """Of one expert's part: a tensor, or a row of a stack."""
    return place.shape if piece.length == place.length else place.shape[1:]


def attach_cache(model: nn.Module, cache: ExpertCache, local: Sequence[tuple[int, ...]]) -> None:
    """Let the experts modules of `model` compute from the cache. local: by layer, this rank's experts."""
    parents = {id(child): parent for parent in model.modules() for child in parent.children()}
    following: LayerCache | None = None
    modules = [module for _, module in expert_modules(model).values()]
    for layer in range(len(modules) - 1, -1, -1):
        router = router_in(parents[id(modules[layer])], cache.experts)
        weights, choose = (None, None) if router is None else (router.weight, choice_of(router, cache.top_k))
        following = LayerCache(cache, layer, local[layer], weights, choose, following)
        modules[layer].coterie_cache = following  # type: ignore[assignment]


def attach_embeddings(model: Any, cache: ExpertCache) -> None:
    """Let the cache know which tokens are alike: by their embeddings, of which a fixed random projection keeps what matters."""
    weight = model.get_input_embeddings().weight
    drawn = torch.randn(weight.shape[1], EMBEDDING, generator=torch.Generator().manual_seed(0))
    projection = drawn.to(weight.device, weight.dtype)

    def embed(ids: Sequence[int]) -> np.ndarray:
        with torch.inference_mode():
            found: np.ndarray = (weight[torch.tensor(ids, device=weight.device)] @ projection).float().cpu().numpy()
        return found

    cache.guesser.token.embed = embed


MISSES = ("fetch", "cpu", "auto")


def misses_of(kind: str, cache: ExpertCache, module: nn.Module) -> Misses | None:
    """What `--misses` asks for on a GPU, None to fetch all; `auto` measures an expert's copy and a row of `module` on the host.

    Nothing may be cached yet.
    """
    tier = cache.source
    if kind == "fetch" or not isinstance(tier, HostTier):
        return None
    cache.misses = Misses()
    if kind == "cpu":
        return cache.misses
    host, slot = stacked(module).host, {name: pool[0] for name, pool in cache.pools.items()}
    assert host is not None
    with tier.held(0, [0]) as (place,):
        row = torch.zeros(1, host.first.shape[1 if host.transposed else 2], dtype=next(iter(tier.pools.values())).dtype)
        return Misses(_median(lambda: host.run(place, row)), _median(lambda: tier.start(0, 0, slot).result()))


def _median(call: Callable[[], object]) -> float:
    found = []
    for _ in range(7):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return statistics.median(found)
