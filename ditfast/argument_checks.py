"""Checks of arguments; each error names the argument, what came and what was expected."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

LARGEST_SEED = 2**64 - 1
LARGEST_FP32 = torch.finfo(torch.float32).max
_LONGEST = 60  # characters of a value in a message


def describe(value: object) -> str:
    """Return what a value is in a few words: short ones as they are written, else the type."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype}"
    if isinstance(value, np.ndarray):
        return f"a NumPy array {list(value.shape)} of {value.dtype}"
    kind = f"a {type(value).__name__}"
    if isinstance(value, int) and value.bit_length() > 4 * _LONGEST:  # Python refuses to write very large ones
        return f"{kind} of {value.bit_length()} bits"
    if not isinstance(value, (Real, str, bytes, list, tuple, type(None))):
        return kind
    written = repr(value) if isinstance(value, (Real, type(None))) or len(value) <= _LONGEST else ""
    if 0 < len(written) <= _LONGEST and written.isprintable():
        return written
    return f"{kind} of length {len(value)}" if isinstance(value, (str, bytes, list, tuple)) else kind


def check_type(name: str, value: object, types: type | tuple[type, ...], expected: str) -> None:
    """Raise TypeError unless a value is of one of the types."""
    if not isinstance(value, types):
        raise TypeError(f"{name}: got {describe(value)}, expected {expected}")


def check_tensor(name: str, value: object, expected: str = "a tensor") -> None:
    check_type(name, value, Tensor, expected)


def check_same_shape(name: str, value: object, like: Tensor, of: str) -> None:
    """Raise unless a value is a tensor of the shape of another, which the caller knows as ``of``."""
    check_tensor(name, value, f"a tensor {list(like.shape)}, as {of}")
    if isinstance(value, Tensor) and value.shape != like.shape:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {tuple(like.shape)}, as {of}")


def check_callable(name: str, value: object, expected: str = "a function") -> None:
    if not callable(value):
        raise TypeError(f"{name}: got {describe(value)}, expected {expected}")


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise unless a value is one of a few words."""
    if not isinstance(value, str) or value not in choices:
        kind = ValueError if isinstance(value, str) else TypeError
        raise kind(f"{name}: got {describe(value)}, expected one of {', '.join(choices)}")


def as_bool(name: str, value: object) -> bool:
    check_type(name, value, (bool, np.bool_), "True or False")
    return bool(value)


def as_int(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """Return an integer of Python, NumPy or torch as Python's; bools are none.

    Raises:
        TypeError: it is no number.
        ValueError: it is a fraction, a bool, or out of the range.
    """
    expected = _range("an integer", least, most)
    try:
        number = None if _is_bool(value) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        kind = ValueError if isinstance(value, Real) else TypeError
        raise kind(f"{name}: got {describe(value)}, expected {expected}")
    if (least is not None and number < least) or (most is not None and number > most):
        raise ValueError(f"{name}: got {describe(number)}, expected {expected}")
    return number


def as_float(name: str, value: Any, least: float | None = None, most: float | None = None) -> float:
    """Return a real number of Python, NumPy or torch as Python's; it is finite, in fp32 too.

    Raises:
        TypeError: it is no number.
        ValueError: it is a bool, NaN, infinite, or out of the range.
    """
    expected = _range("a finite number", least, most)
    scalar = isinstance(value, Real) or (isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0)
    if _is_bool(value) or not scalar:
        kind = ValueError if isinstance(value, Real) else TypeError
        raise kind(f"{name}: got {describe(value)}, expected {expected}")
    try:
        number = float(value)
    except OverflowError:  # an integer of Python
        number = math.inf
    except (RuntimeError, TypeError, ValueError) as error:  # complex numbers, words in an array
        raise TypeError(f"{name}: got {describe(value)}, expected {expected}") from error
    outside = (least is not None and number < least) or (most is not None and number > most)
    if not abs(number) <= LARGEST_FP32 or outside:
        raise ValueError(f"{name}: got {number}, expected {expected}")
    return number


def as_list(name: str, values: Any, expected: str) -> list[Any]:
    """Return the elements of a list, tuple, range, array or tensor; text is no list."""
    if isinstance(values, (Tensor, np.ndarray)):
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes, bytearray)):
        raise TypeError(f"{name}: got {describe(values)}, expected {expected}")
    return list(values)


def _is_bool(value: object) -> bool:
    return isinstance(value, (bool, np.bool_)) or getattr(value, "dtype", None) in (torch.bool, np.dtype(bool))


def _range(kind: str, least: float | None, most: float | None) -> str:
    if least is None:
        return kind
    if most is None:
        return f"{kind}, {least} or more"
    return f"{kind} {least}..{'2^64-1' if most == LARGEST_SEED else most}"
