"""What makes a loaded model faster on a CPU: each part replaces modules' ways of computing, and none their weights' values."""

from __future__ import annotations

from typing import Any

from coterie.moe.attention import plain_attention_again, speed_up_attention
from coterie.moe.many_rows import plain_many_rows_again, speed_up_many_rows
from coterie.moe.norms import plain_norms_again, speed_up_norms
from coterie.moe.one_row import plain_again, speed_up_one_row

PARTS = (
    (speed_up_one_row, plain_again),
    (speed_up_many_rows, plain_many_rows_again),
    (speed_up_norms, plain_norms_again),
    (speed_up_attention, plain_attention_again),
)


def speed_up(model: Any) -> None:
    """All of them, for a transformers model that is neither to be trained nor to run batch-invariant."""
    for faster, _ in PARTS:
        faster(model)


def slow_down(model: Any) -> None:
    """The model computes as transformers has it."""
    for _, plain in PARTS:
        plain(model)
