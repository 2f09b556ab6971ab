"""Tables of addresses: which tensors a kernel reaches through an int64 tensor that holds their ``data_ptr()``."""

from __future__ import annotations

import ctypes
import gc
import weakref
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

SMALLEST_ADDRESS = 1 << 32  # smaller numbers are sizes, labels or timesteps
KINDS = (torch.Tensor, torch.nn.Parameter)  # other subclasses may have no memory

_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # table -> its numbers, weak references to what they point to


def reached(table: Any) -> list[torch.Tensor]:
    """Return the living tensors that begin where a number of an int64 tensor points; none for other arguments."""
    if type(table) not in KINDS or table.dtype != torch.int64 or not table.is_contiguous() or not table.numel():
        return []
    numbers = tuple((ctypes.c_int64 * table.numel()).from_address(table.data_ptr()))  # a fake GPU's memory is the CPU's
    addresses = {number for number in numbers if number >= SMALLEST_ADDRESS}
    if not addresses:
        return []
    then, references = _known.get(table, (None, []))
    tensors = [reference() for reference in references]
    if then != numbers or any(tensor is None or tensor.data_ptr() not in addresses for tensor in tensors):
        tensors = [thing for thing in gc.get_objects() if _begins_in(thing, addresses)]
        _known[table] = numbers, [weakref.ref(tensor) for tensor in tensors]
    return tensors


def _begins_in(thing: Any, addresses: set[int]) -> bool:
    return type(thing) in KINDS and thing.layout is torch.strided and not thing.is_meta and thing.data_ptr() in addresses
