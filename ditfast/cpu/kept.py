"""A chain of the engine's that is kept between calls, and gets each call's modulation vectors filled in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ..torch_modes import autocast_dtype
from . import library
from .chain import DoesNotFit, Final, Step, is_here
from .engine import Engine, Fields
from .packed import extent

WORD = 8  # bytes of every field
MOST_KEPT = 8  # kinds of inputs
IN_SUBLAYER, IN_NORM = (13, 17, 21), (0, 4)  # words of a library.SUBLAYER, and NORM, that are addresses of vectors


class KeptChain:
    """Fields of one chain, for as long as its layers are what they were. Weights that changed are packed anew."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], _Filled] = {}

    def run(
        self, engine: Engine, x: Tensor, vectors: Sequence[Tensor], steps: Callable[[], tuple[Sequence[Step], Final]]
    ) -> tuple[Tensor, Tensor]:
        """Return what ``engine.run(x, *steps())`` does.

        Args:
            vectors: the tensors that the steps' modulation vectors are views of.
            steps: called where nothing is kept for such an x and vectors.

        Raises:
            DoesNotFit: as ``engine.run``; or vectors that are not plain arrays in this machine's memory.
        """
        if not all(map(is_here, vectors)):
            raise DoesNotFit
        kind = (x.shape, x.dtype, autocast_dtype(x.device), *((v.shape, v.stride(), v.dtype) for v in vectors))
        kept = self._kept.get(kind)
        if kept is None or engine.packed(kept.fields.weights, kept.fields.product) is not kept.fields.packed:
            fields = engine.fields(x, *steps())
            kept = _filled(fields, vectors)
            if kept is None:
                return engine.call(x, fields.product, fields.chain, fields.norm)
            if len(self._kept) == MOST_KEPT:
                self._kept.clear()
            self._kept[kind] = kept
        return engine.call(x, kept.fields.product, *kept.filled_in(vectors))


class _Filled(NamedTuple):
    """Fields, and where among them the addresses of vectors are."""

    fields: Fields
    words: np.ndarray[Any, np.dtype[np.int64]]  # of the chain, then of the norm
    places: np.ndarray[Any, np.dtype[np.int64]]  # of the addresses among the words
    owners: np.ndarray[Any, np.dtype[np.int64]]  # the tensor that each address is in
    offsets: np.ndarray[Any, np.dtype[np.int64]]  # bytes in front of it there

    def filled_in(self, vectors: Sequence[Tensor]) -> tuple[bytes, bytes]:
        words = self.words.copy()  # threads may share this
        words[self.places] = np.array([vector.data_ptr() for vector in vectors], np.int64)[self.owners] + self.offsets
        size = len(self.fields.chain) // WORD
        return words[:size].tobytes(), words[size:].tobytes()


def _filled(fields: Fields, vectors: Sequence[Tensor]) -> _Filled | None:
    """Return fields that can be kept; None if the call made something, such as keys of a context, that only it has."""
    if fields.alive:
        return None
    words = np.frombuffer(fields.chain + fields.norm, np.int64)
    sublayer, chain = library.SUBLAYER.size // WORD, len(fields.chain) // WORD
    places = [start + word for start in range(0, chain, sublayer) for word in IN_SUBLAYER] + [chain + word for word in IN_NORM]
    places = [place for place in places if words[place]]
    if not places:
        return _Filled(fields, words, *np.empty((3, 0), np.int64))
    starts = np.array([vector.data_ptr() for vector in vectors], np.int64)
    ends = starts + np.array([extent(vector) for vector in vectors], np.int64)
    addresses = words[places]
    inside = (starts[:, None] <= addresses) & (addresses < ends[:, None])  # [vectors, places]
    if not inside.any(0).all():
        return None
    owners = np.where(inside, starts[:, None], -1).argmax(0)  # rows of several vectors may lie between each other
    return _Filled(fields, words, np.array(places), owners, addresses - starts[owners])
