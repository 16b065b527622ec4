"""One source file of another package, run without the rest of it: so that its kernels can be timed beside ours.

vLLM and SGLang keep their Triton kernels for experts in one file each. Importing those packages takes CUDA libraries of their
own and an exact version of torch; the file alone takes torch and Triton. What else it imports of its package is stood in for.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from packaging.version import Version

from coterie.routing.errors import CoterieError

KEPT = re.compile(r"(fused_moe[^/]*\.py|configs/.*device_name=[^/]*\.json)$")  # of a wheel: a few megabytes at most


class PeerMissing(CoterieError):
    """Why another package's kernels cannot be had here."""


@dataclass(frozen=True)
class Package:
    """A package's files. root: the folder that its own folder is in."""

    name: str
    version: str
    root: Path

    def find(self, pattern: str) -> Path:
        """The one file, or the first in order, that matches. Raises PeerMissing if there is none."""
        found = sorted((self.root / self.name).rglob(pattern))
        if not found:
            raise PeerMissing(f"{self.name} {self.version}: it has no {pattern}")
        return found[0]


def find_package(name: str, wheels: Path | None, room: Path) -> Package:
    """A wheel of it in the folder `wheels`, the newest if there are several, unpacked to `room`; else the installed package.

    Raises PeerMissing if there is neither.
    """
    found = sorted(wheels.glob(f"{name}-*.whl"), key=lambda path: Version(path.name.split("-")[1])) if wheels else []
    if found:
        version = found[-1].name.split("-")[1]
        root = room / f"{name}-{version}"
        try:
            with zipfile.ZipFile(found[-1]) as archive:
                archive.extractall(root, [member for member in archive.namelist() if KEPT.search(member)])
        except zipfile.BadZipFile as error:
            raise PeerMissing(f"{found[-1]}: is no whole wheel ({error})") from error
        return Package(name, version, root)
    spec = importlib.util.find_spec(name)  # of a top-level package: finds it without importing it
    if spec is None or not spec.submodule_search_locations:
        raise PeerMissing(f"{name} is not installed, and there is no {name}-*.whl in {wheels or 'a folder given by --peers'}")
    return Package(name, importlib.metadata.version(name), Path(next(iter(spec.submodule_search_locations))).parent)


def load_file(package: Package, path: Path, known: Mapping[str, Any]) -> ModuleType:
    """Run one file of the package. known: by name, what it imports from its package and needs; the rest is stood in for.

    Raises PeerMissing, with what it said, if it does not run like that.
    """
    name = f"coterie_peer_{package.name}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _stood_in(package.name, known):
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # whatever another version may do
            raise PeerMissing(f"{package.name} {package.version}: {path.name} does not run by itself: {error}") from error
    return module


class _Nothing:
    """Stands for anything that is imported and not used: false, and whatever is asked of it is the same again."""

    def __getattr__(self, name: str) -> _Nothing:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_: Any, **__: Any) -> _Nothing:
        return self

    def __bool__(self) -> bool:
        return False

    def __or__(self, _: Any) -> _Nothing:  # in annotations
        return self

    __ror__ = __or__
    __getitem__ = __call__


class _StandIns(MetaPathFinder, Loader):
    """Finds every module of one package, and nothing real in it."""

    def __init__(self, package: str, known: Mapping[str, Any]) -> None:
        self.package, self.known = package, known

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] != self.package:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _StandIn(spec.name, self.known)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


class _StandIn(ModuleType):
    def __init__(self, name: str, known: Mapping[str, Any]) -> None:
        super().__init__(name)
        self.known = known

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.known.get(name, _Nothing())


@contextmanager
def _stood_in(package: str, known: Mapping[str, Any]) -> Iterator[None]:
    """While it lasts the package is a stand-in; what was imported of the real one is there again afterwards."""

    def imported() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] == package]

    real = {name: sys.modules.pop(name) for name in imported()}
    finder = _StandIns(package, known)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in imported():
            del sys.modules[name]
        sys.modules.update(real)
