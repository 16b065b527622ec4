"""The memory that a job will need, told and checked before any is allocated."""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from coterie.launch.available import free_bytes, machine, resident_bytes, system_bytes
from coterie.launch.commands import say
from coterie.launch.distributed import together
from coterie.launch.tables import table
from coterie.offload.expect import Weights
from coterie.placement.plan import PlacementPlan
from coterie.routing.errors import InputError

if TYPE_CHECKING:
    from coterie.launch.generating import Asked
    from coterie.moe.collectives import Group
    from coterie.moe.memory import ModelSizes, RankMemory, Workload
    from coterie.moe.prepare import Share


@dataclass(frozen=True)
class Checked:
    """told: the JSON object of `--dry-run`; too_large: strategies that must not be chosen, since they would not fit."""

    told: dict[str, Any]
    too_large: frozenset[str]


def check_memory_options(options: argparse.Namespace) -> None:
    """Raises InputError for what every process can tell by itself to be wrong."""
    from coterie.moe.cached import MISSES
    from coterie.moe.prepare import check_eviction

    if options.memory is not None:
        parse_bytes(options.memory)
    if options.host_memory is not None:
        parse_bytes(options.host_memory, "--host-memory")
    if options.packed is not None and options.memory is None:
        raise InputError(f"--packed: found {str(options.packed)!r} without --memory, expected --memory SIZE beside it")
    if options.eviction is not None:
        check_eviction(options.eviction, "--eviction")
    if options.misses not in MISSES:
        raise InputError(f"--misses: found {options.misses!r}, expected {', '.join(MISSES)}")


def within_budget(asked: Asked, sizes: ModelSizes, options: argparse.Namespace, group: Group) -> Asked:
    """The same with as many experts at once as the budget of each process allows, on all ranks alike.

    sizes: `sizes_on_device`. The budget is `--memory`, of a GPU's memory where there is one; else what is free, where one
    process cannot hold all.
    """
    asked = _with_host(asked, options, group)
    budget = _budget(asked, sizes, options, group)
    if budget is None:
        if asked.share.misses == "cpu":
            raise InputError("--misses: found cpu where all experts fit, expected --memory with it: nothing is missed here")
        if options.host_memory is not None:
            raise InputError("--host-memory: found it where all experts fit, expected --memory with it: nothing is left there")
        if options.eviction is not None:
            raise InputError("--eviction: found it where all experts fit, expected --memory with it: nothing gives way here")
        if options.prior is not None:
            raise InputError("--prior: found it where all experts fit, expected --memory with it: nothing is read later here")
        return asked
    from coterie.moe.memory import estimate, most_held, most_slots
    from coterie.moe.prepare import needs_copy, not_packed

    share, (work, taken) = asked.share, _needs(asked, options, group)
    slots = most_slots(sizes, share.plan, _candidates(asked)[0], work, budget, taken)
    if slots is not None and needs_copy(share):
        peak = max(need.peak for need in estimate(sizes, share.plan, _candidates(asked)[0], work))
        given = "--memory" if options.memory is not None else "memory that is free"
        enough = int(ENOUGH * (peak + taken))  # another process has not taken just as much
        raise InputError(f"{not_packed(given, share)}; all experts need --memory {enough}")
    if slots is not None and share.device.type != "cpu":
        together(group, lambda: share.host_slots(most_held(share.plan)))  # raises where a rank's is too small
    if group.rank == 0:
        whole = most_held(share.plan)
        given_too = (options.packed, options.prior, options.eviction, options.host_memory)
        unused = "".join(f", {given} is not used" for given in given_too if given is not None)
        what = (
            f"all experts fit{unused}" if slots is None else f"room for {slots} of {whole} experts at once, the others on disk"
        )
        given = options.memory or f"{budget / 1e9:.1f} GB, what is free,"
        say(f"memory: {given} for each process, of which {taken / 1e6:,.0f} MB are taken already: {what}")
        if slots is not None:
            say(f"experts to read for a token, if routing is even: {_read(share, sizes, slots) / 1e6:,.0f} MB")
    chosen = share if options.eviction is None else replace(share, eviction=options.eviction)
    return replace(asked, share=replace(chosen, slots=slots))


def _read(share: Share, sizes: ModelSizes, slots: int) -> float:
    """Bytes a token, where a cache of `slots` finds the share of experts that it holds (docs/cards.md)."""
    from coterie.moe.memory import most_held

    layers, experts = len(share.shape.layer_ids), share.shape.num_experts
    return Weights(sizes.dense, max(sizes.expert), layers, experts, sizes.top_k).read(slots / most_held(share.plan))


def sizes_on_device(share: Share) -> ModelSizes:
    """Sizes of the model where it will run."""
    from coterie.moe.sizes import sizes_of

    sizes = sizes_of(share.shape, share.empty, share.dtype, share.rounding, share.checkpoint)
    return sizes if share.device.type == "cpu" else replace(sizes, process=0, widened=0, widened_rows=(0, 0), room=0)


def _needs(asked: Asked, options: argparse.Namespace, group: Group) -> tuple[Workload, int]:
    """What is to be run, and bytes that the processes have taken already, the most of any."""
    from coterie.moe.memory import workload

    work, device = workload(asked.requests, options.batch_size), asked.share.device
    if device.type == "cpu":
        return work, max(group.gather(resident_bytes()))
    import torch

    return work, max(group.gather(torch.cuda.memory_reserved(device)))


def _budget(asked: Asked, sizes: ModelSizes, options: argparse.Namespace, group: Group) -> int | None:
    """Bytes of a process; None where all experts are to be loaded."""
    share = asked.share
    if options.memory is not None:
        return parse_bytes(options.memory)
    free = free_bytes(share.device)
    if share.quantise or options.replan or free is None or share.plan.ranks > 1:
        return None
    from coterie.moe.memory import estimate, most_slots

    work, taken = _needs(asked, options, group)
    if estimate(sizes, share.plan, "local", work)[0].total <= free:
        return None
    budget = taken + int(MARGIN * free)
    try:
        most_slots(sizes, share.plan, "local", work, budget, taken)
    except InputError:
        return None  # too small for a cache, too: `check_memory` says what would do
    return budget


def _with_host(asked: Asked, options: argparse.Namespace, group: Group) -> Asked:
    """`--host-memory` and `--misses`, which are about what lies behind a GPU; ranks of one machine share what it has free."""
    share = asked.share
    if share.quantise is not None and options.misses != "fetch":
        raise InputError(f"--misses: found {options.misses} with --quantise, expected fetch: the host rounds in another order")
    if share.device.type == "cpu":
        if options.host_memory is not None:
            raise InputError("--host-memory: found it without a GPU, expected --memory: that is the host's here")
        if options.misses == "cpu":
            raise InputError("--misses: found cpu without a GPU, expected fetch or auto: all is computed on the CPU here")
        return asked
    free, beside = system_bytes(), group.gather(machine()).count(machine())
    found = (
        parse_bytes(options.host_memory, "--host-memory") if options.host_memory else free and int(HOST_SHARE * free / beside)
    )
    return replace(asked, share=replace(share, host_bytes=found, misses=options.misses))


ENOUGH = 1.02  # times what all experts need, where that is advised
MARGIN, HOST_SHARE = 0.95, 0.8  # of what is free: for a process where all does not fit; of the host for experts behind a GPU
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str, name: str = "--memory") -> int:
    """`2GiB`, `500MB`, `1.5G`, `123456789`. Raises InputError for anything else."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    if found is None or float(found[1]) == 0:
        raise InputError(f"{name}: found {text!r}, expected a size such as 2GiB, 500MB or 1500000000")
    return int(float(found[1]) * UNITS[found[2] or ""])


def check_memory(asked: Asked, sizes: ModelSizes, options: argparse.Namespace, group: Group) -> Checked:
    """Print what every rank will need; raise InputError on all ranks alike if it is more than there is.

    sizes: `sizes_on_device`. On fewer processes than the plan has ranks (a dry run) nothing is known of the ranks' machines,
    and nothing is checked.
    """
    from coterie.moe.memory import Room, check_fits, estimate, workload

    share = asked.share
    work = workload(asked.requests, options.batch_size)
    plans = [share.plan, asked.replan] if isinstance(asked.replan, PlacementPlan) else [share.plan]

    def of_ranks(name: str) -> list[RankMemory]:
        by_plan = [estimate(sizes, plan, name, work, share.slots) for plan in plans]
        return [max(needs, key=lambda need: need.total) for needs in zip(*by_plan, strict=True)]

    needed = {name: of_ranks(name) for name in _candidates(asked)}
    first = next(iter(needed))
    here, found = free_bytes(share.device), None
    if group.size == share.plan.ranks:
        found = _free_by_rank(group, here, [n.total for n in needed[first]], share.device.type == "cuda")
    if group.rank == 0:
        _print(needed, options, share.plan.ranks, here, found)
    told = _json(needed, asked, here, found)
    if found and share.slots is None:
        try:
            for plan in plans:
                check_fits(sizes, first, work, Room(plan, found))
        except InputError as error:
            error.partial = told if options.dry_run else None
            error.known(alone=False)  # all ranks know what all have
            raise
    too_large = {name for name, ranks in needed.items() if any(ranks[r].total > free for r, free in (found or {}).items())}
    if options.memory is not None:
        budget, taken = parse_bytes(options.memory), _needs(asked, options, group)[1]
        most = {name: max(n.peak if share.slots is None else n.total for n in ranks) for name, ranks in needed.items()}
        too_large |= {
            name for name, peak in most.items() if peak + taken > budget and name != first
        }  # `within_budget` made room
    if share.slots is not None and first in too_large:
        rank, free = min((found or {}).items(), key=lambda item: item[1])
        several = f" for rank {rank}, as many share its machine", ", or start fewer"
        whose, way = several if group.size > 1 else ("", "")
        found_free = f"--memory: found {options.memory} for each process, but {free / 1e9:.2f} GB are free"
        refusal = InputError(f"{found_free}{whose}; give at most that{way}")
        refusal.partial = told if options.dry_run else None
        raise refusal.known(alone=False)
    return Checked(told, frozenset(too_large))


def _candidates(asked: Asked) -> list[str]:
    """The strategies that may come to run; the first one must fit."""
    from coterie.moe.coherent import FAMILIES

    if asked.share.plan.ranks == 1:
        return ["local"]
    if asked.strategy is not None:
        return [asked.strategy]
    coherent = ["coherent"] if asked.share.shape.config.model_type in FAMILIES else []
    return ["all_to_all", "overlapped", "hierarchical", "all_gather", "replicated", *coherent]


def _free_by_rank(group: Group, here: int | None, needed: list[int], apart: bool) -> dict[int, float]:
    """What each rank may take, bytes. apart: each has a device of its own; else a machine's ranks share by what they need."""
    said = group.gather((machine(), here))
    if apart:
        return {rank: float(free) for rank, (_, free) in enumerate(said) if free is not None}
    together: dict[str, list[int]] = defaultdict(list)
    for rank, (where, free) in enumerate(said):
        if free is not None:
            together[where].append(rank)
    least = {where: min(said[r][1] for r in ranks) for where, ranks in together.items()}
    return {
        rank: least[where] * needed[rank] / sum(needed[r] for r in ranks) for where, ranks in together.items() for rank in ranks
    }


def _print(needed: dict[str, list[RankMemory]], options: argparse.Namespace, ranks: int, here: int | None, found: Any) -> None:
    from coterie.moe.memory import told

    first, by_rank = next(iter(needed.items()))
    say(f"memory of a rank, {first}, batch size {options.batch_size} (weights and cache exact, buffers estimated):")
    ends = {"least": min(by_rank, key=lambda n: n.total), "most": max(by_rank, key=lambda n: n.total)}
    rows = [[name, *(told(v) for v in n.to_json().values())] for name, n in ends.items()]
    say(table(["rank", *by_rank[0].to_json()], rows if ranks > 1 else rows[1:]))
    if len(needed) > 1:
        most = (f"{name} {told(max(n.total for n in ranks))}" for name, ranks in needed.items())
        say(f"by strategy, which is chosen later among those that fit: {', '.join(most)}")
    free = "not known here, not checked" if here is None else told(here)
    where = "" if found else f"; its ranks run elsewhere, not checked; all together need {told(sum(n.total for n in by_rank))}"
    say(f"free on this machine: {free}{where}")


def _json(
    needed: dict[str, list[RankMemory]], asked: Asked, here: int | None, found: dict[int, float] | None
) -> dict[str, Any]:
    by_rank = next(iter(needed.values()))
    fits = None if not found else all(by_rank[r].total <= free for r, free in found.items())
    memory = {
        "ranks": [n.to_json() for n in by_rank],
        "largest": max(n.total for n in by_rank),
        "by_strategy": {name: max(n.total for n in ranks) for name, ranks in needed.items()},
        "free_bytes": here,
        "fits": fits,
    }
    return {
        "memory": memory,
        "ranks": asked.share.plan.ranks,
        "strategy": asked.strategy or (None if len(needed) > 1 else "local"),
    }
