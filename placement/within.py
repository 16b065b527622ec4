"""Re-planning: a search within the budget, then the best mix of it with plans from scratch.

Here for objectives that are sums over layers (dispatch, time, load); `within_chain.py` for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from coterie.placement import balance, replicas
from coterie.placement.budget import EPS, Board, Option, combined
from coterie.placement.cost import homes_of, layer_seconds, layer_use
from coterie.placement.moving import Array, Given, Holds, Layer, State, holds_of, state_of
from coterie.placement.pricing import Even, Rows
from coterie.placement.problem import Problem, dispatch_problem, one_hot
from coterie.placement.rows import Filling, TimeScore, fill_dispatch, fill_time
from coterie.placement.task import Task, replaced
from coterie.placement.timing import LayerTime
from coterie.routing.errors import InputError

JUDGED = 8  # placements of a layer that are evaluated before one is chosen
TRIED = 24  # swaps of a layer that are evaluated before one is taken
PATIENCE = 6  # steps without gain after which a walk by evaluation ends
T = TypeVar("T")
TILTS = (0.0, 4.0, 16.0)  # how strongly the worst scenario is weighed up


@dataclass
class Search:
    """One re-planning. fresh: plans from scratch under several names of the ranks; refused: why there is none.

    mended: the old placement within what is required, once a board was made.
    """

    task: Task
    old: NDArray[np.bool_]
    budget: int
    given: list[Given]
    fresh: list[NDArray[np.bool_]]
    refused: InputError | None
    mended: NDArray[np.bool_] | None = None

    def board(self, layers: Sequence[Layer], linked: bool = False, begin: NDArray[np.bool_] | None = None) -> Board:
        """The layers within their limits, as far as may be demanded; or at `begin`, which is."""
        board = Board(layers, self.budget, linked, np.random.default_rng(self.task.request.seed))
        if begin is not None:
            board.begin([self.state(holds) for holds in begin])
            return board
        if board.mend() > EPS:
            raise self._too_few(board)
        self.mended = self.holds(board.best)
        return board

    def kept(self, holds: NDArray[np.bool_], required: bool = False) -> bool:
        """Whether a placement is within every limit, or only those that are required."""
        layers = [Layer(given) for given in self.given]
        for layer, placed in zip(layers, holds, strict=True):
            layer.place(self.state(placed))
        return all(layer.excess(required) <= EPS for layer in layers)

    def state(self, holds: Holds) -> State:
        """A layer's columns."""
        return state_of(holds, self.task.slots)

    def holds(self, states: Sequence[object]) -> NDArray[np.bool_]:
        """bool `[L, E, ranks]` from a state of every layer."""
        experts = self.old.shape[1]
        return np.stack([holds_of(s, experts, self.task.ranks) for s in states if isinstance(s, State)])

    def moves(self, holds: NDArray[np.bool_]) -> int:
        """How many moves a placement is away, of one layer or all."""
        return int((holds & ~self.old).sum())

    def whole(self) -> list[NDArray[np.bool_]]:
        """Plans from scratch that are within the budget as they are."""
        return [holds for holds in self.fresh if self.moves(holds) <= self.budget]

    def rounds(self) -> int | None:
        """Of the search, None for as many as fit."""
        return self.task.request.iterations

    def _too_few(self, board: Board) -> InputError:
        """What is to be said when the budget does not mend the old plan."""
        memory = any(layer.excess_of(~layer.shared) > EPS for layer in board.layers)
        what = "memory_bytes of --topology" if memory else "--max-load"
        board.budget = self.old.size
        for layer in board.layers:
            layer.place(self.state(~layer.new[:-1].astype(bool)))
        if board.mend() > EPS and not self.fresh:
            return self.refused or InputError(f"--from: {what} is exceeded and was not mended; plan anew without --from")
        needed = sum(
            layer.moves if layer.excess(True) <= EPS else int((self.fresh[-1][n] & ~self.old[n]).sum())
            for n, layer in enumerate(board.layers)
        )
        return InputError(
            f"--max-moves: found {self.budget}, but the plan of --from exceeds {what} on these recordings, and {needed} moves "
            f"were found to mend it; give {needed} or more, or a larger limit"
        )


def _independent(
    s: Search, layers: Sequence[Layer], value: Callable[[int, Holds], float], exact: bool = True
) -> NDArray[np.bool_]:
    """Objectives that are sums over layers; value: of a layer, as it is evaluated; exact: what prices tell, up to homes."""
    board = s.board(layers)
    first = [layer.state for layer in layers]
    board.improve(s.task.deadline.share(0.85), s.rounds())
    options = []
    for number, best in enumerate(board.best):
        states = [first[number], best, *(s.state(holds[number]) for holds in s.fresh)]
        if not s.task.deadline.passed():
            states += _near(board, number)
        if not exact:
            states += [t for begin in states[:2] for t in _descent(s, layers[number], begin, partial(value, number))]
        options.append(_valued(s, number, states, value))
    return s.holds([o.what for o in combined(options, s.budget)])


def _near(board: Board, number: int) -> list[State]:
    """Placements seen of a layer that are better than all with fewer moves; at most JUDGED, those nearest to the best mix."""
    options = sorted(board.seen[number].values(), key=lambda o: o.moves)
    better = [o for n, o in enumerate(options) if all(o.cost < p.cost for p in options[:n])]
    board.layers[number].place(board.best[number])
    chosen = board.layers[number].moves
    return [o.what for o in sorted(better, key=lambda o: abs(o.moves - chosen))[:JUDGED] if isinstance(o.what, State)]


def _descent(s: Search, layer: Layer, begin: State, value: Callable[[Holds], float]) -> list[State]:
    """What swaps of one layer lead to, from `begin` to the lowest evaluated value met, and PATIENCE steps beyond."""

    def following(state: State) -> list[State]:
        layer.place(state)
        return [swapped(state, i, j) for i, j in layer.promising(TRIED, s.budget - layer.moves)]

    return walk(s, begin, following, lambda state: value(s.holds([state])[0]), lambda state: state.here.tobytes())


def swapped(state: State, i: int, j: int) -> State:
    """Columns i and j change places."""
    here = state.here.copy()
    here[[i, j]] = here[[j, i]]
    return State(state.expert, here)


def walk(
    s: Search, begin: T, following: Callable[[T], Iterable[T]], value: Callable[[T], float], name: Callable[[T], bytes]
) -> list[T]:
    """From `begin` always to the best of what follows that was not visited, until PATIENCE steps or the time are over."""
    path, visited = [begin], {name(begin)}
    lowest, quiet = value(begin), 0
    while quiet < PATIENCE and not s.task.deadline.passed():
        best, least = None, np.inf
        for trial in following(path[-1]):
            if name(trial) not in visited and not s.task.deadline.passed() and (found := value(trial)) < least:
                best, least = trial, found
        if best is None:
            break
        path.append(best)
        visited.add(name(best))
        quiet = 0 if least < lowest - 1e-12 * abs(lowest) else quiet + 1
        lowest = min(least, lowest)
    return path


def _valued(s: Search, number: int, states: Sequence[State], value: Callable[[int, Holds], float]) -> list[Option]:
    found: dict[bytes, Option] = {}
    for state in states:
        holds = holds_of(state, *s.old.shape[1:])
        if holds.tobytes() not in found:
            found[holds.tobytes()] = Option(value(number, holds), int((holds & ~s.old[number]).sum()), state)
    return list(found.values())


def row_layers(s: Search, problem: Problem, load: Array | None = None, score: TimeScore | None = None) -> list[Layer]:
    """Every layer of a dispatch problem; load, score: see `pricing.Rows`."""
    parts = zip(problem.members, problem.prices, s.given, strict=True)
    return [Rows(m, p, None if load is None else load[n], score, g) for n, (m, p, g) in enumerate(parts)]


def _priced(s: Search) -> Problem:
    t, exact = s.task, s.task.request.exact
    return dispatch_problem(t.patterns(exact), t.row_weights, t.ranks, t.slots, (), exact)


def dispatch(s: Search) -> NDArray[np.bool_]:
    """Distinct ranks, and copies where moves and slots are left."""
    found = _independent(s, row_layers(s, _priced(s)), lambda n, holds: _evaluated(s.task, n, holds)[0], not s.task.copied)
    return _copied(s, found, fill_dispatch)


def time(s: Search) -> NDArray[np.bool_]:
    """Predicted seconds, and copies where moves and slots are left."""
    problem = _priced(s)
    model = LayerTime(s.task.request.topology, s.task.scenarios, s.task.weights)
    layers = row_layers(s, problem, model.weight, TimeScore(model, problem.scale * problem.layers))
    found = _independent(s, layers, lambda number, holds: _evaluated(s.task, number, holds)[1], False)
    return _copied(s, found, fill_time)


def _copied(s: Search, found: NDArray[np.bool_], fill: Filling) -> NDArray[np.bool_]:
    """The best of what was found, with copies made of the moves that are left, and of the start with copies alone."""
    assert s.mended is not None
    if not s.task.copied:
        return found
    return min((found, *(_filled(s, begin, fill) for begin in (found, s.mended))), key=s.task.evaluated)


def _filled(s: Search, begin: NDArray[np.bool_], fill: Filling) -> NDArray[np.bool_]:
    """With copies, the same share of the moves that are left for every layer."""
    left, layers, within = s.budget - s.moves(begin), len(begin), replicas.within_limits(s.task)

    def allowed(layer: int, holds: Holds) -> bool:
        share = left // layers + (layer < left % layers)
        moves = int((holds & ~s.old[layer]).sum() - (begin[layer] & ~s.old[layer]).sum())
        return moves <= share and within(layer, holds)

    return fill(s.task, begin, allowed) if left > 0 else begin


def _evaluated(task: Task, number: int, holds: Holds) -> tuple[float, float]:
    """Rows per token and seconds of one layer by the dispatcher's own rules, of the mixture; holds: bool `[E, ranks]`."""
    topology = task.request.topology.of_layer(number)
    rows = seconds = 0.0
    for scenario, weight in zip(task.scenarios, task.weights, strict=True):
        trace = scenario.trace
        assert trace is not None
        homes = homes_of(trace, task.ranks)
        needed, pairs, touched = layer_use(trace.expert_ids[:, number], holds, homes, topology)
        sent = one_hot(homes, task.ranks).astype(np.float32).T @ needed.astype(np.float32)
        np.fill_diagonal(sent, 0)
        batch = sent[None].astype(np.float64), pairs[None], touched[None]
        rows += weight * float(sent.sum(dtype=np.float64)) / trace.tokens
        seconds += weight * float(layer_seconds(*batch, trace.phase, topology)[0])
    return rows, seconds


def load(s: Search) -> NDArray[np.bool_]:
    """The busiest rank over the mean, of the scenarios' mean or worst."""
    task = s.task
    loads = np.stack([scenario.load for scenario in task.scenarios])
    worst = task.request.robust == "worst" and len(loads) > 1
    relative = balance.relative_loads(loads, task.ranks)

    mix = np.full(len(loads), 1 / len(loads))
    layers = [Even(relative[:, n], mix, g) for n, g in enumerate(s.given)]
    found = [*s.whole(), s.holds(s.board(layers).best)]
    tilts = TILTS if worst else TILTS[:1]
    for turn, tilt in enumerate(tilts):
        peaks = _peaks(relative, found[-1])
        mix = mix * np.exp(tilt * (peaks / max(peaks.max(), 1e-300) - 1))
        found.append(_evened(s, relative, mix / mix.sum(), 1 / (len(tilts) - turn)))
    return min(found, key=task.evaluated)


def _evened(s: Search, relative: Array, mix: Array, share: float) -> NDArray[np.bool_]:
    """The best for one mixture of the scenarios; mix `[scenarios]`, share: of the time that is left."""
    layers = [Even(relative[:, n], mix, g) for n, g in enumerate(s.given)]
    part = replace(s, task=replaced(s.task, s.task.deadline.share(share)))
    return _independent(part, layers, lambda n, holds: float(mix @ _peaks(relative[:, n : n + 1], holds[None])))


def _peaks(relative: Array, holds: NDArray[np.bool_]) -> Array:
    """Busiest over mean of each scenario, averaged over layers, `[scenarios]`; relative `[scenarios, L, E]`."""
    share = holds / holds.sum(2, keepdims=True)
    return np.asarray(np.einsum("sle,ler->slr", relative, share, optimize=True).max(2).mean(1))
