"""Keys and values of all ranks' sequences, on every rank: what context-coherent decoding attends to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from coterie.moe.collectives import Group
from coterie.moe.dispatch import as_bytes, from_bytes
from coterie.moe.kv import SLACK
from coterie.routing.errors import InputError

HEAD_BYTES = 8


class SharedKV:
    """Per layer, keys and values `[sequences, heads, positions, head size]`, left-padded to the longest sequence.

    A step's own are kept aside, by layer and sequence, until `spread` has brought those of all ranks to every rank.
    """

    def __init__(self, layers: int, device: torch.device) -> None:
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.layers = layers
        self.length = 0
        self.valid = torch.zeros((0, 0), dtype=torch.bool, device=device)  # [sequences, positions]
        self._aside: list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def add(self, group: Group, cache: Any, mask: torch.Tensor, lengths: Sequence[Sequence[int]]) -> None:
        """Take in newly prefilled sequences of all ranks. cache, mask: this rank's; lengths: prompt tokens, by rank."""
        counts = [sum(taken) for taken in lengths]
        shapes = _shapes(group, cache)
        mine = _token_rows(cache, mask) if counts[group.rank] else None
        if len(set(shapes)) > 1:
            raise InputError(
                f"--strategy: found 'coherent' with keys and values of {len(set(shapes))} shapes, expected one shape"
            )
        width = sum((k + v) * heads for heads, k, v in shapes)
        dtype = torch.float32 if mine is None else mine.dtype
        dtype = next(d for d in group.gather(None if mine is None else dtype) if d is not None)
        rows = group.gather_rows(
            torch.empty((0, width), dtype=dtype, device=self.valid.device) if mine is None else mine,
            counts,
            "keys and values",
            beside=True,
        )
        flat = [n for taken in lengths for n in taken]
        fresh = torch.tensor([[False] * (max(flat) - n) + [True] * n for n in flat], device=self.valid.device)
        offset = 0
        made: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for heads, key, value in shapes:
            for kept, size in zip(made, (key, value), strict=True):
                whole = rows.new_zeros((len(flat), fresh.shape[1], heads * size))
                whole[fresh] = rows[:, offset : offset + heads * size]
                kept.append(whole.view(*fresh.shape, heads, size).transpose(1, 2).contiguous())
                offset += heads * size
        self._join(made[0], made[1], fresh)

    def _join(self, keys: list[torch.Tensor], values: list[torch.Tensor], fresh: torch.Tensor) -> None:
        longest = max(self.length, fresh.shape[1])
        if not self.keys:
            self.keys, self.values = keys, values
        else:
            for store, new in ((self.keys, keys), (self.values, values)):
                for i in range(self.layers):
                    store[i] = torch.cat([_to_length(store[i][:, :, : self.length], longest), _to_length(new[i], longest)])
        old = F.pad(self.valid, (longest - self.length, 0))
        self.valid = torch.cat([old, F.pad(fresh, (longest - fresh.shape[1], 0))])
        self.length = longest

    def view(self, at: torch.Tensor) -> _View:
        """What attention takes as its cache for the sequences `at`, int64 `[n]`, in the step after `length` positions."""
        self._grow()
        return _View(self, at)

    def mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """Additive mask `[sequences, 1, 1, positions + 1]` for the next token; window: of sliding attention, in tokens."""
        valid = F.pad(self.valid, (0, 1), value=True)
        if window is not None:
            places = valid.cumsum(1)
            valid = valid & (places[:, -1:] - places < window)
        return torch.zeros(valid.shape, dtype=dtype, device=valid.device).masked_fill(~valid, torch.finfo(dtype).min)[
            :, None, None
        ]

    def spread(self, group: Group, tokens: Mapping[int, int], word: int) -> tuple[list[tuple[int, int, int]], tuple[int, ...]]:
        """Bring what is kept aside on each rank to every rank, as the next position of all sequences, and the chosen tokens.

        tokens: by sequence, what this rank chose; word: what else it tells. Returns (sequence, token, rank that chose it) of
        all ranks, by sequence, and the ranks' words. One collective: a token travels like the keys and values of one layer
        more, a word like a token of one sequence more.
        """
        sequences = len(self.valid)
        mine = self._rows(sequences, tokens, word)
        rows, counts = group.share_rows(mine, sequences * (self.layers + 1) + 1, "keys and values")
        head = from_bytes(rows[:, :HEAD_BYTES], torch.int32).long()
        last = rows.new_tensor(counts, dtype=torch.int64).cumsum(0) - 1  # each rank's word
        words = tuple(head[last, 1].tolist())
        layer, at = head[:, 0] // sequences, head[:, 0] % sequences
        if int((layer < self.layers).sum()):
            self._take(rows, layer, at)
        source = torch.repeat_interleave(torch.tensor(counts)).to(rows.device)
        told = layer == self.layers
        found = torch.stack([at[told], head[told, 1], source[told]], 1).tolist()
        return sorted((s, token, rank) for s, token, rank in found), words

    def _take(self, rows: torch.Tensor, layers: torch.Tensor, at: torch.Tensor) -> None:
        self._grow()
        heads, key, value = self.keys[0].shape[1], self.keys[0].shape[3], self.values[0].shape[3]
        body = from_bytes(rows[:, HEAD_BYTES:], self.keys[0].dtype)
        for layer in range(self.layers):
            here = (layers == layer).nonzero()[:, 0]
            self.keys[layer][at[here], :, self.length] = body[here, : heads * key].reshape(-1, heads, key)
            self.values[layer][at[here], :, self.length] = body[here, heads * key :].reshape(-1, heads, value)
        self.valid = F.pad(self.valid, (0, 1), value=True)
        self.length += 1
        self._aside = []

    def _rows(self, sequences: int, tokens: Mapping[int, int], word: int) -> torch.Tensor:
        """uint8: int32 layer x sequences + sequence, int32 token, then keys, then values; tokens in a layer after the last.

        The word is in the last row, in a layer after that.
        """
        device = self.valid.device
        width = self.keys[0].shape[1] * (self.keys[0].shape[3] + self.values[0].shape[3]) * self.keys[0].element_size()
        parts = []
        for layer, at, keys, values in self._aside:
            head = torch.stack([layer * sequences + at, torch.zeros_like(at)], 1).to(torch.int32)
            parts.append(torch.cat([as_bytes(head), as_bytes(keys.flatten(1)), as_bytes(values.flatten(1))], 1))
        chosen = [(self.layers * sequences + s, token) for s, token in tokens.items()]
        chosen.append(((self.layers + 1) * sequences, word))
        head = torch.tensor(chosen, dtype=torch.int32, device=device).view(-1, 2)
        parts.append(F.pad(as_bytes(head), (0, width)))
        return torch.cat(parts)

    def _grow(self) -> None:
        """Room for one position more; all layers have the same."""
        if self.keys and self.keys[0].shape[2] == self.length:
            for store in (self.keys, self.values):
                store[:] = [F.pad(tensor, (0, 0, 0, SLACK)) for tensor in store]

    def select(self, rows: torch.Tensor) -> None:
        """Keep some sequences, without the padding common to them."""
        self.valid = self.valid[rows]
        first = int(self.valid.any(0).int().argmax()) if len(rows) else self.length
        for store in (self.keys, self.values):
            store[:] = [t[rows, :, first : self.length] for t in store] if len(rows) else []
        self.valid = self.valid[:, first:]
        self.length -= first


class _View:
    """The part of transformers' cache interface that attention uses, for one step of some sequences."""

    def __init__(self, kv: SharedKV, at: torch.Tensor) -> None:
        self.kv = kv
        self.at = at

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kv, last = self.kv, self.kv.length
        kv._aside.append((layer, self.at, keys[:, :, 0], values[:, :, 0]))
        for store, new in ((kv.keys[layer], keys), (kv.values[layer], values)):
            store[self.at, :, last] = new[:, :, 0]
        return kv.keys[layer][self.at, :, : last + 1], kv.values[layer][self.at, :, : last + 1]

    def get_seq_length(self, layer: int = 0) -> int:
        return self.kv.length


def _shapes(group: Group, cache: Any) -> list[tuple[int, int, int]]:
    """(heads, key size, value size) of each layer; a rank without sequences learns it from another."""
    mine = None if cache is None else [(k.shape[1], k.shape[3], v.shape[3]) for k, v in _layers(cache)]
    return next(s for s in group.gather(mine) if s is not None)


def _layers(cache: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def _token_rows(cache: Any, mask: torch.Tensor) -> torch.Tensor:
    """One row per prompt token, `[tokens, layers x heads x (key + value)]`."""
    live = mask.bool()
    return torch.cat([t.transpose(1, 2)[live].flatten(1) for pair in _layers(cache) for t in pair], 1)


def _to_length(tensor: torch.Tensor, length: int) -> torch.Tensor:
    return F.pad(tensor, (0, 0, length - tensor.shape[2], 0))
