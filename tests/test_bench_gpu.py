"""The bench on a GPU, under a fake CUDA: a whole run, its defaults, its tables, and what a tool that is missing costs."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda, fake_cuda
from fake_cuda.fixtures import cut_ceilings, fake_gpu
from fake_cuda.nvml import CLOCK_MHZ, WATTS
from rich.console import Console
from support import HAS_GPU, randomize

import ditfast
from ditfast import DiT, DiTConfig, timer
from ditfast.benchmarks import bench, gauges, rivals
from ditfast.benchmarks.gpu import Gpu
from ditfast.benchmarks.report import print_tables
from ditfast.benchmarks.rows import Row
from ditfast.benchmarks.weights import random_weights
from ditfast.flops import DEVICES, floor_ms

__all__ = ["fake_gpu"]
pytestmark = pytest.mark.usefixtures("one_thread")
TINY = DiTConfig(depth=1, hidden_size=64, num_heads=2, input_size=8, num_classes=10)
CUDA = torch.device("cuda", 0)
NVML = ["nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetPowerUsage", "nvmlDeviceGetClockInfo"]
NVML += ["nvmlDeviceGetCurrentClocksEventReasons", "nvmlSystemGetDriverVersion"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks of small matrices, short windows, and no process that compiles ahead, unless there is a real GPU."""
    if HAS_GPU:
        return
    cut_ceilings(monkeypatch)
    monkeypatch.setattr(gauges, "ENERGY_WINDOW_S", 0.4)
    monkeypatch.setattr(gauges, "MOST_COPIES", 2)
    monkeypatch.setattr(bench, "compile_ahead", lambda jobs, processes: iter(()))
    monkeypatch.setattr("ditfast.benchmarks.timing.SHORTEST_ROUND_S", 0.001)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    ditfast.save_checkpoint(randomize(DiT(TINY)), tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


def run_bench(checkpoint: Path, *more: str, device: str = "cuda", status: int = 0) -> dict[str, Any]:
    out = checkpoint.parent / "out"
    arguments = ["--checkpoint", str(checkpoint), "--dtype", "fp32", "--batch", "2", "--rounds", "5", "--device", device]
    with ditfast.backend("torch"):
        assert bench.main([*arguments, "--out", str(out), *more]) == status
    return json.loads((out / "bench.json").read_text())


# ------------------------------------------------------------------------------------------------ a whole run
@pytest.mark.usefixtures("small", "fake_gpu")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_run_reads_everything(device: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run_bench(checkpoint, "--rivals", "eager", "ditfast", device=device)
    assert [row["rival"] for row in report["rows"]] == ["eager", "ditfast", "eager+graph", "ditfast+graph"]
    bound = floor_ms(TINY, 2, torch.float32, DEVICES["H200"])
    for row in report["rows"]:
        assert row["parity"]
        assert row["launches"] > 10
        assert row["peak_memory_gb"] > 0
        assert row["watts"] == pytest.approx(WATTS, rel=0.1)
        assert row["clock_mhz"] == row["clock_mhz_before"] == row["clock_mhz_after"] == CLOCK_MHZ
        assert row["first_call_s"] > 0
        assert row["host_us"] > 0
        assert row["slowed_by"] == []
        assert row["floor_ms"] == bound
        assert row["roofline_share"] == bound / row["ms_median"]
        assert row["roofline_share_measured"] == row["floor_ms_measured"] / row["ms_median"]
    machine = report["machine"]
    assert (machine["device"], machine["data_sheet"]) == ("NVIDIA H200", "H200")
    assert {"driver", "measured_copy_tb_per_s", "measured_bf16_tflops", "measured_fp32_tflops"} <= set(machine)
    assert report["notes"] == []
    printed = capsys.readouterr().out
    assert "driver 999.1" in printed.replace("\n", "")
    for expected in ("Beside its time", "J/image", "roofline bound", "host us", "share", "roofline of H200, unmeasured"):
        assert expected in printed
    assert max(map(len, printed.splitlines()[:-4])) <= 80


@pytest.mark.usefixtures("small")
def test_a_gpu_that_is_not_known_has_no_share_of_its_data_sheet(checkpoint: Path) -> None:
    with fake_cuda(name="NVIDIA RTX 9999"):
        report = run_bench(checkpoint, "--rivals", "ditfast")
    assert all(row["floor_ms"] is None and row["roofline_share_measured"] for row in report["rows"])
    assert report["notes"] == ["share of the data sheet: left out, this GPU's is not in ditfast.flops.DEVICES"]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("broken", "lost", "named"),
    [
        pytest.param(NVML, ["joules_per_image", "watts", "clock_mhz", "clock_mhz_before"], "energy", id="no NVML"),
        pytest.param(NVML[2:3], ["clock_mhz", "clock_mhz_before", "clock_mhz_after"], "clocks", id="no clocks"),
        pytest.param(NVML[3:4], [], "throttling", id="no throttling reasons"),
    ],
)
def test_a_missing_tool_costs_its_column(
    checkpoint: Path, broken: list[str], lost: list[str], named: str, fake_gpu: FakeCuda
) -> None:
    for name in broken:
        fake_gpu.nvml.break_function(name, RuntimeError("no such tool\nin 40 lines"))
    report = run_bench(checkpoint, "--rivals", "ditfast")
    read = ["launches", "joules_per_image", "watts", "clock_mhz", "clock_mhz_before", "roofline_share_measured"]
    for row in report["rows"]:
        assert row["ms_median"] > 0
        assert {column for column in read if row[column] is None} == set(lost) & set(read)
    assert sum(note == f"{named}: left out, RuntimeError: no such tool" for note in report["notes"]) == 1


@pytest.mark.usefixtures("small", "fake_gpu")
@pytest.mark.parametrize(
    ("method", "column", "named"),
    [
        ("trace", "launches", "launches"),
        ("l2_bytes", None, "rotated inputs"),
        ("free_bytes", "roofline_share_measured", "share of the measured ceilings"),
    ],
)
def test_a_figure_of_torch_that_is_missing_costs_its_column(
    checkpoint: Path, method: str, column: str | None, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Gpu, *arguments: object) -> None:
        raise RuntimeError("no such tool")

    monkeypatch.setattr(Gpu, method, fail)
    monkeypatch.setattr(bench, "count_processes", lambda device, jobs: 1)
    report = run_bench(checkpoint, "--rivals", "ditfast")
    assert all(row["ms_median"] and (column is None or row[column] is None) for row in report["rows"])
    assert f"{named}: left out, RuntimeError: no such tool" in report["notes"]


@pytest.mark.usefixtures("small")
def test_energy_from_power_where_it_is_not_counted(checkpoint: Path, fake_gpu: FakeCuda) -> None:
    fake_gpu.nvml.break_function("nvmlDeviceGetTotalEnergyConsumption")
    rows = run_bench(checkpoint, "--rivals", "ditfast")["rows"]
    assert all(row["watts"] == pytest.approx(WATTS) for row in rows)


@pytest.mark.usefixtures("small")
def test_slow_clocks_are_noted(checkpoint: Path, fake_gpu: FakeCuda) -> None:
    fake_gpu.nvml.slowdowns = 0x4 | 0x40 | 0x1
    report = run_bench(checkpoint, "--rivals", "ditfast")
    assert {tuple(row["slowed_by"]) for row in report["rows"]} == {("heat (hardware)", "power cap")}
    line = "tiny.safetensors fp32 batch 2: clocks held down by heat (hardware), power cap; 1980 MHz before, 1980 MHz after"
    assert line in report["notes"]


@pytest.mark.usefixtures("small", "fake_gpu")
def test_a_capture_that_fails_costs_its_row(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Gpu, run: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nin 40 lines")

    monkeypatch.setattr(Gpu, "capture", fail)
    report = run_bench(checkpoint, "--rivals", "ditfast")
    assert [row["rival"] for row in report["rows"]] == ["ditfast"]
    failed = "tiny.safetensors fp32 batch 2: ditfast+graph failed: RuntimeError: operation not permitted"
    assert any(note.startswith(failed) for note in report["notes"])


@pytest.mark.usefixtures("fake_gpu")
def test_what_holds_itself_by_a_cycle_is_released() -> None:
    gpu = Gpu(CUDA)
    gc.collect()
    before = gpu.allocated_bytes()
    gc.disable()
    try:
        cycle: list[object] = [torch.zeros(1000, device=CUDA)]
        cycle.append(cycle)
        del cycle
        assert gpu.allocated_bytes() > before
        gpu.release_cache()
        assert gpu.allocated_bytes() == before
    finally:
        gc.enable()


def fail_at_batch_3(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = DiT.forward

    def forward(self: DiT, x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        if len(x) == 3:
            raise error
        return plain(self, x, *rest)

    monkeypatch.setattr(DiT, "forward", forward)


@pytest.mark.usefixtures("small", "fake_gpu")
def test_out_of_memory_leaves_the_other_rows(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at_batch_3(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), monkeypatch)
    report = run_bench(checkpoint, "--rivals", "eager", "ditfast", "--batch", "3", "2")
    assert [(row["batch"], row["rival"]) for row in report["rows"] if row["rival"] == "ditfast"] == [(2, "ditfast")]
    assert {row["batch"] for row in report["rows"] if row["rival"] == "eager"} == {2, 3}
    (note,) = report["notes"]  # none on its graph, which was not tried
    assert "batch 3: ditfast skipped, out of memory: take a smaller batch" in note


@pytest.mark.usefixtures("small")
def test_a_lost_gpu_keeps_the_rows_before(checkpoint: Path, fake_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at_batch_3(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), monkeypatch)
    report = run_bench(checkpoint, "--rivals", "eager", "ditfast", "--batch", "2", "3", "1", status=1)
    assert {row["batch"] for row in report["rows"]} == {2}
    assert any("ditfast lost the GPU: CUDA error: an illegal memory access" in note for note in report["notes"])


@pytest.mark.usefixtures("small", "fake_gpu")
def test_the_profiler_comes_last_and_sees_no_graph(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    for name in ("capture", "energy_mj", "trace"):
        plain = getattr(Gpu, name)
        monkeypatch.setattr(Gpu, name, lambda *a, name=name, plain=plain: order.append(name) or plain(*a))
    report = run_bench(checkpoint, "--rivals", "ditfast", "--batch", "2", "1")
    assert order == 2 * ["capture", *["energy_mj"] * 4] + ["trace"]
    assert [row["launches"] is not None for row in report["rows"]] == [True, True, False, False]  # the first batch's


@pytest.mark.usefixtures("small", "fake_gpu")
def test_clocks_are_read_while_the_gpu_works(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting: list[bool] = []
    working = False
    seconds, read = timer.seconds, Gpu.clock_mhz

    def timed(*arguments: Any) -> float:
        nonlocal working
        working = True
        taken = seconds(*arguments)
        working = False
        return taken

    def clock(self: Gpu) -> int:
        waiting.append(working)
        return read(self)

    monkeypatch.setattr(timer, "seconds", timed)
    monkeypatch.setattr(Gpu, "clock_mhz", clock)
    run_bench(checkpoint, "--rivals", "ditfast")
    assert len(waiting) > 4
    assert all(waiting)


# ------------------------------------------------------------------------------------------------ defaults
@pytest.fixture
def gpu_defaults(tmp_path: Path, fake_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    find_spec = rivals.importlib.util.find_spec
    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda name: None if name == "diffusers" else find_spec(name))


@pytest.mark.usefixtures("gpu_defaults")
def test_defaults_on_a_gpu_without_diffusers() -> None:
    args = bench.parse_arguments([])
    assert (args.device, args.dtype, args.batch) == (CUDA, ["bf16"], [1, 8, 32, 128])
    assert [model for model, _ in args.models] == ["DiT-XL/2", "DiT-B/2", "DiT-S/2", "DiT-L/4", "DiT-S/8"]
    (*plans, digits), notes = bench._plans(args)
    for plan in plans:
        plain = ["eager", *["compile"] * (plan.case.batch in (1, 32)), "ditfast"]
        assert plan.rivals == [*plain, *(f"{name}+graph" for name in plain)]
    assert len(plans) == 5 * 4
    assert "compile" not in digits.rivals
    assert notes == ["diffusers: skipped, it is not installed (pip install diffusers)"]


@pytest.mark.usefixtures("gpu_defaults")
def test_what_compiles_ahead_are_plain_rivals() -> None:
    plans, _ = bench._plans(bench.parse_arguments(["--models", "DiT-S/8", "--batch", "1", "8"]))
    jobs = [(job.title, job.rival) for plan in plans[:-1] for job in plan.jobs()]
    assert jobs == [("DiT-S/8 bf16 batch 1", "compile"), *((f"DiT-S/8 bf16 batch {n}", "ditfast") for n in (1, 8))]


def test_max_autotune_and_compile_keep_to_their_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    case = rivals.random_case("tiny", TINY, 1, torch.device("cpu"), "fp32")
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: asked.append(options))
    for name in ("compile", "max-autotune"):
        case.rival(name, {})
    assert asked == [{"dynamic": False, "mode": "default"}, {"dynamic": False, "mode": "max-autotune-no-cudagraphs"}]


@pytest.mark.usefixtures("fake_gpu")
def test_weights_are_drawn_on_the_gpu_the_same_for_each_rival() -> None:
    case = rivals.random_case("tiny", TINY, 2, CUDA, "bf16")
    drawn = case.weights()
    assert {weight.device for weight in drawn.values()} == {CUDA}
    random_weights.cache_clear()
    again = case.weights()
    assert all(torch.equal(again[name], weight) for name, weight in drawn.items())
    eager, ours = case.reference(), case._loaded(ditfast.DiT)
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, eager.state_dict()[name])
        assert weight.data_ptr() != eager.state_dict()[name].data_ptr()  # else the first rival's memory would be all of theirs


def test_tables_fit_80_columns() -> None:
    names = ["eager", "compile", "max-autotune", "diffusers", "ditfast", "ditfast-swapped"]
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
        row.host_us, row.roofline_share, row.roofline_share_measured = 123456.0, 0.999, 0.999
        row.speedup_over = {other.rival: 1.23 for other in rows if other is not row}
    rows[-1].parity = False
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_tables(console, rows)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("\u2026" in line for line in lines)
    assert "RED" in "".join(lines)


# ------------------------------------------------------------------------------------------------ on a GPU
@pytest.mark.gpu
@pytest.mark.usefixtures("small")
def test_on_a_gpu_with_every_default_rival(tmp_path: Path) -> None:
    models = ["--models", "DiT-S/8:1"]
    assert bench.main(["--device", "cuda", *models, "--rounds", "5", "--out", str(tmp_path / "out")]) == 0
    rows = json.loads((tmp_path / "out/bench.json").read_text())["rows"]
    names, _ = rivals.available_rivals(bench.QUICK_RIVALS, on_gpu=True)
    assert [row["rival"] for row in rows if row["model"] == "DiT-S/8"] == names
    assert {row["rival"] for row in rows if row["model"] == "digits"} == {name for name in names if "compile" not in name}
    assert all(row["parity"] and row["launches"] for row in rows)
    if "pynvml" in sys.modules:  # else nobody tells
        assert all(row["joules_per_image"] for row in rows)


@pytest.mark.gpu
def test_a_models_graph_follows_its_arguments() -> None:
    case = rivals.digits_case("bf16", CUDA)
    with torch.inference_mode():
        plain = case.rival("ditfast", {})
        graph = case.rival("ditfast+graph", {"ditfast": plain}, Gpu(CUDA))
        x, t, y = case.inputs()
        for inputs in ((x, t, y), (x.flip(0), t.flip(0), y.flip(0))):
            torch.testing.assert_close(graph(*inputs), plain(*inputs))
