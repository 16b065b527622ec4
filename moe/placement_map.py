"""A plan turned into what one rank needs: which experts to load, and where every expert is to be found."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from coterie.moe.families import ModelShape
from coterie.placement.baselines import contiguous
from coterie.placement.cost import destinations
from coterie.placement.plan import PlacementPlan, slots_from_assignment
from coterie.placement.topology import Topology
from coterie.routing.errors import InputError

OF_MODEL = ("num_experts", "layer_ids", "model")  # what a plan says of the model it is for


@dataclass(frozen=True)
class LayerMap:
    """One layer as one rank sees it.

    local: ascending ids of the experts this rank holds, in the order in which its weights are stacked.
    destination: int64 `[E]`, the rank to which this rank sends a token for each expert.
    position: int64 `[E]`, where the expert is in that rank's stack.
    routes: int64 `[ranks, E]`, `destination` of every rank; here: int64 `[E]`, places in this rank's stack, -1 if not held.
    """

    local: tuple[int, ...]
    destination: torch.Tensor
    position: torch.Tensor
    routes: torch.Tensor
    here: torch.Tensor

    def to(self, device: torch.device) -> LayerMap:
        """The same with its tensors on `device`."""
        return LayerMap(self.local, *(t.to(device) for t in (self.destination, self.position, self.routes, self.here)))


def contiguous_plan(shape: ModelShape, ranks: int, nodes: int = 1) -> PlacementPlan:
    """Experts in order over the ranks: what is used without a plan."""
    if ranks > shape.num_experts:
        raise InputError(
            f"ranks: found {ranks} processes, expected at most {shape.num_experts}: the model has that many experts"
        )
    assignment = contiguous(np.zeros((len(shape.layer_ids), shape.num_experts)), ranks)
    slots = slots_from_assignment(assignment, ranks, -(-shape.num_experts // ranks))
    return PlacementPlan(slots, shape.num_experts, shape.layer_ids, Topology(nodes, ranks // nodes), model=shape.name)


def check_plan(plan: PlacementPlan, shape: ModelShape, ranks: int) -> None:
    """Raises InputError unless the plan is for this model (or does not name one) and this number of processes."""
    if plan.ranks != ranks:
        raise InputError(
            f"ranks: the plan is for {plan.ranks}, found {ranks} processes; start {plan.ranks}, or plan for {ranks}"
        )
    actuals = (shape.num_experts, shape.layer_ids, shape.name)
    for field, actual in zip(OF_MODEL, actuals, strict=True):
        planned = getattr(plan, field)
        if planned != actual and planned != "":
            raise InputError(
                f"{field}: the plan has {planned!r}, expected {actual!r} as the model; plan from a trace of this model"
            )


def layer_maps(plan: PlacementPlan, rank: int, one_copy: bool = False) -> list[LayerMap]:
    """The plan's layers as `rank` sees them; as `layer_map`."""
    return [layer_map(holds, plan.topology, rank, one_copy) for holds in plan.holds()]


def layer_map(holds: NDArray[np.bool_], topology: Topology, rank: int, one_copy: bool = False) -> LayerMap:
    """One layer as `rank` sees it. holds: bool `[E, ranks]`, which rank holds which expert.

    one_copy: the first copy of an expert computes for all ranks, so that what is summed where does not depend on the sender.
    """
    used = holds & (np.cumsum(holds, axis=1) == 1) if one_copy else holds
    routes = destinations(used, topology).astype(np.int64)
    order = np.where(holds, np.cumsum(holds, axis=0) - 1, -1)  # [E, ranks]: place among the ascending experts of each rank
    position = order[np.arange(len(holds)), routes[rank]]
    tensors = (torch.from_numpy(a.astype(np.int64)) for a in (routes[rank], position, routes, order[:, rank]))
    return LayerMap(tuple(holds[:, rank].nonzero()[0].tolist()), *tensors)
