"""What a recording of another program becomes: a trace or load statistics, checked, with what it does not say itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coterie.routing.errors import InputError, first_line
from coterie.routing.trace import LoadStatistics, RoutingTrace

MAX_EXPERTS = 32767


@dataclass(frozen=True)
class ImportOptions:
    """What the foreign file does not say. num_experts: None takes the file's, or the largest id seen plus one.

    phase: None is what the recording says, else mixed; counts have none.
    """

    model: str = ""
    num_experts: int | None = None
    scenario: str = ""
    phase: str | None = None


@contextmanager
def recording(path: Path) -> Iterator[None]:
    """Puts the file before what is wrong with it; what odd contents raise in numpy or torch becomes InputError, too."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (ValueError, TypeError, IndexError, KeyError, OverflowError, AttributeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {first_line(error, 100)}"
        raise InputError(f"{path}: is not what its kind of recording holds ({reason})") from error


def integers(values: NDArray[Any], name: str, dimensions: int) -> NDArray[np.int64]:
    """`values` as int64; InputError unless they are integers from -1 to 2**31 - 1 in so many dimensions."""
    if values.dtype.kind not in "iu" or values.ndim != dimensions:
        found = f"{values.dtype} with {values.ndim} dimensions"
        raise InputError(f"{name}: found {found}, expected integers with {dimensions}")
    if values.size and (values.min() < -1 or values.max() > 2**31 - 1):
        raise InputError(f"{name}: found {values.min()} to {values.max()}, expected -1 to {2**31 - 1}")
    return values.astype(np.int64)


def as_trace(
    ids: NDArray[np.int64], sequence: NDArray[np.int64], positions: NDArray[np.int64], options: ImportOptions,
    stated: int | None, layer_ids: tuple[int, ...], weights: NDArray[Any] | None = None,
    token_ids: NDArray[np.int64] | None = None, phase: str = "mixed",
) -> RoutingTrace:  # fmt: skip
    """A trace of ids `[tokens, layers, top_k]`; stated: experts of a layer, where the recording says so."""
    if ids.size == 0:
        raise InputError(f"expert_ids: found shape {list(ids.shape)}, expected at least one token")
    known = stated if options.num_experts is None else options.num_experts
    experts = int(ids.max()) + 1 if known is None else known
    if not 1 <= experts <= MAX_EXPERTS:
        raise InputError(f"num_experts: found {experts}, expected 1 to {MAX_EXPERTS}")
    if ids.max() >= experts:
        raise InputError(f"expert_ids: found {ids.max()}, expected less than num_experts = {experts}")
    return RoutingTrace(
        expert_ids=ids.astype(np.int16),
        sequence_ids=sequence.astype(np.int32),
        positions=positions.astype(np.int32),
        model=options.model,
        num_experts=experts,
        layer_ids=layer_ids,
        scenario=options.scenario,
        phase=options.phase or phase,
        router_weights=None if weights is None else _finite(weights),
        token_ids=None if token_ids is None else token_ids.astype(np.int32),
    )


def _finite(weights: NDArray[Any]) -> NDArray[np.float16]:
    if weights.dtype.kind not in "fiu":
        raise InputError(f"router_weights: found {weights.dtype}, expected numbers")
    with np.errstate(over="ignore"):
        found = weights.astype(np.float16)
    if not np.isfinite(found).all():
        wrong = weights[~np.isfinite(found)].flat[0]
        raise InputError(f"router_weights: found {wrong}, expected numbers within float16")
    return found


def as_load(counts: NDArray[np.float64], options: ImportOptions) -> LoadStatistics:
    """Load statistics of counts `[layers, experts]` or `[scenarios, layers, experts]`; layers without any are left out."""
    if options.phase is not None:
        raise InputError(f"--phase: found {options.phase} for counts, expected none: they have no phase")
    if counts.ndim == 2:
        counts = counts[None]
    if counts.ndim != 3 or not counts.size:
        raise InputError(
            f"logical_count: found shape {list(counts.shape)}, expected [layers][experts], with or without scenarios"
        )
    if not np.isfinite(counts).all() or counts.min() < 0 or counts.max() > 2**53 or (counts % 1).any():
        raise InputError("logical_count: found a value that is negative, not finite or not whole, expected counts")
    routed = counts.sum((0, 2)) > 0  # dense layers are listed with zero counts
    if not routed.any():
        raise InputError("logical_count: found only zeros, expected counts")
    names = [options.scenario] if len(counts) == 1 else [f"{options.scenario}{i}" for i in range(len(counts))]
    if options.num_experts not in (None, counts.shape[2]):
        raise InputError(f"--num-experts: found {options.num_experts}, expected {counts.shape[2]}, as logical_count has")
    layer_ids = tuple(int(i) for i in np.flatnonzero(routed))
    return LoadStatistics(counts[:, routed].round().astype(np.int64), options.model, layer_ids, tuple(names))
