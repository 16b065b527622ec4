"""Experts read by the system's asynchronous reads and by threads: the same bytes, and the same said of what goes wrong."""

from __future__ import annotations

import errno
import gc
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import make_model

from coterie.moe.collectives import Group
from coterie.moe.model import assembled
from coterie.moe.prepare import prepare
from coterie.offload import aio
from coterie.offload.aio import Queue
from coterie.offload.cache import ExpertCache
from coterie.offload.checkpoint import ReadCounter
from coterie.offload.checksum import Checksum
from coterie.offload.files import Files
from coterie.offload.reader import AHEAD_BYTES, STAGES
from coterie.offload.slots import Slots
from coterie.offload.store import ExpertStore
from coterie.offload.transfer import BLOCK, STAGE_BYTES, Part, Piece, own_shift, plan
from coterie.routing.errors import CoterieError

PROMPTS = torch.tensor([[5, 17, 33, 60, 8, 2, 91, 44, 7], [9, 9, 3, 4, 96, 11, 12, 40, 1]])
HAS_THEM = aio.numbers() is not None and ExpertStore([], ReadCounter()).asynchronous is not None
needs_them = pytest.mark.skipif(not HAS_THEM, reason="the system has no asynchronous reads, or refuses them")


@pytest.fixture(params=[pytest.param("asynchronous", marks=needs_them), "threads"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of them reads in this test."""
    if request.param == "threads":
        monkeypatch.setattr(aio, "NUMBERS", {})
    return str(request.param)


def answering(reader: str, monkeypatch: pytest.MonkeyPatch, change: Callable[[int], int]) -> None:
    """Let the system's answers to reads, bytes or -errno, be others."""
    if reader == "asynchronous":
        ended = Queue.ended
        monkeypatch.setattr(Queue, "ended", lambda queue: [(tag, change(result)) for tag, result in ended(queue)])
        return
    real = os.preadv

    def preadv(*arguments: Any) -> int:
        found = change(real(*arguments))
        if found < 0:
            raise OSError(-found, os.strerror(-found))
        return found

    monkeypatch.setattr(os, "preadv", preadv)


def model(folder: Path, slots: int | None, reader: str | None = None):
    share = replace(prepare(folder, None, "float32", 1), slots=slots)
    made = assembled(share, share.read(0), None, Group())
    if reader is not None:
        assert (made.cache.store.asynchronous is not None) == (reader == "asynchronous" and made.cache.store.files.direct)
    return made


def stored(file: Path, experts: int, values: int, offset: int = 0) -> tuple[ExpertStore, torch.Tensor]:
    """A store of one layer of so many experts of float32, one after another, and what is in them `[experts, values]`."""
    right = torch.arange(experts * values, dtype=torch.float32)
    file.write_bytes(bytes(offset) + right.numpy().tobytes())
    size = 4 * values
    records = [{"w": Part(torch.float32, (values,), (Piece(file, offset + size * e, size),))} for e in range(experts)]
    return ExpertStore([records], ReadCounter()), right.view(experts, values)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("checked", [False, True])
def test_parts_of_pieces_anywhere_in_several_files_and_dtypes(seed: int, checked: bool, reader: str, tmp_path: Path) -> None:
    """Against the files' bytes: pieces adjacent or not, aligned or not, into aligned memory or not, cast or not."""
    rng = np.random.default_rng(seed)
    files = [tmp_path / "a", tmp_path / "b"]
    contents = [rng.integers(0, 120, 3 * STAGE_BYTES // 2 + 40_000, dtype=np.uint8) for _ in files]
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content.tobytes())
    record, right, sums, at = {}, {}, Checksum(), [0, 0]
    for name in "uvwx":
        dtype = [torch.int16, torch.int32, torch.uint8][rng.integers(3)]
        pieces, bytes_ = [], b""
        for _ in range(rng.integers(1, 4)):
            which = int(rng.integers(2))
            start = at[which] + int(rng.choice([0, 0, 1, BLOCK - at[which] % BLOCK]))
            length = int(rng.choice([dtype.itemsize, 2 * BLOCK, 4 * 777, 40 * BLOCK + 8, STAGE_BYTES // 8]))
            at[which] = start + length
            pieces.append(Piece(files[which], start, length))
            bytes_ += contents[which][start : start + length].tobytes()
        sums.update(bytes_)
        values = torch.frombuffer(bytearray(bytes_), dtype=dtype)
        record[name], right[name] = Part(dtype, tuple(values.shape), tuple(pieces)), values
    store = ExpertStore([[record]], ReadCounter(), [[sums.hexdigest()]] if checked else None)
    assert (store.asynchronous is not None) == (reader == "asynchronous" and store.files.direct)
    shapes = {name: part.shape for name, part in record.items()}
    dtypes = {name: part.dtype if rng.integers(3) else torch.int64 for name, part in record.items()}
    slots = Slots(3, shapes, dtypes, torch.device("cpu"), [[record]], store.files.block, moving=bool(rng.integers(2)))
    around = [{name: tensor.fill_(-1) for name, tensor in slots.place(slot, slots._shifts[slot]).items()} for slot in (0, 2)]
    wanted = tuple(shift if rng.integers(3) else 8 for shift in store.shifts(0, 0))
    into = slots.place(1, wanted) if rng.integers(4) else {n: torch.full(p.shape, -1, dtype=p.dtype) for n, p in record.items()}
    store.start(0, 0, into).result()
    for name, values in right.items():
        assert torch.equal(into[name].to(values.dtype), values), name
    assert all((tensor == -1).all() for beside in around for tensor in beside.values()), "the slots beside it are not touched"
    assert store.counter.bytes == sum(values.numel() * values.itemsize for values in right.values())
    store.close()


@pytest.mark.parametrize(
    ("offset", "length"), [(8, 40 * BLOCK), (520, 3 * STAGE_BYTES + 8), (4088, STAGE_BYTES + 16), (0, 99_992)]
)
def test_slots_have_room_for_the_blocks_that_an_expert_lies_in(offset: int, length: int, reader: str, tmp_path: Path) -> None:
    right = torch.arange(3 * length // 2, dtype=torch.int16).view(3, -1)
    file = tmp_path / "f"
    file.write_bytes(bytes(offset) + right.numpy().tobytes())
    records = [{"w": Part(torch.int16, (length // 2,), (Piece(file, offset + length * e, length),))} for e in range(3)]
    store = ExpertStore([records], ReadCounter())
    slots = Slots(3, {"w": (length // 2,)}, {"w": torch.int16}, torch.device("cpu"), store.records, store.files.block, True)
    into = [slots.place(slot, store.shifts(0, slot)) for slot in range(3)]
    for expert in (1, 0, 2):
        requests = store._transfer(0, expert, into[expert]).requests
        assert all(request.direct and request.length <= STAGE_BYTES for request in requests)
        assert all(at % store.files.block == 0 for r in requests for at in (r.offset, r.length))
        begins = into[expert].addresses["w"] - requests[0].spans[0].start
        assert begins % BLOCK == 0, "the fastest place to read to"
        store.start(0, expert, into[expert]).result()
    assert all(torch.equal(slots.pools["w"][expert], right[expert]) for expert in range(3))
    store.close()


def laid_out(rng: np.random.Generator, file: Path, block: int) -> tuple[dict[str, Part], dict[str, np.ndarray]]:
    """An expert of two or three parameters of pieces in any order in a file, where they can be read right into
    place, as Mixtral's gate, down and up lie; and what is in them."""
    pieces = [(name, nth) for name in "abc"[: rng.integers(2, 4)] for nth in range(rng.integers(1, 4))]
    lengths = {key: int(rng.choice([16 * BLOCK, 40 * BLOCK, 65 * BLOCK, 1100 * 1024])) for key in pieces}
    offset, places = int(rng.choice([8, 200, 512, 2048, 3000, 3584])), {}
    for at in rng.permutation(len(pieces)):
        places[pieces[at]] = offset
        offset += lengths[pieces[at]] + int(rng.choice([0, 0, block]))
    values = rng.integers(0, 256, offset, dtype=np.uint8)
    file.write_bytes(values.tobytes())
    record, right = {}, {}
    for name in dict.fromkeys(name for name, _ in pieces):
        mine = [(places[key], lengths[key]) for key in pieces if key[0] == name]
        record[name] = Part(torch.uint8, (sum(length for _, length in mine),), tuple(Piece(file, *place) for place in mine))
        right[name] = np.concatenate([values[first : first + length] for first, length in mine])
    return record, right


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("most", [None, 70_001])
def test_pieces_apart_in_the_file_are_read_into_one_tensor(
    seed: int, most: int | None, reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one ends and the next begins in the tensor, blocks of the file hold others' bytes; reads may be short, too."""
    rng = np.random.default_rng(seed)
    if seed % 3 == 0:
        monkeypatch.setattr(Files, "_reads_sectors", lambda files, path: False)
    block = BLOCK if seed % 3 == 0 else 512
    record, right = laid_out(rng, tmp_path / "f", block)
    store = ExpertStore([[record]], ReadCounter())
    if most is not None:
        answering(reader, monkeypatch, lambda result: min(result, most))
    assert store.files.block == block
    shapes = {name: part.shape for name, part in record.items()}
    slots = Slots(3, shapes, dict.fromkeys(shapes, torch.uint8), torch.device("cpu"), store.records, block, True)
    for stack in slots.stacks.values():
        stack.memory.fill_(0xEE)
    slot = seed % 3
    into = slots.place(slot, store.shifts(0, 0))
    requests = store._transfer(0, 0, into).requests
    assert any(request.direct for request in requests)
    store.start(0, 0, into).result()
    for name, stack in slots.stacks.items():
        assert np.array_equal(into[name].numpy(), right[name]), name
        rows = stack.memory.view(3, stack.stride)
        assert all((rows[other] == 0xEE).all() for other in range(3) if other != slot), "others' room is not touched"
    assert store.counter.bytes == sum(map(len, right.values()))
    store.close()


def test_some_pieces_end_within_a_block_that_is_anothers_too(tmp_path: Path) -> None:
    """Else the test above would not try what it says."""
    tails = [0, 0]
    for seed in range(24):
        block = BLOCK if seed % 3 == 0 else 512
        record, _ = laid_out(np.random.default_rng(seed), tmp_path / "f", block)
        for request in plan(record, [own_shift(part, block) for part in record.values()], False, block):
            tails[0] += request.tail > 0
            tails[1] += request.tail > 0 and request.length == block  # nothing else is read
    assert tails[0] > 10, tails


def test_an_error_while_it_goes_right_into_its_place_is_told(
    reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, right = laid_out(np.random.default_rng(1), tmp_path / "f", 512)
    store = ExpertStore([[record]], ReadCounter())
    shapes = {name: part.shape for name, part in record.items()}
    slots = Slots(2, shapes, dict.fromkeys(shapes, torch.uint8), torch.device("cpu"), store.records, store.files.block, True)
    broken = [True]
    answering(reader, monkeypatch, lambda result: -errno.EIO if broken[0] else result)
    into = slots.place(0, store.shifts(0, 0))
    with pytest.raises(CoterieError, match="f: cannot be read: Input/output error"):
        store.start(0, 0, into).result()
    broken[0] = False
    store.start(0, 0, into).result()
    assert all(np.array_equal(into[name].numpy(), values) for name, values in right.items())
    store.close()


def test_experts_of_files_that_lie_otherwise_are_read_into_the_same_slots(reader: str, tmp_path: Path) -> None:
    records, right = [], []
    for nth, offset in enumerate((8, 264, 4000, 6001)):
        values = torch.arange(nth, nth + 50_000, dtype=torch.int16)
        file = tmp_path / str(nth)
        file.write_bytes(bytes(offset) + values.numpy().tobytes())
        records.append({"w": Part(torch.int16, (50_000,), (Piece(file, offset, 100_000),))})
        right.append(values)
    store = ExpertStore([records], ReadCounter())
    cache = ExpertCache(store, 4, 2, {"w": (50_000,)}, torch.int16, 1)
    for expert in [0, 1, 2, 3, 2, 0, 3, 1, 3]:
        cache.announce(0, [expert])
        for group in cache.arrivals(0, [expert]):
            for _, slot in group:
                assert torch.equal(cache.pools["w"][slot], right[expert]), expert
    direct = [
        all(r.direct for r in store._transfer(0, e, cache.memory.place(0, store.shifts(0, e))).requests) for e in range(4)
    ]
    assert direct == [True, True, True, False], "an odd offset is no place for values of two bytes"
    store.close()


def test_a_checkpoint_in_bfloat16_is_read_into_the_slots_themselves(tmp_path: Path) -> None:
    folder = make_model("qwen3_moe", tmp_path, dtype="bfloat16", hidden_size=256, moe_intermediate_size=128)
    share = replace(prepare(folder, None, "bfloat16", 1), slots=4)
    cache = assembled(share, share.read(0), None, Group()).cache
    assert cache is not None
    for expert in range(4):
        into = cache.memory.place(1, cache.store.shifts(0, expert))
        requests = cache.store._transfer(0, expert, into).requests
        assert all(r.direct for r in requests), requests


@pytest.mark.parametrize("offset", [0, 1, 4095, 5000])
def test_pieces_longer_than_what_is_read_at_once(offset: int, reader: str, tmp_path: Path) -> None:
    store, right = stored(tmp_path / "f", 1, 2 * (STAGES + 2) * STAGE_BYTES // 4 + 3, offset)
    out = torch.zeros(right.shape[1])
    store.start(0, 0, {"w": out}).result()
    assert torch.equal(out, right[0])
    store.close()


def test_a_checkpoint_cut_short_while_in_use_is_named_and_no_half_read_expert_is_used(reader: str, tmp_path: Path) -> None:
    folder = make_model("qwen3_moe", tmp_path)
    made, right = model(folder, 3, reader), model(folder, None)
    file = folder / "model.safetensors"
    whole, written = file.read_bytes(), file.stat().st_mtime_ns
    os.truncate(file, 4096)
    with (
        torch.no_grad(),
        pytest.raises(CoterieError, match=r"model.safetensors: ends at byte \d+, expected \d+; was it changed"),
    ):
        made.transformers(PROMPTS)
    file.write_bytes(whole)
    os.utime(file, ns=(written, written))
    with torch.no_grad():
        assert torch.equal(made.transformers(PROMPTS).logits, right.transformers(PROMPTS).logits)


def test_a_checkpoint_written_to_while_in_use_is_named(reader: str, tmp_path: Path) -> None:
    folder = make_model("qwen3_moe", tmp_path)
    made = model(folder, 3, reader)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(bytes(64))
    with torch.no_grad(), pytest.raises(CoterieError, match=r"model\.safetensors: was changed while in use; start again"):
        made.transformers(PROMPTS)


def test_an_error_of_the_disk_is_named_and_what_follows_is_right(
    reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model("qwen3_moe", tmp_path)
    made, right = model(folder, 3, reader), model(folder, None)
    calls = iter(range(1 << 30))
    answering(reader, monkeypatch, lambda result: -errno.EIO if next(calls) == 5 else result)
    with torch.no_grad():
        with pytest.raises(CoterieError, match=r"model\.safetensors: cannot be read: Input/output error"):
            made.transformers(PROMPTS)
        assert torch.equal(made.transformers(PROMPTS).logits, right.transformers(PROMPTS).logits)


@pytest.mark.parametrize("most", [4096, 5000, 9000])
def test_short_reads_are_gone_on_with(most: int, reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model("qwen3_moe", tmp_path)
    made, right = model(folder, 3, reader), model(folder, None)
    answering(reader, monkeypatch, lambda result: min(most, result))
    with torch.no_grad():
        assert torch.equal(made.transformers(PROMPTS).logits, right.transformers(PROMPTS).logits)


def test_closing_waits_until_nothing_is_written(reader: str, tmp_path: Path) -> None:
    store, right = stored(tmp_path / "f", 40, STAGE_BYTES // 8)
    into = [{"w": torch.zeros(right.shape[1])} for _ in right]
    futures = [store.start(0, e, into[e], ahead=bool(e % 2)) for e in range(len(right))]
    store.close()
    kept = [tensors["w"].clone() for tensors in into]
    for expert, future in enumerate(futures):
        assert future.done()
        if future.cancelled():  # it had not begun
            continue
        error = future.exception()
        assert error is None or "when reading was closed" in str(error)
        assert error is not None or torch.equal(kept[expert], right[expert])
    time.sleep(0.2)  # would be a late write's
    assert all(torch.equal(tensors["w"], was) for tensors, was in zip(into, kept, strict=True))


def test_what_has_not_begun_is_not_read_when_closing(reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, right = stored(tmp_path / "f", 40, STAGE_BYTES // 8)
    read, closing = store.files.fill, threading.Event()

    def slowly(*arguments: Any) -> None:
        closing.wait(60)
        read(*arguments)

    if reader == "asynchronous":
        monkeypatch.setattr(Queue, "ended", lambda queue: [])  # so that what was begun stays under way
    monkeypatch.setattr(store.files, "fill", slowly)
    into = [{"w": torch.zeros(right.shape[1])} for _ in right]
    last = [store.start(0, expert, into[expert]) for expert in range(40)][-1]
    assert not last.running()
    threading.Timer(0.2, closing.set).start()  # once `close` has called off what waits
    store.close()
    assert last.cancelled() or isinstance(last.exception(), CoterieError)
    assert not into[-1]["w"].any()


def test_ctrl_c_while_waiting_leaves_no_expert_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model("qwen3_moe", tmp_path)
    monkeypatch.setattr(aio, "NUMBERS", {})
    made, right = model(folder, 3, "threads"), model(folder, None)
    calls, wait, read = iter(range(1 << 30)), Future.exception, made.cache.store.files.fill

    def waiting(future: Future[Any], timeout: float | None = None) -> BaseException | None:
        if next(calls) == 4:
            raise KeyboardInterrupt
        return wait(future, timeout)

    def slowly(*arguments: Any) -> None:
        time.sleep(0.1)
        read(*arguments)

    monkeypatch.setattr(Future, "exception", waiting)
    monkeypatch.setattr(made.cache.store.files, "fill", slowly)
    with torch.no_grad():
        with pytest.raises(KeyboardInterrupt):
            made.transformers(PROMPTS)
        assert torch.equal(made.transformers(PROMPTS).logits, right.transformers(PROMPTS).logits)


def test_a_store_that_is_forgotten_gives_its_files_back(reader: str, tmp_path: Path) -> None:
    store, _ = stored(tmp_path / "f", 1, 1000)
    (descriptor,) = store.files.descriptors.values()
    os.fstat(descriptor)
    del store
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_store_that_is_forgotten_gives_its_threads_back(reader: str, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    store, right = stored(tmp_path / "f", 1, 1000)
    store.start(0, 0, {"w": torch.zeros(right.shape[1])}).result()
    (mine,) = set(threading.enumerate()) - before
    del store
    gc.collect()
    mine.join(30)
    assert not mine.is_alive()


@needs_them
def test_what_is_needed_comes_before_what_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, right = stored(tmp_path / "f", 12, STAGE_BYTES // 4)
    hold, ended = threading.Event(), Queue.ended
    monkeypatch.setattr(Queue, "ended", lambda queue: ended(queue) if hold.is_set() else [])
    order: list[int] = []

    def begin(expert: int, ahead: bool) -> Future[None]:
        future = store.start(0, expert, {"w": torch.zeros(right.shape[1])}, ahead)
        future.add_done_callback(lambda _, expert=expert: order.append(expert))
        return future

    later = [begin(expert, True) for expert in range(8)]
    begun = -(-AHEAD_BYTES // STAGE_BYTES)
    assert [future.running() for future in later] == [place < begun for place in range(8)]
    assert later[7].cancel() and not later[0].cancel()
    needed = [begin(expert, False) for expert in range(8, 12)]
    assert all(future.running() for future in needed)
    hold.set()
    assert store.asynchronous is not None
    os.eventfd_write(store.asynchronous._wake, 1)
    for future in (*needed, *later[:7]):
        future.result()
    assert set(order[: begun + 5]) == {*range(begun), 7, *range(8, 12)}
    store.close()


@needs_them
@pytest.mark.parametrize("after", [False, True])
def test_ctrl_c_while_reads_begin_leaves_a_store_that_reads(
    after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, right = stored(tmp_path / "f", 6, STAGE_BYTES // 4)
    into = [{"w": torch.zeros(right.shape[1])} for _ in right]
    first, submit = store.start(0, 0, into[0], ahead=True), Queue.submit

    def interrupted(queue: Queue, reads: Any) -> int:
        if after:
            submit(queue, reads)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Queue, "submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.start(0, 1, into[1])
    error = first.exception()
    assert error is None or "when the run was interrupted" in str(error)
    for expert in range(6):
        store.start(0, expert, into[expert]).result()
        assert torch.equal(into[expert]["w"], right[expert])
    store.close()


@needs_them
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_reader_that_dies_ends_all_that_was_asked_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, whoever waited for what had just come would have waited for good."""
    store, right = stored(tmp_path / "f", 40, STAGE_BYTES // 4)
    reader = store.asynchronous
    assert reader is not None
    send = reader._send

    hold, ended = threading.Event(), Queue.ended
    monkeypatch.setattr(Queue, "ended", lambda queue: ended(queue) if hold.is_set() else [])

    def failing() -> None:
        if threading.current_thread() is reader._thread and hold.is_set():
            raise MemoryError("no more memory")
        send()

    monkeypatch.setattr(reader, "_send", failing)
    futures = [store.start(0, e, {"w": torch.zeros(right.shape[1])}) for e in range(len(right))]
    hold.set()
    os.eventfd_write(reader._wake, 1)
    told = [future.exception(timeout=20) for future in futures]
    assert all(error is None or isinstance(error, MemoryError) for error in told) and told[-1] is not None
    with pytest.raises(CoterieError, match="load it again"):
        store.start(0, 0, {"w": torch.zeros(right.shape[1])})
    store.close()


@needs_them
def test_what_was_called_off_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read-ahead is called off in nearly every layer: what remembered each would grow for as long as text is made."""
    store, right = stored(tmp_path / "f", 12, STAGE_BYTES // 4)
    reader = store.asynchronous
    assert reader is not None
    hold, ended = threading.Event(), Queue.ended
    monkeypatch.setattr(Queue, "ended", lambda queue: ended(queue) if hold.is_set() else [])
    for _ in range(3):
        hold.clear()
        futures = [store.start(0, e, {"w": torch.zeros(right.shape[1])}, ahead=True) for e in range(len(right))]
        called_off = [future.cancel() for future in futures]
        hold.set()
        os.eventfd_write(reader._wake, 1)
        assert any(called_off)
        for future, off in zip(futures, called_off, strict=True):
            if not off:
                future.result(timeout=60)
        store.start(0, 0, {"w": torch.zeros(right.shape[1])}).result(timeout=60)
    assert not reader._open and not reader._later and not reader._wanted
    store.close()


@needs_them
def test_reads_that_the_system_has_no_room_for_yet_begin_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, right = stored(tmp_path / "f", 40, STAGE_BYTES // 8)
    calls, submit = iter(range(1 << 30)), Queue.submit

    def full(queue: Queue, reads: Any) -> int:
        if next(calls) % 2:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return submit(queue, reads[:1])

    monkeypatch.setattr(Queue, "submit", full)
    into = [{"w": torch.zeros(right.shape[1])} for _ in right]
    futures = [store.start(0, expert, into[expert]) for expert in range(len(right))]
    for future in futures:
        future.result(timeout=60)
    assert all(torch.equal(tensors["w"], row) for tensors, row in zip(into, right, strict=True))
    store.close()


def test_a_checkpoint_exchanged_for_another_while_it_is_loaded_is_named(tmp_path: Path) -> None:
    """One of the same shape: experts would be the old ones', the rest the new one's."""
    folder = make_model("qwen3_moe", tmp_path / "m")
    share = replace(prepare(folder, None, "float32", 1), slots=3)
    other = make_model("qwen3_moe", tmp_path / "other")
    (other / "model.safetensors").replace(folder / "model.safetensors")
    with pytest.raises(CoterieError, match=r"model\.safetensors: was changed since its header was read; start again"):
        share.read(0)
    with pytest.raises(CoterieError, match=r"model\.safetensors: was changed since its header was read; start again"):
        replace(share, slots=None).read(0)


@needs_them
def test_a_system_that_refuses_leaves_it_to_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> int:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Queue, "_call", refused)
    store, right = stored(tmp_path / "f", 1, 1000)
    assert store.asynchronous is None
    out = torch.zeros(1000)
    store.start(0, 0, {"w": out}).result()
    assert torch.equal(out, right[0])
    store.close()
