"""A repair for Triton's interpreter, which keeps bfloat16 as the integers of its bits and computes with those.

With `TRITON_INTERPRET=1`, `repair()` makes products and conversions of bfloat16 what they are on a GPU: products exact and
summed in float32, conversions rounded to the nearest even. Any other arithmetic on bfloat16 is refused, so that a kernel that
would be silently wrong there fails. Seen with Triton 3.6 to 3.9 (triton-lang/triton#11584).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
from numpy.typing import NDArray


def interpreting() -> bool:
    """Whether kernels are run by the interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def to_float32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Exact."""
    return np.left_shift(bits, 16, dtype=np.uint32).view(np.float32)


def to_bfloat16(values: NDArray[Any]) -> NDArray[np.uint16]:
    """The bits of the nearest bfloat16, of two equally near ones the even; not-a-number stays that."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def repair() -> None:
    """Patch the interpreter in this process; a second call does nothing."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if getattr(builder, "coterie_repaired", False):
        return
    builder.coterie_repaired = True

    def is_half(value: Any) -> bool:
        return isinstance(value, handle) and not isinstance(value.dtype, tl.pointer_type) and value.dtype.scalar == tl.bfloat16

    def wide(value: Any) -> Any:
        """As float32; half precision too, whose products NumPy computes one by one."""
        if is_half(value):
            return handle(to_float32(value.data), tl.float32)
        return handle(value.data.astype(np.float32), tl.float32) if value.data.dtype == np.float16 else value

    def replaced(name: str, make: Callable[[Any], Any]) -> None:
        before = getattr(builder, name)
        setattr(builder, name, wraps(before)(make(before)))

    def dot(before: Any) -> Any:
        return lambda self, a, b, d, *rest: before(self, wide(a), wide(b), d, *rest)

    def cast(before: Any) -> Any:
        def convert(self: Any, value: Any, kind: Any, *rest: Any) -> Any:
            source, target = value.dtype.scalar, kind.scalar
            if source == target or tl.bfloat16 not in (source, target):
                return before(self, value, kind, *rest)
            if source == tl.bfloat16:
                value = handle(to_float32(value.data), tl.float32)
                return value if target == tl.float32 else before(self, value, kind, *rest)
            if source != tl.float32:
                value = before(self, value, tl.float32, *rest)
            return handle(to_bfloat16(value.data), tl.bfloat16)

        return convert

    def refuse(before: Any) -> Any:
        def guarded(self: Any, *values: Any) -> Any:
            if any(is_half(value) and value.data.dtype == np.uint16 for value in values):
                raise NotImplementedError("bfloat16 arithmetic in the interpreter: convert to float32 first")
            return before(self, *values)

        return guarded

    replaced("create_dot", dot)
    for name in ("cast_impl", "create_fp_to_fp"):
        replaced(name, cast)
    for name in ("binary_op", "unary_op", "create_atomic_rmw"):
        replaced(name, refuse)
