"""What the bench does on a GPU, with a stand-in for one; and that the calls behind the real one exist."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_gpu import ACTIVATIONS, KERNELS, SECONDS, WATTS, WEIGHTS, FakeGpu
from rich.console import Console
from support import randomize

import ditfast
from ditfast import DiT, DiTConfig
from ditfast.benchmarks import bench, gpu
from ditfast.benchmarks.ceilings import measure_ceilings
from ditfast.benchmarks.gauges import MOST_COPIES, SLOWDOWNS, Gauges, count_kernels
from ditfast.benchmarks.report import print_tables
from ditfast.benchmarks.rivals import Captured
from ditfast.benchmarks.rows import Row
from ditfast.flops import DEVICES, floor_ms

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = DiTConfig(depth=2, hidden_size=64, num_heads=2, input_size=8, num_classes=10)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    ditfast.save_checkpoint(randomize(DiT(TINY)), tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


def run_bench(checkpoint: Path, fake: FakeGpu, *more: str) -> dict[str, Any]:
    out = checkpoint.parent / "out"
    arguments = ["--checkpoint", str(checkpoint), "--dtype", "fp32", "--batch", "2", "--rounds", "5", "--device", "cpu"]
    assert bench.main([*arguments, "--out", str(out), *more], fake) == 0
    return json.loads((out / "bench.json").read_text())


# ------------------------------------------------------------------------------------------------ a whole run
def test_a_run_reads_everything(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake = FakeGpu()
    report = run_bench(checkpoint, fake, "--rivals", "eager", "ditfast", "diffusers", "ditfast-swapped")
    rivals = ["eager", "ditfast", "diffusers", "ditfast-swapped"]
    assert [row["rival"] for row in report["rows"]] == [*rivals, *(f"{name}+graph" for name in rivals)]
    assert fake.captures == 4
    assert fake.replays > 4 * 5
    for row in report["rows"]:
        assert row["parity"]
        assert row["ms_median"] == 1e3 * SECONDS
        assert row["launches"] == KERNELS
        own = WEIGHTS + ACTIVATIONS  # a graph's weights are those of what it captured
        assert row["peak_memory_gb"] == (own + WEIGHTS if "+graph" in row["rival"] else own) / 1e9
        assert row["joules_per_image"] == pytest.approx(WATTS * SECONDS / 2)
        assert row["watts"] == pytest.approx(WATTS)
        assert row["clock_mhz"] == row["clock_mhz_before"] == row["clock_mhz_after"] == 1980
        assert row["first_call_s"] > 0
        assert row["slowed_by"] == []
        assert row["floor_ms"] is None  # the CPU's data sheet is not known
        assert row["roofline_share_measured"] == row["floor_ms_measured"] / row["ms_median"]
    assert {"driver", "measured_copy_tb_per_s", "measured_bf16_tflops", "measured_fp32_tflops"} <= set(report["environment"])
    assert report["notes"] == ["share of the data sheet: left out, this GPU's is not in ditfast.flops.DEVICES"]
    printed = capsys.readouterr().out
    assert "driver 999.1" in printed
    for expected in ("Beside its time", "J/image", "Share of the roofline", "measured floor, ms", "over diffusers"):
        assert expected in printed
    assert "over ditfast" not in printed


def test_known_gpus_have_a_share_of_their_data_sheet(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "spec_of", lambda device: DEVICES["H100"])
    report = run_bench(checkpoint, FakeGpu(), "--rivals", "ditfast")
    floor = floor_ms(TINY, 2, torch.float32, DEVICES["H100"])
    assert report["environment"]["data_sheet"] == "H100"
    for row in report["rows"]:
        assert row["floor_ms"] == floor
        assert row["roofline_share"] == floor / (1e3 * SECONDS)
    assert report["notes"] == []


@pytest.mark.parametrize(
    ("broken", "lost", "named"),
    [
        pytest.param(["trace"], ["launches"], "launches", id="no profiler"),
        pytest.param(
            ["energy_mj", "power_mw", "clock_mhz", "slowdowns", "driver"],
            ["joules_per_image", "watts", "clock_mhz", "clock_mhz_before", "clock_mhz_after"],
            "energy",
            id="no NVML",
        ),
        pytest.param(["clock_mhz"], ["clock_mhz", "clock_mhz_after"], "clocks", id="no clocks"),
        pytest.param(["slowdowns"], [], "throttling", id="no throttling reasons"),
        pytest.param(["l2_bytes"], [], "rotated inputs", id="no cache size"),
        pytest.param(
            ["free_bytes"], ["roofline_share_measured"], "share of the measured ceilings", id="no memory for ceilings"
        ),
    ],
)
def test_a_missing_tool_costs_its_column(checkpoint: Path, broken: list[str], lost: list[str], named: str) -> None:
    report = run_bench(checkpoint, FakeGpu(*broken), "--rivals", "ditfast")
    read = ["launches", "joules_per_image", "watts", "clock_mhz", "clock_mhz_before", "clock_mhz_after"]
    read += ["roofline_share_measured"]
    for row in report["rows"]:
        assert row["ms_median"] == 1e3 * SECONDS
        empty = {column for column in read if row[column] is None}
        assert empty >= set(lost)
        assert empty <= {*lost, "clock_mhz_before"}
    assert sum(note == f"{named}: left out, RuntimeError: no such tool" for note in report["notes"]) == 1


def test_energy_from_power_where_it_is_not_counted(checkpoint: Path) -> None:
    (row, _) = run_bench(checkpoint, FakeGpu(counts_energy=False), "--rivals", "ditfast")["rows"]
    assert row["joules_per_image"] == pytest.approx(WATTS * SECONDS / 2)


def test_slow_clocks_are_noted(checkpoint: Path) -> None:
    report = run_bench(checkpoint, FakeGpu(slowed=0x4 | 0x40 | 0x1), "--rivals", "ditfast")
    assert {tuple(row["slowed_by"]) for row in report["rows"]} == {("heat (hardware)", "power cap")}
    line = "tiny.safetensors fp32 batch 2: clocks held down by heat (hardware), power cap; 1980 MHz before, 1980 MHz after"
    assert line in report["notes"]


def test_a_capture_that_fails_costs_its_row(checkpoint: Path) -> None:
    report = run_bench(checkpoint, FakeGpu("capture"), "--rivals", "ditfast")
    assert [row["rival"] for row in report["rows"]] == ["ditfast"]
    assert "tiny.safetensors fp32 batch 2: ditfast+graph failed: RuntimeError: no such tool" in report["notes"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        pytest.param(torch.OutOfMemoryError("CUDA out of memory"), "skipped, out of memory", id="out of memory"),
        pytest.param(RuntimeError("cuBLAS\nin 40 lines"), "skipped, RuntimeError: cuBLAS", id="anything else"),
    ],
)
def test_a_case_that_fails_leaves_the_others(
    checkpoint: Path, error: Exception, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = bench.bench_case, []

    def fail_once(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 1:
            raise error
        return plain(*arguments)

    monkeypatch.setattr(bench, "bench_case", fail_once)
    fake = FakeGpu()
    report = run_bench(checkpoint, fake, "--rivals", "ditfast", "--batch", "1", "2")
    assert [row["batch"] for row in report["rows"]] == [2, 2]
    assert f"tiny.safetensors fp32 batch 1: {words}" in report["notes"]
    assert fake.released == 3  # behind the ceilings and each case


def test_defaults_on_a_gpu_run_diffusers_and_both_compiles() -> None:
    args = bench.parse_arguments(["--device", "cpu", "--models", "DiT-S/8", "DiT-B/8"])
    (first, second, digits), notes = bench._cases(args, on_gpu=True)
    plain = ["eager", "compile", "max-autotune", "diffusers", "ditfast"]
    assert second[1] == digits[1] == [*plain, *(f"{name}+graph" for name in plain)]
    assert set(first[1]) - set(second[1]) == {"ditfast-swapped", "ditfast-swapped+graph"}
    assert notes == []


def test_max_autotune_and_compile_keep_to_their_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    (case, _), *_ = bench._cases(bench.parse_arguments(["--device", "cpu", "--models", "DiT-S/8"]), on_gpu=True)[0]
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: asked.append(options))
    for name in ("compile", "max-autotune"):
        case.rival(name, {})
    assert asked == [{"dynamic": False, "mode": "default"}, {"dynamic": False, "mode": "max-autotune-no-cudagraphs"}]


def test_tables_fit_112_columns() -> None:
    names = ["max-autotune", "diffusers", "ditfast", "ditfast-swapped"]
    numbers = {"gmacs": 524.6, "gflops": 1049.2, "parameters": 675 * 10**6, "error": 1.2e-3, "allowed_error": 1e-2}
    rows = [
        Row("DiT-XL/2@512", name, "bf16", 128, "cuda", parity=True, **numbers)
        for name in [*names, *(f"{name}+graph" for name in names)]
    ]
    for row in rows:
        row.ms_median = row.ms_p20 = row.ms_p80 = 1234.5
        row.images_per_s, row.tflops_per_s, row.first_call_s, row.launches = 123456.0, 987.6, 1234.0, 12345
        row.peak_memory_gb, row.joules_per_image, row.watts, row.clock_mhz = 77.7, 12.34, 700.0, 1980.0
        row.floor_ms = row.floor_ms_measured = 1234.5
        row.roofline_share = row.roofline_share_measured = 0.999
        row.speedup_over = {other.rival: 1.23 for other in rows if other is not row}
    console = Console(width=112, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_tables(console, rows)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 112
    assert not any("…" in line for line in lines)


# ------------------------------------------------------------------------------------------------ its parts
def test_a_graph_follows_its_arguments() -> None:
    graph = Captured(lambda x, y: 2 * x + y, FakeGpu())
    x, y = torch.arange(3.0), torch.ones(3)
    for inputs in ((x, y), (y, x), (x + 7, y)):
        assert torch.equal(graph(*inputs), 2 * inputs[0] + inputs[1])
    assert (graph.gpu.captures, graph.gpu.replays) == (1, 3)


def test_the_profiler_comes_last_and_sees_no_graph(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake, order = FakeGpu(), []
    for name in ("trace", "energy_mj"):
        plain = getattr(fake, name)
        monkeypatch.setattr(fake, name, lambda *a, name=name, plain=plain: order.append(name) or plain(*a))
    run_bench(checkpoint, fake, "--rivals", "ditfast")
    assert order == ["energy_mj"] * 4 + ["trace"]  # before and after the window of ditfast and of ditfast+graph


def test_inputs_are_rotated_past_the_cache() -> None:
    gauges = Gauges(FakeGpu(), None)
    large, small = torch.arange(1000.0), torch.zeros(1)
    copies = gauges.rotated((large,))
    assert len(copies) == 5  # of 4,000 bytes: twice the cache's 10,000
    assert all(torch.equal(copy, large) for (copy,) in copies)
    assert len({copy.data_ptr() for (copy,) in copies}) == 5
    assert len(gauges.rotated((small,))) == MOST_COPIES


def test_ceilings_count_reads_writes_and_two_operations_a_mac() -> None:
    found = measure_ceilings(FakeGpu(), DEVICES["H100"], largest_copy=1000, largest_side=64)
    assert found.name == "measured"
    assert found.bandwidth == 2 * 1000 / SECONDS
    assert found.fp32 == found.half == 2 * 64**3 / SECONDS


def test_ceilings_take_what_memory_allows() -> None:
    found = measure_ceilings(FakeGpu(), DEVICES["H100"])
    assert found.bandwidth == 2 * (2**18 // 4) / SECONDS
    assert found.half == 2 * 128**3 / SECONDS  # three of 128 x 128 take 98 kB of 131; of 256 x 256 four times as much
    assert found.fp32 == 2 * 64**3 / SECONDS


def test_a_profiler_that_sees_nothing_is_no_zero() -> None:
    fake = FakeGpu()
    fake.trace = lambda run, path: path.write_text('{"traceEvents": [{"cat": "cpu_op"}]}')  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="saw no kernel"):
        count_kernels(fake, lambda: None)


# ------------------------------------------------------------------------------------------------ the calls behind the real one
def test_the_stand_in_has_the_real_ones_methods() -> None:
    methods = {name: parameters(f) for name, f in vars(gpu.Gpu).items() if inspect.isfunction(f) and name[0] != "_"}
    for kind in (gpu.Cuda, FakeGpu):
        assert {name: parameters(getattr(kind, name)) for name in methods} == methods
    assert len(methods) == 15


def parameters(function: Callable[..., object]) -> list[str]:
    return list(inspect.signature(function).parameters)


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
    names = {name for name in dotted_names(gpu) if name.startswith("torch.")}
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


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_a_trace_is_written_as_the_count_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    gpu.Cuda(torch.device("cpu")).trace(lambda: torch.zeros(3) + 1, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert any(event.get("cat") == "cpu_op" for event in events)


@pytest.mark.gpu
def test_a_gpu_answers_everything() -> None:
    device = gpu.open_gpu(torch.device("cuda"))
    gauges = Gauges(device, DEVICES["H100"])
    x = torch.randn(1024, 1024, device="cuda")
    assert gauges.launches(lambda: x @ x) >= 1
    busy = gauges.busy(lambda: x @ x, device.seconds(lambda: x @ x, 10) / 10)
    assert busy.joules > 0
    assert busy.clock_mhz > 0
    assert device.l2_bytes() > 0
    assert device.peak_bytes() >= device.allocated_bytes() >= x.nbytes
    assert gauges.ceilings.bandwidth > 0
    assert gauges.notes == []
