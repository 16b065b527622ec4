"""`coterie`, but what is finished reaches the journal every 5 ms: for tests that stop a run in its middle.

HANG_AFTER=N: once N prompts more are in the journal, nothing goes on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import coterie.moe.offline
from coterie.launch.program import entry
from coterie.moe.journal import Entry, Journal

if __name__ == "__main__":
    coterie.moe.offline.GATHER_SECONDS = 0.005
    append, written, most = Journal.append, 0, int(os.environ.get("HANG_AFTER", "1000000"))

    def hanging(journal: Journal, entries: Sequence[Entry]) -> None:
        global written
        append(journal, entries)
        written += len(entries)
        if written >= most:
            time.sleep(600)

    Journal.append = hanging  # type: ignore[method-assign]
    entry()
