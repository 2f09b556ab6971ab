"""An estimate of how long bench.py takes: on a CPU from timed blocks, on a GPU from the roofline, with named constants."""

from __future__ import annotations

import dataclasses
import statistics
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ditfast import DiTConfig, flops, reference, timer
from ditfast.flops import DEVICES, DeviceSpec

from .ahead import needs_compiling
from .gauges import ENERGY_WINDOW_S
from .rivals import COMPILED, GRAPH, IN_DIFFUSERS, Case, kind_of
from .timing import HOST_CALLS, SHORTEST_ROUND_S, compared_samples

UNKNOWN_GPU = "H100"  # whose data sheet stands for one that is not known
AHEAD = 3  # calls of a rival before its rounds: the first one, a warm-up, one that is timed
PROBE = "".join(f"def f{i}(a, b):\n    return [a + b * {i} for _ in range({i})]\n" for i in range(100))
PROBE_S = 6.3e-3  # seconds of Python's compiler for it, on the CPU where the constants were measured
PROBE_WINDOW_S = 0.5  # in shorter ones other tenants of the machine decide
BLOCKS = 2  # of the models that are timed
TIMES_EAGER = {"compile": 0.9, "max-autotune": 0.9, "openvino": 0.7, "openvino-int8": 0.8, "diffusers": 1.05, "ditfast": 0.75}


def _constant(cpu: float, cuda: float, help: str) -> Any:
    return field(default=cpu, metadata={"cuda": cuda, "help": help})


@dataclass(frozen=True)
class Constants:
    """Seconds, unless the help says otherwise, on a CPU and on CUDA; on a CPU scaled by the time that ``PROBE`` takes."""

    start_s: float = _constant(12.0, 15.0, "imports of torch.compile, diffusers and scikit-learn, files at the end")
    worker_s: float = _constant(9.0, 15.0, "start of a process that compiles")
    compile_s: float = _constant(
        30.0, 20.0, "compiling a model, apart from its blocks; max-autotune: MAX_AUTOTUNE times as long"
    )
    compile_block_s: float = _constant(2.0, 2.0, "compiling, per block")
    trace_s: float = _constant(1.0, 4.0, "first call of what is compiled already, apart from its blocks")
    trace_block_s: float = _constant(0.25, 0.4, "the same, per block")
    max_autotune: float = _constant(4.0, 10.0, "max-autotune's compile time over the default mode's (a guess)")
    weights_per_s: float = _constant(6e7, 1e9, "parameters drawn per second; once a case")
    make_s: float = _constant(0.2, 0.5, "making a rival, apart from its weights")
    share: float = _constant(1.0, 0.4, "of the roofline's speed; on a CPU blocks are timed instead")
    double: float = _constant(2.2, 20.0, "a float64 forward's time over eager's")
    capture_s: float = _constant(0.0, 0.5, "capturing a CUDA graph")
    launch_us: float = _constant(0.0, 8.0, "host time of a launch from Python")
    launches_per_block: float = _constant(0.0, 25.0, "kernels per block, launched from Python")


CPU = Constants()  # CPU time of torch 2.13 on an AMD EPYC (Zen 3)
CUDA = Constants(**{one.name: one.metadata["cuda"] for one in dataclasses.fields(Constants)})  # unmeasured


class Estimator:
    """Seconds of parts of a run on one device."""

    def __init__(self, device: torch.device, spec: DeviceSpec | None, rounds: int):
        self.device, self.rounds = device, rounds
        self.on_gpu = device.type == "cuda"
        self.constants = CUDA if self.on_gpu else CPU
        self.spec = spec or DEVICES[UNKNOWN_GPU]
        self.slowness = 1.0 if self.on_gpu else _seconds(lambda: compile(PROBE, "probe", "exec")) / PROBE_S
        self.timed: dict[tuple[DiTConfig, int, str], float] = {}

    def describe(self, seconds: float) -> str:
        """Return the line that a run begins with."""
        timed = f"{BLOCKS} blocks of each model were timed; Python takes {self.slowness:.1f} times what is assumed"
        basis = f"roofline of {self.spec.name}, unmeasured constants" if self.on_gpu else timed
        return f"This will take about {seconds / 60:.1f} minutes ({basis}; --help has the constants)."

    def start(self) -> float:
        """Return the time of what a run does once."""
        return self.constants.start_s * self.slowness

    def compiling(self, jobs: Sequence[tuple[int, bool]], processes: int) -> float:
        """Return the time of compiling ahead: that of the process which has most to do.

        Args:
            jobs: of each the blocks of its model, and whether it is compiled by max-autotune.
            processes: that compile at the same time.
        """
        c = self.constants
        seconds = [(c.compile_s + c.compile_block_s * blocks) * (c.max_autotune if slow else 1) for blocks, slow in jobs]
        busy = [0.0] * processes
        for job in seconds:
            busy[busy.index(min(busy))] += job
        return self.slowness * (c.worker_s + max(busy)) if seconds else 0.0

    def case(self, case: Case, rivals: Sequence[str]) -> float:
        """Return the time of parity, rounds and, on a GPU, what is read beside."""
        c = self.constants
        host = flops.parameters(case.config) / c.weights_per_s  # seconds that depend on the host's speed, not on forwards
        kinds = {kind_of(rival) in IN_DIFFUSERS for rival in rivals}
        compared = dataclasses.replace(case, batch=len(compared_samples(case.config, case.batch)))
        device = len(kinds) * (1 + c.double) * self.forward(compared, "eager", graph=True)
        host += len(kinds) * 2 * c.make_s
        for rival in rivals:
            graph = rival.endswith(GRAPH)
            forward = self.forward(case, kind_of(rival), graph=graph)
            device += AHEAD * forward + self.rounds * max(forward, SHORTEST_ROUND_S)
            host += c.capture_s if graph else c.make_s
            if not graph and needs_compiling(rival, self.device):
                host += c.trace_s + c.trace_block_s * case.config.depth if rival in COMPILED else c.trace_s
            if self.on_gpu:
                device += ENERGY_WINDOW_S + HOST_CALLS * forward
        return self.slowness * host + device

    def forward(self, case: Case, kind: str, *, graph: bool) -> float:
        """Return the seconds of a rival's forward."""
        c = self.constants
        if not self.on_gpu:
            times_eager = TIMES_EAGER.get(kind.partition("+")[0].removesuffix("-swapped").removesuffix("-int8"), 1.0)
            return times_eager * self._timed(case)
        device = 1e-3 * flops.floor_ms(case.config, case.batch, case.dtype, self.spec) / c.share
        return device if graph else max(device, 1e-6 * c.launch_us * c.launches_per_block * case.config.depth)

    @torch.inference_mode()
    def _timed(self, case: Case) -> float:
        """Return the seconds of the reference's forward, from one with fewer blocks, timed once."""
        key = (case.config, case.batch, case.dtype_name)
        if key not in self.timed:
            depth = min(BLOCKS, case.config.depth)
            model = reference.DiT(dataclasses.replace(case.config, depth=depth)).to(case.dtype).eval()
            x = torch.randn(case.batch, *case.config.input_shape, dtype=case.dtype)
            t = torch.zeros(case.batch, dtype=torch.int64)
            self.timed[key] = _seconds(lambda: model(x, t, t)) * case.config.depth / depth
        return self.timed[key]


def constants_help() -> Iterator[str]:
    """Return lines on what the estimate assumes."""
    yield "The estimate at the start assumes (on a CPU; on CUDA, where nothing was measured):"
    for one in dataclasses.fields(Constants):
        values = [f"{getattr(constants, one.name):g}" for constants in (CPU, CUDA)]
        first, *others = textwrap.wrap(one.metadata["help"], 42)
        yield f"  {one.name:19}{values[0]:>6}{values[1]:>7}  {first}"
        yield from (" " * 36 + line for line in others)
    ratios = ", ".join(f"{name} {ratio:g}" for name, ratio in TIMES_EAGER.items())
    yield f"On a CPU it times {BLOCKS} blocks of each model in eager PyTorch, and the host by Python's"
    yield f"compiler. Other rivals' times over eager's: {ratios}."


def _seconds(run: Callable[[], object]) -> float:
    """Return the mean time of a run; of all of them, so that what else the machine does counts."""
    run()
    times: list[float] = []
    while sum(times) < PROBE_WINDOW_S:
        times.append(timer.seconds(run, torch.device("cpu")))
    return statistics.mean(times)
