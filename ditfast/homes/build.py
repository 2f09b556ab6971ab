"""Description of how a module is built: two with the same description compute the same with the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .home import NOTE, Swap

SIMPLE = (bool, int, float, str, bytes, type(None), type, torch.dtype, torch.device)
DEPTH = 3  # of objects inside objects that are looked into
OWN = ("_parameters", "_buffers", "_modules", "training", NOTE)


def build_of(module: nn.Module) -> str:
    """Return the types, attributes, buffers, and parameters' shapes of a module, without its parameters' numbers."""
    parts = []
    for name, part in module.named_modules():
        own = {key: value for key, value in vars(part).items() if key not in OWN and not isinstance(value, Swap)}
        settings = {key: _describe(value) for key, value in own.items()}
        buffers = {key: _describe(buffer) for key, buffer in part._buffers.items()}
        shapes = {key: None if p is None else (p.shape, p.dtype, p.device) for key, p in part._parameters.items()}
        parts.append((name, type(part), settings, buffers, shapes))
    return repr(parts)


def _describe(value: Any, depth: int = DEPTH) -> Any:
    if isinstance(value, SIMPLE):
        return value
    if isinstance(value, Swap):
        return None
    if isinstance(value, MethodType):
        return _describe(value.__func__, depth)
    if isinstance(value, FunctionType):  # copies of a module may hold new functions of the same code
        return value.__code__, [_describe(item, depth - 1) for item in _captured(value)] if depth else []
    if isinstance(value, Tensor):
        return value.shape, value.dtype, _checksum(value)
    if depth and isinstance(value, Mapping):
        return [(_describe(key, depth - 1), _describe(item, depth - 1)) for key, item in value.items()]
    if depth and isinstance(value, (tuple, list, set, frozenset)):
        return [_describe(item, depth - 1) for item in value]
    if depth and hasattr(value, "__dict__") and not isinstance(value, nn.Module):
        return type(value), {key: _describe(item, depth - 1) for key, item in vars(value).items()}
    return type(value)


def _captured(function: FunctionType) -> list[Any]:
    """Return the values that a function's code finds in its defaults and closure."""
    cells = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
    return [*(function.__defaults__ or ()), *cells]


def _checksum(tensor: Tensor) -> Any:
    """Return two sums that differ where the numbers do."""
    if tensor.is_meta or type(tensor) not in (Tensor, nn.Parameter) or tensor.is_quantized:
        return None
    numbers = tensor.detach().flatten()
    numbers = torch.view_as_real(numbers).flatten() if numbers.is_complex() else numbers
    numbers = numbers.double().nan_to_num()
    return numbers.sum().item(), (numbers * torch.arange(len(numbers), device=numbers.device).cos()).sum().item()
