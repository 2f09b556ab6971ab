"""An estimate of how long bench.py takes, from shapes and named constants."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ditfast import DiTConfig, flops
from ditfast.dtypes import DTYPES
from ditfast.flops import DEVICES, DeviceSpec

from .ahead import needs_compiling
from .gauges import ENERGY_WINDOW_S
from .rivals import COMPILED, GRAPH, IN_DIFFUSERS, kind_of
from .timing import HOST_CALLS, ORACLE_SAMPLES, SHORTEST_ROUND_S

PROBE_SIDE, PROBE_ROUNDS = 1024, 5
UNKNOWN_GPU = "H100"  # whose data sheet stands for one that is not known
AHEAD = 3  # calls of a rival before its rounds: the first one, a warm-up, one that is timed


def _constant(value: float, help: str) -> Any:
    return field(default=value, metadata={"help": help})


@dataclass(frozen=True)
class Constants:
    """Measured on two cores of a Zen 3 (AVX2)."""

    start_s: float = _constant(4.0, "imports of a process that compiles, plots and files at the end")
    compile_s: float = _constant(9.0, "compiling a model, apart from its blocks; max-autotune: MAX_AUTOTUNE times as long")
    compile_block_s: float = _constant(0.8, "compiling, per block")
    trace_s: float = _constant(4.0, "first call of what is compiled already, apart from its blocks")
    trace_block_s: float = _constant(0.3, "the same, per block")
    max_autotune: float = _constant(4.0, "max-autotune's compile time over the default mode's")
    weights_per_s: float = _constant(6e7, "parameters drawn, converted and loaded per second; once a rival")
    share: float = _constant(0.6, "of the measured speed of large fp32 matmuls that a forward reaches")
    double: float = _constant(2.2, "a float64 forward's time over fp32's")
    capture_s: float = _constant(0.0, "capturing a CUDA graph")
    launch_us: float = _constant(0.0, "host time of a launch from Python")
    launches_per_block: float = _constant(0.0, "kernels per block, launched from Python")


CPU = Constants()
CUDA = dataclasses.replace(  # unmeasured: nothing has run on a GPU
    CPU,
    start_s=15.0,
    compile_s=20.0,
    compile_block_s=2.0,
    trace_s=4.0,
    trace_block_s=0.4,
    max_autotune=10.0,
    weights_per_s=1e9,
    share=0.4,
    double=20.0,
    capture_s=0.5,
    launch_us=8.0,
    launches_per_block=25.0,
)


class Work(NamedTuple):
    """A case and the rivals that run it."""

    config: DiTConfig
    batch: int
    dtype_name: str
    rivals: Sequence[str]


class Estimator:
    """Seconds of parts of a run on one device."""

    def __init__(self, device: torch.device, spec: DeviceSpec | None, rounds: int):
        self.device, self.rounds = device, rounds
        self.on_gpu = device.type == "cuda"
        self.constants = CUDA if self.on_gpu else CPU
        self.spec = spec or DEVICES[UNKNOWN_GPU]
        self.speed = 0.0 if self.on_gpu else _matmul_speed()

    def describe(self, seconds: float) -> str:
        """Return the line that a run begins with."""
        basis = f"roofline of {self.spec.name}, unmeasured constants" if self.on_gpu else f"{self.speed / 1e9:.0f} GFLOP/s"
        return f"This will take about {seconds / 60:.1f} minutes ({basis}; --help has the constants)."

    def compiling(self, jobs: Sequence[tuple[int, bool]], processes: int) -> float:
        """Return the time of compiling ahead: the longest job, or all of them shared by the processes.

        Args:
            jobs: of each the blocks of its model, and whether it is compiled by max-autotune.
            processes: that compile at the same time.
        """
        c = self.constants
        seconds = [(c.compile_s + c.compile_block_s * blocks) * (c.max_autotune if slow else 1) for blocks, slow in jobs]
        return c.start_s + max(max(seconds), sum(seconds) / processes) if seconds else 0.0

    def case(self, work: Work) -> float:
        """Return the time of parity, rounds and, on a GPU, what is read beside."""
        c = self.constants
        once = flops.parameters(work.config) / c.weights_per_s
        kinds = {kind_of(rival) in IN_DIFFUSERS for rival in work.rivals}
        samples = min(work.batch, len(ORACLE_SAMPLES))
        oracle = (1 + c.double) * self.forward(work._replace(batch=samples), graph=True) + 2 * once
        seconds = len(kinds) * oracle
        for rival in work.rivals:
            graph = rival.endswith(GRAPH)
            forward = self.forward(work, graph=graph)
            seconds += AHEAD * forward + self.rounds * max(forward, SHORTEST_ROUND_S)
            seconds += c.capture_s if graph else once
            if not graph and needs_compiling(rival, self.device):
                seconds += c.trace_s + c.trace_block_s * work.config.depth if rival in COMPILED else c.trace_s
            if self.on_gpu:
                seconds += ENERGY_WINDOW_S + HOST_CALLS * forward
        return seconds

    def forward(self, work: Work, *, graph: bool) -> float:
        """Return the seconds of a forward."""
        c = self.constants
        if not self.on_gpu:
            return flops.flops(work.config) * work.batch / (c.share * self.speed)
        device = 1e-3 * flops.floor_ms(work.config, work.batch, DTYPES[work.dtype_name], self.spec) / c.share
        return device if graph else max(device, 1e-6 * c.launch_us * c.launches_per_block * work.config.depth)


def constants_help() -> Iterator[str]:
    """Return lines on what the estimate assumes."""
    yield "The estimate at the start assumes (on a CPU; on CUDA, where nothing was measured):"
    for one in dataclasses.fields(Constants):
        values = [f"{getattr(constants, one.name):g}" for constants in (CPU, CUDA)]
        yield f"  {one.name:19}{values[0]:>6}{values[1]:>7}  {one.metadata['help']}"


def _matmul_speed() -> float:
    """Return operations a second of a large fp32 product on this CPU."""
    a, b = (torch.randn(PROBE_SIDE, PROBE_SIDE, generator=torch.Generator().manual_seed(i)) for i in range(2))
    seconds = []
    for _ in range(PROBE_ROUNDS):
        start = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - start)
    return 2 * PROBE_SIDE**3 / min(seconds)
