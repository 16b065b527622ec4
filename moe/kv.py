"""Keys and values in memory that has room for those to come.

transformers' own cache copies all of a layer's keys and values for every token: in a text of 4,096 tokens 16 MB a layer where
one of 4 KB is new. Here a position is written into its place, and all are copied once in SLACK tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

SLACK = 64  # positions allocated ahead


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """As transformers' layer of that kind, `[B, heads, positions, head size]`; keys and values are the beginning of `rooms`.

    most: positions that are expected in the end, beyond which there is no room unless there are more after all.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.rooms: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values, the new ones behind those before."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        key_room, self.keys = extended(self.keys, key_states, self.rooms[0], self.most)
        value_room, self.values = extended(self.values, value_states, self.rooms[1], self.most)
        self.rooms = key_room, value_room
        return self.keys, self.values

    def reset(self) -> None:
        """Forget all, with the room."""
        self.rooms = (None, None)
        super().reset()


class GrowingCache(DynamicCache):  # type: ignore[misc]
    """transformers' cache with such layers, for models that keep keys and values only.

    most: tokens of the longest sequence with its text. A left-padded batch, whose padding goes with the rows that needed it,
    never has more positions.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.layer_class_to_replicate = partial(GrowingLayer, most)


def extended(
    held: torch.Tensor | None, new: torch.Tensor, room: torch.Tensor | None, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`new` written behind `held`, both `[B, heads, positions, head size]`: the room, and its beginning that holds all.

    held: None or empty at first. room: None, or where `held` lies; what lies elsewhere, as after rows were chosen, is copied
    into a new one. most: as `GrowingLayer`.
    """
    length = 0 if held is None or not held.numel() else held.shape[-2]
    whole = length + new.shape[-2]
    if room is None or held is None or whole > room.shape[-2] or not _begins(room, held):
        positions = whole + SLACK if whole > most else min(whole + SLACK, most)
        with torch.inference_mode(False):  # what is made in that mode could not be written to outside of it
            room = torch.empty((*new.shape[:-2], positions, new.shape[-1]), dtype=new.dtype, device=new.device)
        if held is not None and length:
            room[..., :length, :] = held
    room[..., length:whole, :] = new
    return room, room[..., :whole, :]


def _begins(room: torch.Tensor, held: torch.Tensor) -> bool:
    same = held.shape[:-2] == room.shape[:-2] and held.stride() == room.stride()
    return same and held.data_ptr() == room.data_ptr()
