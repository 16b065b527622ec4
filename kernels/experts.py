"""The experts' feed-forward networks over stacked weights: the plain reference, the CPU path, and the choice of a path.

All compute sum over slots j of weights[t, j] * expert[ids[t, j]](x[t]), with id -1 meaning an empty slot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch.nn import functional as F

from coterie.kernels.activations import Activation
from coterie.kernels.cpu import Product, multiply_each, multiply_widened, takes_vectors, widens
from coterie.kernels.formats import Weights

if TYPE_CHECKING:
    from coterie.kernels.fused import FusedExperts

REGISTER, GRAIN = 128, 1 << 15  # values: of four of the widest registers; from which on torch shares work among threads
CHUNK_ROWS = 1024  # rows whose hidden values are held at once: few enough to stay in the cache


class Residency(Protocol):
    """Experts that come and go: `offload/cache.py` behind one layer."""

    @property
    def experts(self) -> int:
        """How many can be asked for."""
        ...

    def look_ahead(self, x: torch.Tensor, ids: torch.Tensor) -> None:
        """What the layer is about to be given, `[T, H]` and `[T, K]`: the next one may be prepared for it."""
        ...

    def announce(self, places: Sequence[int]) -> None:
        """All experts that a step will ask for, each once."""
        ...

    def arrivals(self, places: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
        """(position in `places`, where in the stacks it is), in groups as they come; valid until the next group."""
        ...

    def on_host(self, places: Sequence[int], rows: Sequence[int]) -> AbstractContextManager[dict[int, int]]:
        """Which are to be computed on the host: by position in `places`, where in the host's stacks, while it lasts.

        rows: how many each has. They are not to be asked for with `arrivals`.
        """
        ...


class Places(Protocol):
    """Tensors of one shape that lie anywhere: `offload/slots.py`."""

    @property
    def shape(self) -> Sequence[int]:
        """As if they were stacked: `[S, ...]`."""
        ...

    def __getitem__(self, place: int) -> torch.Tensor: ...


Stack = torch.Tensor | Places


@dataclass(frozen=True)
class StackedExperts:
    """The weights of S experts as transformers stacks them, and what happens between the two products.

    first: gate_up_proj or up_proj, `[S, 2I or I, H]`, or `[S, H, 2I or I]` if transposed; first_bias `[S, 2I or I]`.
    second: down_proj, `[S, H, I]`, or `[S, I, H]` if transposed; second_bias `[S, H]`. In 8 or 4 bits: `Weights` on a GPU,
    `cpu.for_cpu` of them on a CPU.
    activation: `[rows, 2I or I]` -> `[rows, I]`; known: the same as data, which a GPU's kernels fuse, or None.
    finish: applied to each expert's output `[rows, H]`, or None.
    residency: what brings experts to their places, where the stacks are smaller than the model's; None if all are there.
    host: for a GPU, those that its host may compute, in stacks of its own memory, or None.
    least_rows, most_rows: of one product; fewer are filled up with zeros (libraries round differently for few rows).
    """

    first: Stack | Product | Weights
    second: Stack | Product | Weights
    activation: Callable[[torch.Tensor], torch.Tensor]
    first_bias: Stack | None = None
    second_bias: Stack | None = None
    transposed: bool = False
    finish: Callable[[torch.Tensor], torch.Tensor] | None = None
    known: Activation | None = None
    residency: Residency | None = None
    host: StackedExperts | None = None
    least_rows: int = 1
    most_rows: int = 1 << 30

    @property
    def count(self) -> int:
        """How many experts there are, here or to be brought."""
        return self.first.shape[0] if self.residency is None else self.residency.experts

    def arrivals(self, used: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
        """(position in `used`, place in the stacks) of the experts `used`, each once, in groups as they are there."""
        if self.residency is None:
            return iter([list(enumerate(used))])
        self.residency.announce(used)
        return self.residency.arrivals(used)

    def run(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """One expert on its rows, `[rows, H]` -> `[rows, H]`."""
        hidden = self.activation(self._product(x, self.first, self.first_bias, expert))
        y = self._product(hidden, self.second, self.second_bias, expert)
        return y if self.finish is None else self.finish(y)

    def run_many(self, chunk: list[tuple[int, int]], x: torch.Tensor) -> torch.Tensor:
        """Several experts, each on its (place, rows) of `x`, in order: what lies between the products is done once for all."""
        hidden = self._activated(chunk, self._products(chunk, x, self.first, self.first_bias))
        y = self._products(chunk, hidden, self.second, self.second_bias)
        return y if self.finish is None else self.finish(y)

    def _activated(self, chunk: list[tuple[int, int]], z: torch.Tensor) -> torch.Tensor:
        """The activation, so that no value depends on which experts share the chunk.

        torch computes the last few values of a thread's part by other instructions than those before. Rows that fill whole
        registers have no such last values if one thread does them all; else each expert's rows are a call of their own.
        """
        counts = [rows for _, rows in chunk]
        if z.shape[1] % REGISTER == 0:
            most = len(z) if torch.get_num_threads() == 1 else GRAIN // z.shape[1]
            counts = _together(counts, most)
        parts = [self.activation(part) for part in torch.split(z, counts)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _products(
        self, chunk: list[tuple[int, int]], x: torch.Tensor, weight: Stack | Product | Weights, bias: Stack | None
    ) -> torch.Tensor:
        assert not isinstance(weight, Weights)  # of a GPU
        vectors = bias is None and self.least_rows == 1 and takes_vectors(x.dtype)  # faster with one row, in one go
        if isinstance(weight, Product) and vectors and x.dtype != torch.float32 and len(chunk) == len(x):
            return weight.vectors([expert for expert, _ in chunk], x)
        out = x.new_empty(x.shape[0], weight.shape[2 if self.transposed else 1])
        start, ones = 0, []
        for expert, count in chunk:
            end = start + count
            if isinstance(weight, Product):
                weight.multiply(expert, x[start:end], out[start:end])
                if bias is not None:
                    out[start:end] += bias[expert]
            elif vectors and count == 1:
                ones.append((start, expert))
            else:
                matrix = weight[expert] if self.transposed else weight[expert].T
                for first in range(start, end, self.most_rows):
                    last = min(first + self.most_rows, end)
                    self._multiply(x[first:last], matrix, None if bias is None else bias[expert], out[first:last])
            start = end
        if ones:
            assert not isinstance(weight, Product)
            matrices = (weight[expert].T if self.transposed else weight[expert] for _, expert in ones)
            rows, outs = ((t.unbind() if len(ones) == len(t) else [t[row] for row, _ in ones]) for t in (x, out))
            multiply_each(matrices, rows, outs)
        return out

    def _multiply(self, rows: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        count = len(rows)
        if count < self.least_rows:
            rows = F.pad(rows, (0, 0, 0, self.least_rows - count))
        if widens(matrix, len(rows)):
            product = multiply_widened(rows, matrix)
            out.copy_((product if bias is None else product + bias)[:count])
        elif count < self.least_rows:
            out.copy_((rows @ matrix if bias is None else torch.addmm(bias, rows, matrix))[:count])
        elif bias is None:
            torch.mm(rows, matrix, out=out)
        else:
            torch.addmm(bias, rows, matrix, out=out)

    def _product(self, x: torch.Tensor, weight: Stack | Product | Weights, bias: Stack | None, expert: int) -> torch.Tensor:
        if isinstance(weight, Product):
            return self._products([(expert, len(x))], x, weight, bias)
        assert not isinstance(weight, Weights)  # of a GPU
        matrix = weight[expert].T if self.transposed else weight[expert]
        return F.linear(x, matrix, None if bias is None else bias[expert])


def compute_experts(experts: StackedExperts, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """By the kernels for the device that x is on; shapes as `grouped_experts`."""
    if x.is_cuda and experts.least_rows == 1:
        run = fused(experts) if experts.residency is None else partial(arriving_experts, experts)
        return run(x, ids, weights)
    return grouped_experts(experts, x, ids, weights)


def arriving_experts(experts: StackedExperts, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """By a GPU's kernels, picks of each group of experts as it comes, and one sum in the end: the bits of `fused`.

    Which experts are asked for is looked up on the host, so that the device is waited for. What the residency
    leaves to the host is computed there meanwhile, and rounded as there.
    """
    assert experts.residency is not None
    if ids.numel() == 0:
        return torch.zeros_like(x)
    table = torch.full((experts.count,), -1, dtype=torch.int32, device=x.device)
    made = replace(fused(experts), table=table)
    rows = made.room(x, ids)
    known = ids.cpu()
    counts = torch.bincount(known.flatten() + 1, minlength=experts.count + 1)[1:].tolist()
    used = [expert for expert, count in enumerate(counts) if count]
    experts.residency.announce(used)
    with experts.residency.on_host(used, [counts[expert] for expert in used]) as apart:
        here = [expert for position, expert in enumerate(used) if position not in apart]
        left, x_host = list(apart.items()), x.cpu() if apart else x  # before anything is queued that this would wait for
        for group in experts.residency.arrivals(here):
            there = torch.tensor([(here[position], place) for position, place in group])
            table[there[:, 0].to(x.device)] = there[:, 1].to(x.device, torch.int32)
            made.picked(x, torch.where(torch.isin(known, there[:, 0]), known, -1).to(x.device), rows)
            _on_host(experts, x_host, known, used, left, rows)  # while what was begun is computed and copied
            left = []
        _on_host(experts, x_host, known, used, left, rows)
    return made.summed(rows, ids, weights, x.dtype)


def _on_host(
    experts: StackedExperts, x: torch.Tensor, known: torch.Tensor, used: Sequence[int], apart: Sequence[tuple[int, int]],
    rows: torch.Tensor,
) -> None:  # fmt: skip
    """Fill the rows of picks whose expert the host computes. x, known (ids): on the host; apart: (position in used, place)."""
    for position, place in apart:
        assert experts.host is not None
        picks = (known.flatten() == used[position]).nonzero()[:, 0]
        y = experts.host.run(place, x[picks // known.shape[1]])
        rows[:, picks.to(rows.device)] = 0
        rows[0, picks.to(rows.device)] = y.to(rows.device, rows.dtype)


def fused(experts: StackedExperts) -> FusedExperts:
    """The same experts for Triton's kernels; the weights are not copied."""
    from coterie.kernels.fused import FusedExperts

    def as_weights(stack: Stack | Product | Weights) -> Weights:
        if isinstance(stack, torch.Tensor):
            return Weights(stack.transpose(1, 2) if experts.transposed else stack)
        assert isinstance(stack, Weights)  # a `Product` is of a CPU
        return stack

    def as_bias(stack: Stack | None) -> torch.Tensor | None:
        assert stack is None or isinstance(stack, torch.Tensor)  # `Places` are of a CPU
        return stack

    return FusedExperts(
        as_weights(experts.first), as_weights(experts.second), experts.known,
        as_bias(experts.first_bias), as_bias(experts.second_bias),
        between=experts.activation if experts.known is None else None, finish=experts.finish,
    )  # fmt: skip


def reference_experts(experts: StackedExperts, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """One token and one slot at a time: what every fast path must equal. Shapes as `grouped_experts`."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for t in range(len(x)):
        for j in range(ids.shape[1]):
            if ids[t, j] >= 0:
                out[t] += experts.run(int(ids[t, j]), x[t : t + 1])[0].float() * weights[t, j].float()
    return out.to(x.dtype)


def grouped_experts(experts: StackedExperts, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Rows grouped by expert, one product each, summed over slots in fp32 in slot order.

    x: `[T, H]`; ids: integer `[T, K]`, positions in the stack, -1 for an empty slot; weights: float `[T, K]`.
    Returns `[T, H]` in x's dtype. Stable order, no atomics: a repeat run is bit-identical.
    """
    tokens, slots = ids.shape
    if tokens == 1 and experts.least_rows == 1:
        return _one_token(experts, x, ids[0], weights[0])
    known = ids.cpu().numpy()
    flat, filled = known.reshape(-1), known >= 0
    order = np.argsort(flat, kind="stable")
    counts = np.bincount(flat + 1, minlength=experts.count + 1).tolist()
    nth = filled.cumsum(1)
    width = max(1, int(nth[:, -1].max(initial=0)))
    slot_of = (np.arange(tokens)[:, None] * width + nth - 1).reshape(-1)
    make = torch.empty if counts[0] == 0 else torch.zeros
    parts = make(tokens * width, x.shape[1], dtype=torch.float32, device=x.device)
    factors = weights.reshape(-1, 1).float()
    used = [expert for expert, rows in enumerate(counts[1:]) if rows]
    starts = list(accumulate(counts))  # by expert, since the first of `counts` is of empty slots
    for group in experts.arrivals(used):
        for chunk in _chunks([(used[position], place) for position, place in group], counts[1:]):
            picks = np.concatenate([order[starts[expert] : starts[expert] + counts[1 + expert]] for expert, _ in chunk])
            rows, pairs, places = (torch.from_numpy(of).to(x.device) for of in (picks // slots, picks, slot_of[picks]))
            y = experts.run_many([(place, counts[1 + expert]) for expert, place in chunk], x[rows])
            parts[places] = y.to(torch.float32, copy=True).mul_(factors[pairs])
    return parts.view(tokens, width, x.shape[1]).sum(1).to(x.dtype)


def _one_token(experts: StackedExperts, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The same for x `[1, H]`, ids and weights `[K]`, with nothing to put in order."""
    picks = [expert for expert in ids.tolist() if expert >= 0]
    if not picks:
        return torch.zeros_like(x)
    if experts.residency is None:
        y = experts.run_many([(expert, 1) for expert in picks], x.expand(len(picks), -1))
    else:
        used = sorted(set(picks))
        found: dict[int, torch.Tensor] = {}  # by row
        for group in experts.arrivals(used):
            here = {used[position]: place for position, place in group}
            rows = [row for row, expert in enumerate(picks) if expert in here]
            made = experts.run_many([(here[picks[row]], 1) for row in rows], x.expand(len(rows), -1))
            found |= dict(zip(rows, made.unbind(), strict=True))
        y = torch.stack([found[row] for row in range(len(picks))])
    weights = weights if len(picks) == len(ids) else weights[ids >= 0]
    return (y.float() * weights[:, None].float()).sum(0, keepdim=True).to(x.dtype)


def _together(counts: list[int], most: int) -> list[int]:
    """Neighbours added up, as long as they come to no more than `most`."""
    made: list[int] = []
    for count in counts:
        if made and made[-1] + count <= most:
            made[-1] += count
        else:
            made.append(count)
    return made


def _chunks(experts: list[tuple[int, int]], counts: list[int]) -> Iterator[list[tuple[int, int]]]:
    """Consecutive (expert, place), as many as fit in CHUNK_ROWS together by their `counts`, at least one."""
    chunk: list[tuple[int, int]] = []
    held = 0
    for expert, place in experts:
        if chunk and held + counts[expert] > CHUNK_ROWS:
            yield chunk
            chunk, held = [], 0
        chunk.append((expert, place))
        held += counts[expert]
    if chunk:
        yield chunk
