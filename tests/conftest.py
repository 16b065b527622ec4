"""Shared fixtures. Every model here is small; every process uses one thread."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in its background; tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLCONFIGDIR", str(Path.home() / ".cache" / "matplotlib"))  # its fonts are listed once, for all runs
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(
    prefix="coterie-tests-"
)  # links measured here, on busy cores, are nobody else's

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined

from hypothesis import settings

from coterie.routing.trace import RoutingTrace, save_trace

settings.register_profile("ci", derandomize=True, print_blob=True)  # what fails there fails again
if "COTERIE_CI" in os.environ:
    settings.load_profile("ci")
ROOT = Path(__file__).resolve().parent.parent
ON_GPUS = ("test_triton", "test_kernel_peers", "test_seam", "test_tiers")


def pytest_sessionfinish() -> None:
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def without_gpus(request: pytest.FixtureRequest) -> Iterator[None]:
    """Only tests of what runs on GPUs see one: the others start more processes than there are GPUs, and give ids of the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        if torch.cuda.is_available() and request.module.__name__ not in ON_GPUS:
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setattr(torch.cuda, "device_count", lambda: 0)
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


def make_trace(
    tokens: int = 400,
    layers: int = 3,
    experts: int = 8,
    top_k: int = 2,
    sequences: int = 7,
    seed: int = 0,
    model: str = "m",
) -> RoutingTrace:
    """Routing with structure: an expert's follower is one of few, loads are uneven."""
    rng = np.random.default_rng(seed)
    follower = np.argsort(rng.random((layers, experts, experts)), axis=2)
    ids = np.zeros((tokens, layers, top_k), dtype=np.int16)
    popularity = rng.dirichlet(np.ones(experts))
    for t in range(tokens):
        ids[t, 0] = rng.choice(experts, top_k, replace=False, p=popularity)
        for layer in range(1, layers):
            wanted = [int(follower[layer, e, rng.integers(2)]) for e in ids[t, layer - 1]]
            free = [e for e in rng.permutation(experts) if e not in wanted]
            distinct = list(dict.fromkeys(wanted))
            ids[t, layer] = (distinct + free)[:top_k]
    weights = np.sort(rng.dirichlet(np.ones(top_k), size=(tokens, layers)), axis=2)[:, :, ::-1]
    return RoutingTrace(
        ids, np.sort(rng.integers(0, sequences, tokens)).astype(np.int32), np.arange(tokens, dtype=np.int32), model, experts,
        tuple(range(layers)), "test", "prefill", np.ascontiguousarray(weights).astype(np.float16),
    )  # fmt: skip


@pytest.fixture
def trace() -> RoutingTrace:
    return make_trace()


@pytest.fixture
def trace_file(tmp_path: Path, trace: RoutingTrace) -> Path:
    path = tmp_path / "trace.safetensors"
    save_trace(trace, path)
    return path


@pytest.fixture
def no_partial_files(tmp_path: Path):
    """After the test, nothing half-written lies in its folder."""
    yield
    left = [p.name for p in tmp_path.rglob("*") if p.name.endswith((".part", ".probe"))]
    assert not left, left


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of 3 layers with 8 experts each."""
    from tiny_models import make_model

    return make_model("qwen3_moe", tmp_path / "m")


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sidecars of tiny models take several files, too."""
    monkeypatch.setattr("coterie.offload.pack.FILE_BYTES", 100_000)


@pytest.fixture
def packed(folder: Path, tmp_path: Path, small_files: None) -> Path:
    """The sidecar of `folder`."""
    from coterie.launch.packing import contents_of
    from coterie.offload.pack import pack

    pack(contents_of(str(folder)), tmp_path / "p")
    return tmp_path / "p"
