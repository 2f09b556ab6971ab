"""A stand-in for a GPU's timer: calls run once, on the CPU, and take as long as the test says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ditfast.dispatch.override import current_override


class StubTimer:
    """``ms`` is given the op and the backend; every measurement takes ``takes`` seconds of the stub's own time."""

    def __init__(self, ms: Callable[[str, str], float], takes: float = 1.0):
        self.device = torch.device("cpu")
        self.ms, self.takes = ms, takes
        self.now = 0.0
        self.measured: list[tuple[str, str]] = []

    def copies(self, nbytes: int) -> int:
        return 2

    def median_ms(self, calls: Sequence[Callable[[], object]]) -> float:
        assert len(calls) == 2
        for call in calls:
            call()
        trial = current_override().trial
        assert trial is not None
        self.measured.append(trial)
        self.now += self.takes
        return self.ms(*trial)

    def seconds(self) -> float:
        return self.now
