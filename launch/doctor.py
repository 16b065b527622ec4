"""What this machine has, what coterie will use of it, what is missing and the command that fixes it."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from coterie.launch.available import usable_cores
from coterie.launch.tables import table
from coterie.routing.errors import InputError, first_line, not_installed, wanted

REQUIRED = ("numpy", "scipy", "safetensors", "tqdm", "PuLP", "highspy", "torch", "transformers", "accelerate")
OPTIONAL = {"matplotlib": "plot", "deepspeed": "deepspeed", "mpi4py": "mpi", "triton": ""}


def doctor(options: argparse.Namespace) -> dict[str, Any]:
    """Print the findings; `ok` is false if something that is needed is missing."""
    findings = [*_python(), *_packages(), *_machine(), *_compute(), *_model()]
    ok = all(status != "missing" for _, status, _ in findings)
    if not options.json:
        print(table(["what", "status", "found"], findings))
        print("\nready" if ok else "\nnot ready: see the lines marked missing")
    rows = [{"what": what, "status": status, "found": found} for what, status, found in findings]
    return {"ok": ok, "findings": rows}


def without(package: str, arguments: Sequence[str]) -> int:
    """The exit code where a package is missing without which no command line can be read: `doctor` says all there is to say."""
    if arguments[:1] == ["doctor"]:
        options = argparse.Namespace(json="--json" in arguments)
        found = doctor(options)
        if options.json:
            print(json.dumps(found))
        return 0
    print(f"coterie: {not_installed(package)}", file=sys.stderr)
    return 1


Finding = tuple[str, str, str]


def _python() -> list[Finding]:
    fine = sys.version_info >= (3, 11)
    return [("Python", "ok" if fine else "missing", platform.python_version() + ("" if fine else ": install 3.11 or later"))]


def _packages() -> list[Finding]:
    found: list[Finding] = []
    fits = _fitting()
    if fits is None:
        found.append(
            ("versions", "optional", "not compared with what coterie asks for: pip install packaging, and coterie itself")
        )
    for name in REQUIRED:
        version = _version(name)
        way = f"pip install -c constraints.txt {name}"
        if version and fits is not None and not fits(name, version):
            found.append((name, "missing", f"{version} does not fit: {way}"))
        else:
            found.append((name, "ok" if version else "missing", version or way))
    for name, extra in OPTIONAL.items():
        version = _version(name)
        way = wanted(extra) if extra else f"pip install {name}"
        found.append((name, "ok" if version else "optional", version or f"not installed: {way}"))
    return found


def _fitting() -> Callable[[str, str], bool] | None:
    """Whether a version of a package is one that coterie's own metadata ask for; None where that cannot be told."""
    try:
        from packaging.requirements import Requirement

        asked = [Requirement(text) for text in importlib.metadata.requires("coterie") or ()]
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return None
    ranges = {one.name.lower(): one.specifier for one in asked if one.marker is None or "extra" not in str(one.marker)}
    return lambda name, version: name.lower() not in ranges or ranges[name.lower()].contains(version, prereleases=True)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine() -> list[Finding]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = shutil.disk_usage(Path.cwd()).free
    return [
        ("processor", "ok", f"{_cpu_name()}, {usable_cores()} core(s) usable"),
        ("memory", "ok", f"{memory / 2**30:.1f} GiB"),
        ("disk here", "ok" if free > 2**30 else "missing", f"{free / 2**30:.1f} GiB free"),
    ]


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    extras = [f for f in ("avx512f", "avx512_bf16", "amx_bf16") if f in flags]
    return f"{name} ({', '.join(extras)})" if extras else name


def _compute() -> list[Finding]:
    if _version("torch") is None:
        return []
    try:
        import torch
        import torch.distributed as dist
    except (ImportError, OSError) as error:  # such as a library of CUDA that is not there
        return [("torch", "missing", f"cannot be imported ({first_line(error)}): install it again, for this machine")]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    kernels: list[Finding] = []
    if gpus and _version("triton") is None:
        kernels = [("kernels", "missing", "experts on a GPU need triton: pip install triton")]
    backends = [b for b, there in (("nccl", dist.is_nccl_available()), ("gloo", dist.is_gloo_available())) if there]
    used = "nccl" if gpus else "tcp (mpi under mpirun)"
    return [
        *kernels,
        (
            "GPU",
            "ok" if gpus else "optional",
            ", ".join(gpus) or "none: models run on the CPU, in float32 unless --dtype says otherwise",
        ),
        (
            "several processes",
            "ok" if not gpus or "nccl" in backends else "missing",
            f"{', '.join([*backends, 'tcp'])}; {used} will be used",
        ),
        (
            "mpirun",
            "ok" if shutil.which("mpirun") else "optional",
            shutil.which("mpirun") or f"not found: {wanted('mpi')}",
        ),
    ]


def _model() -> list[Finding]:
    if _version("torch") is None or _version("transformers") is None:
        return []
    try:
        from coterie.moe.families import EMBEDDED, EMBEDDED_FOLDER, supported_families
        from coterie.offload.checkpoint import Checkpoint
    except (ImportError, OSError) as error:
        return [("transformers", "missing", f"cannot be imported ({first_line(error)}): install it again, with its torch")]
    try:
        count = len(Checkpoint.open(EMBEDDED_FOLDER).tensors)
        embedded = (EMBEDDED, "ok", f"{count} tensors in {EMBEDDED_FOLDER}")
    except InputError as error:
        embedded = (EMBEDDED, "missing", f"{error}: install coterie again")
    return [
        embedded,
        ("experts from disk", *_reading(EMBEDDED_FOLDER)),
        ("model families", "ok", f"{len(supported_families())} in transformers {_version('transformers')}"),
    ]


def _reading(folder: Path) -> tuple[str, str]:
    """How experts would be read from where coterie lies."""
    from coterie.offload.files import Files
    from coterie.offload.reader import AsyncReader

    with closing(Files(sorted(folder.glob("*.safetensors")))) as files:
        if not files.direct:
            return "optional", f"by threads, which is slower: the file system of {folder} has no O_DIRECT"
        try:
            AsyncReader(files).close()
        except OSError as error:
            return "optional", f"by threads, which is slower: no asynchronous reads ({error.strerror or error})"
    return "ok", "asynchronously, with O_DIRECT"
