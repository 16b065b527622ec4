"""Host memory behind a device's slots, groups of experts that arrive under Triton's kernels, and misses on the host.

Without a GPU the tier is tried with host memory on both sides: streams and pinning are not.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import make_model
from torch.nn import functional as F

import coterie
from coterie.kernels.activations import Activation
from coterie.kernels.experts import StackedExperts, arriving_experts, fused, reference_experts
from coterie.launch.cli import main
from coterie.moe.collectives import Group
from coterie.moe.model import assembled
from coterie.moe.prepare import prepare
from coterie.offload.cache import ExpertCache
from coterie.offload.checkpoint import ReadCounter
from coterie.offload.store import ExpertStore
from coterie.offload.tiers import LEAST, HostTier, Misses
from coterie.offload.transfer import Part, Piece
from coterie.routing.errors import CoterieError, InputError
from coterie.routing.record import expert_modules

LAYERS, EXPERTS, VALUES = 3, 8, 2048
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def store_of(folder: Path) -> ExpertStore:
    """Expert e of layer l is full of numbers from (l * EXPERTS + e) * VALUES on."""
    (folder / "f").write_bytes(torch.arange(LAYERS * EXPERTS * VALUES, dtype=torch.float32).numpy().tobytes())
    size = 4 * VALUES
    parts = [
        {"w": Part(torch.float32, (VALUES,), (Piece(folder / "f", size * number, size),))} for number in range(LAYERS * EXPERTS)
    ]
    return ExpertStore([parts[EXPERTS * layer :][:EXPERTS] for layer in range(LAYERS)], ReadCounter())


@pytest.mark.skipif(GPU, reason="reads into host memory")
def test_one_expert_that_several_ask_for_at_once_is_read_once(tmp_path: Path) -> None:
    """Into one slot, which is given up no more than others are; a read that fails leaves nothing behind."""
    tier = HostTier(store_of(tmp_path), LEAST, {"w": (VALUES,)}, torch.float32, pinned=False)
    for turn in range(30):
        expert = turn % EXPERTS
        outs = [torch.empty(VALUES) for _ in range(6)]
        before, known = tier.store.counter.bytes, (turn % LAYERS, expert) in tier.slot_of
        for future in [tier.start(turn % LAYERS, expert, {"w": out}) for out in outs]:
            future.result()
        assert tier.store.counter.bytes - before == (0 if known else 4 * VALUES)
        first = (turn % LAYERS * EXPERTS + expert) * VALUES
        assert all(torch.equal(out, torch.arange(first, first + VALUES, dtype=torch.float32)) for out in outs)
        assert len(tier.slot_of) + len(tier.free) == LEAST and len(set(tier.slot_of.values()) | set(tier.free)) == LEAST
    (tmp_path / "f").write_bytes(b"short")
    missing = next((i, e) for i in range(LAYERS) for e in range(EXPERTS) if (i, e) not in tier.slot_of)
    for future in [tier.start(*missing, {"w": torch.empty(VALUES)}) for _ in range(3)]:
        with pytest.raises(CoterieError):
            future.result()
    assert not tier.busy and len(tier.slot_of) + len(tier.free) == LEAST
    tier.close()


@pytest.mark.parametrize("host_slots", [LEAST, 12, LAYERS * EXPERTS])
def test_slots_behind_a_tier_hold_what_they_say(host_slots: int, tmp_path: Path) -> None:
    tier = HostTier(store_of(tmp_path), host_slots, {"w": (VALUES,)}, torch.float32, pinned=GPU)
    cache = ExpertCache(tier, EXPERTS, 5, {"w": (VALUES,)}, torch.float32, 3, device=DEVICE)
    rng = np.random.default_rng(host_slots)
    for step in range(1500):
        layer = step % LAYERS
        picked = rng.permutation(EXPERTS)[: rng.integers(1, 4)].tolist()
        cache.announce(layer, picked)
        guess = rng.permutation(EXPERTS)[:2].tolist()
        cache.expect((layer + 1) % LAYERS, lambda guess=guess: guess, sure=True)
        for group in cache.arrivals(layer, picked):
            for position, slot in group:
                first = (layer * EXPERTS + picked[position]) * VALUES
                assert cache.pools["w"][slot][[0, -1]].tolist() == [first, first + VALUES - 1], step
        with tier.lock:
            being_read = [key for key in tier.busy if key not in tier.slot_of]
            assert len(tier.slot_of) + len(tier.free) + len(being_read) == host_slots
    read = tier.store.counter.bytes // (4 * VALUES)
    assert read == LAYERS * EXPERTS if host_slots == LAYERS * EXPERTS else LAYERS * EXPERTS < read < cache.statistics.transfers
    tier.close()
    assert not tier.busy and sorted([*tier.slot_of.values(), *tier.free]) == list(range(host_slots))


def test_a_failed_read_leaves_nothing_in_the_tier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = HostTier(store_of(tmp_path), LEAST, {"w": (VALUES,)}, torch.float32, pinned=GPU)
    into, real = {"w": torch.zeros(VALUES)}, tier.store.read

    def failing(*arguments: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(tier.store, "read", failing)
    with pytest.raises(OSError, match="no"):
        tier.start(0, 1, into).result()
    assert not tier.slot_of and not tier.busy and len(tier.free) == LEAST
    monkeypatch.setattr(tier.store, "read", real)
    tier.start(0, 1, into).result()
    assert into["w"][0] == VALUES
    tier.close()


def test_misses_fill_free_slots_first_and_then_stay_on_the_host(tmp_path: Path) -> None:
    tier = HostTier(store_of(tmp_path), 16, {"w": (VALUES,)}, torch.float32, pinned=GPU)
    cache = ExpertCache(tier, EXPERTS, 4, {"w": (VALUES,)}, torch.float32, 3, misses=Misses(1.0, 2.5), device=DEVICE)
    cache.announce(0, [0, 1, 2])
    with cache.on_host(0, [0, 1, 2], [1, 1, 1]) as apart:
        assert apart == {}
        assert sorted(p for group in cache.arrivals(0, [0, 1, 2]) for p, _ in group) == [0, 1, 2]
    cache.announce(1, [3, 4, 5, 6])
    with cache.on_host(1, [3, 4, 5, 6], [1, 2, 3, 1]) as apart:  # one slot is free; three rows are dearer than a copy
        assert list(apart) == [1, 3]
        for position, slot in apart.items():
            assert tier.pools["w"][slot][0] == (EXPERTS + [3, 4, 5, 6][position]) * VALUES
    found = cache.statistics
    assert (found.requests, found.on_host) == (7, 2) and found.hit_rate == 1 - (found.transfers + 2) / 7
    tier.close()


@dataclass
class InGroups:
    """A residency that brings `size` experts at a time, each group over the last one's places."""

    source: StackedExperts
    into: StackedExperts
    size: int
    apart: dict[int, int] = field(default_factory=dict)
    announced: list[list[int]] = field(default_factory=list)

    @property
    def experts(self) -> int:
        return self.source.count

    def look_ahead(self, x: torch.Tensor, ids: torch.Tensor) -> None:
        raise AssertionError("not asked here")

    def announce(self, places: Sequence[int]) -> None:
        self.announced.append(list(places))

    def arrivals(self, places: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
        for start in range(0, len(places), self.size):
            group = list(enumerate(places))[start : start + self.size]
            for slot, (_, expert) in enumerate(group):
                self.into.first[slot], self.into.second[slot] = self.source.first[expert], self.source.second[expert]  # type: ignore[index]
            yield [(position, slot) for slot, (position, _) in enumerate(group)]

    def on_host(self, places: Sequence[int], rows: Sequence[int]) -> AbstractContextManager[dict[int, int]]:
        return nullcontext({places.index(expert): place for expert, place in self.apart.items() if expert in places})


@pytest.mark.parametrize("tokens", [1, 2, 9])
@pytest.mark.parametrize("size", [1, 2, 6])
@pytest.mark.parametrize("apart", [False, True])
def test_experts_that_arrive_in_groups_give_the_bits_of_all_at_once(tokens: int, size: int, apart: bool) -> None:
    pytest.importorskip("triton")
    from coterie.kernels.interpreter import interpreting, repair

    if interpreting():
        repair()
    device = "cpu" if interpreting() else "cuda"
    torch.manual_seed(tokens)
    first, second = torch.randn(6, 24, 16, device=device), torch.randn(6, 16, 12, device=device)

    def swiglu(z: torch.Tensor) -> torch.Tensor:
        gate, up = z.chunk(2, -1)
        return F.silu(gate) * up

    whole = StackedExperts(first, second, swiglu, known=Activation())
    host = StackedExperts(first.cpu(), second.cpu(), swiglu, known=Activation())
    x = torch.randn(tokens, 16, device=device)
    ids = torch.stack([torch.randperm(6)[:3] for _ in range(tokens)]).to(device)
    ids[0, 1] = -1
    weights = torch.rand(tokens, 3, device=device)
    pool = replace(whole, first=torch.full((size, 24, 16), float("nan"), device=device),
                   second=torch.full((size, 16, 12), float("nan"), device=device))  # fmt: skip
    residency = InGroups(whole, pool, size, {0: 0, 4: 4} if apart else {})
    found = arriving_experts(replace(pool, residency=residency, host=host), x, ids, weights)
    right = fused(whole)(x, ids, weights)
    if apart:
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(found, right)
    torch.testing.assert_close(found, reference_experts(whole, x, ids, weights), rtol=1e-4, atol=1e-4)
    assert residency.announced == [sorted(set(ids.flatten().tolist()) - {-1})]


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("host_bytes", [None, 40_000])
def test_logits_from_host_memory_are_the_residents_to_the_bit(host_bytes: int | None, tmp_path: Path) -> None:
    share = prepare(make_model("qwen3_moe", tmp_path), None, "bfloat16", 1)
    ids = torch.randint(1, 90, (2, 9), device="cuda")
    right = assembled(share, share.read(0), None, Group()).transformers(ids).logits
    for slots in (share.shape.top_k, 9):
        cached = replace(share, slots=slots, host_bytes=host_bytes)
        assert torch.equal(assembled(cached, cached.read(0), None, Group()).transformers(ids).logits, right)


@pytest.mark.skipif(GPU, reason="says what a machine without a GPU answers")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--misses", "cpu"], "--misses: found cpu without a GPU, expected fetch or auto"),
        (["--misses", "never"], "--misses: found 'never', expected fetch, cpu, auto"),
        (["--host-memory", "1GB"], "--host-memory: found it without a GPU, expected --memory"),
    ],
)
def test_what_is_about_a_gpu_is_refused_without_one(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "coterie-tiny", "--prompt", "x", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_memory_is_registered_no_longer_than_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a runtime that counts: what a closed, a forgotten and a failed tier have registered is given back."""
    held: list[int] = []

    class Runtime:
        room = 10

        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
            if len(held) == self.room:
                return 2
            held.append(address)
            return 0

        def cudaHostUnregister(self, address: int) -> int:
            held.remove(address)
            return 0

    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    store = ExpertStore([], ReadCounter())
    shapes = {"a": (4, 4), "b": (4,)}
    tier = HostTier(store, 3, shapes, torch.float32, True)
    assert sorted(held) == sorted(pool.data_ptr() for pool in tier.pools.values())
    tier.close()
    assert not held
    tier = HostTier(ExpertStore([], ReadCounter()), 3, shapes, torch.float32, True)
    assert len(held) == 2
    del tier
    gc.collect()
    assert not held
    runtime.room = 1
    with pytest.raises(CoterieError, match="cannot be pinned; give a smaller --host-memory"):
        HostTier(ExpertStore([], ReadCounter()), 3, shapes, torch.float32, True)
    assert not held


@pytest.mark.parametrize(
    ("host_bytes", "misses", "message"),
    [
        (1000, "fetch", "--host-memory .host_bytes.: found 1000, expected {least} or more: room for 7 experts"),
        (None, "cpu", None),
        ("least", "cpu", "--misses: found cpu with room for 7 experts on the host, expected more than 7"),
        ("least", "fetch", None),
    ],
)
def test_a_host_that_is_too_small_is_refused_before_anything_is_read(
    host_bytes: object, misses: str, message: str | None, tmp_path: Path
) -> None:
    folder = make_model("qwen3_moe", tmp_path)
    share = prepare(folder, None, "float32", 1, device="cpu")
    (_, module), *_ = expert_modules(share.empty).values()
    least = LEAST * sum(p[0].numel() * 4 for p in module.parameters())
    share = replace(share, host_bytes=least if host_bytes == "least" else host_bytes, misses=misses)
    whole = len(share.shape.layer_ids) * share.shape.num_experts
    if message is None:
        assert share.host_slots(whole) == (whole if host_bytes is None else LEAST)
        return
    with pytest.raises(InputError, match=message.format(least=least)):
        share.host_slots(whole)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"misses": "nonsense"}, "misses: found 'nonsense', expected fetch, cpu, auto"),
        ({"misses": "auto"}, "misses: found it without slots"),
        ({"host_bytes": 1 << 30}, "host_bytes: found it without slots"),
        ({"slots": 8, "misses": "cpu", "device": "cpu"}, "misses: found it without a GPU"),
        ({"slots": 8, "misses": "cpu", "quantise": "int8", "device": "meta"}, "misses: found 'cpu' with quantise"),
        ({"slots": 8, "host_bytes": 1 << 30, "device": "cpu"}, "host_bytes: found it without a GPU"),
    ],
)
def test_load_refuses_what_would_have_no_effect(tmp_path: Path, given: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        coterie.load(make_model("mixtral", tmp_path / "model"), **given)
