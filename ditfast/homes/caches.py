"""What an accelerated model keeps between calls. Everything here is checked against the parameters before it is used."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import blocks, cpu
from ..cpu.chain import is_here
from ..cpu.packed import Watch
from ..dispatch.override import current_override
from ..torch_modes import autocast_dtype, computes_now

Fingerprint: TypeAlias = tuple[tuple[int, int], ...]
Modulations: TypeAlias = tuple[Sequence[blocks.Modulation | None], blocks.Norm]  # None of a block that is called

CACHE_BYTES = 512 * 2**20


def fingerprint(tensors: Iterable[Tensor]) -> Fingerprint | None:
    """Changes when a tensor moves, or is written to in any way that autograd notices; None where that cannot be told."""
    tensors = list(tensors)
    if not computes_now() or any(tensor.is_inference() or tensor.is_meta for tensor in tensors):
        return None
    return tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)


class Caches:
    """Of one accelerated module: copies of weights in another dtype, comparisons of weights, and modulation vectors."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        with self._lock:
            self._copies: dict[int, tuple[weakref.ref[Tensor], tuple[int, int], Tensor]] = {}
            self._agreement: tuple[Fingerprint, bool] | None = None
            self._weights: Fingerprint | None = None
            self._watch: Watch | None = None  # of the same, on a CPU
            self._modulations: OrderedDict[Any, tuple[int, Modulations]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start empty."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Caches.__init__(self)

    def cast(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        if weight.dtype == dtype:
            return weight
        if not computes_now() or weight.is_inference():
            return weight.to(dtype)
        now = weight.data_ptr(), weight._version
        source, then, copy = self._copies.get(id(weight), (None, None, weight))
        if source is None or source() is not weight or then != now:
            copy = weight.to(dtype)
            source = weakref.ref(weight, partial(self._copies.pop, id(weight)))  # a copy goes with its weight
            self._copies[id(weight)] = source, now, copy
        return copy

    def agree(self, groups: Sequence[Sequence[Tensor]]) -> bool:
        """Whether all groups hold the same numbers; compared again only after one of them changed."""
        now = fingerprint(tensor for group in groups for tensor in group)
        if now is None:
            return False
        if self._agreement is None or self._agreement[0] != now:
            first, *others = groups
            equal = all(len(first) == len(o) and all(map(_equal, first, o)) for o in others)
            self._agreement = (now, equal)
        return self._agreement[1]

    def modulations(
        self, conditions: Sequence[Tensor], weights: Iterable[Tensor], compute: Callable[[], Modulations]
    ) -> Modulations:
        """``compute()``, once for the same bits of the conditions and the same backend as long as the weights stay.

        Reads the conditions on the host.
        """
        weights = list(weights)
        now = fingerprint(weights)
        if now is None:
            return compute()
        key = (current_override(), *map(_bits, conditions))
        with self._lock:
            if self._weights != now or (self._watch is not None and not self._watch.unchanged(weights)):
                self._weights, self._watch = now, _watch(weights)
                self._modulations.clear()
            if key in self._modulations:
                self._modulations.move_to_end(key)
                return self._modulations[key][1]
        found = compute()
        per_block, final = found
        vectors = [v for modulation in (*per_block, final) for v in modulation or () if isinstance(v, Tensor)]
        with self._lock:
            self._modulations[key] = (sum(vector.nbytes for vector in vectors), found)
            while sum(size for size, _ in self._modulations.values()) > CACHE_BYTES:
                self._modulations.popitem(last=False)
        return found


def _watch(tensors: Sequence[Tensor]) -> Watch | None:
    """Return what sees writes that autograd does not count; None where the CPU engine cannot look at the bytes."""
    engine, _ = cpu.found() if all(map(is_here, tensors)) else (None, "")
    return None if engine is None else engine.watch(tensors)


def _equal(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) and torch.equal(a, b)


def _bits(condition: Tensor) -> tuple[Any, ...]:
    """Return those of a conditioning vector, and autocast's dtype, in which modulation comes out of it."""
    numbers = condition.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return condition.dtype, numbers, autocast_dtype(condition.device)
