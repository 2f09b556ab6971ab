"""A stand-in for a GPU in the benches: the CPU computes, everything that is read off the device is made up."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

SECONDS = 0.25  # of every run
WATTS = 300
KERNELS = 7
WEIGHTS = 100  # bytes that seem to come with every rival
ACTIVATIONS = 1000  # bytes that every call seems to allocate at its height


class FakeGpu:
    """``broken`` methods raise, as tools do that are not there."""

    def __init__(self, *broken: str, counts_energy: bool = True, slowed: int = 0):
        self.device = torch.device("cpu")
        self.counts_energy, self.slowed = counts_energy, slowed
        self.now, self.allocated = 0.0, 0
        self.captures = self.replays = self.released = 0
        for name in broken:
            setattr(self, name, self._fail)

    def _fail(self, *arguments: object) -> None:
        raise RuntimeError("no such tool\nin 40 lines")

    def wait(self) -> None:
        pass

    def seconds(self, run: Callable[[], object], repeats: int) -> float:
        for _ in range(repeats):
            run()
            self.now += SECONDS
        return repeats * SECONDS

    def capture(self, run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """Like a CUDA graph: until it is replayed the output holds nothing."""
        self.captures += 1
        output = run().clone().fill_(math.nan)

        def replay() -> None:
            self.replays += 1
            output.copy_(run())

        return output, replay

    def trace(self, run: Callable[[], object], path: Path) -> None:
        run()
        kinds = [*["kernel"] * KERNELS, "gpu_memcpy", "gpu_memset", "gpu_user_annotation", "cpu_op", "cuda_runtime"]
        path.write_text(json.dumps({"traceEvents": [{"cat": kind} for kind in kinds] + [{"ph": "M"}]}))

    def l2_bytes(self) -> int:
        return 10_000

    def free_bytes(self) -> int:
        return 2**18

    def allocated_bytes(self) -> int:
        self.allocated += WEIGHTS
        return self.allocated

    def peak_bytes(self) -> int:
        return self.allocated + ACTIVATIONS

    def reset_peak(self) -> None:
        pass

    def release_cache(self) -> None:
        self.released += 1

    def energy_mj(self) -> int | None:
        return round(1e3 * WATTS * self.now) if self.counts_energy else None

    def power_mw(self) -> int:
        return 1000 * WATTS

    def clock_mhz(self) -> int:
        return 1980

    def slowdowns(self) -> int:
        return self.slowed

    def driver(self) -> str:
        return "999.1"
