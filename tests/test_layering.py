"""The import table of docs/design.md, and what must not be imported at all."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

FOLDERS = ("routing", "kernels", "placement", "offload", "moe", "launch")
MAY_IMPORT = {
    "routing": set(),
    "kernels": set(),
    "placement": {"routing"},
    "offload": {"routing", "kernels"},
    "moe": {"routing", "kernels", "placement", "offload"},
    "launch": set(FOLDERS),
}


def imported_names(source: str) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names.append(node.module or "")
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_only_what_the_design_allows(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for file in files:
        for name in imported_names(file.read_text()):
            parts = name.split(".")
            assert parts[0] not in FOLDERS, f"{file} imports {name} from the root: that makes two copies of every class"
            if parts[0] == "coterie" and len(parts) > 1 and parts[1] in FOLDERS:
                assert parts[1] == folder or parts[1] in MAY_IMPORT[folder], f"{file} imports {name}"
            if name == "coterie":
                assert folder == "launch", f"{file} imports the package itself"


def test_tests_import_through_the_package() -> None:
    for file in (ROOT / "tests").glob("*.py"):
        assert not [n for n in imported_names(file.read_text()) if n.split(".")[0] in FOLDERS], file


def test_no_folder_is_a_regular_package() -> None:
    assert not [f for f in FOLDERS if (ROOT / f / "__init__.py").exists()]


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_coterie_imports_neither_torch_nor_transformers() -> None:
    heavy = run_python(
        "import coterie, sys; print([m for m in ('torch', 'transformers', 'scipy', 'pulp') if m in sys.modules])"
    )
    assert heavy.strip() == "[]"


def test_planning_and_evaluating_work_without_torch(tmp_path, trace_file) -> None:
    plan = tmp_path / "plan.json"
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('torch', 'transformers'):
            raise ImportError(f'{{name}} is not wanted here')
sys.meta_path.insert(0, Block())
from coterie.launch.cli import main
assert main(['plan', {str(trace_file)!r}, '--topology', '1x2', '--out', {str(plan)!r}, '--time-limit', '3', '--json']) == 0
assert main(['evaluate', {str(plan)!r}, {str(trace_file)!r}, '--json']) == 0
"""
    assert run_python(code).count("\n") == 2


def test_every_public_name_is_there() -> None:
    import coterie

    for name in coterie.__all__:
        assert getattr(coterie, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        coterie.nothing  # noqa: B018
