"""Makes Triton's CPU interpreter exact for bf16: upstream multiplies raw bit patterns in dot and truncates fp32 to bf16."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def install() -> None:
    """Patches the interpreter, once."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "rounds_bf16", False):
        return
    cast, convert, dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        return _cast(source, target) if _involves_bf16(source.dtype, target) else cast(self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        return _cast(source, target) if _involves_bf16(source.dtype, target) else convert(self, source, target, rounding)

    def create_dot(self: Any, a: Any, b: Any, acc: Any, *options: Any) -> Any:
        a, b = (_cast(operand, tl.float32) if operand.dtype.scalar == tl.bfloat16 else operand for operand in (a, b))
        return dot(self, a, b, acc, *options)

    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = cast_impl, create_fp_to_fp, create_dot
    builder.rounds_bf16 = True


def _involves_bf16(source: Any, target: Any) -> bool:
    dtypes = (source.scalar, target.scalar)
    return tl.bfloat16 in dtypes and set(dtypes) <= set(FORMATS) and dtypes[0] != dtypes[1]


class Format(NamedTuple):
    """How the interpreter stores a type in numpy, and what torch calls its bits and its values."""

    stored: type[np.generic]
    bits: torch.dtype
    values: torch.dtype


FORMATS = {
    tl.bfloat16: Format(np.uint16, torch.int16, torch.bfloat16),
    tl.float16: Format(np.float16, torch.int16, torch.float16),
    tl.float32: Format(np.float32, torch.int32, torch.float32),
}


def _cast(source: Any, target: Any) -> Any:
    """Through torch, which rounds to nearest."""
    old, new = FORMATS[source.dtype.scalar], FORMATS[target.scalar]
    signed = np.ascontiguousarray(source.data).view(f"i{old.bits.itemsize}").copy()
    values = torch.from_numpy(signed).view(old.values).to(new.values)
    return interpreter.TensorHandle(values.view(new.bits).numpy().view(new.stored), target.scalar)
