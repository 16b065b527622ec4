"""`coterie`, but what is finished reaches the journal every 5 ms: for tests that stop a run in its middle."""

from __future__ import annotations

import coterie.moe.offline
from coterie.launch.cli import entry

if __name__ == "__main__":
    coterie.moe.offline.GATHER_SECONDS = 0.005
    entry()
