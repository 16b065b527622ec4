"""Plans home ranks and placement in turns: sequences go where their experts are, experts to where their sequences are.

The placement that a solver made without homes is the start. In each turn every home's rows are predicted from the sequences'
token ids where they were recorded (what tokens of that id send on average), else from their first tokens (ridge regression on
the experts they use); the sequences are assigned, the ranks of every layer are named anew for these homes and the tabu search
goes on with them known; what lowers the evaluated number is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from coterie.placement import bounds, copies, local, rows
from coterie.placement.baselines import Assignment
from coterie.placement.company import clustered, picks
from coterie.placement.cost import destinations, needed_ranks
from coterie.placement.deadline import Deadline
from coterie.placement.homes import HomeClass, Homes, assign, first_tokens
from coterie.placement.plan import PlacementPlan, slots_from_holders
from coterie.placement.prices import Prices, minimised
from coterie.placement.problem import Problem, dispatch_problem, on_nodes
from coterie.placement.scenarios import summarised
from coterie.placement.task import Solution, Task
from coterie.routing.errors import InputError, require
from coterie.routing.trace import RoutingTrace

Array = NDArray[np.float64]
OBJECTIVES = ("dispatch", "time")
TOKENS = 8  # looked at by default; the figures that speak for it are in docs/planning.md
WATCHED = 128  # (layer, expert) pairs at most that classes are told by
RIDGE = 1.0  # of the mean square of a sequence's uses
WATCHED_IDS = 1024  # token ids at most that classes are told by
PRIOR = 20.0  # tokens of the mean kind that every id is taken to have been seen with besides
SAMPLE = 2000  # sequences at most that the classes are learnt from, evenly taken
DIGITS = 6  # of the numbers in the file
STALLED = 3  # turns without a better plan before it ends
SEARCH_SHARE = 0.7  # of the time; the rest is for the bound


@dataclass(frozen=True)
class _State:
    """holds: bool `[L, E, ranks]`; at: the home of each token, int64 `[tokens]`, by scenario.

    value: the objective as evaluated; paid: what is minimised, the same but for `prices.Prices`.
    """

    holds: NDArray[np.bool_]
    homes: Homes
    at: tuple[NDArray[np.int64], ...]
    value: float
    paid: float


def check_objective(objective: str) -> None:
    """Raises InputError unless homes matter to the objective and are planned for it."""
    require(objective in OBJECTIVES, "--homes", f"--objective {objective} beside it", " or ".join(OBJECTIVES))


def alternate(task: Task, start: Solution, tokens: int | None = TOKENS) -> Solution:
    """`start` with homes, or a better placement with better ones; its bound holds whatever the homes.

    Experts only move where they have no copies and no old plan limits the moves; homes are planned in any case.
    """
    check_objective(task.request.objective_name)
    teller = teller_for(_traces(task), tokens)
    best, made = _told(task, start.holds, teller), start.iterations
    if not (task.copied or task.request.previous):
        searching = task.deadline.share(SEARCH_SHARE)
        best, made = _turns(task, best, best, teller, made, searching.share(0.5))
        if not searching.passed():
            begin = clustered(_homed(task, best.at), _traces(task), task.prices, start.holds.argmax(2))
            company = _told(task, copies.held(begin, task.ranks), teller)
            best, made = _turns(task, company, best, teller, made, searching)
    bound = start.lower_bound
    if bound is not None and task.request.objective_name == "dispatch":  # None: of a plan that a default load cap is beyond
        bound = homes_bound(task, best.holds, task.deadline)
    return replace(start, holds=best.holds, lower_bound=bound, iterations=made, homes=best.homes)


def _turns(task: Task, here: _State, best: _State, teller: Teller, made: int, deadline: Deadline) -> tuple[_State, int]:
    """Homes and placement in turns from `here` until the deadline or until nothing is gained: the best, and iterations made."""
    quiet, least = 0, np.inf
    most = task.request.iterations
    while not (deadline.passed() or quiet == STALLED or (most is not None and made >= most)):
        moved, more = _moved(task, here, task.request.seed + made, deadline)
        here = _told(task, copies.held(moved, task.ranks), teller)
        made, quiet = made + more, 0 if here.paid < least * (1 - 1e-6) else quiet + 1
        least = min(least, here.paid)
        best = min(best, here, key=lambda state: state.paid)
        task.progress(best.value, None, made)
    return best, made


def _traces(task: Task) -> list[RoutingTrace]:
    traces = [s.trace for s in task.scenarios if s.trace is not None]
    if len(traces) < len(task.scenarios):
        raise InputError("--homes: found load statistics, expected recordings of single tokens")
    return traces


def _told(task: Task, holds: NDArray[np.bool_], teller: Teller) -> _State:
    """The placement with the homes that suit it."""
    traces, topology = _traces(task), task.request.topology
    homes = teller.learn([token_rows(trace, holds, task.prices) for trace in traces])
    layer_ids = traces[0].layer_ids
    plan = PlacementPlan(
        slots_from_holders(holds, task.slots), holds.shape[1], layer_ids, topology, strategy=task.request.strategy, homes=homes
    )
    value = summarised(plan, task.scenarios, task.request.objective_name, task.request.robust)
    paid = minimised(plan, task.scenarios, task.request)
    return _State(holds, homes, tuple(assign(homes, trace) for trace in traces), value, paid)


def token_rows(trace: RoutingTrace, holds: NDArray[np.bool_], prices: Prices) -> NDArray[np.float32]:
    """What every token sends if a rank is its home, over all layers, float32 `[tokens, ranks]`.

    In rows; where it matters where they go, in rows inside a node.
    """
    topology = prices.topology
    rows = np.zeros((trace.tokens, topology.ranks), dtype=np.float32)
    copied = bool((holds.sum(2) > 1).any())
    by_rank, by_node = prices.by_rank.astype(np.float32), prices.by_node.astype(np.float32)
    for layer in range(trace.layers):
        table, ids = destinations(holds[layer], topology), trace.expert_ids[:, layer]
        for home in range(topology.ranks):
            if copied or home == 0:
                needed = needed_ranks(np.where(ids < 0, -1, table[home, ids]), topology.ranks)
                hosts, entered = needed.astype(np.float32), on_nodes(needed, topology.ranks_per_node).astype(np.float32)
            rows[:, home] += hosts @ by_rank[home] + entered @ by_node[home]
    return rows


def rows_by_home(trace: RoutingTrace, rows: NDArray[np.float32]) -> Array:
    """`token_rows` per token and layer of every sequence, float64 `[sequences, ranks]`, by ascending id."""
    _, sequence, lengths = np.unique(trace.sequence_ids, return_inverse=True, return_counts=True)
    summed = np.stack([np.bincount(sequence, weights=column) for column in rows.T], axis=1)
    return np.asarray(summed / (lengths[:, None] * trace.layers))


class Teller(Protocol):
    """Learns to tell how many rows a sequence sends, by home."""

    def learn(self, rows: Sequence[NDArray[np.float32]]) -> Homes:
        """Classes for rows as `token_rows` counts them, of every trace."""
        ...


def teller_for(traces: Sequence[RoutingTrace], tokens: int | None) -> Teller:
    """By token ids where all traces have them: they are known before anything runs. tokens: else, how many are looked at."""
    if all(trace.token_ids is not None for trace in traces):
        return _IdTeller(traces)
    return _ExpertTeller(traces, tokens)


class _IdTeller:
    """From the ids of its tokens: each is expected to send what tokens of that id sent on average, drawn to the mean of all."""

    def __init__(self, traces: Sequence[RoutingTrace]) -> None:
        self.layers = traces[0].layers
        ids = np.concatenate([trace.token_ids for trace in traces if trace.token_ids is not None])
        self.ids, self.number, self.counts = np.unique(ids, return_inverse=True, return_counts=True)

    def learn(self, rows: Sequence[NDArray[np.float32]]) -> Homes:
        """As `Teller`."""
        each = np.concatenate(rows).astype(np.float64) / self.layers
        mean = each.mean(0)
        sums = np.stack([np.bincount(self.number, weights=column) for column in (each - mean).T], axis=1)
        weights = sums / (self.counts[:, None] + PRIOR)  # [ids, ranks]
        apart = weights - weights.mean(1, keepdims=True)  # what all homes have in common tells nothing
        strength = self.counts * (apart**2).sum(1)
        watched = np.sort(np.argsort(-strength, kind="stable")[:WATCHED_IDS])
        watched = watched[strength[watched] > 0]
        kept, level = np.round(weights[watched], DIGITS), np.round(mean, DIGITS)
        classes = (HomeClass(rank, float(level[rank]), tuple(kept[:, rank].tolist())) for rank in range(len(mean)))
        return Homes(tuple(classes), token_ids=tuple(self.ids[watched].tolist()))


class _ExpertTeller:
    """From the experts of its first tokens: ridge regression.

    uses: float32 `[sequences, L * E]`, how often a looked-at token uses an expert, less the mean over sequences.
    """

    def __init__(self, traces: Sequence[RoutingTrace], tokens: int | None) -> None:
        self.traces = traces
        self.tokens, self.layer_ids, self.num_experts = tokens, traces[0].layer_ids, traces[0].num_experts
        self.sampled = _sample(sum(len(np.unique(trace.sequence_ids)) for trace in traces))
        found = np.concatenate([_uses(trace, tokens) for trace in traces])[self.sampled]
        self.mean = found.mean(0)
        self.uses = found - self.mean
        self.kernel = (self.uses @ self.uses.T).astype(np.float64)

    def learn(self, rows: Sequence[NDArray[np.float32]]) -> Homes:
        """As `Teller`."""
        by_sequence = [rows_by_home(trace, part) for trace, part in zip(self.traces, rows, strict=True)]
        return self._learnt(np.concatenate(by_sequence)[self.sampled])

    def _learnt(self, rows: Array) -> Homes:
        centred = rows - rows.mean(0)
        size = len(rows)
        ridge = RIDGE * max(float(np.trace(self.kernel)) / size, 1e-12)
        dense = self.uses.T @ np.linalg.solve(self.kernel + ridge * np.eye(size), centred)
        strength = (dense**2).sum(1) * self.uses.var(0)
        watched = np.sort(np.argsort(-strength, kind="stable")[:WATCHED])
        watched = watched[strength[watched] > 0]
        few = self.uses[:, watched].astype(np.float64)
        weights = np.round(np.linalg.solve(few.T @ few + ridge * np.eye(len(watched)), few.T @ centred), DIGITS)
        level = np.round(rows.mean(0) - self.mean[watched] @ weights, DIGITS)
        classes = (HomeClass(r, float(level[r]), tuple(weights[:, r].tolist())) for r in range(rows.shape[1]))
        experts = ((self.layer_ids[w // self.num_experts], int(w % self.num_experts)) for w in watched)
        return Homes(tuple(classes), tuple(experts), self.tokens)


def _sample(size: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, size - 1, min(size, SAMPLE)).astype(np.int64))


def _uses(trace: RoutingTrace, tokens: int | None) -> NDArray[np.float32]:
    """How often a looked-at token uses each expert, float32 `[sequences, L * E]`, by ascending id."""
    looked = trace.select(first_tokens(trace, tokens))
    lengths = np.unique(looked.sequence_ids, return_counts=True)[1]
    return np.asarray((picks(looked) / lengths[:, None, None]).reshape(len(lengths), -1), dtype=np.float32)


def _moved(task: Task, here: _State, seed: int, deadline: Deadline) -> tuple[Assignment, int]:
    """A placement for these homes, searched from the present one, and the search's iterations."""
    problem = _homed(task, here.at)
    begin = rows.at_home(problem, here.holds.argmax(2))
    score = None
    if task.request.objective_name == "time":
        problem, score = rows.timed(task, problem)
    return local.search(problem, seed, 1, deadline, begin=begin, score=score)


def _homed(task: Task, at: Sequence[NDArray[np.int64]]) -> Problem:
    """The dispatch problem in which tokens have these homes."""
    homed = [s.patterns_by_home(task.ranks, homes) for s, homes in zip(task.scenarios, at, strict=True)]
    return dispatch_problem(homed, task.row_weights, task.ranks, task.slots, task.limits, True, task.prices)


def homes_bound(task: Task, holds: NDArray[np.bool_], deadline: Deadline) -> float:
    """Rows per token and layer that no placement goes below, whatever the homes.

    A token that uses experts at all saves one row at most by its home, so the bound on the ranks that tokens need, less one
    each. holds: the placement whose line of the envelope is taken, see `bounds.patterns_bound`.
    """
    if task.ranks == 1:
        return 0.0
    free = dispatch_problem(task.patterns(), task.weights, task.ranks, task.slots, task.limits, known_homes=False)
    whole = replace(free, prices=tuple(prices * (task.ranks / (task.ranks - 1)) for prices in free.prices))
    at_home = sum(float(p[m.any(1), 0].sum()) for m, p in zip(whole.members, whole.prices, strict=True))
    counted = bounds.rows_with_copies(free)
    if not task.copied and task.prove:
        counted = max(counted, bounds.patterns_bound(whole, holds.argmax(2), deadline) - at_home)
    return counted * whole.scale
