"""What the launchers' environments say: found without starting anything."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.launch.assembly import check_seats, ranks_per_node
from coterie.launch.distributed import choose_transport
from coterie.launch.launched import FIRST_PORT, PORTS, Launch, expand_nodes, find_launch, slurm_port
from coterie.moe.beats import Seat, seat_here
from coterie.routing.errors import InputError

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500", "GROUP_RANK": "1"}
MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
STEP = {
    "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "gpu[03-04,11]", "SLURMD_NODENAME": "gpu11", "SLURM_NTASKS_PER_NODE": "2",
}  # fmt: skip


def test_a_process_without_a_launcher_stands_alone() -> None:
    assert find_launch({}) == Launch()
    assert find_launch({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}) == Launch()


def test_torchrun_tells_everything() -> None:
    found = find_launch({**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert (found.launcher, found.rank, found.size, found.local_rank) == ("torchrun", 3, 4, 1)
    assert (found.address, found.port, found.agent_store) == ("a", 29500, True)
    assert found.node.endswith(", node 1") and not find_launch(TORCHRUN).agent_store


def test_two_nodes_on_one_machine_are_told_apart_by_the_local_world_size() -> None:
    environment = {k: v for k, v in TORCHRUN.items() if k != "GROUP_RANK"} | {"LOCAL_WORLD_SIZE": "2"}
    nodes = [find_launch({**environment, "RANK": str(rank)}).node for rank in range(4)]
    assert nodes[0] == nodes[1] != nodes[2] == nodes[3]


def test_mpirun_is_found_by_open_mpi_and_by_mpich() -> None:
    assert (find_launch(MPI).launcher, find_launch(MPI).rank, find_launch(MPI).size) == ("mpirun", 1, 4)
    assert find_launch({"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0"}).launcher == "mpirun"


def test_mpirun_goes_before_the_slurm_step_that_started_its_daemons() -> None:
    assert find_launch({**STEP, **MPI}).launcher == "mpirun"


def test_a_step_of_srun_meets_on_its_first_node() -> None:
    found = find_launch({**STEP, "PMI_RANK": "5", "PMI_SIZE": "8"})
    assert (found.launcher, found.rank, found.size, found.local_rank, found.node) == ("srun", 5, 8, 1, "gpu11")
    assert (found.address, found.port) == ("gpu03", slurm_port(4711, 0))
    chosen = find_launch({**STEP, "MASTER_ADDR": "other", "MASTER_PORT": "1234"})
    assert (chosen.address, chosen.port) == ("other", 1234)


@pytest.mark.parametrize(
    "shell",
    [
        {"SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"},  # salloc
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "1"},  # the script of sbatch
        {**STEP, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # salloc's interactive step
    ],
)
def test_an_allocations_shell_stands_alone(shell: dict[str, str]) -> None:
    assert find_launch(shell) == Launch()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE: found 4 without RANK"),
        ({"RANK": "0", "WORLD_SIZE": "4"}, "MASTER_ADDR, MASTER_PORT: not set"),
        ({**TORCHRUN, "RANK": "4"}, "RANK: found 4 with WORLD_SIZE 4, expected 0 to 3"),
        ({**TORCHRUN, "RANK": "x"}, "RANK: found 'x' in the environment, expected a number"),
        ({k: v for k, v in STEP.items() if k != "SLURM_STEP_NODELIST"}, "SLURM_STEP_NODELIST: not set"),
        ({**STEP, "SLURM_STEP_NODELIST": "a[1-"}, r"SLURM_STEP_NODELIST: found 'a\[1-'"),
    ],
)
def test_an_environment_that_says_half_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_launch(environment)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a", ["a"]),
        ("a,b1,c", ["a", "b1", "c"]),
        ("host[1-3,7]", ["host1", "host2", "host3", "host7"]),
        ("n[08-11]x,m", ["n08x", "n09x", "n10x", "n11x", "m"]),
        ("r[0-1]n[1,3]", ["r0n1", "r0n3", "r1n1", "r1n3"]),
        ("", []),
    ],
)
def test_node_lists_are_expanded(text: str, names: list[str]) -> None:
    assert list(expand_nodes(text)) == names


@pytest.mark.parametrize("text", ["a[", "a]", "a[]", "a[3-1]", "a[x]", "a[1-2-3]"])
def test_what_is_no_node_list_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="SLURM_STEP_NODELIST: found"):
        expand_nodes(text)


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 32))
def test_a_slurm_port_is_one_that_systems_do_not_hand_out(job: int, step: int) -> None:
    assert FIRST_PORT <= slurm_port(job, step) < FIRST_PORT + PORTS <= 32768 and slurm_port(job, step) != slurm_port(
        job + 1, step
    )


def seats(*nodes: str, **more: str) -> list[Seat]:
    return [Seat(rank, node, node, rank, "", "", **more) for rank, node in enumerate(nodes)]


def test_every_node_must_have_as_many_ranks_in_a_row() -> None:
    assert ranks_per_node(seats("a", "a", "b", "b")) == 2 and ranks_per_node(seats("a", "a", "a")) == 3
    with pytest.raises(InputError, match="ranks per node: found 1 on b and 2 on a, expected as many on every node"):
        ranks_per_node(seats("a", "a", "b"))
    with pytest.raises(InputError, match="ranks per node: found ranks 0, 2 on a, expected consecutive ones"):
        ranks_per_node(seats("a", "b", "a", "b"))


def test_ranks_must_run_one_version_and_not_share_a_gpu() -> None:
    check_seats(seats("a", "a"))
    with pytest.raises(InputError, match="coterie: found version 2 on rank 1"):
        check_seats([*seats("a", version="1"), Seat(1, "b", "b", 1, "", "", version="2")])
    with pytest.raises(
        InputError, match=r"--transport: rank 1 \(host b\) found tcp and rank 0 \(host a\) nccl, expected the same"
    ):
        check_seats(
            [replace(seat_here(0, "a", transport="nccl"), host="a"), replace(seat_here(1, "b", transport="tcp"), host="b")]
        )
    with pytest.raises(InputError, match=r"nccl: rank 0 \(host a, pid 0\) and rank 1 share a GPU"):
        check_seats(seats("a", "a", device="GPU-1"))


def test_one_place_chooses_the_transport() -> None:
    assert choose_transport(find_launch(MPI), 0) == "mpi" and choose_transport(find_launch(MPI), 2) == "nccl"
    assert choose_transport(find_launch(TORCHRUN), 0) == "tcp" and choose_transport(find_launch(STEP), 0) == "tcp"
    assert choose_transport(find_launch(STEP), 0, "mpi") == "mpi" and choose_transport(find_launch(MPI), 0, "gloo") == "gloo"
    for launch, gpus, wish, message in (
        (MPI, 0, "udp", "found 'udp', expected one of nccl, mpi, tcp, gloo"),
        (MPI, 0, "nccl", "found nccl without a GPU"),
        (TORCHRUN, 0, "mpi", "found mpi under torchrun, expected mpirun"),
        (MPI, 1, "mpi", "found mpi with a GPU"),
    ):
        with pytest.raises(InputError, match=message):
            choose_transport(find_launch(launch), gpus, wish)
