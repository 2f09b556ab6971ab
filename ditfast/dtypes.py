"""The dtypes of weights and of products, by the names that commands give them."""

from __future__ import annotations

import torch

from .argument_checks import describe

INT8 = "int8"  # of products on the CPU engine; weights stay in one of the others
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NAMES = DTYPES | {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}


def as_dtype(name: str, value: object) -> torch.dtype:
    """Return a dtype of weights, given as such or by its name.

    Raises:
        ValueError: it is another dtype or word.
        TypeError: it is neither.
    """
    dtype = _NAMES.get(value) if isinstance(value, str) else value
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    kind = ValueError if isinstance(value, (str, torch.dtype)) else TypeError
    got = str(value) if isinstance(value, torch.dtype) else describe(value)
    raise kind(f"{name}: got {got}, expected one of {', '.join(_NAMES)}")
