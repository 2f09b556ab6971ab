"""Which records a step sees: no state but the step, so a run goes on in the middle of an epoch on any number of ranks."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray


def batch_indices(seed: int, count: int, batch: int, step: int) -> list[int]:
    """Return the records of a step, over all ranks: every epoch has each of ``count`` once, and may end inside a batch."""
    places = range(step * batch, (step + 1) * batch)
    return [int(_permutation(seed, count, place // count)[place % count]) for place in places]


def rows(batch: int, rank: int, world: int) -> slice:
    """A rank's part of a step's batch.

    Raises:
        ValueError: the ranks cannot share the batch evenly.
    """
    if batch % world:
        raise ValueError(f"batch: got {batch}, expected a multiple of the {world} ranks")
    share = batch // world
    return slice(rank * share, (rank + 1) * share)


@functools.lru_cache(maxsize=2)  # of a batch in which an epoch ends and the next begins
def _permutation(seed: int, count: int, epoch: int) -> NDArray[np.int64]:
    """[count]: sorted by Philox's raw bits, whose stream no version of NumPy may change, as it may its ``permutation``."""
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(count)
    return np.argsort(bits, kind="stable")
