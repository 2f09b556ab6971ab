"""Figures of a GPU beside time: launches, memory, energy, clocks. A tool that fails costs its figure, with a note, once."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from torch import Tensor

from ditfast import timer
from ditfast.flops import DEVICES, DeviceSpec

from .ceilings import measure_ceilings
from .gpu import Gpu

T = TypeVar("T")
Inputs = tuple[Tensor, ...]

ENERGY_WINDOW_S = 0.5  # NVML's counter moves on every 20 to 100 ms
SAMPLES = 10  # of clocks and power, in that window
MOST_COPIES = 64
SLOWDOWNS = {  # NVML's bits; that of an idle GPU left out
    0x2: "set clocks",
    0x4: "power cap",
    0x8: "hardware",
    0x10: "sync boost",
    0x20: "heat (software)",
    0x40: "heat (hardware)",
    0x80: "power brake",
    0x100: "display clocks",
}


class Busy(NamedTuple):
    """Figures of a GPU that runs one thing over and over."""

    joules: float  # of one run
    watts: float
    clock_mhz: float | None  # of the multiprocessors


class Gauges:
    """Reads a GPU; ``notes`` says what could not be read."""

    def __init__(self, gpu: Gpu, data_sheet: DeviceSpec | None):
        self.gpu, self.data_sheet = gpu, data_sheet
        self.notes: list[str] = []
        self.slowed_by: set[str] = set()
        if data_sheet is None:
            self.notes.append("share of the data sheet: left out, this GPU's is not in ditfast.flops.DEVICES")
        like = data_sheet or DEVICES["H100"]  # floors depend on its peaks only, all of which are replaced
        self.ceilings = self._read("share of the measured ceilings", lambda: measure_ceilings(gpu, like))
        gpu.release_cache()

    def rotated(self, inputs: Inputs) -> list[Inputs]:
        """Return the inputs and copies of them, so many that the L2 cache cannot hold them all, but ``MOST_COPIES`` at most."""
        size = sum(tensor.nbytes for tensor in inputs)
        cache = self._read("rotated inputs", self.gpu.l2_bytes) or 0
        copies = min(MOST_COPIES, math.ceil(2 * cache / size)) if size else 1
        return [inputs, *(tuple(tensor.clone() for tensor in inputs) for _ in range(copies - 1))]

    def launches(self, run: Callable[[], object]) -> int | None:
        """Return the number of kernels of one run; the profiler has been seen to break CUDA graphs captured before."""
        return self._read("launches", lambda: count_kernels(self.gpu, run))

    def busy(self, run: Callable[[], object], seconds: float) -> Busy | None:
        """Return figures over ``ENERGY_WINDOW_S`` of runs that take ``seconds`` each."""
        return self._read("energy", lambda: self._busy(run, seconds))

    def clock_mhz(self) -> int | None:
        """Return the multiprocessors' clock, to be read while the GPU works; what holds it down is added to ``slowed_by``."""
        bits = self._read("throttling", self.gpu.slowdowns) or 0
        self.slowed_by |= {name for bit, name in SLOWDOWNS.items() if bits & bit}
        return self._read("clocks", self.gpu.clock_mhz)

    def describe(self) -> dict[str, str | int | float | None]:
        """Return what the results' machine has of a GPU."""
        measured = self.ceilings
        return {
            "driver": self._read("driver", self.gpu.driver),
            "data_sheet": None if self.data_sheet is None else self.data_sheet.name,
            "measured_copy_tb_per_s": None if measured is None else round(measured.bandwidth / 1e12, 3),
            "measured_bf16_tflops": None if measured is None else round(measured.half / 1e12, 1),
            "measured_fp32_tflops": None if measured is None else round(measured.fp32 / 1e12, 1),
        }

    def _busy(self, run: Callable[[], object], seconds: float) -> Busy:
        repeats = math.ceil(ENERGY_WINDOW_S / seconds)
        every = max(1, repeats // SAMPLES)
        calls, clocks, powers = itertools.count(1), [], []
        counted = self.gpu.energy_mj()

        def watched() -> None:
            run()
            if next(calls) % every == 0:  # runs are queued, and the GPU is at one of them
                clocks.append(self.clock_mhz())
                powers.append(1e-3 * self.gpu.power_mw() if counted is None else 0.0)

        taken = timer.seconds(watched, self.gpu.device, repeats)
        joules = statistics.mean(powers) * taken if counted is None else 1e-3 * ((self.gpu.energy_mj() or 0) - counted)
        known = [clock for clock in clocks if clock is not None]
        return Busy(joules / repeats, joules / taken, statistics.median(known) if known else None)

    def _read(self, what: str, tool: Callable[[], T]) -> T | None:
        try:
            return tool()
        except Exception as error:  # whatever a driver, NVML or the profiler comes up with
            note = f"{what}: left out, {type(error).__name__}: {first_line(error)}"
            if note not in self.notes:
                self.notes.append(note)
            return None


def count_kernels(gpu: Gpu, run: Callable[[], object]) -> int:
    """Count the kernels that a run launches; copies and fills of memory are none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        gpu.trace(run, path)
        events = json.loads(path.read_text())["traceEvents"]
    kernels = sum(event.get("cat") == "kernel" for event in events)
    if not kernels:
        raise RuntimeError("the profiler saw no kernel; it may need permission to read the GPU's counters")
    return kernels


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
