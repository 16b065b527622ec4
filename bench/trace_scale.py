"""Reads and measures a large trace of the shape of DeepSeek-V3: 1,000,000 tokens, 58 layers, 8 of 256 experts.

    python bench/trace_scale.py [--tokens 1000000] [--family misaligned] [--noise 0.1]

Makes the trace in a temporary directory (0.93 GB) by another process, then prints the seconds and the peak memory so far of
reading it, checks included, and of measuring load, transitions and patterns.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from coterie.launch.tables import table
from coterie.routing.affinity import measure
from coterie.routing.synth import FAMILIES, make
from coterie.routing.trace import read_trace, save_trace

LAYERS, EXPERTS, TOP_K = 58, 256, 8


def main() -> None:
    """Make, read, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--family", choices=tuple(FAMILIES), default="misaligned")
    parser.add_argument("--noise", type=float, default=0.1)
    options = parser.parse_args()
    rows: list[list[Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.safetensors"
        maker = multiprocessing.get_context("spawn").Process(target=_write, args=(options, path))
        maker.start()
        maker.join()
        trace = _timed("read and check", lambda: read_trace(path), rows)
        affinity = _timed("measure", lambda: measure(trace), rows)
        size = path.stat().st_size
    patterns = sum(len(p.weight) for p in affinity.patterns) / trace.layers
    print(table(("step", "seconds", "peak GB"), rows))
    print(f"\n{options.family}, noise {options.noise:g}: {trace.tokens} tokens x {LAYERS} layers x {TOP_K} of {EXPERTS} "
          f"experts, {size / 1e9:.2f} GB on disk, {patterns:.0f} patterns a layer")  # fmt: skip
    print(f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}, "
          f"safetensors {safetensors.__version__}")  # fmt: skip


def _write(options: argparse.Namespace, path: Path) -> None:
    save_trace(make(options.family, options.tokens, LAYERS, EXPERTS, TOP_K, noise=options.noise, skew=0.5), path)


def _timed(step: str, work: Callable[[], Any], rows: list[list[Any]]) -> Any:
    started = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - started
    rows.append([step, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9])
    return result


if __name__ == "__main__":
    main()
