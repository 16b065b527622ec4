"""The exceptions of the whole package.

The command line maps them to exit codes: `InputError` to 2 (a file or an argument is wrong), every other `CoterieError`
to 1 (the work failed). Their messages are one or two lines that name the file, the field, the value found, the value
expected and the way out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self


class CoterieError(Exception):
    """Something failed that the user can be told about in a line.

    alone: in a job of several processes, whether only this one knows, which then says so itself whatever its rank; None until
    that is settled. partial: the JSON object of what was found before, for `--json`; None if nothing was.
    """

    alone: bool | None = None
    partial: dict[str, Any] | None = None

    def known(self, alone: bool) -> Self:
        """The error itself, marked: known to this process alone, or to all alike."""
        self.alone = alone
        return self


class InputError(CoterieError, ValueError):
    """A file or an argument is wrong."""


class RankLostError(CoterieError):
    """Other processes of the job are gone, stopped, late or failed. ranks: those; empty if it cannot be said which."""

    alone = True

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks


def require(condition: bool, field: str, found: object, expected: str) -> None:
    """Raises InputError in the words of all our errors unless `condition` holds."""
    if not condition:
        raise InputError(f"{field}: found {found}, expected {expected}")


@contextmanager
def naming(path: object, *fields: str) -> Iterator[None]:
    """Puts the file before errors of input inside that are about one of these fields; without fields, before all."""
    try:
        yield
    except InputError as error:
        if not fields or str(error).startswith(tuple(f"{field}: " for field in fields)):
            raise InputError(f"{path}: {error}") from error
        raise


def positive(name: str, value: int) -> int:
    """`value`; raises InputError unless it is at least 1."""
    require(value >= 1, name, value, "1 or more")
    return value


def first_line(error: BaseException, length: int = 160) -> str:
    """The beginning of another library's message, fit for one of our lines."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:length]


DEFECT = "(this is a defect of coterie: --debug shows where it is)"


def wanted(extra: str) -> str:
    """The command that installs what an optional part needs, in a checkout."""
    return f"pip install -c constraints.txt -e '.[{extra}]'"


def missing_package(error: BaseException) -> str:
    """The package of others that could not be imported; empty where that is not what happened."""
    name = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    return "" if name == "coterie" else name


def not_installed(package: str) -> str:
    """What to do about a package that coterie needs and that is not there."""
    return f"{package} is not installed: pip install -c constraints.txt -e . (coterie doctor lists what is missing)"
