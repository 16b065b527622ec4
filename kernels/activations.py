"""What an expert does between its two products, as data: so that a kernel can do it without being told the model's family."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch.nn import functional as F

FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda z: F.relu(z).square(),
    "none": lambda z: z,
}
WIDE = 20.0  # reaches the usual limits (7, 10)
PROBE = torch.linspace(-WIDE, WIDE, 2 * 321, dtype=torch.float64)  # even


@dataclass(frozen=True)
class Activation:
    """function(alpha * gate) / alpha * (up + offset), both cut to the limit beforehand; without a gate the function alone.

    function: of FUNCTIONS. gated: the first product gives gate and up, one after the other or, if interleaved, in turns.
    limit: gate is at most that, up within it on both sides; None for none. SwiGLU and GeGLU (Shazeer 2020) are (silu, gated)
    and (gelu, gated); gpt-oss is (silu, gated, interleaved, limit 7, alpha 1.702, offset 1).
    """

    function: str = "silu"
    gated: bool = True
    interleaved: bool = False
    limit: float | None = None
    alpha: float = 1.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        if self.function not in FUNCTIONS:
            raise ValueError(f"activation: found {self.function!r}, expected one of {', '.join(FUNCTIONS)}")
        if not self.gated and (self.interleaved or self.limit is not None or self.offset or self.alpha != 1.0):
            raise ValueError(f"activation: found {self}, expected interleaved, limit, alpha and offset only where it is gated")

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        """The plain reference: `[..., 2I]` to `[..., I]` if gated, else `[..., I]` to `[..., I]`."""
        function = FUNCTIONS[self.function]
        if not self.gated:
            return function(z)
        gate, up = (z[..., ::2], z[..., 1::2]) if self.interleaved else z.chunk(2, -1)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        if self.alpha != 1.0:
            return function(gate * self.alpha) / self.alpha * (up + self.offset)
        return function(gate) * (up + self.offset if self.offset else up)


def recognise(
    apply: Callable[[torch.Tensor], torch.Tensor], gated: bool, limits: Sequence[float] = (), alphas: Sequence[float] = ()
) -> Activation | None:
    """Which `Activation` a model's own function is, found by trying both on the same numbers; None if it is none of them.

    limits, alphas: constants that the model has for it.
    """
    widest = 2 * max((abs(limit) for limit in limits if math.isfinite(limit)), default=0.0)
    probe = _shuffled(PROBE if widest <= WIDE else torch.cat([PROBE, PROBE * (widest / WIDE)]))
    try:
        found = apply(probe)
    except (RuntimeError, TypeError, ValueError):
        return None  # it takes only its own shapes or dtypes
    for candidate in _candidates(gated, limits, alphas):
        expected = candidate(probe)
        if found.shape == expected.shape and torch.allclose(found.double(), expected, rtol=1e-6, atol=1e-9):
            return candidate
    return None


def _shuffled(values: torch.Tensor) -> torch.Tensor:
    """Each value beside another one, `[2, n]`, so that gate and up, halves and turns can be told apart."""
    return torch.stack([values.roll(17), values.flip(0).roll(5).view(2, -1).T.reshape(-1)])


def _candidates(gated: bool, limits: Sequence[float], alphas: Sequence[float]) -> Iterator[Activation]:
    if not gated:
        yield from (Activation(name, False) for name in FUNCTIONS)
        return
    found = product(FUNCTIONS, (False, True), (None, *limits), (1.0, *alphas), (0.0, 1.0))
    yield from (Activation(f, True, turns, limit, alpha, offset) for f, turns, limit, alpha, offset in found)
