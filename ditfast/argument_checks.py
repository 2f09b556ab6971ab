"""Checks of arguments; each error names the argument, what came and what was expected."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Collection, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

LARGEST_SEED = 2**64 - 1
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of ops
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


def check_device(name: str, tensor: Tensor, like: Tensor, of: str = "x") -> None:
    """Raise unless a tensor is on the device of another, which the caller knows as ``of``."""
    if tensor.device != like.device:
        raise ValueError(f"{name}: got a tensor on {tensor.device}, expected {like.device}, as {of}")


def check_same_shape(name: str, value: object, like: Tensor, of: str) -> None:
    """Raise unless a value is a tensor of the shape and on the device of another, which the caller knows as ``of``."""
    check_tensor(name, value, f"{list(like.shape)}, as {of}")
    if isinstance(value, Tensor):
        if value.shape != like.shape:
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {tuple(like.shape)}, as {of}")
        check_device(name, value, like, of)


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


def as_path(name: str, value: object) -> Path:
    """Return a path given as text or as any path-like object."""
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise wrong_type(name, value, "a path")
    return Path(value)


def as_guidance_scale(cfg_scale: Any, count: int, like: Tensor) -> float | Tensor:
    """Return one guidance scale for all images as a number, or one an image as [count, 1, 1, 1] of at least fp32.

    Args:
        cfg_scale: a number, a list or array of one or ``count``, or such a tensor, whose values are not looked at.
        count: of images.
        like: a tensor on the device wanted.

    Raises:
        ValueError: another number of scales, or one that is not finite.
        TypeError: no numbers.
    """
    traced_number = _is_traced(cfg_scale) and not (isinstance(cfg_scale, Tensor) and cfg_scale.dim())
    if traced_number or (type(cfg_scale) is float and abs(cfg_scale) <= LARGEST_FP32):
        return cfg_scale
    dtype = torch.promote_types(like.dtype, torch.float32)
    expected = f"a finite number, or one for each of the {count} images"
    if isinstance(cfg_scale, Tensor):
        check_tensor("cfg_scale", cfg_scale)
        in_a_row = cfg_scale.dim() < 2 or tuple(cfg_scale.shape[1:]) == (1, 1, 1)
        if _is_bool(cfg_scale) or cfg_scale.is_complex() or not in_a_row or cfg_scale.numel() not in (1, count):
            raise ValueError(f"cfg_scale: got {describe(cfg_scale)}, expected {expected}")
        return cfg_scale.to(like.device, dtype).reshape(-1, 1, 1, 1).expand(count, 1, 1, 1)
    if not isinstance(cfg_scale, (list, tuple, np.ndarray)) or (isinstance(cfg_scale, np.ndarray) and not cfg_scale.ndim):
        return as_float("cfg_scale", cfg_scale)
    values = [as_float("cfg_scale", value) for value in as_list("cfg_scale", cfg_scale, expected)]
    if len(values) not in (1, count):
        raise ValueError(f"cfg_scale: got {describe(cfg_scale)}, expected {expected}")
    return values[0] if len(values) == 1 else torch.tensor(values, dtype=dtype, device=like.device).view(-1, 1, 1, 1)


def as_list(name: str, values: Any, expected: str) -> list[Any]:
    """Return the elements of a list, tuple, range, array or tensor; text is no list."""
    if isinstance(values, (Tensor, np.ndarray)):
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes, bytearray)):
        raise wrong_type(name, values, expected)
    return list(values)


def _layout(tensor: Tensor) -> str:
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


# ------------------------------------------------------------------------------------------------ tensors of ops
def check_tokens(name: str, x: Tensor) -> None:
    """Raise unless x is [B, T, D] with unit inner stride."""
    _check_placed(name, x, None, "[B, T, D]")
    shape = x.shape
    if len(shape) != 3:
        raise ValueError(f"{name}: got shape {tuple(shape)}, expected [B, T, D]")
    if shape[2] == 0:
        raise _empty(name, x)
    check_dtype(name, x)


def token_rows(x: Tensor) -> int:
    """Return B * T of [B, T, ...]."""
    return x.shape[0] * x.shape[1]


def check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise ValueError(
            f"{name}: got dtype {tensor.dtype}, expected float32, float16 or bfloat16 (ditfast.reference works in float64)"
        )


def check_parameter(name: str, tensor: Tensor, x: Tensor, shape: tuple[int, ...], of: str = "x") -> None:
    """Raise unless a tensor has a shape that follows from x, and its dtype and device; ``of`` is what the op calls x."""
    _check_placed(name, tensor, x, shape, of)
    if tensor.shape != shape:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {shape} for {of} {tuple(x.shape)}")
    if tensor.dtype != x.dtype:
        raise ValueError(f"{name}: got dtype {tensor.dtype}, expected {x.dtype}, as {of}")


def check_linear(x: Tensor, weight: Tensor, bias: Tensor, prefix: str = "", features: int | None = None, of: str = "x") -> None:
    """weight [N, K] and bias [N] for x [B, T, K]; K is ``features`` where x is not what the weight multiplies."""
    check_tokens(of, x)
    check_weight(f"{prefix}weight", weight)
    check_parameter(f"{prefix}weight", weight, x, (weight.shape[0], x.shape[2] if features is None else features), of)
    check_parameter(f"{prefix}bias", bias, x, (weight.shape[0],), of)


def check_weight(name: str, weight: Tensor) -> None:
    """Raise unless a weight is [N, K], neither of them 0."""
    check_tensor(name, weight, "[N, K]")
    if weight.dim() != 2:
        raise ValueError(f"{name}: got shape {tuple(weight.shape)}, expected [N, K]")
    if 0 in weight.shape:
        raise _empty(name, weight)


def check_branch(name: str, h: Tensor, x: Tensor, shape: tuple[int, ...] | None = None, of: str = "x") -> None:
    """Raise unless h has ``shape`` (default: x's) on x's device, in any dtype: autocast brings bf16 beside an fp32 stream."""
    expected = tuple(x.shape) if shape is None else shape
    _check_placed(name, h, x, expected, of)
    if h.shape != expected:
        raise ValueError(f"{name}: got shape {tuple(h.shape)}, expected {expected} for {of} {tuple(x.shape)}")
    check_dtype(name, h)


def check_modulation(name: str, vector: Tensor | None, x: Tensor) -> None:
    """[B, D] for one vector a sample or [B, T, D] for one a token, in any of the dtypes; or None."""
    if vector is None:
        return
    _check_placed(name, vector, x, "[B, D] or [B, T, D], or None")
    shape, whole = vector.shape, x.shape
    if shape != whole and shape != whole[::2]:
        B, T, D = whole
        raise ValueError(f"{name}: got shape {tuple(shape)}, expected {(B, D)} or {(B, T, D)} for x {tuple(whole)}")
    check_dtype(name, vector)


def _check_placed(name: str, tensor: Tensor, x: Tensor | None, expected: str | tuple[int, ...], of: str = "x") -> None:
    """Raise unless a value is a dense tensor with unit inner stride, on x's device if there is an x.

    The usual tensor is let through in one expression: this is asked of each of an op's tensors at each call.
    """
    if (
        isinstance(tensor, Tensor)
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and (x is None or tensor.device == x.device)
        and tensor.shape
        and tensor.stride(-1) == 1
    ):
        return
    check_tensor(name, tensor, expected)
    if x is not None:
        check_device(name, tensor, x, of)
    if tensor.dim() and tensor.stride(-1) != 1 and tensor.shape[-1] > 1 and tensor.numel():
        raise ValueError(
            f"{name}: got strides {tensor.stride()} for shape {tuple(tensor.shape)}, expected a unit inner stride: "
            f"call {name}.contiguous()"
        )


def _empty(name: str, tensor: Tensor) -> ValueError:
    return ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected features; only batches and sequences may be empty")


def check_grid(x: Tensor, grid: tuple[int, int], features: int, patch_size: int) -> None:
    """Raise unless tokens x [B, T, ...] fill the grid, each with ``features`` values of a patch."""
    check_integer("patch_size", patch_size, 1)
    if not isinstance(grid, Sequence) or isinstance(grid, str):
        raise wrong_type("grid", grid, "(h, w)")
    for side in grid:
        check_integer("grid", side)
    if len(grid) != 2 or grid[0] * grid[1] != x.shape[1] or min(grid) < 0:
        raise ValueError(
            f"grid: got {tuple(grid)}, expected (h, w) with h * w = {x.shape[1]} tokens, for tokens {tuple(x.shape)}"
        )
    if features % patch_size**2:
        raise ValueError(f"patch_size: got {patch_size}, expected one whose square divides the {features} values of a token")
