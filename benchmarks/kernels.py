"""How fast each op's Triton kernels are, forward and with their backward, against the op in eager PyTorch and torch.compile.

    pytest benchmarks/kernels.py                                    on a GPU; every op at DiT-S/2's and XL/2's shapes
    pytest benchmarks/kernels.py -k "layer_norm_modulate and XL"
    pytest benchmarks/kernels.py --benchmark-json kernels.json

bf16. Outputs and gradients are compared with fp32 PyTorch on the same values before anything is timed. A CUDA graph runs an op
on one set of arguments after the other, as many as the L2 cache does not hold. GB/s count each argument and result once,
TFLOP/s the products; "share" is of what this GPU's own copies and large products reach.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import ditfast
from ditfast import DiTConfig
from ditfast.benchmarks.gauges import Gauges
from ditfast.benchmarks.gpu import Gpu
from ditfast.benchmarks.kernel_cases import OPS, Sizes, Work, arguments, as_tuple, work
from ditfast.benchmarks.precision import fix_precision
from ditfast.benchmarks.report import number
from ditfast.benchmarks.results import new_results
from ditfast.benchmarks.timing import UNIT_ROUNDOFF
from ditfast.devices import DeviceError, find_gpu
from ditfast.flops import DeviceSpec
from ditfast.flops.devices import spec_of
from ditfast.terminal import PIPED_COLUMNS, new_table, print_table, say

MODELS = ("DiT-S/2", "DiT-XL/2")
BATCHES = (8, 32)
DIRECTIONS = ("forward", "forward+backward")
IMPLEMENTATIONS = {"eager": "torch", "compile": "torch", "triton": "triton"}  # and the backend that they take
DTYPE = torch.bfloat16
ROUNDS = 20
FEWEST_CALLS = 16  # in a graph
ORACLE_ROUNDOFF = 8 * UNIT_ROUNDOFF[torch.float32]  # the oracle is fp32, and rounds several times itself
Outputs = tuple[Tensor, ...]

CASES = [
    pytest.param(op, direction, model, batch, id=f"{op}-{direction}-{model}-b{batch}")
    for op, direction, model, batch in itertools.product(OPS, DIRECTIONS, MODELS, BATCHES)
    if OPS[op].differentiable or direction == "forward"
]


@dataclass(frozen=True)
class Found:
    """One implementation of one case."""

    op: str
    direction: str
    model: str
    batch: int
    implementation: str
    us: float  # median
    gb_per_s: float
    tflop_per_s: float
    share: float | None  # of the measured ceilings


class OpBench:
    """An op at a model's shapes, its arguments as often as it takes to outgrow the cache."""

    def __init__(self, op: str, direction: str, config: DiTConfig, batch: int, gauges: Gauges, dtype: torch.dtype = DTYPE):
        self.op, self.sizes, self.gpu, self.dtype = op, Sizes(config, batch), gauges.gpu, dtype
        self.backward = direction == "forward+backward"
        tensors = arguments(op, self.sizes, dtype, self.gpu.device, backward=self.backward)
        self.names = list(tensors)
        self.sets = [_leaves(copy, tensors) for copy in gauges.rotated(tuple(tensors.values()))]
        generator = torch.Generator().manual_seed(1)
        with ditfast.backend("torch"), torch.no_grad():
            outputs = as_tuple(OPS[op].call(self.sizes, **tensors))
        self.upstream = [torch.randn(out.shape, generator=generator).to(out) for out in outputs]
        self.work: Work = work(op, tensors, outputs, self.sizes, backward=self.backward)

    def run(self, implementation: str, call: Callable[..., Any], tensors: list[Tensor]) -> Outputs:
        """Return outputs, and gradients behind them."""
        with ditfast.backend(IMPLEMENTATIONS[implementation]), torch.set_grad_enabled(self.backward):
            outputs = as_tuple(call(self.sizes, **dict(zip(self.names, tensors, strict=True))))
            if not self.backward:
                return outputs
            trained = [tensor for tensor in tensors if tensor.requires_grad]
            upstream = [gradient.to(out.dtype) for gradient, out in zip(self.upstream, outputs, strict=True)]
            return (*outputs, *torch.autograd.grad(outputs, trained, upstream))

    def call(self, implementation: str) -> Callable[..., Any]:
        if implementation != "compile":
            return OPS[self.op].call
        torch._dynamo.reset()  # else the cases before this one count against torch.compile's recompilation limit
        return torch.compile(OPS[self.op].call, dynamic=False)

    def check(self, implementation: str, call: Callable[..., Any]) -> None:
        """Each output and gradient is within 1.1 times eager PyTorch's error, plus one unit roundoff.

        Raises:
            AssertionError: one is not.
        """
        tensors = self.sets[0]
        wide = [tensor.detach().float().requires_grad_(tensor.requires_grad) for tensor in tensors]
        exact = self.run("eager", OPS[self.op].call, wide)
        eager = self.run("eager", OPS[self.op].call, tensors)
        for i, (out, bar, oracle) in enumerate(zip(self.run(implementation, call, tensors), eager, exact, strict=True)):
            allowed = 1.1 * _error(bar, oracle) + UNIT_ROUNDOFF[out.dtype] + ORACLE_ROUNDOFF
            assert _error(out, oracle) <= allowed, (
                f"{self.op}, {implementation}: result {i} is off by {_error(out, oracle):.1e}"
            )

    def captured(self, implementation: str, call: Callable[..., Any]) -> tuple[Callable[[], None], int]:
        """A replay of many calls, and how many."""
        sets = list(itertools.islice(itertools.cycle(self.sets), max(FEWEST_CALLS, len(self.sets))))

        def run_all() -> Tensor:
            return [self.run(implementation, call, tensors)[0] for tensors in sets][-1].detach()

        _, replay = self.gpu.capture(run_all)
        return replay, len(sets)

    def floor_s(self, ceilings: DeviceSpec) -> float:
        return max(self.work.moved / ceilings.bandwidth, self.work.operations / ceilings.peak(self.dtype))


def bench_op(
    case: OpBench, implementation: str, gauges: Gauges, benchmark: Any, label: tuple[str, str, str, int]
) -> Found | None:
    """Check parity, then time with pytest-benchmark's fixture, None if it times nothing; label: op, direction, model, batch."""
    call = case.call(implementation)
    case.check(implementation, call)
    replay, calls = case.captured(implementation, call)

    def replay_and_wait() -> None:
        replay()
        gauges.gpu.wait()

    benchmark.group = " ".join(map(str, label))
    benchmark.pedantic(replay_and_wait, rounds=ROUNDS, warmup_rounds=2)
    if benchmark.stats is None:
        return None
    seconds = benchmark.stats.stats.median / calls
    share = None if gauges.ceilings is None else case.floor_s(gauges.ceilings) / seconds
    speed = (1e6 * seconds, case.work.moved / seconds / 1e9, case.work.operations / seconds / 1e12, share)
    found = Found(*label, implementation, *speed)
    benchmark.extra_info.update(asdict(found), calls=calls)
    return found


def print_tables(console: Console, found: list[Found]) -> None:
    """Print a table of forwards, and one of forwards with their backward."""
    for direction in DIRECTIONS:
        rows = [one for one in found if one.direction == direction]
        if rows:
            print_table(_table(rows), console, f"Triton kernels against PyTorch, bf16, {direction}")
            say("Microseconds a call. Speed and its share of this GPU's measured ceilings are Triton's.\n", console)


def _table(found: list[Found]) -> Table:
    table = new_table("op", "", right=(*IMPLEMENTATIONS, "speed", "share", "over eager", "over compile"))
    cases: dict[tuple[str, str, int], dict[str, Found]] = {}
    for one in found:
        cases.setdefault((one.op, one.model, one.batch), {})[one.implementation] = one
    for (op, model, batch), by in cases.items():
        times = (number(by[name].us) if name in by else "" for name in IMPLEMENTATIONS)
        table.add_row(op, f"{model.removeprefix('DiT-')} b{batch}", *times, *_of_triton(by))
    return table


def _of_triton(by: dict[str, Found]) -> list[str]:
    """Its speed, its share, and how many times faster it is than the others."""
    own = by.get("triton")
    if own is None:
        return [""] * 4
    speed = f"{number(own.tflop_per_s)} TFLOP/s" if own.tflop_per_s else f"{number(own.gb_per_s)} GB/s"
    share = "" if own.share is None else f"{own.share:.0%}"
    return [speed, share, *(f"{by[name].us / own.us:.2f}" if name in by else "" for name in ("eager", "compile"))]


def print_summary(found: list[Found], reporter: Any) -> None:
    """Through pytest's own terminal reporter, which no capturing of output reaches."""
    if found and reporter is not None:
        text = io.StringIO()
        print_tables(Console(width=reporter._screen_width if reporter.isatty else PIPED_COLUMNS, file=text), found)
        reporter.write("\n" + text.getvalue())


def _leaves(copy: tuple[Tensor, ...], tensors: dict[str, Tensor]) -> list[Tensor]:
    return [t.detach().requires_grad_(like.requires_grad) for t, like in zip(copy, tensors.values(), strict=True)]


def _error(out: Tensor, exact: Tensor) -> float:
    error = ((out.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-300)).item()
    return math.inf if math.isnan(error) else error


# ------------------------------------------------------------------------------------------------ what pytest runs
@pytest.fixture(scope="session")
def gauges() -> Gauges:
    try:
        device = find_gpu()
    except DeviceError as error:
        pytest.skip(f"times kernels on a GPU, but {error}")
    fix_precision()
    return Gauges(Gpu(device), spec_of(device))


class _Json:
    """A plugin that adds our results to the JSON of pytest-benchmark."""

    def __init__(self, found: list[Found]):
        self.found = found

    def pytest_benchmark_update_json(self, config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
        results = new_results("kernels", find_gpu())
        results.rows = list(self.found)
        output_json.update(results.to_dict())


@pytest.fixture(scope="session")
def found(request: pytest.FixtureRequest) -> Iterator[list[Found]]:
    """Collect the rows; print a table of them at the end, and add them to --benchmark-json as ``results.read`` takes them."""
    everything: list[Found] = []
    request.config.pluginmanager.register(_Json(everything))
    yield everything
    print_summary(everything, request.config.pluginmanager.get_plugin("terminalreporter"))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("op", "direction", "model", "batch"), CASES)
def test_op(
    op: str, direction: str, model: str, batch: int, implementation: str, gauges: Gauges, found: list[Found], benchmark: Any
) -> None:
    case = OpBench(op, direction, DiTConfig.from_name(model), batch, gauges)
    one = bench_op(case, implementation, gauges, benchmark, (op, direction, model, batch))
    found += [] if one is None else [one]
