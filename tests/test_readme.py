"""The demo, and what the README says one can type."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


def shell(command: str, folder: Path, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    """Run as a user with the environment activated would, wherever the package is imported from."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name, module in (("coterie", "coterie"), ("torchrun", "torch.distributed.run")):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        (programs / name).chmod(0o755)
    (programs / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (programs / "python").chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", "-ec", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout
    )


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


@pytest.mark.processes
@pytest.mark.slow
def test_the_demo_does_the_whole_tour(tmp_path: Path) -> None:
    made = Path(os.environ.get("COTERIE_DEMO", tmp_path))
    if "COTERIE_DEMO" not in os.environ:  # in CI .ci/wheel has run it already
        done = shell("coterie demo --json --out demo > demo.json", tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((made / "demo.json").read_text())
    figures = {"tokens_per_second", "max_logit_difference", "text_equal", "offload", "seconds", "plans"}
    assert set(result) == {"model", "trace", "held_out_trace", "plan", "report", *figures}
    assert result["text_equal"] is True and 0 <= result["max_logit_difference"] <= 1e-4
    offload = result["offload"]
    assert offload["text_equal"] is True and 0 < offload["hit_rate"] < 1 and offload["memory_bytes"] < 5.5e6  # of 7.8
    plans = result["plans"]
    assert plans["plan"]["dispatch"] <= 0.85 * plans["contiguous"]["dispatch"]
    assert plans["plan"]["load"] <= plans["contiguous"]["load"]
    assert all(v > 0 for v in result["tokens_per_second"].values())
    assert "<svg" in Path(result["report"]).read_text()
    assert not list((made / "demo").glob("*.part"))


@pytest.mark.processes
@pytest.mark.slow
def test_every_command_of_the_readme_runs_as_printed(tmp_path: Path) -> None:
    steps = next(block for block in blocks("sh") if "coterie doctor" in block)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()  # what is activated is here already
    (tmp_path / "moe").symlink_to(ROOT / "moe")
    done = shell(steps, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "tokens/s" in done.stderr and "packed" in done.stdout and "[python-0]" in done.stdout
    for name in ("trace.safetensors", "heldout.safetensors", "plan.json", "report.html"):
        assert (tmp_path / name).stat().st_size > 0


@pytest.mark.processes
@pytest.mark.slow
def test_the_python_of_the_readme_runs_as_printed(tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(blocks("python")[0])
    done = shell("python example.py", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Objective(name='dispatch'" in done.stdout


def test_every_verb_is_in_the_readme() -> None:
    from coterie.launch.cli import build_parser

    verbs = next(a for a in build_parser()._actions if hasattr(a, "choices") and a.dest == "verb").choices
    text = (ROOT / "README.md").read_text()
    assert all(f"| `coterie {verb}" in text for verb in verbs)


def test_links_between_documents_lead_somewhere() -> None:
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^):]+)\)", document.read_text()):
            file, _, heading = target.partition("#")
            found = document.parent / file if file else document
            assert found.exists(), f"{document.name}: {target}"
            assert not heading or heading in headings(found), f"{document.name}: {target}"


def headings(document: Path) -> list[str]:
    """As links name them."""
    titles = re.findall(r"^#+ (.*)$", document.read_text(), re.M)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
