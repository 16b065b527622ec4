"""Recording routing from a running transformers model, streaming to disk.

Every Mixture-of-Experts family that goes through transformers' experts interface calls its experts module with
`(hidden_states, top_k_index, top_k_weights)`; a hook there sees the routing of any of them. The module sees neither
sequence nor position nor padding: a second hook, on the model, takes those from the call's attention mask.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from coterie.routing.errors import CoterieError, InputError
from coterie.routing.files import atomic_output
from coterie.routing.trace import PHASES, TRACE_FORMAT, safetensors_header

COPY_BYTES = 1 << 20


def expert_modules(model: nn.Module) -> dict[int, tuple[str, nn.Module]]:
    """The experts modules of a model by decoder layer: `{layer: (dotted name, module)}`, ascending.

    They are known by what transformers' `use_experts_implementation` leaves on them.
    """
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        if all(hasattr(module, a) for a in ("is_transposed", "has_gate", "has_bias", "down_proj")):
            numbers = [int(part) for part in name.split(".") if part.isdigit()]
            if numbers:
                found[numbers[0]] = (name, module)
    return dict(sorted(found.items()))


class TraceWriter:
    """Writes a trace token by token and never holds it: columns go to temporary files, joined into one at the end.

    token_ids: whether they are written, too.
    """

    COLUMNS = (("expert_ids", "I16", np.int16), ("positions", "I32", np.int32), ("router_weights", "F16", np.float16),
               ("sequence_ids", "I32", np.int32))  # fmt: skip
    TOKEN_IDS = (("token_ids", "I32", np.int32),)

    def __init__(self, path: Path, metadata: dict[str, str], layers: int, top_k: int, token_ids: bool = False) -> None:
        self.path = path
        self.metadata = metadata
        self.shape = (layers, top_k)
        self.tokens = 0
        self.columns = (*self.COLUMNS, *(self.TOKEN_IDS if token_ids else ()))
        self._parts = {name: path.with_name(f".{path.name}.{name}.{os.getpid()}.part") for name, _, _ in self.columns}
        self._streams: dict[str, BinaryIO] = {}
        try:
            for name, part in self._parts.items():
                self._streams[name] = part.open("wb")
        except OSError as error:
            self.discard()
            raise CoterieError(f"{path}: cannot be written: {error.strerror}") from error

    def append(
        self,
        expert_ids: NDArray[Any],
        router_weights: NDArray[Any],
        sequence_ids: NDArray[Any],
        positions: NDArray[Any],
        token_ids: NDArray[Any],
    ) -> None:
        """Add tokens: ids and weights `[tokens, layers, top_k]`, the rest `[tokens]`."""
        if expert_ids.shape[1:] != self.shape:
            raise CoterieError(
                f"expert_ids: found shape {expert_ids.shape}, expected [tokens, {self.shape[0]}, {self.shape[1]}]"
            )
        values = dict(expert_ids=expert_ids, router_weights=router_weights, sequence_ids=sequence_ids, positions=positions,
                      token_ids=token_ids)  # fmt: skip
        try:
            for name, _, dtype in self.columns:
                self._streams[name].write(np.ascontiguousarray(values[name], dtype=dtype).tobytes())
        except OSError as error:
            raise CoterieError(f"{self.path}: cannot be written: {error.strerror}") from error
        self.tokens += len(expert_ids)

    def close(self) -> None:
        """Join the columns into the trace file, atomically. Raises CoterieError if nothing was recorded."""
        try:
            for stream in self._streams.values():
                stream.flush()
            if self.tokens == 0:
                raise CoterieError(f"{self.path}: no token was recorded, expected at least one; nothing was written")
            self._join()
        except OSError as error:
            raise CoterieError(f"{self.path}: cannot be written: {error.strerror}") from error
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove the temporary files; the trace file, if there was one before, stays as it was."""
        for name, part in self._parts.items():
            with suppress(OSError):  # a full disk is told of where it was met; here all that matters is to clean up
                if name in self._streams:
                    self._streams[name].close()
            with suppress(OSError):  # such as a name too long to be one
                part.unlink(missing_ok=True)

    def _join(self) -> None:
        columns = []
        for name, code, _ in self.columns:
            shape = (self.tokens, *self.shape) if name in ("expert_ids", "router_weights") else (self.tokens,)
            columns.append((name, code, shape, self._parts[name].stat().st_size))
        with atomic_output(self.path) as temporary, temporary.open("wb") as out:
            out.write(safetensors_header(columns, self.metadata))
            for name, _, _ in self.columns:
                with self._parts[name].open("rb") as part:
                    while block := part.read(COPY_BYTES):
                        out.write(block)


class RoutingSink(Protocol):
    """What a `Recorder` hands routing to: a `TraceWriter`, or a count in memory. tokens: how many it was given."""

    tokens: int

    def append(
        self, expert_ids: NDArray[Any], router_weights: NDArray[Any], sequence_ids: NDArray[Any], positions: NDArray[Any],
        token_ids: NDArray[Any],
    ) -> None:  # fmt: skip
        """Take tokens, as `TraceWriter.append`."""


class Rows:
    """A `RoutingSink` in memory, for what a rank records until the one that writes has it."""

    def __init__(self) -> None:
        self.tokens = 0
        self._columns: list[tuple[NDArray[Any], ...]] = []

    def append(
        self, expert_ids: NDArray[Any], router_weights: NDArray[Any], sequence_ids: NDArray[Any], positions: NDArray[Any],
        token_ids: NDArray[Any],
    ) -> None:  # fmt: skip
        """Take tokens, as `TraceWriter.append`."""
        self.tokens += len(expert_ids)
        narrow = expert_ids.astype(np.int16), router_weights.astype(np.float16)
        self._columns.append((*narrow, *(column.astype(np.int32) for column in (sequence_ids, positions, token_ids))))

    def taken(self) -> tuple[NDArray[Any], ...] | None:
        """What was appended since, column by column; None if nothing was."""
        columns, self._columns = self._columns, []
        return tuple(np.concatenate(parts) for parts in zip(*columns, strict=True)) if columns else None


class Recorder:
    """Hooks that collect one forward call's routing and hand it to a `RoutingSink`.

    sequences: the sequence id of each row of the batch, set by whoever runs the model before each call.
    live: bool `[rows]` or None: rows that are finished are not recorded.
    """

    def __init__(self, model: nn.Module, writer: RoutingSink, num_experts: int, phase: str, max_tokens: int | None) -> None:
        self.writer = writer
        self.num_experts = num_experts
        self.phase = phase
        self.max_tokens = max_tokens
        self.sequences: list[int] = []
        self.decoded = False  # whether a token that was generated was recorded
        self.live: torch.Tensor | None = None
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._mask: torch.Tensor | None = None
        self._modules = [module for _, module in expert_modules(model).values()]
        self._model = model

    @property
    def full(self) -> bool:
        """Whether as many tokens as were asked for have been recorded."""
        return self.max_tokens is not None and self.writer.tokens >= self.max_tokens

    @contextmanager
    def attached(self) -> Iterator[Recorder]:
        """Record the calls made inside the block."""
        hooks = [self._model.register_forward_pre_hook(self._before, with_kwargs=True)]
        hooks.append(self._model.register_forward_hook(self._after, with_kwargs=True))
        hooks += [m.register_forward_pre_hook(self._routed, with_kwargs=True) for m in self._modules]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        mask = kwargs.get("attention_mask")
        self._mask = torch.ones_like(ids) if mask is None else mask
        self._layers = []

    def _routed(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = [*args, *kwargs.values()]
        self._layers.append((values[1].detach(), values[2].detach()))

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        decoding = ids.shape[1] == 1 and self._mask is not None and self._mask.shape[1] > 1
        if self.full or (self.phase == "decode" and not decoding) or (self.phase == "prefill" and decoding):
            return
        self.decoded |= decoding
        self._write(ids)

    def _write(self, ids: torch.Tensor) -> None:
        assert self._mask is not None
        rows, length = ids.shape
        if len(self.sequences) != rows:
            raise CoterieError(f"sequences: found {len(self.sequences)} ids, expected {rows}, one per row of the batch")
        positions = (self._mask.cumsum(1) - 1)[:, -length:]
        keep = self._mask[:, -length:].bool()
        if self.live is not None:
            keep = keep & self.live[:, None]
        chosen = keep.reshape(-1).nonzero()[:, 0]
        if self.max_tokens is not None:
            chosen = chosen[: self.max_tokens - self.writer.tokens]
        experts = torch.stack([i.reshape(rows * length, -1)[chosen] for i, _ in self._layers], 1).cpu()
        weights = torch.stack([w.reshape(rows * length, -1)[chosen].half() for _, w in self._layers], 1).cpu()
        if not bool((fine := torch.isfinite(weights)).all()):
            layer = int((~fine).any(2).any(0).nonzero()[0, 0])
            raise CoterieError(
                f"the router of layer {layer}, of those with experts, gives weights that are no numbers within float16: the "
                "model's weights are damaged, or its values leave the dtype; try --dtype float32"
            )
        experts = experts.masked_fill((experts < 0) | (experts >= self.num_experts), -1)
        sequence = torch.tensor(self.sequences).repeat_interleave(length)[chosen.cpu()]
        read, places = (values.reshape(-1)[chosen].cpu().numpy() for values in (ids, positions))
        self.writer.append(experts.numpy(), weights.numpy(), sequence.numpy(), places, read)


def metadata_for(model: str, num_experts: int, layer_ids: tuple[int, ...], scenario: str, phase: str) -> dict[str, str]:
    """The metadata strings of a trace to be recorded."""
    if phase not in PHASES:
        raise InputError(f"--phase: found {phase!r}, expected {', '.join(PHASES)}")
    return {"format": TRACE_FORMAT, "model": model, "num_experts": str(num_experts), "layer_ids": json.dumps(list(layer_ids)),
            "scenario": scenario, "phase": phase}  # fmt: skip
