"""What rows cost by where they go: a row to another node in rows that stay inside one, by the links of the topology.

Where tokens return home, bytes wait for two kinds of links. A node's link is shared by its ranks, so that a rank has
`between / ranks_per_node` of it; a row that leaves the node takes as much of that as `price` rows inside a node take of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from coterie.placement.cost import CostReport
from coterie.placement.plan import PlacementPlan
from coterie.placement.scenarios import ROBUST, Scenario, summarised
from coterie.placement.topology import Topology

if TYPE_CHECKING:
    from coterie.placement.planner import PlanRequest

Array = NDArray[np.float64]
PRICED = ("all_to_all", "hierarchical")  # strategies whose rows are priced; no other sends rows by where experts live and home


@dataclass(frozen=True)
class Prices:
    """between: of a row that leaves its node, one inside being 1. once: such a row serves all ranks of the node it goes to
    (`hierarchical`): there it is handed on inside the node, as one row for each further rank.
    """

    topology: Topology
    between: float = 1.0
    once: bool = False

    @property
    def matter(self) -> bool:
        """Whether it makes a difference where a row goes."""
        return self.between > 1

    @property
    def tiered(self) -> bool:
        """Whether nodes have a price of their own beside that of ranks."""
        return self.once and self.matter

    @property
    def by_rank(self) -> Array:
        """Of a row from home rank to rank, `[ranks, ranks]`; 0 at home."""
        ranks = self.topology.ranks
        node = np.arange(ranks) // self.topology.ranks_per_node
        far = 1.0 if self.once else self.between
        prices = np.where(node[:, None] == node[None, :], 1.0, far)
        np.fill_diagonal(prices, 0.0)
        return prices

    @property
    def by_node(self) -> Array:
        """What a token pays besides for a node with some of its experts, by home rank, `[ranks, nodes]`; 0 for its own."""
        t = self.topology
        node = np.arange(t.ranks) // t.ranks_per_node
        extra = self.between - 1 if self.once else 0.0
        return np.where(node[:, None] == np.arange(t.nodes), 0.0, extra)

    def paid(self, report: CostReport) -> float:
        """Per token and layer, one exchange, in rows inside a node: rows, and what those that leave their node cost besides."""
        assert report.dispatch is not None
        return report.dispatch + (self.between - 1) * (report.node_rows or 0.0) / 2


def link_price(topology: Topology) -> float:
    """What a row between nodes costs in rows inside one: a rank's bytes per second inside over its part of the node's link."""
    if topology.nodes == 1 or topology.ranks_per_node == 1:
        return 1.0  # all rows go the same way
    share = topology.between.bytes_per_second / topology.ranks_per_node
    return max(1.0, topology.within.bytes_per_second / share)


def prices_of(request: PlanRequest) -> Prices:
    """What the search has to pay: ranks alone count with `exact`, near an old plan, and for other objectives than dispatch."""
    counted = request.exact or request.previous is not None or request.objective_name != "dispatch"
    if counted or request.strategy not in PRICED:
        return Prices(request.topology)
    return Prices(request.topology, link_price(request.topology), request.strategy == "hierarchical")


def minimised_name(request: PlanRequest) -> str:
    """What `minimised` counts, in words."""
    return request.objective_name + (" at the links' prices" if prices_of(request).matter else "")


def minimised(plan: PlacementPlan, scenarios: Sequence[Scenario], request: PlanRequest) -> float:
    """What the search minimises, over the scenarios: the objective as `evaluate` prints it, or rows at their links' prices."""
    prices = prices_of(request)
    if not prices.matter:
        return summarised(plan, scenarios, request.objective_name, request.robust)
    return float(ROBUST[request.robust]([prices.paid(s.report(plan)) for s in scenarios]))
