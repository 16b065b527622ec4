"""The program `coterie`, and `python -m coterie`."""

from __future__ import annotations

import sys
from typing import NoReturn


def entry() -> NoReturn:
    """Run one command; where a package that every verb needs is not there, say so."""
    try:
        from coterie.launch.program import entry as run
    except KeyboardInterrupt:
        print("coterie: interrupted; no output was written", file=sys.stderr)
        sys.exit(1)
    except ModuleNotFoundError as error:
        from coterie.launch.doctor import without
        from coterie.routing.errors import missing_package

        if not (package := missing_package(error)):
            raise
        sys.exit(without(package, sys.argv[1:]))
    run()


if __name__ == "__main__":
    entry()
