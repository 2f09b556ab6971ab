"""Makes Triton's CPU interpreter exact for bf16: upstream multiplies raw bit patterns in dot and truncates fp32 to bf16."""

from __future__ import annotations

from typing import Any

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
    return tl.bfloat16 in dtypes and set(dtypes) <= {tl.bfloat16, tl.float16, tl.float32} and dtypes[0] != dtypes[1]


def _cast(source: Any, target: Any) -> Any:
    """Through torch, which rounds to nearest; the interpreter keeps bf16 as uint16."""
    bits = {
        tl.bfloat16: (np.int16, torch.bfloat16),
        tl.float16: (np.int16, torch.float16),
        tl.float32: (np.int32, torch.float32),
    }
    from_int, from_dtype = bits[source.dtype.scalar]
    to_int, to_dtype = bits[target.scalar]
    data = np.ascontiguousarray(source.data)
    values = torch.from_numpy(data.view(from_int).copy()).view(from_dtype).to(to_dtype)
    stored = {tl.bfloat16: np.uint16, tl.float16: np.float16, tl.float32: np.float32}[target.scalar]
    return interpreter.TensorHandle(
        values.view(torch.from_numpy(np.zeros(1, to_int)).dtype).numpy().view(stored), target.scalar
    )
