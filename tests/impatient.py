"""`coterie`, but ranks that do not come are waited for 3 s instead of 25."""

from __future__ import annotations

import coterie.launch.assembly
from coterie.launch.program import entry

if __name__ == "__main__":
    coterie.launch.assembly.START_SECONDS = 3.0
    entry()
