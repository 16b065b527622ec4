"""How long ranks wait for each other is tried out before strategies are chosen, and leaves no mark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from thread_ranks import load, on_ranks
from tiny_models import make_model

from coterie.moe.batch import Request
from coterie.moe.choose import Choice, Links, Load, Pace, Trial, choose, decide, predict, untried
from coterie.moe.collectives import Group
from coterie.moe.families import ModelShape
from coterie.moe.probe import measure
from coterie.moe.rehearsal import Rehearsal, Run
from coterie.moe.strategy import Strategy
from coterie.moe.traits import Traits
from coterie.placement.homes import HomeClass, Homes
from coterie.placement.topology import Link
from coterie.routing.errors import InputError

LINKS = Links(Link(1e9, 1e-6), Link(1e8, 1e-5))


PLAIN = Traits(row_bytes=1000, back_bytes=900, ranks=2.0, nodes=0.9, moves=3.0, top_k=2)
COMPUTING = Pace(8, 2.08e-3, 40, 2.4e-3)  # 2 ms and 10 us a token
LOAD = Load(40, 8)
PROMPTS = [[(1, 2, 3), (4, 5)], [], [(6, 7, 8, 9, 10)]]  # by rank


def flat(seconds: float) -> Pace:
    """The same for any number of tokens."""
    return Pace(8, seconds, 40, seconds)


def two_nodes() -> Group:
    group = Group()
    group.size, group.ranks_per_node = 4, 2
    return group


def test_strategies_that_were_not_tried_wait_as_the_first_one() -> None:
    trial = Trial(COMPUTING, {"all_to_all": COMPUTING}, 5)
    alone, tried = (decide(PLAIN, LINKS, two_nodes(), LOAD, trial=t).prefill_seconds for t in (None, trial))
    assert set(alone) == {"all_to_all", "hierarchical", "overlapped", "all_gather", "replicated"}
    for name, seconds in alone.items():
        assert tried[name] - seconds == pytest.approx(2e-3 + 40 * 1e-5), name


def test_links_that_do_better_than_measured_do_so_for_every_strategy() -> None:
    alone = decide(PLAIN, LINKS, two_nodes(), LOAD).prefill_seconds
    better = Trial(COMPUTING, {"all_to_all": flat(-0.25 * alone["all_to_all"])}, 5)
    tried = decide(PLAIN, LINKS, two_nodes(), LOAD, trial=better).prefill_seconds
    assert tried == {name: pytest.approx(0.75 * seconds) for name, seconds in alone.items()}
    impossible = Trial(COMPUTING, {"all_to_all": flat(-1.0)}, 5)
    assert set(decide(PLAIN, LINKS, two_nodes(), LOAD, trial=impossible).prefill_seconds.values()) == {0.0}


def test_one_that_was_tried_is_chosen_by_how_long_it_took() -> None:
    slow_links = Links(Link(1e9, 1e-6), Link(1e6, 1e-5))
    trial = Trial(COMPUTING, {"all_to_all": flat(0.0)}, 5)
    choice = decide(PLAIN, slow_links, two_nodes(), LOAD, trial=trial)
    assert choice.prefill == "hierarchical"
    assert "hierarchical" in untried(choice, trial, LOAD) and "all_to_all" not in untried(choice, trial, LOAD)
    slower = replace(trial, waits={**trial.waits, "hierarchical": flat(1.0)})
    again = decide(PLAIN, slow_links, two_nodes(), LOAD, trial=slower)
    assert again.prefill != "hierarchical" and again.prefill_seconds["hierarchical"] > 1
    assert "hierarchical" not in untried(again, slower, LOAD)


def test_of_equals_the_simplest_is_chosen() -> None:
    assert choose({"all_to_all": 1.0, "hierarchical": 0.99}) == "all_to_all"
    assert choose({"all_to_all": 1.0, "hierarchical": 0.9}) == "hierarchical"
    assert choose({"all_to_all": 1.0, "hierarchical": 0.9}, rest=10.0) == "all_to_all"


def rehearsed(folder: Path, group: Group) -> tuple[Trial, bool]:
    model = load(folder, strategy="all_to_all", dtype="float32", group=group)
    model.context.loads = torch.zeros(2, 8, dtype=torch.int64)
    traffic = group.traffic
    traffic.rows, traffic.step = 7, 3
    before = {name: getattr(traffic, name) for name in ("rows", "bytes", "overhead", "step", "layer")}
    context = dict(vars(model.context))
    strategy = model.dispatcher.strategy
    rehearsal = Rehearsal(model.transformers, model.context, strategy("all_to_all"), PLAIN, LINKS, 2, 9, PROMPTS[: group.size])
    rehearsal.compare([strategy("overlapped"), strategy("coherent"), strategy("all_gather")])
    unchanged = all(getattr(traffic, name) == value for name, value in before.items())
    same = all(vars(model.context)[name] is value for name, value in context.items())
    return rehearsal.trial, unchanged and same and not model.context.loads.any() and not traffic.seconds


def test_a_rehearsal_is_the_same_on_all_ranks_and_leaves_no_mark(tmp_path: Path) -> None:
    make_model("mixtral", tmp_path)
    found = on_ranks(3, lambda group: rehearsed(tmp_path, group))
    trials = [trial for trial, _ in found]
    assert all(clean for _, clean in found)
    assert trials.count(trials[0]) == 3 and set(trials[0].waits) == {"all_to_all", "overlapped", "all_gather", "coherent"}
    assert trials[0].computing.seconds(8) > 0 and trials[0].layers == 3


def test_steps_are_made_of_what_is_to_run_where_it_will_run(tmp_path: Path) -> None:
    make_model("mixtral", tmp_path)

    def drawn(group: Group) -> list[list[tuple[int, ...]]]:
        model = load(tmp_path, dtype="float32", group=group)
        first = model.dispatcher.strategy("all_to_all")
        made = Rehearsal(model.transformers, model.context, first, PLAIN, LINKS, 2, 8, PROMPTS)
        return [[sequence.request.token_ids for sequence in own] for own in made._drawn(3, 4)]

    (found, *others) = on_ranks(3, drawn)
    assert found[0] == [(1, 2, 3, 1), (4, 5, 4, 5), (1, 2, 3, 1)]
    assert found[1] == [(1, 2, 3, 1), (4, 5, 4, 5), (6, 7, 8, 9)]  # it has none of its own
    assert found[2] == [(6, 7, 8, 9)] * 3 and others == [found] * 2


def test_rows_are_predicted_from_the_prompts_unless_homes_are_yet_to_be_told(tmp_path: Path, monkeypatch) -> None:
    make_model("mixtral", tmp_path)
    heard: dict[int, list[Traits]] = {0: [], 1: []}

    def decided(traits, links, group, load, without, trial):
        heard[group.rank].append(traits)
        return Choice("all_to_all", "all_to_all", {"all_to_all": 1.0}, {"all_to_all": 1.0})

    monkeypatch.setattr("coterie.moe.dispatcher.decide", decided)

    def told(group: Group) -> list[bool]:
        model = load(tmp_path, dtype="float32", group=group)
        dispatcher = model.dispatcher
        requests = [Request(i, (1, 2, 3), 4) for i in range(2)]
        dispatcher.choice(requests, 2, model.transformers, model.context)
        homed = Homes((HomeClass(0, 1.0, (0.0,)), HomeClass(1, 1.0, (0.0,))), ((0, 1),), 8)
        dispatcher.plan = replace(dispatcher.plan, homes=homed)
        for homes in (None, [0, 1]):
            dispatcher.choice(requests, 2, model.transformers, model.context, homes)
        (rehearsal,) = dispatcher._rehearsed.values()
        return [traits is rehearsal.seen for traits in heard[group.rank]]

    assert on_ranks(2, told) == [[True, False, True]] * 2


def test_what_was_rehearsed_is_predicted_as_it_went(tmp_path: Path, monkeypatch) -> None:
    """Steps of known length, by strategies that differ: the prediction for the sizes tried is their length."""
    make_model("mixtral", tmp_path)
    lengths = {"all_to_all": 0.08, "overlapped": 0.05, "coherent": 0.06}
    of_run: dict[Run, float] = {}

    def marked(made: Callable[..., tuple[Run, int]]) -> Callable[..., tuple[Run, int]]:
        def make(self: Rehearsal, strategy: Strategy, *args: int) -> tuple[Run, int]:
            run, tokens = made(self, strategy, *args)
            of_run[run] = lengths[strategy.name]
            return run, tokens

        return make

    monkeypatch.setattr(Rehearsal, "_prompts", marked(Rehearsal._prompts))
    monkeypatch.setattr(Rehearsal, "_decoding", marked(Rehearsal._decoding))
    monkeypatch.setattr(Rehearsal, "_timed", lambda self, run: (run(), (of_run[run], 0.01, 64))[1])

    def speeds(group: Group) -> list[list[float]]:
        model = load(tmp_path, dtype="float32", group=group)
        strategy = model.dispatcher.strategy
        rehearsal = Rehearsal(
            model.transformers, model.context, strategy("all_to_all"), PLAIN, LINKS, 2, 8, PROMPTS[: group.size]
        )
        rehearsal.compare([strategy("overlapped")])
        rehearsal.compare([strategy("coherent")])
        trial, found = rehearsal.trial, []
        for tokens in (2, 8):
            known = rehearsal.seen, LINKS, group.size, group.ranks_per_node, tokens, group.free_bytes, group.counts_inside
            spent = [predict(name, *known) + trial.waits[name].seconds(tokens) for name in lengths]
            found.append([trial.tokens_per_second(2, tokens, seconds) for seconds in spent])
        return found

    for decode, prefill in on_ranks(2, speeds):
        assert decode == [pytest.approx(2 * 2 / seconds) for seconds in lengths.values()]
        assert prefill[:2] == [pytest.approx(2 * 8 / lengths[name]) for name in ("all_to_all", "overlapped")]


def test_what_coherent_needs_of_a_prefill_counts_by_the_steps_that_follow() -> None:
    """Keys and values of all prompts go to every rank once; the fewer tokens are decoded after it, the less that pays."""
    traits = replace(PLAIN, top_k=1, ranks=0.9, moves=0.5, kv_bytes=200)
    group = two_nodes()
    short, long = (decide(traits, LINKS, group, Load(40, 8, steps)) for steps in (1, 1000))
    assert short.decode_seconds == long.decode_seconds and min(long.decode_seconds, key=long.decode_seconds.get) == "coherent"
    assert (short.decode, long.decode) == ("all_to_all", "coherent")
    kv_seconds = 40 * 2 * 2 * 200 / 1e8  # to two ranks of the other node, from the two of this one
    assert long.prefill_seconds == {name: pytest.approx(s + kv_seconds) for name, s in short.prefill_seconds.items()}


def test_one_whose_steps_went_slower_than_the_links_promise_is_not_chosen() -> None:
    traits = replace(PLAIN, top_k=1, ranks=0.9, moves=0.5)
    trial = Trial(COMPUTING, {"all_to_all": flat(0.0)}, 5)
    choice = decide(traits, LINKS, two_nodes(), replace(LOAD, steps=1000), trial=trial)
    assert choice.decode == "coherent" and "coherent" in untried(choice, trial, LOAD)
    slower = replace(trial, waits={**trial.waits, "coherent": flat(1e-3)})
    assert decide(traits, LINKS, two_nodes(), replace(LOAD, steps=1000), trial=slower).decode == "all_to_all"


@pytest.mark.parametrize(
    ("few", "many"), [((1, 0.01), (512, 8.0)), ((500, 0.6), (512, 0.5)), ((64, 0.4), (64, 0.3)), ((8, 0.5), (40, 0.5))]
)
@pytest.mark.parametrize("tokens", [1, 8, 64, 600, 8192])
def test_no_number_of_tokens_is_predicted_to_cost_nothing_or_less_than_fewer(few, many, tokens: int) -> None:
    pace = Pace(*few, *many)
    assert pace.seconds(tokens) > 0
    assert pace.seconds(tokens) <= pace.seconds(2 * tokens) or few[1] > many[1]
    if many[0] < 4 * few[0] and tokens > many[0]:
        assert pace.seconds(tokens) == pytest.approx(many[1] * tokens / many[0])


def test_replicated_takes_as_many_steps_as_its_one_batch_needs() -> None:
    """16 sequences in batches of 4: on 4 ranks one step by all_to_all, four by replicated."""
    far = Links(Link(1e9, 1e-3), Link(1e9, 8e-3))
    whole, parted = (decide(PLAIN, far, two_nodes(), Load(4, 4, at_once=share)) for share in (1.0, 0.25))
    quarter = predict("replicated", PLAIN, far, 4, 2, 1, two_nodes().free_bytes)
    assert parted.decode_seconds["replicated"] == pytest.approx(4 * quarter)
    assert parted.decode_seconds["all_to_all"] == whole.decode_seconds["all_to_all"]
    assert (whole.decode, parted.decode) == ("replicated", "all_to_all")


def test_better_links_do_not_compute_the_dense_part() -> None:
    dense = replace(PLAIN, dense_seconds=1e-4)
    alone = decide(PLAIN, LINKS, two_nodes(), LOAD).decode_seconds
    better = Trial(COMPUTING, {"all_to_all": flat(-0.9 * alone["all_to_all"])}, 5)
    told = decide(dense, LINKS, two_nodes(), LOAD, trial=better).decode_seconds["replicated"]
    assert told == pytest.approx(0.1 * alone["replicated"] + 3 * 8 * 1e-4)


def test_no_strategy_that_fits_is_told_as_such() -> None:
    everything = {"all_to_all", "hierarchical", "all_gather", "replicated", "overlapped", "coherent"}
    for left in (set(), {"replicated"}):
        with pytest.raises(InputError, match="--strategy: found none that fits in memory"):
            decide(PLAIN, LINKS, two_nodes(), LOAD, everything - left)


def test_a_plan_that_is_taken_over_is_rehearsed_anew(tmp_path: Path) -> None:
    make_model("mixtral", tmp_path)

    def rehearsals(group: Group) -> list[int]:
        model = load(tmp_path, dtype="float32", group=group)
        told = []
        for _ in range(2):
            for count in (1, 1, 40):  # as large as before, or much larger
                requests = [Request(i, (1, 2, 3), 4) for i in range(count)]
                model.dispatcher.choice(requests, 16, model.transformers, model.context)
                told.append(len(model.dispatcher._rehearsed))
            model.dispatcher.changed(model.plan)
        return told

    assert on_ranks(2, rehearsals) == [[1, 1, 2, 1, 1, 2]] * 2


def test_on_gpus_an_exchange_is_what_the_links_account_for(tmp_path: Path, monkeypatch) -> None:
    """What its counter has there is the wait for all that was queued before it."""
    make_model("mixtral", tmp_path)

    def trial(group: Group) -> tuple[Trial, float]:
        model = load(tmp_path, dtype="float32", group=group)
        monkeypatch.setattr(Rehearsal, "_timed", lambda self, run: (0.08, 0.07, 64))
        monkeypatch.setattr(Group, "device", torch.device("cuda"))
        made = Rehearsal(
            model.transformers,
            model.context,
            model.dispatcher.strategy("all_to_all"),
            PLAIN,
            LINKS,
            2,
            8,
            PROMPTS[: group.size],
        )
        return made.trial, made._accounted(made.first, 8)

    for found, accounted in on_ranks(2, trial):
        assert found.computing.seconds(8) == pytest.approx(0.08 / 3 - accounted, rel=1e-3)
        assert found.waits["all_to_all"].seconds(8) == pytest.approx(0, abs=1e-4)


def test_whole_steps_are_told_in_tokens_a_second() -> None:
    """Five layers of 2 ms and 8 tokens' 10 us each; what an exchange adds is the chosen strategy's."""
    assert decide(PLAIN, LINKS, two_nodes(), LOAD).tokens_per_second == {}
    choice = decide(PLAIN, LINKS, two_nodes(), LOAD, trial=Trial(COMPUTING, {"all_to_all": flat(1e-3)}, 5))
    assert choice.tokens_per_second == {
        "prefill": pytest.approx(4 * 40 / (5 * (2e-3 + 40e-5 + choice.prefill_seconds[choice.prefill]))),
        "decode": pytest.approx(4 * 8 / (5 * (2e-3 + 8e-5 + choice.decode_seconds[choice.decode]))),
    }
    assert choice.describe().endswith("(decode)")


def test_a_choice_counts_no_rows_and_no_use_of_the_rehearsal(tmp_path: Path) -> None:
    make_model("mixtral", tmp_path)

    def chosen(group: Group) -> tuple[int, float]:
        model = load(tmp_path, dtype="float32", group=group)
        choice = model.dispatcher.choice([Request(0, (1, 2, 3), 4)], 2, model.transformers, model.context)
        assert isinstance(model.shape, ModelShape)
        return group.traffic.rows, choice.tokens_per_second["decode"]

    for rows, speed in on_ranks(2, chosen):
        assert rows == 0 and speed > 0


def test_a_batch_invariant_run_does_not_choose_what_refuses_it(tmp_path: Path, monkeypatch) -> None:
    make_model("mixtral", tmp_path)
    heard: list[frozenset[str]] = []

    def decided(traits, links, group, load, without, trial):
        heard.append(without)
        return Choice("all_to_all", "all_to_all", {"all_to_all": 1.0}, {"all_to_all": 1.0})

    monkeypatch.setattr("coterie.moe.dispatcher.decide", decided)
    for invariant in (False, True):

        def chosen(group: Group, invariant: bool = invariant) -> None:
            model = load(tmp_path, dtype="float32", group=group, batch_invariant=invariant)
            model.dispatcher.choice([Request(0, (1, 2, 3), 4)], 2, model.transformers, model.context)

        on_ranks(2, chosen)
    assert ["coherent" in without for without in heard] == [False, False, True, True]


def test_links_that_cannot_be_kept_end_nothing(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="the measured links cannot be kept"):
        found = on_ranks(2, measure)
    assert found[0] == found[1] and found[0].within.bytes_per_second > 0


def test_what_is_far_behind_is_tried_no_further_and_a_trial_ends_in_time() -> None:
    rehearsal = object.__new__(Rehearsal)
    rehearsal.group = Group()
    calls: list[int] = []
    seconds = [0.10, 0.11, 0.30, 0.08]

    def timed(run: int) -> tuple[float, float, int]:
        calls.append(run)
        return seconds[run], 0.0, 0

    rehearsal._timed = timed  # type: ignore[method-assign, assignment]
    assert rehearsal._in_turns([0, 1, 2, 3], 9) == pytest.approx([0.01, 0.20, -0.02])  # type: ignore[list-item]
    assert [calls.count(run) for run in range(4)] == [5, 3, 3, 5]  # two are beyond FAR of 0.08; then 2 s are over
    calls.clear()
    seconds[:] = [1.0, 1.1, 3.0, 0.9]
    rehearsal._in_turns([0, 1, 2, 3], 9)  # type: ignore[list-item]
    assert len(calls) == 8, "a warm-up and one turn"
    calls.clear()
    seconds[:] = [0.01, 0.5]
    assert rehearsal._in_turns([0, 1], 9) == pytest.approx([0.49])  # type: ignore[list-item]
    assert calls.count(0) == 3, "nothing is left to compare"


def test_what_a_job_is_tried_for_is_a_tenth_of_it_at_most(tmp_path: Path, monkeypatch) -> None:
    """A step of 0.08 s: eight tokens are not worth a trial; a thousand prompts are, of two seconds and no more."""
    make_model("mixtral", tmp_path)
    compared: dict[int, float] = {}
    before = Rehearsal.pays
    monkeypatch.setattr(Rehearsal, "_timed", lambda self, run: (0.08, 0.07, 64))
    monkeypatch.setattr(Rehearsal, "compare", lambda self, strategies, most: compared.update({self.group.rank: most}))
    monkeypatch.setattr("coterie.moe.dispatcher.untried", lambda *_: ["overlapped"])
    monkeypatch.setattr(Rehearsal, "pays", lambda self, *given: self.group.rank not in compared and before(self, *given))

    def chosen(group: Group, count: int, new: int) -> tuple[float, float]:
        model = load(tmp_path, dtype="float32", group=group)
        requests = [Request(i, (1, 2, 3), new) for i in range(count)]
        model.dispatcher.choice(requests, 2, model.transformers, model.context)
        (rehearsal,) = model.dispatcher._rehearsed.values()
        few, more = rehearsal.few.seconds, rehearsal.more.seconds * 6 / rehearsal.more.tokens
        return rehearsal.affordable(model.dispatcher._load(requests, 2), 0.1), 0.1 * (-(-count // 4)) * (few * new + more)

    for affordable, by_hand in on_ranks(2, lambda group: chosen(group, 4, 8)):
        assert affordable == pytest.approx(by_hand) and by_hand < 0.1
    assert not compared
    for affordable, by_hand in on_ranks(2, lambda group: chosen(group, 1000, 1000)):
        assert affordable == 2.0 < by_hand
    assert compared == {0: 2.0, 1: 2.0}
