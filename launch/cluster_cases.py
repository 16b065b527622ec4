"""What `coterie bench cluster` runs: models, prompts, routing to plan from and other routing to run, plans for a layout."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import coterie
from coterie.launch.cluster_sides import DEEPSPEED, OURS, TRANSFORMERS, Side
from coterie.moe.families import EMBEDDED, EMBEDDED_FOLDER
from coterie.placement.cost import plan_homes
from coterie.placement.planner import PlanRequest, baseline_plan, plan_whole
from coterie.placement.topology import Link, Topology
from coterie.routing import synth
from coterie.routing.errors import InputError
from coterie.routing.trace import RoutingTrace, read_trace

RANKS = 4
LAYERS, EXPERTS, HIDDEN, INTERMEDIATE, VOCABULARY = 8, 64, 256, 64, 512
GROUPS, NOISE, PURITY = 8, 0.2, 0.7  # of the synthetic routing, see `company`
SEEN_SEQUENCES = 96
PLANNED_BETWEEN = Link(125e6, 1e-4)  # plans are made for 1 Gbit/s between nodes, whatever the cell's rate
PLANNED_WITHIN = Link(4e9, 1e-5)
CONTIGUOUS, PLANNED, HOMED = "all_to_all, contiguous", "all_to_all, planned", "hierarchical, planned, homes"
HOMED_FLAT, COPIED = "all_to_all, planned, homes", "hierarchical, planned, homes, copies"
CHOSEN, CHOSEN_GLOO = "chosen", "chosen, over gloo"
COPIES = 2  # slots of a rank and layer beyond its share, in the case that has copies
STAYING, RETURNING = "coherent, planned", "all_to_all, planned"
MAX_LOAD = 1.2  # links are what is slow here: rows saved are worth more than the last of the balance (docs/cluster.md)
PEERS = {"transformers all_to_all": TRANSFORMERS, "deepspeed MOELayer": DEEPSPEED}


@dataclass(frozen=True)
class Case:
    """A model and its work. model: a folder or a name for `coterie.load`; top_k: experts a token.

    token_ids: int64 `[sequences, prefill + decode]`; expert_ids: int64 `[sequences, prefill + decode, layers, K]` where the
    routing is replayed, else None. seen: routing that plans are made from; prompts: that of the prefill, to choose homes by.
    """

    name: str
    model: str
    top_k: int
    prefill: int
    decode: int
    token_ids: NDArray[np.int64]
    expert_ids: NDArray[np.int64] | None
    seen: RoutingTrace
    prompts: RoutingTrace

    @property
    def sequences(self) -> int:
        """All ranks' together."""
        return len(self.token_ids)

    def save(self, folder: Path) -> None:
        """What the worker processes read."""
        from safetensors.numpy import save_file

        replayed = {} if self.expert_ids is None else {"expert_ids": np.ascontiguousarray(self.expert_ids)}
        save_file({"token_ids": np.ascontiguousarray(self.token_ids), **replayed}, folder / "case.safetensors")


def embedded(folder: Path, per_rank: int = 8, prefill: int = 96, decode: int = 6, checkpoint: str = EMBEDDED) -> Case:
    """The embedded model on held-out text, by its own routers; planned from its calibration text."""
    model = coterie.load(checkpoint, dtype="float32", device="cpu")
    texts = {name: _texts(EMBEDDED_FOLDER / "prompts" / f"{name}.jsonl") for name in ("calibration", "heldout")}
    model.record(texts["calibration"], folder / "seen.safetensors", token_ids=True)
    long = [ids for ids in map(model.text.encode, texts["heldout"]) if len(ids) >= prefill + decode]
    picked = np.random.default_rng(0).permutation(len(long))[: RANKS * per_rank]
    token_ids = np.array([long[i][: prefill + decode] for i in picked], dtype=np.int64)
    asked = [coterie.Prompt(token_ids=tuple(row[:prefill].tolist())) for row in token_ids]
    model.record(asked, folder / "prompts.safetensors", token_ids=True)
    seen, prompts = (read_trace(folder / f"{name}.safetensors") for name in ("seen", "prompts"))
    name = f"{EMBEDDED}, top-{model.shape.top_k}"
    return Case(name, checkpoint, model.shape.top_k, prefill, decode, token_ids, None, seen, prompts)


def single(folder: Path, per_rank: int = 1, prefill: int = 32, decode: int = 32) -> Case:
    """The embedded model run with one expert per token, in batches so small that latency rules."""
    model = folder / "single-expert"
    shutil.copytree(EMBEDDED_FOLDER, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 1}))
    case = embedded(folder, per_rank, prefill, decode, str(model))
    return replace(case, name="coterie-tiny, one expert per token")


def coherent_sides(case: Case, nodes: int, ranks_per_node: int, folder: Path, seconds: float) -> list[Side]:
    """Tokens that stay with their experts beside tokens that return home, each with a plan of its own."""
    dealt = tuple(sequence % RANKS for sequence in range(case.sequences))
    topology = Topology(nodes, ranks_per_node, PLANNED_WITHIN, PLANNED_BETWEEN, row_bytes=4.0 * 128)
    request = PlanRequest(topology, strategy="coherent", max_load=MAX_LOAD, time_limit=seconds, workers=2)
    staying = plan_whole(case.seen, request, prove=False)
    returning = plan_whole(case.seen, replace(request, strategy="all_to_all"), prove=False)
    free = replace(staying, strategy="all_to_all")  # the strategy of another plan would be taken as asked for
    sides = []
    for name, made, strategy in ((STAYING, staying, "coherent"), (RETURNING, returning, "all_to_all"), (CHOSEN, free, None)):
        path = folder / f"plan-{strategy or 'free'}.json"
        coterie.save_plan(made, path)
        sides.append(Side(name, OURS, dealt, str(path), strategy))
    return sides + [Side(name, kind, dealt) for name, kind in PEERS.items() if kind == TRANSFORMERS]


def _texts(file: Path) -> list[coterie.Prompt]:
    return [coterie.Prompt(text=json.loads(line)["prompt"]) for line in file.read_text().splitlines()]


def synthetic(folder: Path, per_rank: int = 4, prefill: int = 32, decode: int = 6) -> Case:
    """The random top-8 model with replayed synthetic routing; other sequences are planned from than run."""
    sequences, positions = RANKS * per_rank, prefill + decode
    ids = company(SEEN_SEQUENCES + sequences, positions, top_k=8)
    return _replayed("random 8x64 top-8, synthetic routing", folder, ids[:SEEN_SEQUENCES], ids[SEEN_SEQUENCES:], prefill)


def recorded(folder: Path, traces: Path, per_rank: int = 4, prefill: int = 32, decode: int = 6) -> Case:
    """The random model with top-6 and the routing of DeepSeek-V2-Lite's first layers on two domains. InputError without it."""
    found = []
    for domain in ("intent", "law"):
        path = traces / f"deepseek-v2-lite-{domain}.safetensors"
        if not path.is_file():
            raise InputError(f"{path} is not there: give --traces DIR")
        found.append(_sequences(read_trace(path), prefill + decode))
    half = RANKS * per_rank // 2
    seen = np.concatenate([part[half:] for part in found])
    run = np.concatenate([part[:half] for part in found])[np.random.default_rng(0).permutation(2 * half)]
    return _replayed("random 8x64 top-6, deepseek-v2-lite routing", folder, seen, run, prefill)


def _sequences(trace: RoutingTrace, positions: int) -> NDArray[np.int64]:
    """The first `positions` tokens of every sequence that has them, int64 `[sequences, positions, LAYERS, K]`, shuffled."""
    found = []
    for number in np.unique(trace.sequence_ids):
        tokens = np.flatnonzero(trace.sequence_ids == number)
        if len(tokens) >= positions:
            found.append(trace.expert_ids[tokens[np.argsort(trace.positions[tokens])][:positions], :LAYERS])
    stacked = np.stack(found).astype(np.int64)
    return stacked[np.random.default_rng(0).permutation(len(found))]


def company(sequences: int, positions: int, top_k: int, seed: int = 0) -> NDArray[np.int64]:
    """Routing where tokens of a sequence keep company, int64 `[sequences, positions, LAYERS, top_k]`.

    Tokens are those of `synth.make("aligned")`: each belongs to a group of experts, and a pick strays from it with probability
    NOISE. A sequence has a group for its topic; a token is of that group with probability PURITY, else of any.
    """
    count = sequences * positions
    trace = synth.make("aligned", 8 * count, LAYERS, EXPERTS, top_k, seed, groups=GROUPS, noise=NOISE, sequences=1)
    groups_of = synth.aligned_groups(LAYERS, EXPERTS, GROUPS, seed)
    visited = np.take_along_axis(groups_of[None], trace.expert_ids.astype(np.int64).reshape(-1, LAYERS, top_k), 2)
    group = (visited.reshape(len(visited), -1, 1) == np.arange(GROUPS)).sum(1).argmax(1)
    rng = np.random.default_rng((seed, 7))
    topic = np.repeat(rng.permutation(np.arange(sequences) % GROUPS), positions)
    wanted = np.where(rng.random(count) < PURITY, topic, rng.integers(GROUPS, size=count))
    pools = [rng.permutation(np.flatnonzero(group == g)) for g in range(GROUPS)]
    nth = np.array([(wanted == g).cumsum() - 1 for g in range(GROUPS)])[wanted, np.arange(count)]
    tokens = np.array([pools[g][n] for g, n in zip(wanted, nth, strict=True)])
    picked: NDArray[np.int64] = trace.expert_ids[tokens].astype(np.int64)
    return picked.reshape(sequences, positions, LAYERS, top_k)


def _replayed(name: str, folder: Path, seen: NDArray[np.int64], run: NDArray[np.int64], prefill: int) -> Case:
    sequences, positions, _, top_k = run.shape
    model = folder / f"random-top-{top_k}"
    save_random_model(model, top_k)
    token_ids = np.random.default_rng(1).integers(0, VOCABULARY, (sequences, positions))
    traces = [as_trace(ids, model.name) for ids in (seen, run[:, :prefill])]
    return Case(name, str(model), top_k, prefill, positions - prefill, token_ids, run, *traces)


def as_trace(ids: NDArray[np.int64], model: str) -> RoutingTrace:
    """ids `[sequences, positions, layers, K]` as a trace."""
    sequences, positions, layers, top_k = ids.shape
    return RoutingTrace(
        expert_ids=ids.reshape(-1, layers, top_k).astype(np.int16),
        sequence_ids=np.repeat(np.arange(sequences), positions).astype(np.int32),
        positions=np.tile(np.arange(positions), sequences).astype(np.int32),
        model=model, num_experts=EXPERTS, layer_ids=tuple(range(layers)),
    )  # fmt: skip


def save_random_model(folder: Path, top_k: int) -> None:
    """A checkpoint of 8 layers with 64 experts each and random weights."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS, num_experts=EXPERTS, num_experts_per_tok=top_k, norm_topk_prob=True,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).save_pretrained(folder)


def make_sides(case: Case, nodes: int, ranks_per_node: int, folder: Path, seconds: float) -> list[Side]:
    """All sides of a case on a layout; plans are written to `folder`. seconds: of the planner, for each of two plans."""
    row_bytes = float(4 * (HIDDEN if case.expert_ids is not None else 128))
    topology = Topology(nodes, ranks_per_node, PLANNED_WITHIN, PLANNED_BETWEEN, row_bytes=row_bytes)
    dealt = tuple(sequence % RANKS for sequence in range(case.sequences))
    request = PlanRequest(topology, max_load=MAX_LOAD, time_limit=seconds, workers=2)
    contiguous = baseline_plan("contiguous", case.seen, topology, "all_to_all")
    planned = plan_whole(case.seen, request, prove=False)
    homed = plan_whole(case.seen, replace(request, strategy="hierarchical", homes=True), prove=False)
    homes = _homes(homed, case.prompts)
    free = replace(homed, strategy="all_to_all")  # the strategy of another plan would be taken as asked for
    plans = {CONTIGUOUS: contiguous, PLANNED: planned, HOMED: homed, HOMED_FLAT: free, CHOSEN: free, CHOSEN_GLOO: free}
    strategies = {CONTIGUOUS: "all_to_all", PLANNED: "all_to_all", HOMED: "hierarchical", HOMED_FLAT: "all_to_all"}
    if case.expert_ids is None:
        slots = -(-case.seen.num_experts // RANKS) + COPIES
        copied = replace(request, strategy="hierarchical", homes=True, slots_per_rank=slots)
        plans[COPIED], strategies[COPIED] = plan_whole(case.seen, copied, prove=False), "hierarchical"
    sides = []
    for number, (name, made) in enumerate(plans.items()):
        path = folder / f"plan-{number}.json"
        coterie.save_plan(made, path)
        transport = "gloo" if name == CHOSEN_GLOO else "tcp"
        at = dealt if made.homes is None else homes if made is not plans.get(COPIED) else _homes(made, case.prompts)
        sides.append(Side(name, OURS, at, str(path), strategies.get(name), transport, once=name == CHOSEN_GLOO))
    return sides + [Side(name, kind, dealt) for name, kind in PEERS.items()]


def _homes(made: coterie.PlacementPlan, prompts: RoutingTrace) -> tuple[int, ...]:
    """The home rank of each sequence, in order."""
    homes = plan_homes(made, prompts)
    return tuple(int(homes[np.flatnonzero(prompts.sequence_ids == s)[0]]) for s in np.unique(prompts.sequence_ids))
