"""The bench of single ops under a fake CUDA: its counts, its parity, what it runs, what it says without a GPU."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda
from fake_cuda.fixtures import cut_ceilings, fake_gpu
from rich.console import Console

from ditfast import DiTConfig, ops
from ditfast.benchmarks import kernels
from ditfast.benchmarks.gauges import Gauges
from ditfast.benchmarks.gpu import Gpu
from ditfast.benchmarks.kernel_cases import OPS, Sizes, arguments, work
from ditfast.flops import DEVICES, operations

__all__ = ["fake_gpu"]
pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
TINY = DiTConfig(depth=1, hidden_size=128, num_heads=2, input_size=8, num_classes=10)
SECONDS = 0.25
KERNELS = [("gated_residual", "forward+backward"), ("layer_norm_modulate", "forward")]


class Stats:
    """pytest-benchmark's fixture, as far as it is used."""

    def __init__(self, median: float | None):
        self.median, self.extra_info, self.runs = median, {}, 0
        self.stats: Any = None if median is None else self

    def pedantic(self, target: Any, rounds: int, warmup_rounds: int) -> None:
        target()
        self.runs += 1
        if self.stats is not None:
            self.stats = type("Metadata", (), {"stats": self})


def open_gauges(monkeypatch: pytest.MonkeyPatch) -> Gauges:
    """Return gauges whose peaks are those of small matrices, of a GPU with a small cache."""
    cut_ceilings(monkeypatch)
    monkeypatch.setattr(Gpu, "l2_bytes", lambda self: 10_000)
    return Gauges(Gpu(torch.device("cuda", 0)), DEVICES["H100"])


@pytest.fixture
def gauges(fake_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> Gauges:
    return open_gauges(monkeypatch)


def work_of(op: str, config: DiTConfig, batch: int, *, backward: bool = False) -> tuple[int, int]:
    sizes = Sizes(config, batch)
    tensors = arguments(op, sizes, torch.bfloat16, CPU, backward=backward)
    found = OPS[op].call(sizes, **tensors)
    return work(op, tensors, found if isinstance(found, tuple) else (found,), sizes, backward=backward)


# ------------------------------------------------------------------------------------------------ what is counted
def test_every_op_has_a_case() -> None:
    assert set(OPS) == set(ops.__all__)
    assert len(kernels.CASES) == 4 * (2 * len(OPS) - 4)  # four have no backward


def test_bytes_of_a_row_op() -> None:
    B, T, D = 2, 16, 128
    x, vector = 2 * B * T * D, 2 * B * D
    assert work_of("gated_residual_layer_norm_modulate", TINY, B) == (4 * x + 3 * vector, 0)
    # the backward reads two gradients, x, h, gate and scale, and writes the gradients of all five arguments
    step = 4 * x + 3 * vector + 2 * x + (2 * x + 2 * vector) + (2 * x + 3 * vector)
    assert work_of("gated_residual_layer_norm_modulate", TINY, B, backward=True) == (step, 0)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("linear", "qkv"), ("linear_gelu", "fc1"), ("attention", "attention"), ("linear_gated_residual", "proj")],
)
def test_products_are_those_of_the_model(ours: str, theirs: str) -> None:
    (op,) = (op for op in operations(TINY, 2, torch.bfloat16, "keep") if op.name == theirs)
    assert work_of(ours, TINY, 2).operations == 2 * op.macs
    assert work_of(ours, TINY, 2, backward=True).operations == 2 * (op.macs + op.back_macs)


# ------------------------------------------------------------------------------------------------ what is run
@pytest.mark.parametrize("direction", kernels.DIRECTIONS)
@pytest.mark.parametrize("op", OPS)
def test_every_op_is_timed_and_agrees_with_its_oracle(op: str, direction: str, gauges: Gauges) -> None:
    if direction == "forward+backward" and not OPS[op].differentiable:
        pytest.skip("has no backward")
    case = kernels.OpBench(op, direction, TINY, 2, gauges)
    benchmark = Stats(SECONDS)
    found = kernels.bench_op(case, "eager", gauges, benchmark, (op, direction, "tiny", 2))
    assert found is not None
    calls = benchmark.extra_info["calls"]
    assert calls >= kernels.FEWEST_CALLS
    assert found.us == pytest.approx(1e6 * SECONDS / calls)
    assert found.gb_per_s == pytest.approx(case.work.moved / (SECONDS / calls) / 1e9)
    assert found.share is not None
    assert benchmark.extra_info["gb_per_s"] == found.gb_per_s


@pytest.mark.parametrize(("op", "direction"), KERNELS)
def test_kernels_agree_with_the_oracle(op: str, direction: str, gauges: Gauges) -> None:
    case = kernels.OpBench(op, direction, TINY, 2, gauges)
    assert kernels.bench_op(case, "triton", gauges, Stats(SECONDS), (op, direction, "tiny", 2))


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "direction"), KERNELS)
def test_kernels_agree_with_the_oracle_on_a_gpu(op: str, direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    test_kernels_agree_with_the_oracle(op, direction, open_gauges(monkeypatch))


@pytest.mark.full
def test_compiled_ops_agree_with_the_oracle(gauges: Gauges) -> None:
    case = kernels.OpBench("unpatchify", "forward", TINY, 2, gauges)
    assert kernels.bench_op(case, "compile", gauges, Stats(SECONDS), ("unpatchify", "forward", "tiny", 2))


def test_nothing_is_timed_that_is_wrong(gauges: Gauges, monkeypatch: pytest.MonkeyPatch) -> None:
    case = kernels.OpBench("linear", "forward", TINY, 2, gauges)
    right = OPS["linear"].call
    monkeypatch.setattr(case, "call", lambda implementation: lambda s, **tensors: 1.02 * right(s, **tensors))
    benchmark = Stats(SECONDS)
    with pytest.raises(AssertionError, match="linear, eager: result 0 is off by"):
        kernels.bench_op(case, "eager", gauges, benchmark, ("linear", "forward", "tiny", 2))
    assert benchmark.runs == 0


def test_not_a_number_is_wrong() -> None:
    assert kernels._error(torch.tensor([math.nan]), torch.ones(1)) == math.inf


def test_told_to_time_nothing_it_finds_nothing(gauges: Gauges) -> None:
    case = kernels.OpBench("unpatchify", "forward", TINY, 2, gauges)
    assert kernels.bench_op(case, "eager", gauges, Stats(None), ("unpatchify", "forward", "tiny", 2)) is None


def test_arguments_are_rotated(gauges: Gauges) -> None:
    case = kernels.OpBench("unpatchify", "forward", TINY, 2, gauges)
    (nbytes,) = (tensor.nbytes for tensor in case.sets[0])
    assert len(case.sets) == math.ceil(2 * gauges.gpu.l2_bytes() / nbytes)
    assert len({tensors[0].data_ptr() for tensors in case.sets}) == len(case.sets)


def test_the_floor_is_of_bytes_or_of_products(gauges: Gauges) -> None:
    spec = DEVICES["H100"]
    small, large = (kernels.OpBench(op, "forward", TINY, 2, gauges) for op in ("unpatchify", "attention"))
    assert small.floor_s(spec) == small.work.moved / spec.bandwidth
    assert large.floor_s(spec._replace(half=1.0)) == large.work.operations


# ------------------------------------------------------------------------------------------------ what is said
def test_the_tables_have_a_line_a_case_and_fit() -> None:
    label = ("gated_residual_layer_norm_modulate", "forward+backward", "DiT-XL/2", 32)
    found = [
        kernels.Found(*label, name, us, 1234.5, 0.0, 0.91)
        for name, us in (("eager", 40000.0), ("compile", 30000.0), ("triton", 20000.0))
    ]
    found += [kernels.Found("linear", "forward", "DiT-XL/2", 32, "triton", 200.0, 1234.5, 612.3, None)]
    shown = io.StringIO()
    kernels.print_tables(Console(width=120, file=shown), found)
    text = shown.getvalue()
    (fused,) = (line for line in text.splitlines() if label[0] in line)
    assert fused.split() == [label[0], "XL/2", "b32", "40000", "30000", "20000", "1234", "GB/s", "91%", "2.00", "1.50"]
    (linear,) = (line for line in text.splitlines() if "linear" in line)
    assert linear.split() == ["linear", "XL/2", "b32", "200", "612", "TFLOP/s"]


def test_the_tables_are_printed_at_the_end() -> None:
    written: list[str] = []
    reporter = SimpleNamespace(isatty=False, write=written.append)
    kernels.print_summary([kernels.Found("linear", "forward", "DiT-XL/2", 32, "triton", 200.0, 1234.5, 612.3, None)], reporter)
    kernels.print_summary([], reporter)
    (text,) = written
    assert "612 TFLOP/s" in text


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    command = [sys.executable, "-m", "pytest", "benchmarks/kernels.py", "-rs", "-k", "unpatchify and forward and XL and b8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "times kernels on a GPU, but torch" in done.stdout
