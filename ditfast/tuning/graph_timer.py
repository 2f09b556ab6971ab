"""Time of calls inside a CUDA graph, so that the host's time is not in it."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .. import timer
from ..devices import with_index
from ..sampling.graph import cuda_capture

ROUNDS = 11
ROUND_MS = 2.0
MOST_REPEATS = 1000
MOST_COPIES = 32
CACHES = 2  # that the inputs of one round of calls fill, so that none is still in the cache when its turn comes again


class Timer(Protocol):
    """Measurements that tuning asks of a device."""

    device: torch.device

    def copies(self, nbytes: int) -> int:
        """Return how many copies of inputs of so many bytes it takes for ``median_ms`` to find them outside of the cache."""

    def median_ms(self, calls: Sequence[Callable[[], object]]) -> float:
        """Return the milliseconds of one call; they take turns."""

    def seconds(self) -> float:
        """Return the seconds since some time."""


class GraphTimer:
    """Timer of a CUDA device, the current one. All calls are captured into one graph, which is replayed a few times a round."""

    def __init__(self, device: torch.device):
        self.device = with_index(device)
        self._cache = torch.cuda.get_device_properties(self.device).L2_cache_size

    def copies(self, nbytes: int) -> int:
        return max(1, min(MOST_COPIES, math.ceil(CACHES * self._cache / max(nbytes, 1))))

    def median_ms(self, calls: Sequence[Callable[[], object]]) -> float:
        nothing = torch.empty(0, device=self.device)

        def once() -> Tensor:
            for call in calls:
                call()
            return nothing

        _, replay = cuda_capture(once)
        self._ms(replay, 1)  # the first replay uploads the graph
        repeats = max(1, min(MOST_REPEATS, math.ceil(ROUND_MS / self._ms(replay, 1))))
        rounds = [self._ms(replay, repeats) for _ in range(ROUNDS)]
        return statistics.median(rounds) / repeats / len(calls)

    def seconds(self) -> float:
        return time.monotonic()

    def _ms(self, replay: Callable[[], None], repeats: int) -> float:
        return max(1e3 * timer.seconds(replay, self.device, repeats), 1e-6)
