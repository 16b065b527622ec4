"""Run by test_faults.py under torchrun: coterie, with little memory left for rank 1 once its libraries are loaded.

python tests/limited_rank.py generate ...
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

SPARE = 24 << 20


def main(arguments: list[str]) -> int:
    import transformers.models.auto.modeling_auto  # noqa: F401  what is loaded later would fail in many ways

    from coterie.launch import commands, distributed
    from coterie.launch.cli import main as coterie
    from coterie.moe import prepare

    loading = prepare.load_share

    def starved(*given):
        if distributed.launched_rank() == 1:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (used + SPARE, used + SPARE))
            import torch

            torch.zeros(SPARE * 4)
        return loading(*given)

    prepare.load_share = starved
    assert commands
    return coterie(arguments)


if __name__ == "__main__":
    from coterie.launch.distributed import leave

    leave(main(sys.argv[1:]))
