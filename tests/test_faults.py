"""A rank that dies, stops, is late or fails: the others say which, and end; nothing of the job remains."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))
from faults import (
    KINDS,
    RESTART,
    TIMEOUT,
    Fault,
    Job,
    free_port,
    launcher,
    on_ranks,
    restart,
    run,
    undisturbed,
    undisturbed_file,
    wait_for,
)

from coterie.moe import watch as watch_module
from coterie.moe.beats import Beat, Heard, Seat, blame, late, seat_here, system_says
from coterie.moe.traffic import Traffic
from coterie.moe.watch import Watch
from coterie.routing.errors import CoterieError, RankLostError

PATIENCE = 40.0  # on a busy machine; bench/faults.py measures


def heard(*ages: float, **more: Any) -> dict[int, Heard]:
    return {rank: Heard(Beat(1, 10, 4, 2), age, **more) for rank, age in enumerate(ages)}


def test_the_silent_rank_is_to_blame() -> None:
    assert blame(heard(0, 1, 61), 0) == {2: "does not answer: it was last seen 61 s ago in step 4, layer 2"}
    assert blame(heard(0, 1, 1), 0) == {} and blame(heard(99, 1, 1), 0) == {}


def test_a_rank_that_says_why_it_failed_goes_before_those_that_fell_silent_with_it() -> None:
    known = heard(0, 50, 0) | {2: Heard(Beat(1, 1, 3, left="out of memory"), 0)}
    assert blame(known, 0) == {2: "failed in step 3: out of memory"}


def test_ranks_that_left_because_of_another_pass_the_blame_on() -> None:
    known = heard(0, 0, 9) | {1: Heard(Beat(left="rank 2 is dead", lost=(2,)), 9)}
    assert list(blame(known, 0)) == [2]
    known = heard(0, 0, 1) | {1: Heard(Beat(left="rank 2 is dead", lost=(2,)), 9)}
    assert list(blame(known, 0)) == [2]
    gave_me_up = heard(0, 0) | {1: Heard(Beat(left="rank 0 is stopped", lost=(0,)), 9)}
    assert blame(gave_me_up, 0) == {1: "has left: rank 0 is stopped"}


def test_a_stopped_rank_is_to_blame_only_once_an_exchange_has_failed() -> None:
    known = heard(0, 2, system="stopped")
    assert blame(known, 0, 60, failed=False) == {} and list(blame(known, 0)) == [1]
    assert list(blame(heard(0, 0, system="dead"), 0, 60, failed=False)) == [1]


def test_who_is_done_is_never_to_blame() -> None:
    assert blame({0: Heard(Beat(), 0), 1: Heard(Beat(done=True), 99, "dead")}, 0) == {}


def test_of_ranks_that_live_the_one_behind_is_late() -> None:
    known = heard(0, 0, 0) | {1: Heard(Beat(5, 8, 3), 0)}
    assert late(known, 0, 10) == {1: "lives but is late: it is in step 3, 2 exchange(s) behind"}
    assert late(known, 1, 8) == {}


def test_the_system_knows_a_stopped_and_a_dead_process() -> None:
    here = seat_here(0, "n")
    if not here.machine:
        pytest.skip("no /proc")
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    born = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19]
    seat = Seat(1, "n", "h", child.pid, here.machine, born)
    assert system_says(seat, here) == ""
    child.send_signal(19)
    assert wait_for(lambda: system_says(seat, here) == "stopped", 10)
    child.kill()
    assert wait_for(lambda: system_says(seat, here) == "dead", 10)
    child.wait()
    assert system_says(seat, here) == "dead" and system_says(Seat(1, "n", "h", 1, "elsewhere", "0"), here) == ""


class Ranks:
    """Watches of several ranks as threads of this process, on one store."""

    def __init__(self, size: int, timeout: float) -> None:
        import torch.distributed as dist

        self.store = dist.TCPStore("127.0.0.1", 0, size, True, timedelta(seconds=20), wait_for_workers=False)
        seats = [Seat(rank, "n", f"h{rank}", 100 + rank, "", "") for rank in range(size)]
        self.ended: dict[int, CoterieError] = {}
        for rank in range(size):
            self.store.set(Watch.key(rank), Beat().to_json())
        self.watches = [
            Watch(self.store, rank, seats, timeout, Traffic(), partial(self.ended.setdefault, rank), None)
            for rank in range(size)
        ]

    def start(self, *ranks: int) -> None:
        for rank in ranks:
            self.watches[rank].start()

    def stop(self) -> None:
        for watch in self.watches:
            watch._stopping.set()
            watch._kick.set()
        for watch in self.watches:
            for thread in watch._threads:
                if thread.is_alive():
                    thread.join(10)


@pytest.fixture
def ranks():
    made = Ranks(3, timeout=4.0)
    yield made
    made.stop()


def test_a_failed_exchange_names_the_rank_whose_beat_stands_still(ranks: Ranks) -> None:
    ranks.start(0, 1)
    words = r"^rank 2 \(host h2, pid 102\) does not answer: it was last seen \d+ s ago"
    with pytest.raises(RankLostError, match=words) as caught, ranks.watches[0].waiting():
        raise RuntimeError("Connection closed by peer")
    assert caught.value.ranks == (2,)


def test_ranks_meet_however_long_one_takes_as_long_as_it_beats(ranks: Ranks) -> None:
    ranks.start(0, 1, 2)
    done = threading.Event()

    def slow() -> None:
        time.sleep(5)  # longer than the timeout
        done.set()
        ranks.watches[2].meet(60)

    threads = [threading.Thread(target=slow), threading.Thread(target=lambda: ranks.watches[1].meet(60))]
    for thread in threads:
        thread.start()
    ranks.watches[0].meet(60)
    assert done.is_set() and not ranks.ended
    for thread in threads:
        thread.join()


def test_who_does_not_come_to_a_meeting_is_named(ranks: Ranks) -> None:
    ranks.start(0, 1, 2)
    threading.Thread(target=lambda: ranks.watches[2].leave("disk full")).start()
    with pytest.raises(RankLostError, match=r"rank 2 .* failed before the first step: disk full"):
        ranks.watches[0].meet(60)
    with pytest.raises(RankLostError, match=r"rank 2 .* failed"):
        ranks.watches[1].meet(0.5)


def test_who_has_come_to_a_meeting_and_gone_is_named_by_those_who_wait_there(ranks: Ranks) -> None:
    """Rank 1 still works; rank 2 has come, then left, blamed by the rank that loads."""
    ranks.start(0, 1, 2)
    ranks.watches[2]._say(meetings=1)
    assert wait_for(lambda: ranks.watches[0].heard[2][0].meetings == 1, PATIENCE)
    ranks.watches[1].leave("rank 2 is dead", lost=(2,))
    with pytest.raises(RankLostError, match=r"rank 2 \(host h2, pid 102\)") as caught:
        ranks.watches[0].meet(60)
    assert caught.value.ranks == (2,)


def test_ranks_that_all_live_are_not_searched_for_long(ranks: Ranks) -> None:
    ranks.start(0, 1, 2)
    for other in (1, 2):
        ranks.watches[other]._say(collectives=5)
    assert wait_for(lambda: all(ranks.watches[0].heard[r][0].collectives == 5 for r in (1, 2)), PATIENCE)
    began = time.monotonic()
    with pytest.raises(CoterieError, match=r"though every rank lives.*--timeout"), ranks.watches[0].waiting():
        ranks.watches[0].entered = began - 100
        raise RuntimeError("odd")
    assert time.monotonic() - began < watch_module.SEARCH_SECONDS


def test_a_rank_from_which_bytes_come_is_not_late(ranks: Ranks) -> None:
    ranks.start(0, 1, 2)
    with ranks.watches[0].waiting():
        for _ in range(30):  # six seconds, longer than the timeout
            time.sleep(0.2)
            ranks.watches[0].progressed()
    assert not ranks.ended


def test_the_guard_ends_a_process_whose_main_thread_never_comes_back(ranks: Ranks) -> None:
    ranks.start(0, 1, 2)
    ranks.watches[0].traffic.step = 7
    ranks.watches[0].beat = Beat(collectives=5)
    ranks.watches[1].beat = Beat(collectives=6)
    ranks.watches[0].entered = time.monotonic() - 100
    ranks.watches[0].resumed_at = time.monotonic() - 100
    assert wait_for(lambda: 0 in ranks.ended, PATIENCE)
    assert "rank 2" in str(ranks.ended[0]) and "lives but is late" in str(ranks.ended[0])


def test_times_add_up_to_less_than_promised() -> None:
    w = watch_module
    search = (w.SURE_BEATS + 0.1) * w.BEAT_SECONDS  # where all live and one is late; who is gone is found sooner
    told = 2 * w.BEAT_SECONDS
    assert w.GUARD_SECONDS + w.GRACE_SECONDS + search + told + w.LINGER_SECONDS <= 5


@pytest.fixture(scope="module")
def text() -> str:
    return undisturbed()


@pytest.mark.processes
class TestJobs:
    """Real jobs on 4 processes; their times are measured by bench/faults.py, not here."""

    @pytest.mark.parametrize(
        ("kind", "started_by", "delay"),
        [("kill", "torchrun", 0.0), ("stop", "mpirun", 0.0), ("delay", "mpirun", 2.0), ("late", "torchrun", TIMEOUT + 8)],
    )
    def test_a_rank_is_killed_stopped_delayed_or_late(self, kind: str, started_by: str, delay: float, text: str) -> None:
        if not launcher(started_by):
            pytest.skip(f"{started_by} is not installed")
        fault = Fault(0, started_by, kind, 1 + KINDS.index(kind) % 3, 40, delay)
        outcome = run(fault, text)
        assert not outcome.processes_left and not outcome.ports_left, outcome
        if fault.kind == "delay":
            assert outcome.exit_code == 0 and outcome.text_equal, outcome
        else:
            assert outcome.exit_code != 0 and outcome.named and outcome.survivors < PATIENCE, outcome

    def test_deepspeeds_rank_0_dies_with_the_store(self, text: str) -> None:
        if not launcher("deepspeed"):
            pytest.skip("deepspeed is not installed")
        outcome = run(Fault(0, "deepspeed", "kill", 0, 40, 0.0), text)
        assert outcome.named and outcome.exit_code != 0 and not outcome.processes_left and not outcome.ports_left, outcome

    def test_a_job_that_is_started_again_and_resumes_writes_the_same_file(self) -> None:
        outcome = restart(Fault(0, "torchrun", RESTART, 2, 15, 0.0), undisturbed_file())
        assert outcome.exit_code == 0 and outcome.text_equal and not outcome.processes_left and not outcome.ports_left, outcome

    def test_a_rank_that_the_system_cannot_see_is_named_by_its_silence(self) -> None:
        """The second node's processes have ids of their own, as in a container or on another machine."""
        apart = ["unshare", "--pid", "--fork", "--mount-proc"]
        if not shutil.which("unshare") or subprocess.run([*apart, "true"], capture_output=True).returncode:
            pytest.skip("needs root, for a PID namespace")
        program, port = launcher("torchrun")[0], str(free_port())
        where = ["--nnodes", "2", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", port]
        nodes = [
            Job([*(apart if n else []), program, *where, "--node-rank", str(n), "-m", "coterie", *on_ranks()]) for n in range(2)
        ]
        try:
            assert wait_for(lambda: len(nodes[0].out) > 20, 180), nodes[0].err
            os.kill(nodes[1].ranks()[3], signal.SIGSTOP)
            assert wait_for(lambda: nodes[0].process.poll() is not None, 120)
            said = [line for line in nodes[0].err.splitlines() if line.startswith("coterie: ")]
            assert re.search(
                r"rank 3 \(host .*, pid \d+\) does not answer: it was last seen \d+ s ago (in step \d+|before the first step)",
                said[0],
            ), said
        finally:
            for node in nodes:
                node.end()

    def test_a_rank_out_of_memory_is_named(self) -> None:
        line = ["generate", "coterie-tiny", "--timeout", "5", "--prompt", "x", "--strategy", "all_to_all"]
        job = Job([*launcher("torchrun")[:-2], str(ROOT / "tests" / "limited_rank.py"), *line])
        try:
            assert wait_for(lambda: job.process.poll() is not None and not job.processes(), 180), job.err
            said = [line for line in job.err.splitlines() if line.startswith("coterie: ")]
            assert job.process.returncode == 1 and any("out of memory" in line and "rank 1" in line for line in said), job.err[
                -3000:
            ]
        finally:
            job.end()
