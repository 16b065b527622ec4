"""A trace's routing in the place of the routers' own, while a model runs."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from coterie.routing.record import expert_modules


@dataclass
class Replay:
    """The routers' weights stay, the largest for a token's first expert.

    ids: int64 `[sequences, positions, layers, K]`, or None: the routers' own. token_ids: int64 `[sequences, positions]`, for
    `by_text`. rows: of the current call, `[tokens, layers, K]`.
    """

    ids: torch.Tensor | None
    token_ids: torch.Tensor | None = None
    rows: torch.Tensor | None = field(default=None)
    reading: bool = False
    read: list[int] = field(
        default_factory=list
    )  # the sequences of the last call that had prompts, where they are told by text

    def at(self, sequences: list[int], first: int, length: int) -> None:
        """Tell which tokens the next call is about: `length` positions from `first` on, of these sequences.

        A rank without sequences runs a token that does not count, by its own routing.
        """
        self.rows = None
        if self.ids is not None and sequences:
            self.rows = self.ids[sequences, first : first + length].flatten(0, 1)

    @contextmanager
    def by_text(self) -> Iterator[None]:
        """Calls inside are known by their token ids: steps of the same sequences that somebody else makes up."""
        self.reading = True
        try:
            yield
        finally:
            self.reading, self.rows = False, None

    def layer(self, number: int, own: torch.Tensor) -> torch.Tensor:
        """The experts `[tokens, K]` of the current call in the number-th layer with experts; own: the router's."""
        return own if self.rows is None else self.rows[:, number]

    def attach(self, model: nn.Module) -> None:
        """Replace the routers' choice before every experts module of `model`."""
        model.register_forward_pre_hook(self._read, with_kwargs=True)
        for number, (_, module) in enumerate(expert_modules(model).values()):
            module.register_forward_pre_hook(functools.partial(self._replace, number), with_kwargs=True)

    def _read(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """By position: that a prompt was cut or begun anew behind its end does not matter."""
        if not self.reading or self.ids is None or self.token_ids is None:
            return
        tokens, positions = kwargs["input_ids"], kwargs["position_ids"]
        if tokens.shape[1] > 1:
            length = min(tokens.shape[1], self.token_ids.shape[1])
            alike = (tokens[:, None, :length] == self.token_ids[None, :, :length]).sum(2)
            self.read = alike.argmax(1).tolist()
        self.rows = self.ids[torch.tensor(self.read)[:, None], positions % self.ids.shape[1]].flatten(0, 1)

    def _replace(self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "top_k_index" in kwargs:
            return args, kwargs | {"top_k_index": self.layer(number, kwargs["top_k_index"])}
        return (args[0], self.layer(number, args[1]), *args[2:]), kwargs
