"""A chain of sublayers as tensors, and whether they go together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..plain import PLAIN_TYPES
from ..torch_modes import autocast_dtype
from .packed import Linears

SELF_ATTENTION, CROSS_ATTENTION, MLP = range(3)  # kinds, as engine.cpp numbers them


class Context(NamedTuple):
    """What cross-attention looks at."""

    tokens: Tensor  # [B, S, D]
    weight: Tensor  # of the kv linear
    bias: Tensor


class Products(NamedTuple):
    """A sublayer's weights: what follows its norm, up to its gate."""

    kind: int
    first: Linears  # qkv, or q, k and v apart, or cross-attention's q; fc1
    second: Linears  # proj; fc2
    heads: int = 1
    context: Context | None = None
    int8: bool = False


class Step(NamedTuple):
    products: Products
    shift: Tensor | None
    scale: Tensor | None
    gate: Tensor | None
    eps: float


class Final(NamedTuple):
    """The norm behind a chain."""

    shift: Tensor | None
    scale: Tensor | None
    eps: float


class DoesNotFit(Exception):
    """A shape or dtype is not what the ops want, which say what is wrong."""


def dtype_of_weights(x: Tensor) -> torch.dtype | None:
    """That a chain for x wants; None where autocast casts them."""
    return x.dtype if autocast_dtype(x.device) is None else None


def check_vector(vector: Tensor, shapes: Sequence[torch.Size]) -> None:
    """Raises DoesNotFit unless modulation is of one of the shapes."""
    if vector.shape not in shapes or not is_here(vector):
        raise DoesNotFit


def check_weights(products: Products, dtype: torch.dtype | None) -> None:
    """Raises DoesNotFit unless a sublayer's weights, of one dtype unless it is None, go together."""
    kind, first, second, heads, *_ = products
    between, D = _features(first, dtype)
    outputs, inputs = _features(second, dtype)
    expected = {SELF_ATTENTION: 3 * D, CROSS_ATTENTION: D, MLP: between}[kind]
    if between != expected or outputs != D or inputs != (between if kind == MLP else D) or D % heads:
        raise DoesNotFit


def check_context(context: Context, B: int, D: int, dtype: torch.dtype | None) -> None:
    """Raises DoesNotFit unless the context, of one dtype unless it is None, is for B samples of width D."""
    tokens, weight, bias = context
    if weight.shape != (2 * D, D) or bias.shape != (2 * D,) or tokens.dim() != 3 or tokens.shape[::2] != (B, D):
        raise DoesNotFit
    if tokens.shape[1] == 0:
        raise DoesNotFit
    _check_alike(context, dtype)


def _features(linears: Linears, dtype: torch.dtype | None) -> tuple[int, int]:
    """The outputs of linears side by side, and their inputs."""
    outputs, inputs = 0, linears[0][0].shape[-1]
    for weight, bias in linears:
        shape = weight.shape
        if len(shape) != 2 or shape[1] != inputs or bias.shape != shape[:1]:
            raise DoesNotFit
        _check_alike((weight, bias), dtype)
        outputs += shape[0]
    return outputs, inputs


def _check_alike(tensors: tuple[Tensor, ...], dtype: torch.dtype | None) -> None:
    for tensor in tensors:
        if not is_here(tensor) or (dtype is not None and tensor.dtype != dtype):
            raise DoesNotFit


def is_here(tensor: Tensor) -> bool:
    """Return True for a plain array in this machine's memory; subclasses may have none, or want to see each op."""
    return tensor.is_cpu and tensor.layout == torch.strided and type(tensor) in PLAIN_TYPES
