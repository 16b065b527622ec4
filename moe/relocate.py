"""Taking over a new plan while text is being generated: experts move a few per step, a layer changes when all of its are there.

What a rank sends in a step is bounded in bytes, too: over TCP rows of tokens wait behind it, so large experts go in parts.
Every rank computes the same list of transfers from the two plans and changes a layer at the same step boundary, so that whom
tokens are sent to and what is loaded there always agree, and text does not change.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from coterie.moe.collectives import Group
from coterie.moe.placement_map import layer_map
from coterie.placement.cost import destinations
from coterie.placement.plan import PlacementPlan
from coterie.routing.errors import InputError
from coterie.routing.record import expert_modules

STEP_BYTES = 1 << 20  # of experts that a rank sends in a step: 8 ms at 1 Gbit/s
STACKED = ("gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias")


@dataclass(frozen=True)
class Transfer:
    """One expert's weights to go from a rank that holds them to one that will. layer: its place among those with experts."""

    layer: int
    expert: int
    source: int
    to: int


def transfers(old: PlacementPlan, new: PlacementPlan) -> list[Transfer]:
    """What must be copied, by layer; from the copy that the receiving rank sends tokens to.

    Raises InputError if the plans are not of the same model and number of ranks.
    """
    for name in ("num_experts", "layer_ids", "ranks"):
        if getattr(old, name) != getattr(new, name):
            raise InputError(f"--replan: {name}: found {getattr(new, name)!r}, expected {getattr(old, name)!r} as is running")
    before, after = old.holds(), new.holds()
    found = []
    for layer in range(len(old.layer_ids)):
        routes = destinations(before[layer], old.topology)
        wanted = after[layer] & ~before[layer]
        found += [Transfer(layer, int(e), int(routes[r, e]), int(r)) for e, r in zip(*wanted.nonzero(), strict=True)]
    return found


def chunks(moves: list[Transfer], per_step: int) -> list[list[Transfer]]:
    """What goes in each step: transfers of one layer, so that no rank sends or receives more than `per_step` experts."""
    made: list[list[Transfer]] = []
    for move in moves:
        last = made[-1] if made else []
        fits = last and last[0].layer == move.layer
        busy = max(sum(t.source == move.source for t in last), sum(t.to == move.to for t in last))
        if fits and busy < per_step:
            last.append(move)
        else:
            made.append([move])
    return made


class _Moving:
    """A chunk under way. mine: the experts that this rank sends, by receiver, `[n, bytes]`; came: what it gets, by sender."""

    def __init__(self, chunk: list[Transfer], mine: torch.Tensor, receive: int, per_step: int) -> None:
        self.chunk, self.mine = chunk, mine
        width = mine.shape[1]
        self.parts = max(1, -(-width * per_step // STEP_BYTES))
        self.part = 0
        self.came = mine.new_empty((receive, width))

    def columns(self) -> slice:
        """Which bytes of every expert go now."""
        width = self.mine.shape[1]
        return slice(width * self.part // self.parts, width * (self.part + 1) // self.parts)


class Relocation:
    """The way from the plan that runs to another. Every rank calls `step` at every step boundary until it returns True."""

    def __init__(self, model: nn.Module, group: Group, old: PlacementPlan, new: PlacementPlan, per_step: int = 2) -> None:
        self.per_step = per_step
        self.modules: list[Any] = [module for _, module in expert_modules(model).values()]
        self.group = group
        self.new = new
        moves = transfers(old, new)
        self.count = len(moves)
        self._chunks = chunks(moves, per_step)
        self._holds = new.holds()
        self._open = {layer: sum(t.layer == layer for t in moves) for layer in range(len(self.modules))}
        self._here: dict[tuple[int, int], torch.Tensor] = {}
        self._moving: _Moving | None = None
        self._waiting: Callable[[], torch.Tensor] | None = None

    def step(self) -> bool:
        """Take in what has come, change complete layers, send the next few; True when nothing is left."""
        self.rest()
        for layer in [layer for layer, left in self._open.items() if left == 0]:
            del self._open[layer]
            self._change(layer)
        if self._moving is None and self._chunks:
            self._moving = self._begun(self._chunks.pop(0))
        if self._moving is not None:
            self._send(self._moving)
        return not self._open

    def rest(self) -> None:
        """Wait for what is under way, so that nothing is; the next step goes on from there. Every rank must call it."""
        if self._waiting is None or self._moving is None:
            return
        moving, came = self._moving, self._waiting()
        self._waiting = None
        moving.came[:, moving.columns()] = came
        moving.part += 1
        if moving.part == moving.parts:
            self._moving = None
            self._arrived(moving)

    def _begun(self, chunk: list[Transfer]) -> _Moving:
        module = self.modules[chunk[0].layer]
        mine = sorted((t for t in chunk if t.source == self.group.rank), key=lambda t: t.to)
        rows = [packed(module, module.coterie_layer.map.local.index(t.expert)) for t in mine]
        nothing = torch.empty((0, expert_bytes(module)), dtype=torch.uint8, device=module.down_proj.device)
        receive = sum(t.to == self.group.rank for t in chunk)
        return _Moving(chunk, torch.stack(rows) if rows else nothing, receive, self.per_step)

    def _send(self, moving: _Moving) -> None:
        rank, size = self.group.rank, self.group.size
        send = [sum(t.source == rank and t.to == r for t in moving.chunk) for r in range(size)]
        receive = [sum(t.source == r and t.to == rank for t in moving.chunk) for r in range(size)]
        message = moving.mine[:, moving.columns()].contiguous()
        self._waiting = self.group.start_exchange(message, send, receive, "experts moved", beside=True)

    def _arrived(self, moving: _Moving) -> None:
        chunk = moving.chunk
        mine = sorted((t for t in chunk if t.to == self.group.rank), key=lambda t: t.source)
        for transfer, row in zip(mine, moving.came, strict=True):
            self._here[transfer.layer, transfer.expert] = row
        self._open[chunk[0].layer] -= len(chunk)

    def _change(self, layer: int) -> None:
        """This rank's stack and its map of one layer, from the old plan to the new one."""
        module = self.modules[layer]
        old = module.coterie_layer.map
        new = layer_map(self._holds[layer], self.new.topology, self.group.rank).to(module.down_proj.device)
        if new.local != old.local:
            rows = {e: self._here.pop((layer, e), None) for e in new.local}
            full = [packed(module, old.local.index(e)) if row is None else row for e, row in rows.items()]
            unpack_into(module, full)
        module.coterie_layer = replace(module.coterie_layer, map=new)


def stacked_names(module: nn.Module) -> list[str]:
    """The parameters of an experts module that have one row per expert."""
    return [name for name in STACKED if isinstance(getattr(module, name, None), nn.Parameter)]


def expert_bytes(module: nn.Module) -> int:
    """Of one expert's weights."""
    return sum(_row_bytes(getattr(module, name)) for name in stacked_names(module))


def _row_bytes(stack: torch.Tensor) -> int:
    return stack.element_size() * math.prod(stack.shape[1:])


def packed(module: nn.Module, place: int) -> torch.Tensor:
    """One expert's weights as uint8 `[expert_bytes]`."""
    rows = (getattr(module, name)[place].detach() for name in stacked_names(module))
    return torch.cat([row.contiguous().view(-1).view(torch.uint8) for row in rows])


def unpack_into(module: Any, rows: list[torch.Tensor]) -> None:
    """Make the module's stacks out of packed experts, in this order."""
    start = 0
    for name in stacked_names(module):
        old = getattr(module, name)
        size = _row_bytes(old)
        stack = old.new_empty((len(rows), *old.shape[1:]))
        for place, row in enumerate(rows):
            stack[place] = row[start : start + size].view(old.dtype).view(old.shape[1:])
        setattr(module, name, nn.Parameter(stack, requires_grad=False))
        start += size
    module.num_experts = len(rows)
