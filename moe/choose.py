"""Which strategy: measured links, the model's sizes and the plan's statistics in, predicted times and a choice out.

Predicted is what differs between strategies: the seconds that one layer of one step spends on communication, after the
linear model of Hockney (1994), seconds = latency + bytes / bandwidth, for each collective; and, for `replicated`, the dense
part of the layer that every rank then computes for all tokens. What ranks wait for each other beyond that is found by trying
steps of the model (moe/rehearsal.py): for the first strategy, and for those that are predicted to be about as fast as the best.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from coterie.moe.collectives import Group
from coterie.moe.strategy import (
    BESIDE,
    CHUNKS,
    AllGather,
    AllToAll,
    Coherent,
    Hierarchical,
    Local,
    Overlapped,
    Replicated,
    Strategy,
    goes_beside,
)
from coterie.moe.traits import Traits
from coterie.placement.topology import Link
from coterie.routing.errors import InputError

MADE: dict[str, Callable[[Group], Strategy]] = {
    "replicated": Replicated, "all_gather": AllGather, "all_to_all": AllToAll, "hierarchical": Hierarchical,
    "overlapped": Overlapped, "coherent": Coherent,
}  # fmt: skip
STRATEGIES = ("local", *MADE)
EQUAL = 1.07  # times the least seconds of a layer: of strategies so near, about what a trial is off by, the simplest is chosen
CLOSE = 1.25  # and so near they are tried before one is chosen
APART = 4  # times as many tokens in the larger of two steps that tell how time grows
TRIED = ("hierarchical", "overlapped", "all_gather", "coherent")  # beside all_to_all; `replicated` is another layout of a batch


@dataclass(frozen=True)
class Pace:
    """Seconds of a layer by a rank's tokens, from steps of two sizes (moe/rehearsal.py).

    Between and beyond them on their line; where the sizes are too near to each other for one, larger steps take as much longer
    as they are larger.
    """

    few: int
    few_seconds: float
    many: int
    many_seconds: float

    def seconds(self, tokens: int) -> float:
        """With that many tokens on every rank."""
        if tokens <= self.few:
            return self.few_seconds
        if self.many < APART * self.few:
            return self.many_seconds * max(1.0, tokens / self.many)
        share = (tokens - self.few) / (self.many - self.few)
        return self.few_seconds + share * (self.many_seconds - self.few_seconds)


@dataclass(frozen=True)
class Trial:
    """What steps of the model took, by layer with experts, of which there are `layers`.

    computing: all but exchanges; waits: of strategies that were tried, what exchanges took beyond what the links account for.
    """

    computing: Pace
    waits: Mapping[str, Pace]
    layers: int

    def communication(self, name: str, sent: Mapping[str, float], tokens: int) -> float:
        """Seconds of a layer; sent: what the links alone promise. One that was not tried waits as the first one that was.

        Where that did better than the links promise, others are taken to do better by the same share.
        """
        if name in self.waits:
            return max(sent[name] + self.waits[name].seconds(tokens), 0.0)
        first, pace = next(iter(self.waits.items()))
        wait = pace.seconds(tokens)
        if wait >= 0 or not sent.get(first):
            return sent[name] + max(wait, 0.0)
        return sent[name] * max(1 + wait / sent[first], 0.0)

    def tokens_per_second(self, ranks: int, tokens: int, communication: float) -> float:
        """Of all ranks, in steps with `tokens` on each; communication: seconds of a layer."""
        return ranks * tokens / (self.layers * (self.computing.seconds(tokens) + communication))


@dataclass(frozen=True)
class Links:
    """What a rank gets from one all-to-all: within its node, and between nodes (bytes per second of a whole node)."""

    within: Link
    between: Link

    def latency(self, nodes: int) -> float:
        """Of one collective on that many nodes."""
        return self.between.latency_seconds if nodes > 1 else self.within.latency_seconds


def predict(
    name: str, traits: Traits, links: Links, ranks: int, ranks_per_node: int, tokens: int, free_bytes: int,
    counts_inside: bool = False,
) -> float:  # fmt: skip
    """Seconds per layer for `tokens` on every rank; what strategy `name` adds to computing the experts.

    free_bytes, counts_inside: as `Group` has them.
    """
    args = (links, ranks, ranks_per_node, tokens, free_bytes, counts_inside)
    return sent_seconds(name, traits, *args) + computed_more(name, traits, ranks, tokens)


def computed_more(name: str, traits: Traits, ranks: int, tokens: int) -> float:
    """Of that, what is computed: the dense part of a layer for the tokens of other ranks."""
    return (ranks - 1) * tokens * traits.dense_seconds if name == "replicated" else 0.0


def sent_seconds(
    name: str, traits: Traits, links: Links, ranks: int, ranks_per_node: int, tokens: int, free_bytes: int, counts_inside: bool
) -> float:
    """And what the links take."""
    t = _Times(links, ranks, ranks_per_node, tokens, free_bytes, counts_inside)
    out, back, m = traits.row_bytes, traits.back_bytes, traits.ranks
    between = t.between_share(m)
    if name == "all_to_all":
        return t.counted(m, between, out, tokens) + t.known(m, between, back)
    if name == "overlapped":
        whole = t.known(m, between, out) + t.known(m, between, back)
        latency = t.known(0.0, 0.0, 0.0)
        hidden = min(whole - 2 * latency, traits.expert_seconds * tokens) * (1 - 1 / CHUNKS)
        return whole - hidden + (2 * CHUNKS - 1) * latency
    if name == "hierarchical":
        return _hierarchical(t, traits)
    if name == "all_gather":
        return t.known(ranks - 1, t.elsewhere, out) + t.known(ranks - 1, t.elsewhere, back)
    if name == "replicated":
        share = t.known(ranks - 1, t.elsewhere, back)
        small = (ranks - 1) * tokens * ranks * back <= t.free_bytes
        return t.known((ranks - 1) * ranks, t.elsewhere * ranks, back) if small else 2 * share
    if name == "coherent":
        half = traits.moves / 2 if traits.top_k > 1 else traits.moves
        one = t.counted(half, t.between_share(half), out, tokens * ranks)
        return one * (2 if traits.top_k > 1 else 1) + t.shared(traits.kv_bytes)
    raise InputError(f"--strategy: found {name!r}, expected one of {', '.join(STRATEGIES)}")


def _hierarchical(t: _Times, traits: Traits) -> float:
    """One exchange between nodes and one inside, each way; or two inside, of which one goes beside that between nodes."""
    out, back, n = traits.row_bytes, traits.back_bytes, traits.nodes
    inside = max(traits.ranks - n, 0.0)
    first, home = t.counted(n, n, out, t.tokens), t.known(n, n, back)
    beside = goes_beside(t.tokens, int(out), t.ranks // t.ranks_per_node, t.ranks_per_node, BESIDE * t.free_bytes)
    if beside:
        own = min(traits.ranks - t.between_share(traits.ranks), inside)
        first = max(first, t.known(0.0, 0.0, 0.0) + t.counted(own, 0.0, out, t.tokens))  # once the counts have come
        home = max(home, t.known(own, 0.0, back))
        inside -= own
    return first + t.counted(inside, 0.0, out, t.tokens * t.ranks) + t.known(inside, 0.0, back) + home


@dataclass(frozen=True)
class _Times:
    links: Links
    ranks: int
    ranks_per_node: int
    tokens: int
    free_bytes: int
    counts_inside: bool

    @property
    def elsewhere(self) -> float:
        return float(self.ranks - self.ranks_per_node)

    def between_share(self, rows: float) -> float:
        return rows * self.elsewhere / max(self.ranks - 1, 1)

    def known(self, rows: float, between: float, row_bytes: float) -> float:
        """One collective in which a token sends `rows` rows, `between` of them to other nodes."""
        latency = self.links.latency(self.ranks // self.ranks_per_node)
        inside = self.tokens * (rows - between) * row_bytes / self.links.within.bytes_per_second
        outside = self.tokens * self.ranks_per_node * between * row_bytes / self.links.between.bytes_per_second
        return latency + max(inside, outside)

    def shared(self, kv_bytes: float) -> float:
        """This layer's part of bringing all tokens' keys and values to all ranks: one collective for all layers."""
        return self.known(self.ranks - 1, self.elsewhere, kv_bytes) - self.known(0.0, 0.0, 0.0)

    def counted(self, rows: float, between: float, row_bytes: float, bound: int) -> float:
        """The same, with counts before it or, if they are small, padded messages."""
        if self.counts_inside:
            return self.known(rows, between, row_bytes)
        if (self.ranks - 1) * bound * row_bytes <= self.free_bytes:
            rows, between = (self.ranks - 1) * bound / self.tokens, self.elsewhere * bound / self.tokens
            return self.known(rows, between, row_bytes)
        return self.known(rows, between, row_bytes) + self.known(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Choice:
    """What was chosen for each phase, and the predicted seconds per layer of every candidate; empty if not predicted.

    tokens_per_second: of all ranks, predicted of the chosen strategies by phase; empty if nothing was rehearsed.
    """

    prefill: str
    decode: str
    prefill_seconds: dict[str, float]
    decode_seconds: dict[str, float]
    tokens_per_second: dict[str, float] = field(default_factory=dict)

    @property
    def shared(self) -> bool:
        """Whether every rank runs all sequences, instead of its own."""
        return self.decode == "replicated"

    @property
    def name(self) -> str:
        """One name where both phases run alike."""
        return self.decode if self.prefill == self.decode or self.decode == "coherent" else f"{self.prefill}/{self.decode}"

    def describe(self) -> str:
        """For people: the choice and the predicted times."""
        if not self.decode_seconds:
            return "strategy: local (one process)" if self.name == "local" else f"strategy: {self.name}, as asked"
        phases = (("prefill", self.prefill, self.prefill_seconds), ("decode", self.decode, self.decode_seconds))
        told = (
            f"{phase} {chosen} ({', '.join(f'{n} {s * 1e3:.2g}' for n, s in sorted(times.items(), key=lambda i: i[1]))} ms)"
            for phase, chosen, times in phases
        )
        speeds = " and ".join(f"{speed:,.0f} ({phase})" for phase, speed in self.tokens_per_second.items())
        return f"strategy: {'; '.join(told)} predicted per layer{f'; tokens/s: {speeds}' if speeds else ''}"


@dataclass(frozen=True)
class Load:
    """What a job asks of one rank: tokens in a step of its prompts, and in one that decodes; such steps for each of prompts.

    at_once: of the tokens of all ranks, the share that one step of `replicated` has: it runs a batch where others run one on
    every rank. rounds: batches that a rank runs one after another.
    """

    prefill: int
    decode: int
    steps: float = 1.0
    at_once: float = 1.0
    rounds: int = 1


def decide(
    traits: Traits, links: Links, group: Group, load: Load, without: Collection[str] = (), trial: Trial | None = None
) -> Choice:
    """The fastest strategies by prediction. without: those that cannot run here; trial: None where nothing was tried.

    What `coherent` needs of a prefill counts against it when it is chosen, and is told as the prefill's.
    Raises InputError if none is left.
    """

    def times(names: Iterable[str], tokens: int) -> dict[str, float]:
        return {name: _seconds(name, traits, links, group, tokens, load.at_once, trial) for name in names}

    layers = ["hierarchical"] if 1 < group.nodes < group.size else []
    names = [n for n in ("all_to_all", *layers, "all_gather", "replicated") if n not in without]
    if not set(names) - {"replicated"}:
        raise InputError(
            "--strategy: found none that fits in memory, expected room for all_to_all; name one to run it all the same"
        )
    before = times([*names, *({"overlapped"} - set(without))], load.prefill)
    after = times([*names, *({"coherent"} - set(without))], load.decode)
    prefill = _Times(links, group.size, group.ranks_per_node, load.prefill, group.free_bytes, group.counts_inside)
    sharing = prefill.shared(traits.kv_bytes)  # keys and values of the prompts, before tokens can be decoded by `coherent`
    weighed = dict(after)
    if "coherent" in weighed:
        weighed["coherent"] += sharing / max(load.steps, 1.0)
    rest = [trial.computing.seconds(tokens) if trial else 0.0 for tokens in (load.prefill, load.decode)]
    first, then = choose(before, rest[0]), choose(weighed, rest[1])
    if "replicated" in (first, then):  # it is another layout of the batch: both phases or none
        both = before["replicated"] + load.steps * after["replicated"]
        apart = [{n: s for n, s in t.items() if n != "replicated"} for t in (before, weighed)]
        first, then = choose(apart[0], rest[0]), choose(apart[1], rest[1])
        if both < before[first] + load.steps * weighed[then]:
            first = then = "replicated"
    if then == "coherent":
        before = {n: s + sharing for n, s in before.items()}
    phases = {"prefill": (load.prefill, before[first]), "decode": (load.decode, after[then])}
    speeds = {phase: trial.tokens_per_second(group.size, *found) for phase, found in phases.items()} if trial else {}
    return Choice(first, then, before, after, speeds)


def _seconds(name: str, traits: Traits, links: Links, group: Group, tokens: int, at_once: float, trial: Trial | None) -> float:
    """Of a layer, what strategy `name` adds to computing `tokens` on every rank; `replicated` in as many steps as it takes."""

    def of_step(count: int) -> float:
        args = (traits, links, group.size, group.ranks_per_node, count, group.free_bytes, group.counts_inside)
        more = computed_more(name, traits, group.size, count)
        if trial is None:
            return more + sent_seconds(name, *args)
        sent = {n: sent_seconds(n, *args) for n in (name, *trial.waits)}
        return more + trial.communication(name, sent, count)

    if name != "replicated" or at_once == 1:
        return of_step(tokens)
    count = max(1, round(tokens * at_once))
    computing = [trial.computing.seconds(n) if trial else 0.0 for n in (count, tokens)]
    return max((computing[0] + of_step(count)) * tokens / count - computing[1], 0.0)


def choose(candidates: Mapping[str, float], rest: float = 0.0) -> str:
    """The fastest by predicted seconds, or one before it that is as good as equal; rest: what all need besides, 0 or more."""
    least = rest + min(candidates.values())
    return next(name for name, seconds in candidates.items() if rest + seconds <= EQUAL * least)


def untried(choice: Choice, trial: Trial, load: Load) -> list[str]:
    """Strategies that are to be tried before this choice is final: in a phase, those predicted to be about as fast."""
    found: dict[str, None] = {}
    for chosen, times, tokens in (
        (choice.prefill, choice.prefill_seconds, load.prefill),
        (choice.decode, choice.decode_seconds, load.decode),
    ):
        bound = CLOSE * (trial.computing.seconds(tokens) + times[chosen])
        found |= {name: None for name, s in times.items() if trial.computing.seconds(tokens) + s <= bound}
    return [name for name in found if name in TRIED and name not in trial.waits]


def check_group(name: str | None, group: Group) -> None:
    """Raises InputError unless strategy `name` can run on this group; None is left to be chosen."""
    chosen = name or ("local" if group.size == 1 else "all_to_all")
    if chosen not in STRATEGIES:
        raise InputError(f"--strategy: found {chosen!r}, expected {', '.join(STRATEGIES[:-1])} or {STRATEGIES[-1]}")
    if (chosen == "local") != (group.size == 1):
        wanted = f"{', '.join(STRATEGIES[1:])}, or one process" if group.size > 1 else "local, or several processes (torchrun)"
        raise InputError(f"--strategy: found {chosen!r} on {group.size} process(es), expected {wanted}")


def make_strategy(name: str, group: Group) -> Strategy:
    """The strategy called `name`; every rank must make it. Raises InputError if it cannot run on this group."""
    check_group(name, group)
    return Local(group) if name == "local" else MADE[name](group)
