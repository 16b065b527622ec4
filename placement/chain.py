"""Search for `hops`: layers form a chain, and a layer given its neighbours is easy.

Given its neighbours, a layer's best placement is a transportation problem (solved exactly), and swaps of disjoint pairs of
its experts change the cost independently of each other. So all odd layers, then all even ones, are annealed at once, each
by E/2 swaps at a time. Several annealed placements are recombined by a Viterbi pass over a pool of layer partitions, the
ranks of the next layer renamed as is best (exact for the pool); the search then goes on from the best found, at a lower
temperature. The first anneals are short, each twice as long as the one before, so that a search that is cut off early has
something. In a large problem the temperature is the one at which an anneal just does not spoil what it starts from. Without
limits it starts from what `starts.py` finds. Deterministic for a seed and a number of iterations.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from coterie.placement import limits
from coterie.placement.baselines import Assignment
from coterie.placement.deadline import Deadline
from coterie.placement.problem import Problem, held_by
from coterie.placement.recombine import Pool
from coterie.placement.starts import coupled, grown, transport
from coterie.placement.traffic import Traffic

STARTS = 4  # anneals from scratch before the pool is first recombined; every STARTS-th one is from scratch later, too
LONG = 200  # sweeps that an anneal from scratch is worth; a larger problem has no time for them and starts from the grown chain
FAR = 16  # in a larger problem every FAR-th anneal only is from scratch
POOL = 12
PATIENCE = 60  # anneals without a better placement after which it ends
HOT, WARM, COLD = 0.5, 0.2, 0.01  # temperatures, in the mean traffic of an expert with the next layer
LARGE_WARM = 0.25  # in place of WARM at first; few sweeps have to be as hot as is of use, which depends on the problem
WORSE, STEP = 0.002, 1.04  # it then falls by STEP after an anneal that ended more than WORSE above the best, else it rises
ROUNDS, LARGE_ROUNDS = 8, 16  # swap rounds per refresh of the gains; more where there are few refreshes
SWEEPS = (40, 1500)
EPS, SLIGHT = 1e-12, 1e-9  # of all traffic, what rounding makes of a sum, and of a swap's price in single precision
WORK = 1.3e9  # multiply-adds of all gain refreshes of one anneal

Report = Callable[[float, int], None]  # cost of the best placement so far, iterations made


def search(
    problem: Problem, seed: int, iterations: int | None, deadline: Deadline, target: float = 0.0, report: Report | None = None
) -> tuple[Assignment, int]:
    """The best placement found, int64 `[L, E]`, and the iterations (anneals) made.

    It stops early at the deadline, at a cost of `target`, and when nothing better turns up. Raises nothing: where no start
    within the limits was found, what is returned is not feasible.
    """
    padded = problem.padded()
    traffic, rng = Traffic(padded), np.random.default_rng(seed)
    first = limits.start(padded)
    pool = Pool(traffic)
    best = polish(traffic, first, deadline) if padded.limits else _started(traffic, pool, target, deadline)
    best_cost, kept, made = traffic.cost(best), padded.feasible(best), 0
    members, large, found_at = [best], is_large(padded), 0
    steps = sweeps(padded.layers, padded.experts, padded.ranks)
    warm = LARGE_WARM if large else WARM
    for made in itertools.count():
        done = kept and (best_cost <= target + EPS * traffic.total or made - found_at > PATIENCE)
        if done or made == iterations or deadline.passed():
            break
        fresh = made > 0 and made % FAR == 0 if large else made < STARTS or made % STARTS == 0
        begin = _shuffled(padded, first, rng) if fresh else best
        slow = steps if large else max(SWEEPS[0], steps >> max(0, STARTS - made))
        trial = polish(traffic, anneal(traffic, begin, rng, HOT if fresh else warm, slow, deadline), deadline)
        if large and not fresh:
            warm = max(COLD, warm / STEP) if traffic.cost(trial) > (1 + WORSE) * best_cost else min(HOT, warm * STEP)
        members = [best, trial, *members[1 : POOL - 1]]
        if padded.interchangeable and (large or made + 1 >= STARTS):
            trial = min(trial, polish(traffic, pool.best(members), deadline), key=traffic.cost)
        if (not padded.feasible(trial), cost := traffic.cost(trial)) < (not kept, best_cost):
            best, best_cost, kept, found_at = trial, cost, padded.feasible(trial), made
        if report is not None:
            report(best_cost, made + 1)
    return best[:, : problem.experts], made


def _started(traffic: Traffic, pool: Pool, target: float, deadline: Deadline) -> Assignment:
    """Where a search without limits starts: the best chain of one that is grown and of couples of layers, polished."""
    problem = traffic.problem
    start = polish(traffic, grown(problem), deadline)
    if problem.layers < 3 or traffic.cost(start) <= target + EPS * traffic.total or deadline.passed():
        return start
    couples = polish(traffic, pool.best([coupled(problem, first) for first in (0, 1)]), deadline)
    return polish(traffic, pool.best([start, couples]), deadline)


def anneal(
    traffic: Traffic, begin: Assignment, rng: np.random.Generator, hot: float, steps: int, deadline: Deadline
) -> Assignment:
    """Simulated annealing from temperature `hot` to COLD in so many sweeps of parallel swaps; keeps within the limits that
    `begin` keeps.
    """
    problem, current = traffic.problem, begin.copy()
    unit = traffic.total / max(problem.layers - 1, 1) / problem.experts
    rounds = LARGE_ROUNDS if is_large(problem) else ROUNDS
    for step in range(steps):
        if deadline.passed():
            break
        temperature = unit * hot * (COLD / hot) ** (step / max(steps - 1, 1))
        for parity in (0, 1):
            layers = np.arange(parity, problem.layers, 2)
            if len(layers):
                kept = traffic.gains(current, layers)
                for _ in range(rounds):
                    _swap_round(problem, current, layers, kept, temperature, rng)
    return current


def is_large(problem: Problem) -> bool:
    """Whether there is no time for anneals from scratch."""
    return sweeps(problem.layers, problem.experts, problem.ranks) < LONG


def sweeps(layers: int, experts: int, ranks: int) -> int:
    """How many times one anneal of a problem of this size visits every layer."""
    return int(np.clip(WORK / (layers * experts**2 * ranks), *SWEEPS))


def _swap_round(
    problem: Problem, current: Assignment, layers: NDArray[np.int64], kept: NDArray[np.float32], temperature: float,
    rng: np.random.Generator,
) -> None:  # fmt: skip
    """Propose E/2 disjoint swaps in each of `layers`, in place; kept: `gains` of these layers.

    The same pairs of numbers in every layer: what experts of different layers have the same number says nothing.
    """
    here, row = current[layers], np.arange(len(layers))[:, None]
    half = here.shape[1] // 2
    one, two = np.split(rng.permutation(here.shape[1])[: 2 * half], 2)
    a, b = here[:, one], here[:, two]
    flat, count = kept.reshape(-1), kept.shape[1]
    at_one, at_two = (row * count + one) * problem.ranks, (row * count + two) * problem.ranks
    worse = flat.take(at_one + a) + flat.take(at_two + b) - flat.take(at_one + b) - flat.take(at_two + a)
    accepted = (a != b) & (worse < temperature * rng.standard_exponential(worse.shape, dtype=np.float32))
    for limit in problem.limits:
        weights, caps = limit.weights[layers], limit.caps[layers]
        _reject_excess(accepted, weights[:, two] - weights[:, one], a, b, _held(weights, here, problem.ranks), caps)
    here[:, one], here[:, two] = np.where(accepted, b, a), np.where(accepted, a, b)
    current[layers] = here


def _held(weights: NDArray[np.float64], here: Assignment, ranks: int) -> NDArray[np.float64]:
    flat = (np.arange(len(here))[:, None] * ranks + here).ravel()
    return held_by(flat, weights.ravel(), len(here) * ranks).reshape(len(here), ranks)


def _reject_excess(
    accepted: NDArray[np.bool_], change: NDArray[np.float64], a: Assignment, b: Assignment, held: NDArray[np.float64],
    caps: NDArray[np.float64],
) -> None:  # fmt: skip
    """Takes back, in place, swaps that push a rank over its cap; change: what rank a gains and b loses, `[layers, pairs]`."""
    count, ranks = held.shape
    row = np.arange(count)[:, None]
    ceiling = np.maximum(caps * (1 + 1e-9), held)
    for _ in range(4):
        moved = np.where(accepted, change, 0.0)
        delta = np.bincount((row * ranks + a).ravel(), weights=moved.ravel(), minlength=count * ranks)
        delta -= np.bincount((row * ranks + b).ravel(), weights=moved.ravel(), minlength=count * ranks)
        over = held + delta.reshape(count, ranks) > ceiling
        if not over.any():
            return
        accepted &= ~((over[row, a] & (change > 0)) | (over[row, b] & (change < 0)))
    accepted[over.any(1)] = False


def polish(traffic: Traffic, assignment: Assignment, deadline: Deadline) -> Assignment:
    """Each layer best given its neighbours, until nothing changes: exact without limits, else by swaps.

    Every second layer, then those between them: each pass then sees what both neighbours have become.
    """
    problem = traffic.problem
    current, settled = assignment.copy(), np.zeros(problem.layers, dtype=bool)  # settled: best given its present neighbours
    before = np.inf
    order = [*range(0, problem.layers, 2), *range(1, problem.layers, 2)]
    while (cost := traffic.cost(current)) < before - EPS * traffic.total and not deadline.passed():
        before = cost
        for layer in order:
            if not settled[layer]:
                _settle(traffic, current, settled, layer)
    return current


def _settle(traffic: Traffic, current: Assignment, settled: NDArray[np.bool_], layer: int) -> None:
    """One layer placed best given its neighbours, in place; if it changes they are settled no more."""
    problem = traffic.problem
    kept = traffic.gains(current, np.array([layer]))[0].astype(np.float64)
    was = current[layer].copy()
    if problem.limits:
        _descend(problem, current, layer, kept, SLIGHT * traffic.total)
    else:
        current[layer] = transport(kept, problem.slots)
    if not np.array_equal(was, current[layer]):
        settled[max(0, layer - 1) : layer + 2] = False
    settled[layer] = True


def _descend(problem: Problem, current: Assignment, layer: int, kept: NDArray[np.float64], least: float) -> None:
    """Best allowed swap of the layer until none helps by `least`; kept `[E, ranks]` does not depend on the layer itself."""
    while True:
        here = current[layer]
        at_other = kept[:, here]
        own = np.diagonal(at_other)
        delta = own[:, None] + own[None, :] - at_other - at_other.T
        delta[~allowed_swaps(problem, here, layer)] = np.inf
        e, f = np.unravel_index(delta.argmin(), delta.shape)
        if not delta[e, f] < -least:
            return
        here[e], here[f] = here[f], here[e]


def allowed_swaps(problem: Problem, here: NDArray[np.int64], layer: int) -> NDArray[np.bool_]:
    """Swaps between two ranks that leave both within every limit, or under what they carry already; bool `[E, E]`."""
    allowed: NDArray[np.bool_] = here[:, None] != here[None, :]
    for limit in problem.limits:
        weight = limit.weights[layer]
        held = np.bincount(here, weights=weight, minlength=problem.ranks)
        ceiling = np.maximum(limit.caps[layer] * (1 + 1e-9), held)
        fits = held[here][:, None] - weight[:, None] + weight[None, :] <= ceiling[here][:, None]  # e's rank, f instead
        allowed &= fits & fits.T
    return allowed


def _shuffled(problem: Problem, start: Assignment, rng: np.random.Generator) -> Assignment:
    """A random placement; within limits, the start with its ranks renamed (annealing then mixes it)."""
    if problem.limits:
        return start.copy()
    return np.argsort(rng.random(start.shape), axis=1) % problem.ranks
