"""The sides of `coterie bench cluster`: our own models and the peers', each a transformers model that takes the same calls.

A side routes by its own router or, where routing is replayed, by a trace; never do two sides route differently.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

import coterie
from coterie.launch.replay import Replay
from coterie.moe.batch import Request, Running, Scored
from coterie.moe.collectives import Group
from coterie.moe.families import resolve_model
from coterie.moe.sockets import SocketTransport
from coterie.routing.errors import InputError
from coterie.routing.record import expert_modules

OURS, TRANSFORMERS, DEEPSPEED = "coterie", "transformers", "deepspeed"
NEVER = -1e4  # router logit of an expert that was not picked
LEAST_WEIGHT = 1e-30


@dataclass(frozen=True)
class Side:
    """What is measured. kind: OURS, TRANSFORMERS or DEEPSPEED; plan: a plan file; strategy: ours, None: as coterie chooses.

    homes: the rank that runs each sequence, by sequence; transport: ours, tcp or gloo, which is what the peers use. once: what
    is chosen is chosen once for a cell, not in every turn.
    """

    name: str
    kind: str
    homes: tuple[int, ...]
    plan: str | None = None
    strategy: str | None = None
    transport: str = "tcp"
    once: bool = False


Logits = dict[int, torch.Tensor]  # by sequence, `[vocabulary]`; those that this rank computed


class Loaded(Protocol):
    """A side in this process. strategy: ours, as chosen; by phase, predicted seconds per layer, and promised tokens/s."""

    strategy: str | None
    predicted: dict[str, float]
    promised: dict[str, float]
    model: Any

    def communication(self) -> float:
        """Seconds spent in the layers' collectives so far; 0 where that is not known."""
        ...

    def choose(self, homes: Sequence[int], token_ids: torch.Tensor, prefill: int) -> None:
        """Choose what is left to be chosen for such a run as `start` begins, as if nothing had run before."""
        ...

    def start(self, homes: Sequence[int], token_ids: torch.Tensor, prefill: int) -> None:
        """Begin a run of the sequences `token_ids` `[sequences, positions]`, homes: by sequence, the rank that runs it."""
        ...

    def prefill(self) -> Logits:
        """The first `prefill` positions."""
        ...

    def decode(self, position: int) -> Logits:
        """One position more."""
        ...


def load_side(side: Side, model: str, replay: Replay, group: Group) -> Loaded:
    """This rank's share of a side; all ranks load together. Raises InputError if it cannot be had here."""
    return LOADERS[side.kind](side, model, replay, group)


class Ours:
    """Our model, run by what `generate` runs it with; what a step's loop agrees on is part of it."""

    def __init__(self, side: Side, made: coterie.Model, replay: Replay) -> None:
        self.made, self.replay, self.asked = made, replay, side.strategy
        self.strategy: str | None = None
        self.predicted: dict[str, float] = {}
        self.promised: dict[str, float] = {}
        self.model = made.transformers
        replay.attach(made.transformers)

    def communication(self) -> float:
        """As `Loaded`."""
        return self.made.group.traffic.exchanging()

    def choose(self, homes: Sequence[int], token_ids: torch.Tensor, prefill: int) -> None:
        """As `Loaded`: links are measured and steps rehearsed anew."""
        made, requests = self.made, self._requests(token_ids, prefill)
        made.dispatcher.forget()
        all_at_once = len(requests)
        with self.replay.by_text():
            choice = made.dispatcher.choice(requests, all_at_once, made.transformers, made.context, homes)
        self.choice, self.strategy = choice, choice.name
        times = {"prefill": (choice.prefill_seconds, choice.prefill), "decode": (choice.decode_seconds, choice.decode)}
        self.predicted = {phase: seconds[name] for phase, (seconds, name) in times.items() if seconds}
        self.promised = choice.tokens_per_second

    def start(self, homes: Sequence[int], token_ids: torch.Tensor, prefill: int) -> None:
        """As `Loaded`; `choose` must have been called."""
        made, ranks, choice = self.made, self.made.group.size, self.choice
        requests = self._requests(token_ids, prefill)
        self.token_ids = token_ids
        self.executor = made.dispatcher.executor(made.transformers, made.context, choice, None)
        shared = choice.shared
        assigned = [[Running(r, 0 if shared else rank) for r in requests if shared or homes[r.index] == rank]
                    for rank in range(1 if shared else ranks)]  # fmt: skip
        self.assigned, self.at = assigned, prefill
        self._tell(assigned[0 if shared else made.group.rank], 0, prefill)

    def prefill(self) -> Logits:
        """As `Loaded`."""
        return self._grown(self.executor.prefill(self.assigned))

    def decode(self, position: int) -> Logits:
        """As `Loaded`."""
        agreed = self.executor.agree(0, 0)
        self._tell(self.executor.sequences, position, 1)
        return self._grown(self.executor.decode(agreed.running))

    def _requests(self, token_ids: torch.Tensor, prefill: int) -> list[Request]:
        left = token_ids.shape[1] - prefill
        return [Request(i, tuple(row[:prefill].tolist()), left) for i, row in enumerate(token_ids)]

    def _tell(self, sequences: Sequence[Running], first: int, length: int) -> None:
        self.replay.at([s.request.index for s in sequences], first, length)

    def _grown(self, scored: Scored) -> Logits:
        """The sequences, each with the next given token if there is one."""
        at, self.at = self.at, self.at + 1
        if at < self.token_ids.shape[1]:
            given = [(s, int(self.token_ids[s.request.index, at])) for s, _ in scored]
            for sequence, token in self.executor.settle(given, 0):
                sequence.new_tokens.append(token)
        return {s.request.index: logits for s, logits in scored}


class Peer:
    """Another's model, driven through transformers' `forward` with its cache."""

    def __init__(self, model: Any, replay: Replay, group: Group) -> None:
        self.strategy: str | None = None
        self.model, self.replay, self.group = model.eval(), replay, group
        self.predicted: dict[str, float] = {}
        self.promised: dict[str, float] = {}

    def communication(self) -> float:
        """Not known."""
        return 0.0

    def choose(self, homes: Sequence[int], token_ids: torch.Tensor, prefill: int) -> None:
        """Nothing is."""

    def start(self, homes: Sequence[int], token_ids: torch.Tensor, prefill: int) -> None:
        """As `Loaded`."""
        from transformers import DynamicCache

        self.mine = [sequence for sequence, home in enumerate(homes) if home == self.group.rank]
        self.ids, self.length, self.cache = token_ids[self.mine], prefill, DynamicCache(config=self.model.config)

    def prefill(self) -> Logits:
        """As `Loaded`."""
        return self._step(0, self.length)

    def decode(self, position: int) -> Logits:
        """As `Loaded`."""
        return self._step(position, 1)

    def _step(self, first: int, length: int) -> Logits:
        self.replay.at(self.mine, first, length)
        ids = self.ids[:, first : first + length]
        out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return dict(zip(self.mine, out.logits[:, -1], strict=True))


def _coterie(side: Side, model: str, replay: Replay, group: Group) -> Loaded:
    plan = coterie.read_plan(Path(side.plan)) if side.plan else None
    transport = group.transport if side.transport == "gloo" else _tcp()
    own = Group(transport, group.ranks_per_node)  # counters of its own
    made = coterie.load(model, plan, dtype="float32", strategy=side.strategy, device="cpu", group=own)
    made.dispatcher.remember = False  # links differ from cell to cell
    made.dispatcher.share = float("inf")  # what is timed stands for a job of any length
    if replay.ids is not None:
        made.dispatcher.without = frozenset({"coherent"})  # it asks the routers themselves
    return Ours(side, made, replay)


@functools.cache
def _tcp() -> SocketTransport:
    """One mesh of connections for all of our sides."""
    store = PrefixStore("tcp", dist.distributed_c10d._get_default_store())
    master = os.environ["MASTER_ADDR"]
    return SocketTransport.from_store(dist.get_rank(), dist.get_world_size(), store, master, timedelta(minutes=10))


def _whole(model: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(resolve_model(model)[1], dtype=torch.float32)


def _transformers(side: Side, model: str, replay: Replay, group: Group) -> Loaded:
    """Expert parallelism over all ranks, each with its own batch; the dense part is on every rank.

    `from_pretrained(distributed_config=DistributedConfig(fsdp_size=R, ep_size=R, ep_implementation="all_to_all"))` is the
    public way to it, but FSDP then gathers the dense part in every call. Without that the peer is faster, and like ours.
    """
    try:
        from transformers.distributed.expert_parallel import AllToAllEP, apply_expert_parallelism
    except ImportError as error:
        version = importlib.metadata.version("transformers")
        raise InputError(f"transformers {version} has no all-to-all expert parallelism, expected 5.23 or later") from error
    from torch.distributed.device_mesh import init_device_mesh

    made = _whole(model)
    mesh = init_device_mesh("cpu", (group.size, 1), mesh_dim_names=("ep", "tp"))
    plan = made._expand_parallel_plan(made.ep_plan)
    assert AllToAllEP  # what "all_to_all" names
    apply_expert_parallelism(made, mesh["ep"], mesh["tp"], plan, "all_to_all")
    replay.attach(made)
    return Peer(made, replay, group)


def _deepspeed(side: Side, model: str, replay: Replay, group: Group) -> Loaded:
    """The same model with every MoE block replaced by DeepSpeed's MOELayer, which drops no token."""
    _start_deepspeed()
    made = _whole(model)
    for number, (name, experts) in enumerate(expert_modules(made).values()):
        block_name = name.rpartition(".")[0]
        block = made.get_submodule(block_name)
        made.set_submodule(block_name, DeepSpeedBlock(block.gate, experts, number, replay, group))
    return Peer(made, replay, group)


def _start_deepspeed() -> None:
    """DeepSpeed's communication over the running process group.

    Its `init_distributed` would compile an extension for shared memory first, for minutes, which serves single nodes only.
    """
    try:
        communication: Any = importlib.import_module("deepspeed.comm.comm")
        backend: Any = importlib.import_module("deepspeed.comm.torch")  # the package's attribute `torch` is torch itself
    except ImportError as error:
        raise InputError("deepspeed is not installed: pip install -c constraints.txt deepspeed") from error
    if communication.cdb is None:
        backend.build_shm_op = lambda: None
        communication.cdb = backend.TorchBackend("gloo", timedelta(minutes=10), None)


class DeepSpeedBlock(nn.Module):
    """A transformers MoE block whose experts are reached through `deepspeed.moe.sharded_moe.MOELayer`."""

    def __init__(self, router: nn.Module, experts: Any, number: int, replay: Replay, group: Group) -> None:
        super().__init__()
        from deepspeed.moe.experts import Experts
        from deepspeed.moe.sharded_moe import MOELayer

        self.router, self.number, self.replay = router, number, replay
        total = experts.down_proj.shape[0]
        if total % group.size:
            raise InputError(f"deepspeed: found {total} experts on {group.size} ranks, expected as many on each")
        local = total // group.size
        self.gate = _PickedGate(total)
        stack = Experts(_Expert(experts.act_fn), local)
        for place, expert in enumerate(stack.deepspeed_experts):
            expert.take(experts, group.rank * local + place)
        self.layer = MOELayer(self.gate, stack, "all", group.size, local)
        self.layer._set_ep_group(dist.group.WORLD)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Like the block's own; the gate is told which experts and weights its softmax and top-k have to come to."""
        _, weights, ids = self.router(hidden_states.flatten(0, 1))
        ids = self.replay.layer(self.number, ids)
        self.gate.tell(ids, weights)
        out: torch.Tensor = self.layer(hidden_states, None)
        return out


class _PickedGate(nn.Module):
    """DeepSpeed's top-k gating of given experts."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.ep_group: Any = None

    def _set_ep_group(self, group: Any) -> None:
        self.ep_group = group

    def tell(self, ids: torch.Tensor, weights: torch.Tensor) -> None:
        logits = torch.full((len(ids), self.num_experts), NEVER)
        self.logits = logits.scatter(1, ids, weights.float().clamp(min=LEAST_WEIGHT).log())
        self.top_k = ids.shape[1]

    def forward(self, x: torch.Tensor, used_token: Any = None, sparse_routes: bool = False, use_tutel: bool = False) -> Any:
        from deepspeed.moe.sharded_moe import topkgating

        return topkgating(self.logits, self.top_k, 1.0, 0, False, self.ep_group, sparse_routes=sparse_routes)


class _Expert(nn.Module):
    """One gated expert by itself."""

    def __init__(self, activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.activation = activation

    def take(self, experts: Any, number: int) -> None:
        """Copies the weights of the number-th expert of a transformers experts module."""
        self.first = nn.Parameter(experts.gate_up_proj[number].detach().clone(), requires_grad=False)
        self.second = nn.Parameter(experts.down_proj[number].detach().clone(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = nn.functional.linear(x, self.first).chunk(2, dim=-1)
        return nn.functional.linear(self.activation(gate) * up, self.second)


LOADERS: dict[str, Callable[[Side, str, Replay, Group], Loaded]] = {
    OURS: _coterie,
    TRANSFORMERS: _transformers,
    DEEPSPEED: _deepspeed,
}
