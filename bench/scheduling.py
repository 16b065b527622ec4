"""What running alike prompts side by side saves where experts are on disk (moe/schedule.py).

coterie-tiny continues its held-out prompts, of four kinds of text, in batches; counted are the experts that its layers asked
for and those that had to be read, in the order given and as scheduled. Counts, not times: any machine gives the same.

python bench/scheduling.py [--out JSON]
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import coterie
from coterie.launch.quiet import quiet_transformers
from coterie.launch.tables import table
from coterie.moe.batch import Request
from coterie.moe.families import EMBEDDED, EMBEDDED_FOLDER
from coterie.moe.model import Model
from coterie.routing.files import write_text

SHARES, BATCHES, NEW_TOKENS = (0.125, 0.25, 0.5), (4, 8), 24


def main() -> None:
    """As the module says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    quiet_transformers()
    lines = (EMBEDDED_FOLDER / "prompts" / "heldout.jsonl").read_text().splitlines()
    prompts = [coterie.Prompt(text=json.loads(line)["prompt"]) for line in lines]
    random.Random(0).shuffle(prompts)  # as they would come in; the file has one kind after the other
    found = [_cell(prompts, share, batch) for share in SHARES for batch in BATCHES]
    print(table(list(found[0]), [list(row.values()) for row in found]))
    if options.out:
        write_text(options.out, json.dumps(found, indent=1) + "\n")


def _cell(prompts: list[coterie.Prompt], share: float, batch: int) -> dict[str, float]:
    """Experts asked for and read a new token, both ways."""
    given, scheduled = _counted(prompts, share, batch, False), _counted(prompts, share, batch, True)
    return {
        "slots": share, "batch": batch, "asked": given[0], "asked, scheduled": scheduled[0], "read": given[1],
        "read, scheduled": scheduled[1], "saved": 1 - scheduled[1] / given[1],
    }  # fmt: skip


def _counted(prompts: list[coterie.Prompt], share: float, batch: int, scheduled: bool) -> tuple[float, float]:
    shape = coterie.load(EMBEDDED).shape
    model = coterie.load(EMBEDDED, slots=round(share * shape.num_experts * len(shape.layer_ids)))

    def as_given(self: Model, requests: Sequence[Request], batch_size: int) -> list[Request]:
        return list(requests)

    order = Model.scheduled if scheduled else as_given
    with patch.object(Model, "scheduled", order):
        _, statistics = model.generate(prompts, NEW_TOKENS, batch_size=batch)
    assert model.cache is not None
    counted, tokens = model.cache.statistics, statistics.new_tokens
    return counted.requests / tokens, counted.transfers / tokens


if __name__ == "__main__":
    main()
