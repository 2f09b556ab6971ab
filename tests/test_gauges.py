"""Figures that the benches read off a GPU, under a fake CUDA; and that the calls of torch and NVML behind them exist."""

from __future__ import annotations

import ast
import inspect
from typing import Any

import pytest
import torch
from fake_cuda.fixtures import cut_ceilings, fake_gpu
from support import HAS_GPU

from ditfast import timer
from ditfast.benchmarks import ahead, gauges, gpu
from ditfast.benchmarks.ceilings import measure_ceilings
from ditfast.benchmarks.gauges import MOST_COPIES, SLOWDOWNS, Gauges, count_kernels
from ditfast.benchmarks.gpu import Gpu
from ditfast.benchmarks.rivals import Captured
from ditfast.flops import DEVICES

__all__ = ["fake_gpu"]
CUDA = torch.device("cuda", 0)


@pytest.mark.usefixtures("fake_gpu")
def test_a_graph_follows_its_arguments() -> None:
    graph = Captured(lambda x, y: 2 * x + y, Gpu(CUDA))
    x, y = torch.arange(3.0, device=CUDA), torch.ones(3, device=CUDA)
    for inputs in ((x, y), (y, x), (x + 7, y)):
        assert torch.equal(graph(*inputs), 2 * inputs[0] + inputs[1])


@pytest.mark.usefixtures("fake_gpu")
def test_inputs_are_rotated_past_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gauges, "measure_ceilings", lambda gpu, like: like)
    monkeypatch.setattr(Gpu, "l2_bytes", lambda self: 10_000)
    found = Gauges(Gpu(CUDA), None)
    large, small = torch.arange(1000.0, device=CUDA), torch.zeros(1, device=CUDA)
    copies = found.rotated((large,))
    assert len(copies) == 5  # of 4,000 bytes: twice the cache's 10,000
    assert all(torch.equal(copy, large) for (copy,) in copies)
    assert len({copy.data_ptr() for (copy,) in copies}) == 5
    assert len(found.rotated((small,))) == MOST_COPIES


@pytest.mark.usefixtures("fake_gpu")
def test_ceilings_count_reads_writes_and_two_operations_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timer, "seconds", lambda run, device: 0.25)
    found = measure_ceilings(Gpu(CUDA), DEVICES["H100"], largest_copy=1000, largest_side=64)
    assert found.name == "measured"
    assert found.bandwidth == 2 * 1000 / 0.25
    assert found.fp32 == found.half == 2 * 64**3 / 0.25


@pytest.mark.usefixtures("fake_gpu")
def test_ceilings_take_what_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timer, "seconds", lambda run, device: 0.25)
    monkeypatch.setattr(Gpu, "free_bytes", lambda self: 2**18)
    found = measure_ceilings(Gpu(CUDA), DEVICES["H100"])
    assert found.bandwidth == 2 * (2**18 // 4) / 0.25
    assert found.half == 2 * 128**3 / 0.25  # three of 128 x 128 take 98 kB of 131; of 256 x 256 four times as much
    assert found.fp32 == 2 * 64**3 / 0.25


@pytest.mark.usefixtures("fake_gpu")
def test_a_profiler_that_sees_nothing_is_no_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gpu, "trace", lambda self, run, path: path.write_text('{"traceEvents": [{"cat": "cpu_op"}]}'))
    with pytest.raises(RuntimeError, match="saw no kernel"):
        count_kernels(Gpu(CUDA), lambda: None)


@pytest.mark.usefixtures("fake_gpu")
def test_processes_that_compile_fit_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead.os, "sched_getaffinity", lambda pid: set(range(16)))
    assert ahead.count_processes(CUDA, 40) == 16
    assert ahead.count_processes(CUDA, 3) == 3
    monkeypatch.setattr(Gpu, "free_bytes", lambda self: 20 * 2**30)
    assert ahead.count_processes(CUDA, 40) == 2


# ------------------------------------------------------------------------------------------------ the calls behind it
def dotted_names(module: Any) -> set[str]:
    """Whatever a module's source names through dots, such as ``torch.cuda.Event``."""
    found = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if isinstance(node, ast.Name) and parts:
            found.add(".".join([node.id, *reversed(parts)]))
    return found


def test_torch_has_all_that_is_called() -> None:
    names = {name for module in (gpu, timer) for name in dotted_names(module) if name.startswith("torch.")}
    assert {"torch.cuda.Event", "torch.cuda.mem_get_info", "torch.cuda.reset_peak_memory_stats"} <= names
    for name in names:
        found: Any = torch
        for part in name.split(".")[1:]:
            found = getattr(found, part)
    inspect.signature(torch.cuda.Event.__new__).bind(torch.cuda.Event, enable_timing=True)
    if hasattr(torch._C, "_CudaDeviceProperties"):  # only where torch was built for CUDA
        assert hasattr(torch._C._CudaDeviceProperties, "L2_cache_size")
        assert hasattr(torch._C._CudaDeviceProperties, "uuid")


def test_nvml_has_all_that_is_called() -> None:
    nvml = pytest.importorskip("pynvml")
    names = {name.partition(".")[2] for name in dotted_names(gpu) if name.startswith(("nvml.", "pynvml."))}
    assert len(names) == 9
    for name in names:
        assert hasattr(nvml, name)
    assert issubclass(nvml.NVMLError_NotSupported, Exception)
    for name in names:
        if name.startswith("nvmlDevice"):
            arguments = ("GPU-0",) if name.endswith("UUID") else ("handle", 1) if name.endswith("ClockInfo") else ("handle",)
            inspect.signature(getattr(nvml, name)).bind(*arguments)


def test_slowdowns_are_nvmls_bits() -> None:
    nvml = pytest.importorskip("pynvml")
    prefix = "nvmlClocksEventReason"
    bits = {name: getattr(nvml, name) for name in dir(nvml) if name.startswith(prefix)}
    known = set(bits.values()) - {bits[f"{prefix}None"], bits[f"{prefix}All"], bits[f"{prefix}GpuIdle"]}
    assert set(SLOWDOWNS) == known
    assert SLOWDOWNS[bits[f"{prefix}SwPowerCap"]] == "power cap"
    assert SLOWDOWNS[bits[f"{prefix}HwThermalSlowdown"]] == "heat (hardware)"


@pytest.mark.gpu
def test_a_gpu_answers_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pynvml")
    if not HAS_GPU:
        cut_ceilings(monkeypatch)
    device = gpu.open_gpu(CUDA)
    gauges = Gauges(device, DEVICES["H100"])
    x = torch.randn(1024, 1024, device="cuda")
    assert gauges.launches(lambda: x @ x) >= 1
    busy = gauges.busy(lambda: x @ x, timer.seconds(lambda: x @ x, CUDA, 10) / 10)
    assert busy.joules > 0
    assert busy.clock_mhz > 0
    assert device.l2_bytes() > 0
    assert device.peak_bytes() >= device.allocated_bytes() >= x.nbytes
    assert gauges.ceilings.bandwidth > 0
    assert gauges.notes == []
