"""The program around a command: its streams, its signals, its end."""

from __future__ import annotations

import io
import os
import signal
import sys
import warnings
from typing import Any, NoReturn

from coterie.launch.cli import main
from coterie.launch.distributed import launched_size, leave


def entry() -> NoReturn:
    """The program: runs one command and ends the process."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # closed by who started it; a file that is opened next would take its place
            opened = os.open(os.devnull, os.O_RDWR)
            os.dup2(opened, descriptor)
            setattr(sys, name, os.fdopen(descriptor, "w" if descriptor else "r", closefd=False))
    if launched_size() == 1:  # a job of several has ways of its own (launch/distributed.py)
        signal.signal(signal.SIGTERM, _as_interrupt)
    warnings.showwarning = _told_in_a_line
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # text that the terminal's encoding lacks must not cost the rest
            stream.reconfigure(errors="backslashreplace")
    leave(main())


def _as_interrupt(number: int, frame: Any) -> None:
    """A program that is asked to end tidies up as after ctrl-C, and a search gives what it has."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):  # ctrl-C is ignored in the background
        raise KeyboardInterrupt
    handler(signal.SIGINT, frame)


def _told_in_a_line(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """Without the line of source that it comes from."""
    print(f"coterie: warning: {message}", file=sys.stderr, flush=True)
