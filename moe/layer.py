"""What happens to a token between the router's answer and the experts layer's output.

Registered with transformers' experts interface under the name `coterie`: any family that goes through the interface calls
`experts_forward` instead of its own loop, with no other change.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from coterie.kernels.activations import Activation, recognise
from coterie.kernels.compiled import as_text, experts_op
from coterie.kernels.experts import StackedExperts, compute_experts
from coterie.moe.placement_map import LayerMap
from coterie.moe.strategy import Dispatched, Local, Overlapped, Strategy
from coterie.routing.errors import InputError
from coterie.routing.record import expert_modules

IMPLEMENTATION = "coterie"
MOST_ROWS = 128  # of a product that must round alike in any batch (moe/invariant.py)


@dataclass
class StepContext:
    """What the experts interface does not show of the tokens in the current call.

    live: int64, places of tokens, or None for all: the others are padding or belong to finished sequences, are not
    dispatched and get a zero output. tokens: how many each rank dispatches, or None: they are asked in every layer.
    strategy: how. Set by the generation loop before each call. routed: `[tokens, H]` or None: what the experts answer, where
    it is known already.
    loads: int64 `[layers, E]`, how often each expert was picked here, or None: not counted. least_rows: of a product.
    told: is to be told before each call what the live tokens are, each with those before it, the newest first; or None.
    """

    strategy: Strategy = field(default_factory=Local)
    live: torch.Tensor | None = None
    tokens: tuple[int, ...] | None = None
    routed: torch.Tensor | None = None
    loads: torch.Tensor | None = None
    least_rows: int = 1
    told: Callable[[Sequence[tuple[int, ...]]], None] | None = None

    def count(self, index: int, ids: torch.Tensor) -> None:
        """Add routed ids to the loads, if they are wanted; index: the layer's place among those with experts."""
        if self.loads is not None:
            self.loads[index] += torch.bincount(ids.reshape(-1) + 1, minlength=self.loads.shape[1] + 1)[1:]


@dataclass(frozen=True)
class ExpertLayer:
    """One experts module's place in the job; stands on the module as `coterie_layer`."""

    map: LayerMap
    context: StepContext = field(default_factory=StepContext)
    index: int = 0


def attach(model: nn.Module, maps: list[LayerMap], strategy: Strategy) -> StepContext:
    """Tell every experts module of `model` its layer map (in layer order) and the strategy; returns their shared context."""
    context = StepContext(strategy)
    for index, (layer_map, (_, module)) in enumerate(zip(maps, expert_modules(model).values(), strict=True)):
        module.coterie_layer = ExpertLayer(layer_map, context, index)  # type: ignore[assignment]
    return context


def stacked(module: Any, least_rows: int = 1, ask: bool = True) -> StackedExperts:
    """A view of an experts module's weights as the kernels take them. ask: find out what its activation is."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    stacks = getattr(module, "coterie_products", None)  # of moe/quantise.py
    cache = getattr(module, "coterie_cache", None)  # of moe/cached.py
    held = module if cache is None else SimpleNamespace(**cache.cache.pools)
    made = StackedExperts(
        first=getattr(held, first) if stacks is None else stacks[0],
        second=held.down_proj if stacks is None else stacks[1],
        activation=module._apply_gate if module.has_gate else module.act_fn,
        known=_known_activation(module) if ask else None,
        first_bias=getattr(held, f"{first}_bias") if module.has_bias else None,
        second_bias=held.down_proj_bias if module.has_bias else None,
        transposed=module.is_transposed and stacks is None,
        finish=module.post_expert_norm if getattr(module, "has_post_expert_norm", False) else None,
        residency=cache,
        least_rows=least_rows,
        most_rows=MOST_ROWS if least_rows > 1 else 1 << 30,
    )
    if cache is None or cache.cache.misses is None:
        return made
    there = cache.cache.source.pools
    host = replace(
        made, first=there[first], second=there["down_proj"], first_bias=there.get(f"{first}_bias"),
        second_bias=there.get("down_proj_bias"), finish=None, residency=None,
    )  # fmt: skip
    return replace(made, host=host)


def _known_activation(module: Any) -> Activation | None:
    """What the module does between its products, as data; None where it is not known. Found out once."""
    if "_coterie_activation" not in module.__dict__:
        limits, alphas = (
            [float(v) for name, v in vars(module).items() if name.endswith(suffix) and isinstance(v, int | float)]
            for suffix in ("limit", "alpha")
        )
        own = module._apply_gate if module.has_gate else module.act_fn
        module._coterie_activation = recognise(own, module.has_gate, limits, alphas)
    known: Activation | None = module._coterie_activation
    return known


def _is_trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters(recurse=False))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _as_operator(number: int) -> str | None:
    """The activation for `experts_op`; None where the operator cannot carry the module. Asked while a graph is made.

    number: the module's `id`, for torch 2.11 takes no module for a constant; whoever makes the graph has the module.
    """
    module = ctypes.cast(number, ctypes.py_object).value
    known = (
        None
        if hasattr(module, "coterie_products") or getattr(module, "has_post_expert_norm", False)
        else _known_activation(module)
    )
    return None if known is None else as_text(known)


def experts_forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """hidden_states `[tokens, H]`, top_k_index and top_k_weights `[tokens, K]`; returns `[tokens, H]`.

    Ids outside the model's experts are slots without computation. On a model that coterie did not load, all experts are
    here and the kernels run as they are; where gradients are wanted the module's own loop does, for the kernels have none.
    """
    layer: ExpertLayer | None = getattr(module, "coterie_layer", None)
    if layer is not None and layer.context.routed is not None:
        return layer.context.routed
    if torch.is_grad_enabled() and (hidden_states.requires_grad or (layer is None and _is_trained(module))):
        if layer is not None:
            raise InputError("hidden_states: found some that want gradients, which a model that coterie loaded has none of; "
                             "expected torch.no_grad(), or from_pretrained after coterie.register()")  # fmt: skip
        own = type(module).forward.__wrapped__  # type: ignore[attr-defined]
        out: torch.Tensor = own(module, hidden_states, top_k_index, top_k_weights)
        return out
    compiling = layer is None and torch.compiler.is_compiling()
    operator = _as_operator(id(module)) if compiling else None
    experts = stacked(module, 1 if layer is None else layer.context.least_rows, ask=not compiling)
    if layer is None:
        ids = top_k_index.masked_fill(top_k_index >= experts.first.shape[0], -1)
        if operator is not None:
            return experts_op(experts, hidden_states, ids, top_k_weights, operator)
        return compute_experts(experts, hidden_states, ids, top_k_weights)
    ids = top_k_index.masked_fill(top_k_index >= len(layer.map.destination), -1)
    if layer.context.live is None:
        return _run(layer, experts, hidden_states, ids, top_k_weights)
    rows = layer.context.live
    out = torch.zeros_like(hidden_states)
    out[rows] = _run(layer, experts, hidden_states[rows], ids[rows], top_k_weights[rows])
    return out


def _run(
    layer: ExpertLayer, experts: StackedExperts, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    strategy = layer.context.strategy
    traffic = strategy.group.traffic
    tokens = layer.context.tokens
    if tokens is None:
        tokens = tuple(n for (n,) in strategy.group.agree([len(x)]))
    if not any(tokens):
        return torch.zeros_like(x)
    traffic.layer = layer.index
    layer.context.count(layer.index, ids)

    if experts.residency is not None:
        experts.residency.look_ahead(x, ids)

    def compute(dispatched: Dispatched) -> torch.Tensor:
        with traffic.span("experts"):
            return compute_experts(experts, dispatched.rows, dispatched.ids, dispatched.weights)

    if isinstance(strategy, Overlapped):
        out = strategy.run(x, ids, weights, layer.map, compute)
    else:
        dispatched = strategy.dispatch(x, ids, weights, layer.map, tokens)
        out = strategy.combine(compute(dispatched), dispatched)
    traffic.layer = -1
    return out


def register() -> None:
    """Let transformers know `experts_implementation="coterie"`. Importing this module does so, too."""
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


register()
