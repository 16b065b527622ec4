"""`--replan`: what is done between steps to follow the load. `auto` plans anew when the measured load has drifted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn

from coterie.moe.collectives import Group
from coterie.moe.layer import StepContext
from coterie.moe.relocate import Relocation
from coterie.placement.cost import evaluate_load
from coterie.placement.plan import PlacementPlan, read_plan, save_plan
from coterie.routing.files import write_text
from coterie.routing.trace import LoadStatistics, read_routing, save_load

INTERVAL = 64  # steps between looks at the load
DRIFTED = 1.1  # busiest rank over mean from which a new plan is looked for, times the load for which none was found
PATIENCE = 16  # looks for which that is remembered
BETTER = 0.97  # a new plan must bring the load below this times the present one
MOVES_SHARE = 0.1  # of all experts, that a new plan may move
PLAN_SECONDS = 5
COMPLAINTS = "complaints.txt"  # of the planner, in its folder


class Boundary(Protocol):
    """What happens between two steps, on every rank alike."""

    @property
    def moving(self) -> bool:
        """Whether experts are on their way: some layers may lie by one plan and others by another."""
        ...

    def notice(self) -> int:
        """What this rank tells the others in the step's agreement."""
        ...

    def step(self, notices: list[int]) -> None:
        """After the agreement, with what every rank told."""
        ...

    def rest(self) -> None:
        """When generation has ended well: what is on its way comes first. Every rank must call it."""
        ...

    def close(self) -> None:
        """When generation has ended, or failed."""
        ...


class TakeOver:
    """Carries out one new plan from the first step on. done: called on every rank when it has been taken over."""

    def __init__(
        self, model: nn.Module, group: Group, old: PlacementPlan, new: PlacementPlan, done: Callable[[], None]
    ) -> None:
        self.relocation: Relocation | None = Relocation(model, group, old, new)
        self.begun = False
        self.done = done

    @property
    def moving(self) -> bool:
        """As `Boundary`."""
        return self.begun and self.relocation is not None

    def notice(self) -> int:
        """Nothing."""
        return 0

    def step(self, notices: list[int]) -> None:
        """Move on."""
        self.begun = True
        if self.relocation is not None and self.relocation.step():
            self.relocation = None
            self.done()

    def rest(self) -> None:
        """As `Boundary`."""
        if self.relocation is not None:
            self.relocation.rest()

    def close(self) -> None:
        """What has not been taken over yet is left to the next run."""


class AutoReplan:
    """Measures the load of every expert, and plans anew beside the running job when it has drifted.

    The planner runs in a process of its own on rank 0's machine; when its plan is better, rank 0 says so in a step's agreement
    and all ranks take it over. say: for people, called on rank 0 alone. taken: called on every rank with the new plan.
    """

    def __init__(
        self, model: nn.Module, group: Group, context: StepContext, plan: PlacementPlan, say: Callable[[str], None],
        taken: Callable[[PlacementPlan], None], interval: int = INTERVAL,
    ) -> None:  # fmt: skip
        self.model, self.group, self.context, self.plan = model, group, context, plan
        self.say, self.taken, self.interval = say, taken, interval
        self.steps = 0
        self._planner: subprocess.Popen[bytes] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._relocation: Relocation | None = None
        device = next(model.parameters()).device
        self._usual, self._until = 1.0, 0  # the load for which nothing better was found, and until which step that counts
        self._loads = torch.zeros((len(plan.layer_ids), plan.num_experts), dtype=torch.int64, device=device)

    @property
    def moving(self) -> bool:
        """As `Boundary`."""
        return self._relocation is not None

    def notice(self) -> int:
        """1 on rank 0 when a plan has been made."""
        return int(self._planner is not None and self._planner.poll() is not None)

    def step(self, notices: list[int]) -> None:
        """Look at the load now and then; take over a better plan."""
        self.context.loads = self._loads
        self.steps += 1
        if self._relocation is not None:
            if self._relocation.step():
                self.plan, self._relocation = self._relocation.new, None
                self.taken(self.plan)
        elif any(notices):
            self._decide()
        elif self.steps % self.interval == 0:
            self._look()

    def _look(self) -> None:
        """Sum the loads of all ranks; on rank 0 begin to plan if the busiest rank has too much."""
        counted = self.group.agree(self._loads.flatten().tolist())
        total = np.array(counted, dtype=np.int64).sum(0).reshape(1, *self._loads.shape)
        self._loads.zero_()
        if self.group.rank != 0 or self._planner is not None or not total.any():
            return
        statistics = LoadStatistics(total, self.plan.model, self.plan.layer_ids, ("measured",))
        load = evaluate_load(self.plan, statistics, 0).load
        self.say(f"load: the busiest rank has {load:.2f} times the mean (steps {self.steps - self.interval} to {self.steps})")
        if load > DRIFTED * (self._usual if self.steps < self._until else 1.0):
            self._begin(statistics)

    def _begin(self, statistics: LoadStatistics) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="coterie-replan-")
        folder = Path(self._folder.name)
        save_load(statistics, folder / "load.safetensors")
        save_plan(replace(self.plan, homes=None), folder / "old.json")  # a plan is not changed under its homes
        write_text(folder / "topology.json", json.dumps(self.plan.topology.to_json()))
        moves = max(1, int(MOVES_SHARE * self.plan.num_experts * len(self.plan.layer_ids)))
        command = [sys.executable, "-m", "coterie", "plan", str(folder / "load.safetensors"),
                   "--topology", str(folder / "topology.json"), "--objective", "load", "--from", str(folder / "old.json"),
                   "--max-moves", str(moves), "--workers", "1", "--time-limit", str(PLAN_SECONDS),
                   "--out", str(folder / "new.json")]  # fmt: skip
        with (folder / COMPLAINTS).open("w") as complaints:  # a pipe could fill up
            self._planner = subprocess.Popen(
                command, env=_alone(), stdout=subprocess.DEVNULL, stderr=complaints, stdin=subprocess.DEVNULL
            )

    def _decide(self) -> None:
        """Every rank learns the plan that rank 0's planner made, if it is better, and begins to take it over."""
        new = self.group.gather(self._found() if self.group.rank == 0 else None)[0]
        if new is not None:
            self._relocation = Relocation(self.model, self.group, self.plan, new)
            if self.group.rank == 0:
                self.say(f"load: moving {self._relocation.count} experts")

    def _found(self) -> PlacementPlan | None:
        """The new plan, or None if it is not worth its moves."""
        assert self._planner is not None and self._folder is not None
        folder = Path(self._folder.name)
        failed, self._planner = self._planner.wait(), None
        if failed:
            complaint = (folder / COMPLAINTS).read_text(errors="replace")
            self.say(f"load: the planner failed, the plan is kept: {complaint.strip()[-300:]}")
            self._folder.cleanup()
            return None
        statistics = read_routing(folder / "load.safetensors")
        assert isinstance(statistics, LoadStatistics)
        new = replace(read_plan(folder / "new.json"), homes=self.plan.homes)  # a tenth of the experts moves: they still fit
        loads = [evaluate_load(p, statistics, 0).load for p in (self.plan, new)]
        better = loads[1] < BETTER * loads[0]
        if not better:
            self._usual, self._until = loads[0], self.steps + PATIENCE * self.interval
        kept = "" if better else "; kept as it is"
        self.say(f"load: a new plan would bring it from {loads[0]:.2f} to {loads[1]:.2f}{kept}")
        self._folder.cleanup()
        return new if better else None

    def rest(self) -> None:
        """As `Boundary`."""
        if self._relocation is not None:
            self._relocation.rest()

    def close(self) -> None:
        """End the planner if it still runs; stop counting."""
        self.context.loads = None
        if self._planner is not None:
            self._planner.kill()
            self._planner.wait()
            self._planner = None
        if self._folder is not None:
            self._folder.cleanup()


def _alone() -> dict[str, str]:
    """This environment without what a launcher put there: the planner is no rank of the job."""
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    prefixes = ("OMPI_", "PMI", "PMIX_", "SLURM_", "TORCHELASTIC_", "PRTE_")
    return {k: v for k, v in os.environ.items() if k not in launched and not k.startswith(prefixes)}
