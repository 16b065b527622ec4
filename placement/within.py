"""Re-planning under each objective: a search within the budget, then the best mix of it with plans from scratch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from coterie.placement import anchors, balance
from coterie.placement.budget import EPS, Board, Option, combined
from coterie.placement.cost import destinations, homes_of, layer_seconds, needed_ranks
from coterie.placement.moving import Array, Given, Holds, Layer, State, holds_of, state_of
from coterie.placement.pricing import Chain, Even, Rows
from coterie.placement.problem import Problem, dispatch_problem, hops_problem, one_hot
from coterie.placement.rows import TimeScore
from coterie.placement.task import Task, replaced
from coterie.placement.timing import LayerTime
from coterie.placement.topology import Topology
from coterie.routing.errors import InputError

ROUNDS = 100  # of the coherent search, at most
STALLED = 6
REST = 0.15  # of the time limit, for the descent at its end
JUDGED = 8  # placements of a layer that are evaluated before one is chosen
TRIED = 24  # swaps of a layer that are evaluated before one is taken
PATIENCE = 6  # steps without gain after which a walk by evaluation ends
T = TypeVar("T")
SWEEPS = 9  # prices of a move that are tried
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


def _hops(s: Search) -> NDArray[np.bool_]:
    task = s.task
    transitions = np.asarray(hops_problem(task.transitions(), task.weights, task.ranks, task.slots, ()).transitions)
    everyone = np.zeros(s.old.shape, np.float32)
    counts = transitions.astype(np.float32)
    board = s.board([Chain(n, counts, everyone, g) for n, g in enumerate(s.given)], linked=True)
    pool = [s.holds(board.best), *s.fresh]
    board.improve(task.deadline.share(0.3), s.rounds())
    pool.append(s.holds(board.best))
    if not s.task.limits and not task.copied and s.budget > 0:
        pool += _swept(s, [layer for layer in board.layers if isinstance(layer, Chain)], max(board.price, 1e-9 * counts.sum()))
    mixed = _linked_mix(s, transitions, pool)
    board.begin([s.state(holds) for holds in mixed])
    board.improve(task.deadline, s.rounds())
    return min([s.holds(board.best), *s.whole()], key=lambda holds: _apart(transitions, holds))


def _swept(s: Search, layers: Sequence[Chain], price: float) -> list[NDArray[np.bool_]]:
    """Chains in which every layer is best given its neighbours, a move costing a price near that at which the budget is met."""
    found: list[NDArray[np.bool_]] = []
    low, high = 0.0, np.inf
    for _ in range(SWEEPS):
        if s.task.deadline.passed():
            break
        for layer, old in zip(layers, s.old, strict=True):
            layer.place(s.state(old))
        for layer in 2 * [*layers, *layers[-2:0:-1]]:
            layer.settle(price)
        found.append(s.holds([layer.state for layer in layers]))
        low, high = (price, high) if s.moves(found[-1]) > s.budget else (low, price)
        price = (low + high) / 2 if np.isfinite(high) else 2 * low
    return found


def _apart(transitions: Array, holds: NDArray[np.bool_]) -> float:
    return float(sum(_pair(t, holds[n], holds[n + 1]) for n, t in enumerate(transitions)))


def _pair(transitions: Array, one: Holds, two: Holds) -> float:
    return float((transitions * ((one.astype(np.float32) @ two.T.astype(np.float32)) == 0)).sum())


def _pairs(transitions: Array, ones: NDArray[np.bool_], twos: NDArray[np.bool_]) -> Array:
    """`_pair` of every two placements of neighbouring layers, `[ones, twos]`."""
    if ones.sum() + twos.sum() > (len(ones) + len(twos)) * ones.shape[1]:  # copies: what meets on two ranks counts once
        return np.array([[_pair(transitions, one, two) for two in twos] for one in ones])
    ahead = np.einsum("aer,ef->afr", ones.astype(np.float64), transitions, optimize=True)
    return np.asarray(transitions.sum() - np.tensordot(ahead, twos.astype(np.float64), ([1, 2], [1, 2])))


def _linked_mix(s: Search, transitions: Array, pool: Sequence[NDArray[np.bool_]]) -> NDArray[np.bool_]:
    """The best chain of layers, each from any member of the pool, within the budget."""
    options = []
    for number in range(len(s.old)):
        different = {p[number].tobytes(): p[number] for p in pool}
        options.append([Option(0.0, int((h & ~s.old[number]).sum()), s.state(h)) for h in different.values()])
    held = [s.holds([o.what for o in layer]) for layer in options]
    between = [_pairs(t, held[n], held[n + 1]) for n, t in enumerate(transitions)]
    return s.holds([o.what for o in combined(options, s.budget, between)])


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
        return [_swapped(state, i, j) for i, j in layer.promising(TRIED, s.budget - layer.moves)]

    return _walk(s, begin, following, lambda state: value(s.holds([state])[0]), lambda state: state.here.tobytes())


def _swapped(state: State, i: int, j: int) -> State:
    here = state.here.copy()
    here[[i, j]] = here[[j, i]]
    return State(state.expert, here)


def _walk(
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


def _rows(s: Search, problem: Problem, load: Array | None = None, score: TimeScore | None = None) -> list[Layer]:
    parts = zip(problem.members, problem.prices, s.given, strict=True)
    return [Rows(m, p, None if load is None else load[n], score, n, g) for n, (m, p, g) in enumerate(parts)]


def _priced(s: Search) -> Problem:
    t, exact = s.task, s.task.request.exact
    return dispatch_problem(t.patterns(exact), t.row_weights, t.ranks, t.slots, (), exact)


def _dispatch(s: Search) -> NDArray[np.bool_]:
    return _independent(s, _rows(s, _priced(s)), lambda number, holds: _evaluated(s.task, number, holds)[0], not s.task.copied)


def _time(s: Search) -> NDArray[np.bool_]:
    problem = _priced(s)
    model = LayerTime(s.task.request.topology, s.task.scenarios, s.task.weights)
    layers = _rows(s, problem, model.weight, TimeScore(model, problem.scale * problem.layers))
    return _independent(s, layers, lambda number, holds: _evaluated(s.task, number, holds)[1], False)


def _evaluated(task: Task, number: int, holds: Holds) -> tuple[float, float]:
    """Rows per token and seconds of one layer by the dispatcher's own rules, of the mixture; holds: bool `[E, ranks]`."""
    topology = task.request.topology.of_layer(number)
    table, rows, seconds = _destinations(holds, topology), 0.0, 0.0
    for scenario, weight in zip(task.scenarios, task.weights, strict=True):
        trace = scenario.trace
        assert trace is not None
        homes, ids = homes_of(trace, task.ranks), trace.expert_ids[:, number]
        used = table[homes[:, None], ids].astype(np.int64)
        used[ids < 0] = -1
        sent = one_hot(homes, task.ranks).astype(np.float32).T @ needed_ranks(used, task.ranks).astype(np.float32)
        np.fill_diagonal(sent, 0)
        at = (used * holds.shape[0] + ids)[used >= 0]
        pairs = np.bincount(at, minlength=holds.size).reshape(task.ranks, -1)
        batch = sent[None].astype(np.float64), pairs.sum(1)[None].astype(np.float64), (pairs > 0).sum(1)[None]
        rows += weight * float(sent.sum(dtype=np.float64)) / trace.tokens
        seconds += weight * float(layer_seconds(*batch, trace.phase, topology)[0])
    return rows, seconds


def _destinations(holds: Holds, topology: Topology) -> NDArray[np.integer]:
    if holds.sum() == len(holds):  # without copies there is nothing to choose
        return np.broadcast_to(holds.argmax(1), (topology.ranks, len(holds)))
    return destinations(holds, topology)


def _load(s: Search) -> NDArray[np.bool_]:
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


def _coherent(s: Search) -> NDArray[np.bool_]:
    """Layers priced with the anchors of the moment as homes; only what lowers the rows as evaluated is kept."""
    task = s.task

    def rows(holds: NDArray[np.bool_]) -> float:
        return anchors.mean_rows(holds, task.scenarios, task.weights, task.request.topology)

    start = s.holds(s.board(_rows(s, anchors.anchored(task, s.old))).best)
    if s.budget == 0:
        return start
    early = replace(s, task=replaced(task, task.deadline.share(0.2)))
    best = min([start, _hops(early), *s.whole()], key=rows)
    least, quiet = rows(best), 0
    for number in range(ROUNDS if s.rounds() is None else s.rounds() or 0):
        if task.deadline.left() < REST * task.request.time_limit or quiet == STALLED:
            break
        trial = _anchored_trial(s, best, number, quiet)
        value = rows(trial)
        quiet = 0 if value < least - 1e-12 else quiet + 1
        if value < least:
            best, least = trial, value
    return min((_lowered(s, holds, rows) for holds in (best, start)), key=rows)


def _lowered(s: Search, holds: NDArray[np.bool_], rows: Callable[[NDArray[np.bool_]], float]) -> NDArray[np.bool_]:
    """Goes by the evaluated rows themselves: swaps of any layer, those priced lowest with the present anchors."""

    def following(whole: NDArray[np.bool_]) -> Iterator[NDArray[np.bool_]]:
        for number, layer in enumerate(_rows(s, anchors.anchored(s.task, whole))):
            layer.place(s.state(whole[number]))
            for i, j in layer.promising(TRIED, s.budget - s.moves(whole)):
                trial = whole.copy()
                trial[number] = s.holds([_swapped(layer.state, i, j)])[0]
                yield trial

    return min(_walk(s, holds, following, rows, lambda whole: whole.tobytes()), key=rows)


def _anchored_trial(s: Search, best: NDArray[np.bool_], number: int, quiet: int) -> NDArray[np.bool_]:
    """A placement that is better if anchors stay as they are; after failures only every second layer changes."""
    board = s.board(_rows(s, anchors.anchored(s.task, best)), begin=best)
    board.rng = np.random.default_rng([s.task.request.seed, number])
    board.improve(s.task.deadline.share(0.3), 2)
    options = []
    for n, layer in enumerate(board.layers):
        states = [s.state(best[n])]
        if not quiet or n % 2 == number % 2:
            states += [o.what for o in board.seen[n].values() if isinstance(o.what, State)]
            states += [s.state(holds[n]) for holds in s.fresh]
        found = []
        for state in states:
            layer.place(state)
            found.append(Option(layer.cost(), layer.moves, state))
        options.append(found)
    return s.holds([o.what for o in combined(options, s.budget)])


FINDERS: dict[str, Callable[[Search], NDArray[np.bool_]]] = {
    "hops": _hops, "coherent": _coherent, "dispatch": _dispatch, "load": _load, "time": _time,
}  # fmt: skip
