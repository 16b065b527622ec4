"""transformers' own tests of every model whose experts can be ours, with our implementation beside its eager one.

    python bench/transformers_tests.py SOURCE [--over TESTS] [--families mixtral ...] [--out F]

SOURCE: transformers' source with its tests (a checkout; the package installed need not be of the same version, for a test that
fails with eager, too, counts for nothing). TESTS: files that are laid over SOURCE/tests, as those of a newer source
distribution (`pip download --no-deps --no-binary :all: transformers==VERSION`), which lacks the tests of single models. Tests
of FSDP and of tensor parallelism are left out. What passes with eager must pass with ours: the exit status says so; what does
not is run a second time, as some are random. Needs `parameterized` and `httpx`. An hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
IMPLEMENTATIONS = ("eager", "coterie")
LEFT_OUT = {"test_fsdp_mixin.py": "FSDPTesterMixin", "test_tensor_parallel_mixin.py": "TensorParallelTesterMixin"}
LONGEST = 1200  # seconds for the tests of one family
LOST = ("not run", 0)
FINE = ("passed", "skipped")
calls: list[int] = []


# Within pytest, which loads this file as a plugin.


def pytest_configure(config: Any) -> None:
    """Lets models that ask for no implementation have the one that is named in IMPLEMENTATION, and counts calls of ours."""
    import torch
    from transformers import PreTrainedModel
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    import coterie

    coterie.register()
    ours, chosen = ALL_EXPERTS_FUNCTIONS["coterie"], os.environ["IMPLEMENTATION"]
    before = PreTrainedModel.get_correct_experts_implementation

    def counted(*given: Any, **named: Any) -> Any:
        if not torch.compiler.is_compiling():  # a list that grows would be a reason to compile anew
            calls.append(1)
        return ours(*given, **named)

    ALL_EXPERTS_FUNCTIONS.register("coterie", counted)
    PreTrainedModel.get_correct_experts_implementation = lambda self, asked: before(self, chosen if asked is None else asked)


def pytest_runtest_setup(item: Any) -> None:
    """Calls are counted by test."""
    calls.clear()


def pytest_runtest_teardown(item: Any) -> None:
    """How often our experts were called goes into the report."""
    item.user_properties.append(("calls", len(calls)))


# From the command line.


def workplace(folder: Path, source: Path, over: Path | None) -> None:
    """Fills the folder with what the tests expect around them."""
    for name in ("tests", "utils"):  # tests import from utils
        shutil.copytree(source / name, folder / name)
    shutil.copy(source / "conftest.py", folder)
    for file in () if over is None else over.glob("*.py"):
        shutil.copy(file, folder / "tests")
    for name, mixin in LEFT_OUT.items():
        (folder / "tests" / name).write_text(f"class {mixin}:\n    pass\n")
    (folder / "src").mkdir()
    (folder / "src" / "transformers").symlink_to(installed())
    (folder / "pytest.ini").write_text("[pytest]\n")


def installed() -> Path:
    """Where the package transformers lies."""
    import transformers

    return Path(transformers.__file__).parent


def families(folder: Path) -> list[str]:
    """Those with experts that can be exchanged, and with tests."""
    found = {
        file.parent.name
        for file in installed().glob("models/*/modeling_*.py")
        if "use_experts_implementation" in file.read_text(encoding="utf-8")
    }
    return sorted(name for name in found if (folder / "tests" / "models" / name).is_dir())


def started(folder: Path, tests: list[str], implementation: str) -> subprocess.Popen[bytes]:
    """pytest, with one thread."""
    environment = {
        **os.environ, "IMPLEMENTATION": implementation, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join((str(ROOT / "bench"), str(ROOT), os.environ.get("PYTHONPATH", ""))),
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-p", "transformers_tests", "-p", "no:cacheprovider", "-c", "pytest.ini"]
    command += ["--rootdir", ".", f"--junitxml={implementation}.xml", *tests]
    with (folder / f"{implementation}.log").open("wb") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)


def outcomes(folder: Path, tests: list[str]) -> list[dict[str, tuple[str, int]]]:
    """With eager, then with ours, by test: `passed`, `skipped` or the first line of what went wrong; calls of our experts."""
    for implementation in IMPLEMENTATIONS:
        (folder / f"{implementation}.xml").unlink(missing_ok=True)
    running, until = [started(folder, tests, name) for name in IMPLEMENTATIONS], time.monotonic() + LONGEST
    for process in running:
        try:
            process.wait(timeout=max(1.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:  # its report is missing then
            process.kill()
            process.wait()
    return [read(folder / f"{name}.xml") for name in IMPLEMENTATIONS]


def read(report: Path) -> dict[str, tuple[str, int]]:
    """pytest's own report, by path::class::test."""
    made: dict[str, tuple[str, int]] = {}
    if not report.is_file():
        return made
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        said = [child for child in case if child.tag in ("failure", "error", "skipped")]
        outcome = "passed"
        if said:
            why = (said[0].get("message") or "failed").splitlines()[0][:200]
            outcome = "skipped" if said[0].tag == "skipped" else why
        counted = [int(p.get("value", 0)) for p in case.iter("property") if p.get("name") == "calls"]
        file, _, owner = (case.get("classname") or "").rpartition(".")  # of a file that could not be loaded: its own name
        made[f"{file.replace('.', '/')}.py::{owner}::{case.get('name')}"] = (outcome, sum(counted))
    return made


def title(name: str) -> str:
    """Of a test, without its file and class."""
    return name.rsplit("::", 1)[1]


def judged(folder: Path, family: str) -> dict[str, Any]:
    """One family: what passes with eager, with ours, through our experts; what is worse, twice."""
    eager, ours = outcomes(folder, [f"tests/models/{family}"])
    passed = [name for name, (outcome, _) in eager.items() if outcome == "passed"]
    if not passed:
        print((folder / "eager.log").read_text(errors="replace")[-2000:], file=sys.stderr)
    worse = [name for name in passed if ours.get(name, LOST)[0] != "passed"]
    unsteady = []
    if worse:
        again_eager, again_ours = outcomes(folder, worse)
        unsteady = [n for n in worse if again_eager.get(n, LOST)[0] != "passed" or again_ours.get(n, LOST)[0] == "passed"]
    failed = sorted((name for name, (outcome, _) in eager.items() if outcome not in FINE), key=title)
    return {
        "passed_with_eager": len(passed),
        "reached_our_experts": sum(ours.get(name, LOST)[1] > 0 for name in passed),
        "reached_with_eager": sum(count > 0 for _, count in eager.values()),
        "worse": {name: ours.get(name, LOST)[0] for name in worse if name not in unsteady},
        "unsteady": [title(name) for name in unsteady],
        "failed_with_both": [title(name) for name in failed if ours.get(name, LOST)[0] not in FINE],
        "passed_with_ours_alone": [title(name) for name in failed if ours.get(name, LOST)[0] == "passed"],
    }


def main() -> int:
    """Runs both side by side, family by family."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--over", type=Path)
    parser.add_argument("--families", nargs="+")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    import transformers

    version = re.search(r'__version__ = "(.*)"', (options.source / "src/transformers/__init__.py").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="coterie-transformers-") as name:
        folder = Path(name)
        workplace(folder, options.source, options.over)
        by_family = {}
        for family in options.families or families(folder):
            by_family[family] = judged(folder, family)
            print(family, json.dumps(by_family[family]), file=sys.stderr, flush=True)
    result: dict[str, Any] = {
        "transformers": transformers.__version__, "tests_of": version and version[1], "families": by_family,
        **{what: sum(made[what] for made in by_family.values())
           for what in ("passed_with_eager", "reached_our_experts", "reached_with_eager")},
        "worse": sum(len(made["worse"]) for made in by_family.values()),
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    through_us = result["reached_our_experts"] and not result["reached_with_eager"]
    return 0 if result["passed_with_eager"] and not result["worse"] and through_us else 1


if __name__ == "__main__":
    sys.exit(main())
