"""Weights as the library wants them, packed once and again whenever they change."""

from __future__ import annotations

import ctypes
import threading
import warnings
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from . import library

FULL, HALF, BYTE = range(3)  # products, as engine.cpp numbers them
BYTE_ROWS = 3  # beside those that weights are packed for: int8 of which no panels are made, for few_rows.h
PRODUCTS = {torch.float32: FULL, torch.bfloat16: HALF}
STORED = {FULL: torch.float32, HALF: torch.bfloat16}
LARGEST_BYTE = 127
LARGEST_PAIR = 127  # neighbours of one sign, before they are rounded: 255 * 128 fits in 16 bits
SMALLEST_SCALE = 1e-12
HASHED_AT_ONCE = 512 * 2**10  # bytes: 20 us of a core that has them in its cache, 50 us of one that reads them from memory
MOST_QUESTIONS = 256
LATE = (
    "weights were written where torch does not see it (through .data, NumPy or in inference mode), which is noticed up to "
    "{questions} forwards late: call ditfast.refresh(model) after such a write"
)
QUANTISED_AT_ONCE = 2**18  # weights: what is made of them meanwhile stays in the cache

Linears: TypeAlias = tuple[tuple[Tensor, Tensor], ...]  # weights and biases, of which the outputs lie side by side


class PackedLinear(NamedTuple):
    """The fields of a ``library.LINEAR``, which points into tensors, and the tensors."""

    fields: tuple[int, ...]
    tensors: tuple[Tensor, ...]

    @property
    def inputs(self) -> int:
        return self.fields[-1]


class Watch:
    """Tells whether tensors were written to since: by what autograd counts, and by looking at their bytes.

    Writes through ``.data``, NumPy or in inference mode are not counted. A dense one changes most values, so a few from all
    over a tensor show it at once. Of others, each question hashes the next part of all bytes: the larger of ``HASHED_AT_ONCE``
    and a share of 1 / ``MOST_QUESTIONS``, so that any write is noticed after ``questions`` of them.
    """

    def __init__(self, engine: ctypes.CDLL, tensors: Sequence[Tensor]):
        self._engine = engine
        self._tensors = [weakref.ref(tensor) for tensor in tensors]
        pointers = [tensor.data_ptr() for tensor in tensors]
        sizes = [extent(tensor) for tensor in tensors]
        self._spots = (ctypes.c_void_p * len(tensors))(*pointers), (ctypes.c_int64 * len(tensors))(*sizes), len(tensors)
        self._stamps = self._stamps_of(tensors)
        self._seen = engine.ditfast_spot_check(*self._spots)
        self._parts = _parts(pointers, sizes)
        self._hashes = [engine.ditfast_hash(*part) for part in self._parts]
        self._next = 0

    @property
    def questions(self) -> int:
        """How often ``unchanged`` is asked until it has looked at every byte."""
        return len(self._parts)

    def unchanged(self, tensors: Sequence[Tensor]) -> bool:
        return (
            all(known() is tensor for known, tensor in zip(self._tensors, tensors, strict=True))
            and self._stamps_of(tensors) == self._stamps
            and self._engine.ditfast_spot_check(*self._spots) == self._seen
            and self._next_part_is_unchanged()
        )

    def _next_part_is_unchanged(self) -> bool:
        place = self._next  # threads may look at one part twice
        self._next = (place + 1) % max(1, len(self._parts))
        if not self._parts or self._engine.ditfast_hash(*self._parts[place]) == self._hashes[place]:
            return True
        if len(self._parts) > 1:
            warnings.warn(LATE.format(questions=len(self._parts)), stacklevel=2)
        return False

    @staticmethod
    def _stamps_of(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
        return [(tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version) for tensor in tensors]


Part: TypeAlias = tuple[Any, Any, int]  # addresses, bytes, how many


def _parts(pointers: Sequence[int], sizes: Sequence[int]) -> list[Part]:
    """Return pieces of memory in groups of about as many bytes, as ``ditfast_hash`` takes them."""
    at_once = max(HASHED_AT_ONCE, -(-sum(sizes) // MOST_QUESTIONS))
    groups: list[list[tuple[int, int]]] = []
    room = 0
    for pointer, size in zip(pointers, sizes, strict=True):
        start = 0
        while start < size:
            if not room:
                groups.append([])
                room = at_once
            piece = min(room, size - start)
            groups[-1].append((pointer + start, piece))
            start, room = start + piece, room - piece
    return [
        (
            (ctypes.c_void_p * len(group))(*(p for p, _ in group)),
            (ctypes.c_int64 * len(group))(*(n for _, n in group)),
            len(group),
        )
        for group in groups
    ]


class PackedChains:
    """Of every chain of linears that came by, as long as its weights live."""

    def __init__(self, engine: ctypes.CDLL):
        self._engine = engine
        self._lock = threading.Lock()
        self._chains: dict[tuple[int, ...], tuple[Watch, list[PackedLinear]]] = {}

    def find(self, tensors: Sequence[Tensor], product: int) -> list[PackedLinear] | None:
        """What is packed of these weights and biases, if they have not changed since."""
        watch, packed = self._chains.get((product, *map(id, tensors)), (None, []))
        return packed if watch is not None and watch.unchanged(tensors) else None

    def pack(self, tensors: Sequence[Tensor], linears: Sequence[Linears], product: int) -> list[PackedLinear]:
        """One for each of the linears, whose tensors they are."""
        key = product, *map(id, tensors)
        with self._lock:
            if key not in self._chains:
                for tensor in tensors:
                    weakref.finalize(tensor, self._chains.pop, key, None)
            watch = Watch(self._engine, tensors)
            packed = [self._pack(together, product) for together in linears]
            self._chains[key] = watch, packed
        return packed

    def forget(self, tensors: Iterable[Tensor]) -> None:
        """Drops every chain that one of the tensors is in."""
        gone = {id(tensor) for tensor in tensors}
        with self._lock:
            for key in list(self._chains):  # of which some may go meanwhile, with their weights
                if not gone.isdisjoint(key[1:]):
                    self._chains.pop(key, None)

    def _pack(self, together: Linears, product: int) -> PackedLinear:
        if product == BYTE_ROWS:
            return self._rows(together)
        weight = torch.cat([weight.detach() for weight, _ in together]) if len(together) > 1 else together[0][0].detach()
        bias = torch.cat([bias.detach().float() for _, bias in together])
        outputs, inputs = weight.shape
        columns = -(-outputs // self._engine.ditfast_panel()) * self._engine.ditfast_panel()
        vectors = [F.pad(bias, (0, columns - outputs))]
        if product == BYTE:
            weight, scale = quantised(weight, pairs=bool(self._engine.ditfast_pairs_saturate()))
            sums = weight.sum(1, dtype=torch.int32).float()
            vectors += [F.pad(vector, (0, columns - outputs)) for vector in (scale, sums)]
        else:
            weight = weight.to(STORED[product])
        size = self._engine.ditfast_packed_bytes(product, outputs, inputs) + library.READ_AHEAD
        packed = torch.empty(size, dtype=torch.uint8, device=weight.device)
        threads = torch.get_num_threads()
        self._engine.ditfast_pack(product, weight.data_ptr(), outputs, inputs, *weight.stride(), packed.data_ptr(), threads)
        tensors = (packed, *vectors)
        pointers = [tensor.data_ptr() for tensor in tensors] + [0] * (4 - len(tensors))
        return PackedLinear((*pointers, outputs, inputs), tensors)

    @staticmethod
    def _rows(together: Linears) -> PackedLinear:
        weights, scales = zip(*(quantised(weight.detach(), pairs=False) for weight, _ in together), strict=True)
        tensors = torch.cat(weights), torch.cat([bias.detach().float() for _, bias in together]), torch.cat(scales)
        return PackedLinear((*(tensor.data_ptr() for tensor in tensors), 0, *tensors[0].shape), tensors)


def extent(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last, whatever lies between them."""
    return (1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))) * tensor.itemsize


def quantised(weight: Tensor, *, pairs: bool) -> tuple[Tensor, Tensor]:
    """[N, K] as int8 and a scale for each output: weight = scale * int8, to half a scale.

    Where products are summed in ``pairs``, no two neighbours of one sign are more than 128 together.
    """
    rows = max(1, QUANTISED_AT_ONCE // weight.shape[1])
    parts = [_quantised(part.float(), pairs) for part in weight.split(rows)]
    return torch.cat([stored for stored, _ in parts]), torch.cat([scale for _, scale in parts])


def _quantised(weight: Tensor, pairs: bool) -> tuple[Tensor, Tensor]:
    scale = weight.abs().amax(1) / LARGEST_BYTE
    if pairs:
        even, odd = F.pad(weight, (0, weight.shape[1] % 2)).unflatten(1, (-1, 2)).unbind(2)  # 2 x [N, K / 2]
        positive = (even.clamp_min(0) + odd.clamp_min(0)).amax(1)
        negative = (even.clamp_max(0) + odd.clamp_max(0)).amin(1)
        scale = torch.maximum(scale, torch.maximum(positive, -negative) / LARGEST_PAIR)
    scale = scale.clamp_min(SMALLEST_SCALE)
    return (weight / scale[:, None]).round_().to(torch.int8), scale
