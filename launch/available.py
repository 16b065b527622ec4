"""What this machine has for us: cores, and free memory, the device's or the system's within the limits of our control group."""

from __future__ import annotations

import os
import re
import resource
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def machine() -> str:
    """What tells this machine from others; its processes share memory, whatever network they think they are in."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.is_file() else socket.gethostname()


def usable_cores() -> int:
    """Of the processor, by this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_bytes(device: torch.device) -> int | None:
    """Free bytes on this rank's device, None where that cannot be told."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    return system_bytes()


def system_bytes(root: Path = Path("/")) -> int | None:
    """What processes may still allocate, by /proc/meminfo and the memory limits of this process's control groups."""
    meminfo = root / "proc/meminfo"
    if not meminfo.is_file():
        return None
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    if "MemAvailable" not in fields:
        return None
    return min([int(fields["MemAvailable"].split()[0]) * 1024, *_group_bytes(root)])


def _group_bytes(root: Path) -> list[int]:
    """What each control group above this process leaves, version 2 and 1."""
    listed = root / "proc/self/cgroup"
    lines = listed.read_text().splitlines() if listed.is_file() else []
    left = []
    for _, controllers, name in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers == "":
            base, files = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        here = base / name.lstrip("/")
        left += [_left(folder, *files) for folder in (here, *here.parents) if folder.is_relative_to(base)]
    return [count for count in left if count is not None]


def _left(folder: Path, limit: str, used: str, cached: str) -> int | None:
    if not (folder / limit).is_file() or not (folder / used).is_file():
        return None
    most = (folder / limit).read_text().strip()
    if not most.isdigit():
        return None  # "max": no limit here
    stat = folder / "memory.stat"
    fields = dict(line.split() for line in stat.read_text().splitlines()) if stat.is_file() else {}
    return max(0, int(most) - int((folder / used).read_text()) + int(fields.get(cached, 0)))


def resident_bytes() -> int:
    """What this process has in memory now; the most it ever had where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * int(os.sysconf("SC_PAGE_SIZE"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def shared_out_bytes(process: int) -> int | None:
    """What a process and all it has started have in memory, pages that several have counted once (PSS); None if unknown."""
    here = Path("/proc") / str(process)
    try:
        found = re.search(r"^Pss:\s+(\d+) kB", (here / "smaps_rollup").read_text(), re.MULTILINE)
        tasks = list((here / "task").iterdir())
    except OSError:  # it has ended, or the system does not say
        return None
    children: list[str] = []
    for task in tasks:
        with suppress(OSError):  # a thread that has ended
            children += (task / "children").read_text().split()
    return None if found is None else 1024 * int(found[1]) + sum(shared_out_bytes(int(child)) or 0 for child in children)
