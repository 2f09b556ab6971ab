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
_DENSE = {"nested": "torch.nested.to_padded_tensor({}, 0)", "oneDNN": "{}.to_dense()", "sparse": "{}.to_dense()"}


def describe(value: object) -> str:
    """Return what a value is in a few words: short ones as they are written, else the type."""
    if isinstance(value, Tensor):
        layout = _layout(value)
        return f"a {layout} tensor" if layout else f"a tensor {list(value.shape)} of {value.dtype}"
    if isinstance(value, np.ndarray):
        return f"a NumPy array {list(value.shape)} of {value.dtype}"
    name = type(value).__name__
    kind = f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
    if isinstance(value, int) and value.bit_length() > 4 * _LONGEST:  # Python refuses to write very large ones
        return f"{kind} of {value.bit_length()} bits"
    if not isinstance(value, (Real, str, bytes, list, tuple, type(None))):
        return kind
    written = repr(value) if isinstance(value, (Real, type(None))) or len(value) <= _LONGEST else ""
    if 0 < len(written) <= _LONGEST and written.isprintable():
        return written
    return f"{kind} of length {len(value)}" if isinstance(value, (str, bytes, list, tuple)) else kind


def wrong_type(name: str, value: object, expected: str) -> TypeError:
    return TypeError(f"{name}: got {describe(value)}, expected {expected}")


def check_type(name: str, value: object, types: type | tuple[type, ...], expected: str) -> None:
    """Raise TypeError unless a value is of one of the types."""
    if not isinstance(value, types):
        raise wrong_type(name, value, expected)


def check_tensor(name: str, value: object, expected: str | Sequence[int] = "") -> None:
    """Raise TypeError unless a value is a dense tensor; ``expected`` is its shape, or more, for the message."""
    if not isinstance(value, Tensor):
        raise wrong_type(name, value, f"a tensor {expected if isinstance(expected, str) else list(expected)}".rstrip())
    if value.layout is not torch.strided or value.is_nested:
        raise wrong_type(name, value, f"a dense one: call {_DENSE[_layout(value)].format(name)}")


def check_same_shape(name: str, value: object, like: Tensor, of: str) -> None:
    """Raise unless a value is a tensor of the shape of another, which the caller knows as ``of``."""
    check_tensor(name, value, f"{list(like.shape)}, as {of}")
    if isinstance(value, Tensor) and value.shape != like.shape:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {tuple(like.shape)}, as {of}")


def check_callable(name: str, value: object, expected: str = "a function") -> None:
    if not callable(value):
        raise wrong_type(name, value, expected)


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise unless a value is one of a few words."""
    if not isinstance(value, str) or value not in choices:
        kind = ValueError if isinstance(value, str) else TypeError
        raise kind(f"{name}: got {describe(value)}, expected one of {', '.join(choices)}")


def as_bool(name: str, value: object) -> bool:
    check_type(name, value, (bool, np.bool_), "True or False")
    return bool(value)


def check_integer(name: str, value: Any, least: int | None = None, most: int | None = None) -> None:
    """Raise unless a value is an integer in the range: as ``as_int``, but no tensor or array. Traced sizes pass unchecked."""
    if type(value) is int and (least is None or value >= least) and (most is None or value <= most):
        return
    if not _is_traced(value):
        as_int(name, _no_array(name, value, "an integer"), least, most)


def check_number(name: str, value: Any, least: float | None = None) -> None:
    """Raise unless a value is a number in the range: as ``as_float``, but no tensor or array. Traced ones pass unchecked."""
    if type(value) is float and abs(value) <= LARGEST_FP32 and (least is None or value >= least):
        return
    if not _is_traced(value):
        as_float(name, _no_array(name, value, "a number"), least)


def as_int(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """Return an integer of Python, NumPy or torch as Python's; bools are none.

    Raises:
        TypeError: it is no number.
        ValueError: it is a fraction, a bool, or out of the range.
    """
    try:
        number = None if _is_bool(value) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        kind = ValueError if isinstance(value, Real) else TypeError
        raise kind(f"{name}: got {describe(value)}, expected {_range('an integer', least, most)}")
    if (least is not None and number < least) or (most is not None and number > most):
        raise ValueError(f"{name}: got {describe(number)}, expected {_range('an integer', least, most)}")
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
        raise wrong_type(name, values, expected)
    return list(values)


def _layout(tensor: Tensor) -> str:
    """Return the word for how a tensor is stored, empty for a dense one."""
    if tensor.is_nested:
        return "nested"
    if tensor.layout is torch.strided:
        return ""
    return "oneDNN" if tensor.is_mkldnn else "sparse"


def _is_traced(value: object) -> bool:
    """Return whether a value stands for a number while a tracer runs: ``torch.jit.trace`` makes tensors of sizes."""
    return isinstance(value, (torch.SymInt, torch.SymFloat)) or (isinstance(value, Tensor) and torch.jit.is_tracing())


def _no_array(name: str, value: object, expected: str) -> object:
    if isinstance(value, (Tensor, np.ndarray)):
        raise wrong_type(name, value, expected)
    return value


def _is_bool(value: object) -> bool:
    return isinstance(value, (bool, np.bool_)) or getattr(value, "dtype", None) in (torch.bool, np.dtype(bool))


def _range(kind: str, least: float | None, most: float | None) -> str:
    if least is None:
        return kind
    if most is None:
        return f"{kind}, {least} or more"
    return f"{kind} {least}..{'2^64-1' if most == LARGEST_SEED else most}"
