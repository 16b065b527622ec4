"""`coterie bench WHAT`: this program beside its peers, one table and one JSON object (docs/formats.md)."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coterie.launch.available import usable_cores
from coterie.launch.tables import table
from coterie.routing.errors import InputError

BENCHES = {name: f"coterie.launch.bench_{name}" for name in ("plan", "kernels", "experts", "offload", "cluster")}
TAKES = {
    "only": ("plan", "kernels", "cluster"), "traces": ("plan", "offload", "cluster"),
    **dict.fromkeys(("tune", "peers", "compile"), ("kernels",)),
}  # fmt: skip
VERSIONS = ("numpy", "scipy", "PuLP", "highspy", "torch", "triton", "transformers", "accelerate", "deepspeed", "vllm", "sglang",
            "llama-cpp-python")  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One figure. peers: the same by other methods, None where not measured; bar: what it has to reach, None if nothing.

    higher: whether more is better; why: the reason for a missing figure.
    """

    case: str
    metric: str
    unit: str
    value: float | None
    bar: float | None = None
    peers: dict[str, float | None] = field(default_factory=dict)
    higher: bool = False
    why: str = ""

    @property
    def ratio(self) -> float | None:
        """Against the best peer; above 1 is better."""
        known = [p for p in self.peers.values() if p is not None]
        if self.value is None or not known:
            return None
        best = max(known) if self.higher else min(known)
        ours, theirs = (self.value, best) if self.higher else (best, self.value)
        return 1.0 if ours == theirs else ours / theirs if theirs else None

    @property
    def met(self) -> bool | None:
        """Whether the bar was reached; None without one, or if not measured."""
        if self.bar is None or self.value is None:
            return None
        return self.value >= self.bar if self.higher else self.value <= self.bar

    def to_json(self) -> dict[str, Any]:
        """As the contract states it."""
        row = {"case": self.case, "metric": self.metric, "unit": self.unit, "value": self.value, "peers": self.peers}
        return row | {"ratio": self.ratio, "bar": self.bar, "met": self.met} | ({"why": self.why} if self.why else {})


class Interrupted(KeyboardInterrupt):
    """partial: the JSON object of what was measured before."""

    def __init__(self, message: str, partial: dict[str, Any]) -> None:
        super().__init__(message)
        self.partial = partial


def bench(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; rows appear as they are measured."""
    started = time.perf_counter()
    if options.traces is not None and not options.traces.is_dir():
        raise InputError(f"--traces: found {options.traces}, expected a folder of recorded traces")
    if options.what not in BENCHES:
        raise InputError(f"bench: found {options.what!r}, expected {' or '.join(BENCHES)}")
    for name, takers in TAKES.items():
        if getattr(options, name) and options.what not in takers:
            raise InputError(f"--{name}: found it with bench {options.what}, expected bench {' or '.join(takers)}")
    options.traces = options.traces or Path("../shared/traces")
    measured: Iterable[Row] = importlib.import_module(BENCHES[options.what]).rows(options)
    rows = []
    try:
        for row in measured:
            rows.append(row)
            print(_line(row), flush=True, file=sys.stderr if options.json else sys.stdout)
    except KeyboardInterrupt:
        found = _result(options.what, rows, started) | {"interrupted": True}
        raise Interrupted(f"interrupted; {len(rows)} rows were measured before", found) from None
    except Exception as error:  # whatever it is, hours may have been measured
        if rows:
            error.partial = _result(options.what, rows, started) | {"error": str(error)}  # type: ignore[attr-defined]
        raise
    if not options.json:
        print("\n" + _table(rows))
    return _result(options.what, rows, started)


def _result(what: str, rows: list[Row], started: float) -> dict[str, Any]:
    return {
        "bench": what, "machine": machine(), "versions": versions(), "rows": [row.to_json() for row in rows],
        "seconds": time.perf_counter() - started,
    }  # fmt: skip


def named(what: Iterable[str], only: str) -> list[str]:
    """Those whose name contains `only`. Raises InputError if there is none."""
    names = list(what)
    found = [name for name in names if only.lower() in name.lower()]
    if not found:
        raise InputError(f"--only: found {only!r}, expected a part of {', '.join(names)}")
    return found


def _line(row: Row) -> str:
    value = "not measured: " + row.why if row.value is None else f"{row.value:.4g} {row.unit}"
    return f"{row.case}: {row.metric} {value}" + ("" if row.met is None else " (met)" if row.met else " (NOT met)")


def _table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        peers = ", ".join(f"{name} {'-' if p is None else f'{p:.4g}'}" for name, p in row.peers.items())
        met = "" if row.met is None else "met" if row.met else "NOT met"
        lines.append([row.case, row.metric, row.unit, row.value, row.bar, met, row.ratio, peers or row.why])
    return table(["case", "metric", "unit", "value", "bar", "", "ratio", "peers"], lines)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": cpu, "cores": usable_cores(), "memory_bytes": memory, "gpu": _gpu()}


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
