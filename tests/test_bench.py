"""The main job on small models: its files, its refusals, and that nothing wrong is ever timed."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from rich.console import Console
from support import randomize

import ditfast
from ditfast import DiT, DiTConfig, cpu
from ditfast.benchmarks import bench, rivals, timing
from ditfast.benchmarks.report import print_tables
from ditfast.benchmarks.rows import Row, fill
from ditfast.benchmarks.timing import bench_case
from ditfast.cpu import engine

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_command_writes_table_json_and_plots(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/bench.py", "--models", "DiT-S/8", "--rivals", "eager", "ditfast", "--rounds", "5"]
    command += ["--dtype", "fp32"]  # which no CPU is slow at
    command += ["--device", "cpu", "--out", str(tmp_path / "out")]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=one_thread, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for expected in ("DiT-S/8", "digits", "GFLOPs", "TFLOP/s", "x eager", "ditfast", "This will take about"):
        assert expected in done.stdout
    assert max(len(line) for line in done.stdout.splitlines() if str(tmp_path) not in line) <= 80
    assert done.stdout.isascii()  # no boxes, no progress bar
    report = json.loads((tmp_path / "out/bench.json").read_text())
    assert {"device", "cpu features", "threads", "estimated_s", "taken_s"} <= set(report["machine"])
    assert {"torch", "diffusers", "openvino", "nncf"} <= set(report["versions"])
    assert report["command"] == " ".join(["ditfast bench", *command[2:]])
    tables = (tmp_path / "out/bench.txt").read_text()
    assert all(expected in tables for expected in ("DiT-S/8 fp32 batch 1", "digits fp32 batch 64", "x eager"))
    assert max(map(len, tables.splitlines())) <= 80
    assert [(row["model"], row["rival"]) for row in report["rows"]] == [
        ("DiT-S/8", "eager"),
        ("DiT-S/8", "ditfast"),
        ("digits", "eager"),
        ("digits", "ditfast"),
    ]
    for row in report["rows"]:
        assert row["dtype"] == "fp32"
        assert row["ms_p20"] <= row["ms_median"] <= row["ms_p80"]
        assert row["images_per_s"] == pytest.approx(1e3 * row["batch"] / row["ms_median"])
        assert row["tflops_per_s"] == pytest.approx(row["gflops"] * row["batch"] / row["ms_median"])
    for plot in ("throughput.png", "ratios.png"):
        assert (tmp_path / "out" / plot).read_bytes().startswith(b"\x89PNG")


def test_a_checkpoint_alone_and_swapped_into_diffusers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = randomize(DiT(DiTConfig(depth=2, hidden_size=64, num_heads=2, input_size=8, num_classes=10)))
    arguments = ["--checkpoint", str(tmp_path / "tiny.safetensors"), "--dtype", "fp32", "--batch", "2", "--rounds", "5"]
    ditfast.save_checkpoint(model, tmp_path / "tiny.safetensors")
    rivals_wanted = ["--rivals", "eager", "ditfast", "diffusers", "ditfast-swapped"]
    assert bench.main([*arguments, *rivals_wanted, "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    rows = json.loads((tmp_path / "out/bench.json").read_text())["rows"]
    assert [(row["model"], row["rival"]) for row in rows] == [
        ("tiny.safetensors", "eager"),
        ("tiny.safetensors", "ditfast"),
        ("tiny.safetensors", "diffusers"),
        ("tiny.safetensors", "ditfast-swapped"),
    ]
    assert all(row["parity"] for row in rows)
    assert all(row["first_call_s"] > 0 for row in rows)
    assert rows[0]["allowed_error"] != rows[2]["allowed_error"]  # diffusers' arithmetic is another
    printed = capsys.readouterr().out
    assert "How many times faster than" in printed
    for only_on_a_gpu in ("launches", "roofline", "host us"):
        assert only_on_a_gpu not in printed


def test_a_bad_checkpoint_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("not weights")
    assert bench.main(["--checkpoint", str(tmp_path / "notes.txt"), "--device", "cpu", "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ditfast bench: ")


def digits_rows() -> tuple[list[Row], list[str]]:
    return bench_case(rivals.digits_case("fp32", CPU), ["eager", "ditfast"], 5, lambda phase: None)


def test_ratios_are_medians_of_each_rounds_ratio() -> None:
    (eager, fast), remarks = digits_rows()
    assert not remarks
    fill(fast, {"eager": [1.0, 2.0, 9.0, 4.0, 5.0], "ditfast": [1.0, 1.0, 3.0, 4.0, 5.0]})
    assert fast.speedup_over == {"eager": 1.0}  # of 1, 2, 3, 1, 1; the ratio of the medians would be 4/3
    assert fast.ms_median == 3e3
    assert eager.speedup_over.keys() == {"ditfast"}


def test_a_rival_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: DiT, *inputs: object) -> None:
        raise RuntimeError("no such kernel\nin 40 lines")

    monkeypatch.setattr(DiT, "forward", fail)
    (eager,), remarks = digits_rows()
    assert eager.ms_median is not None
    assert remarks == ["digits fp32 batch 64: ditfast failed: RuntimeError: no such kernel"]


def test_a_red_parity_prints_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = DiT.forward
    monkeypatch.setattr(DiT, "forward", lambda self, x, t, y: 1.01 * right(self, x, t, y))
    (eager, fast), remarks = digits_rows()
    assert eager.parity
    assert eager.ms_median is not None
    assert not fast.parity
    assert fast.ms_median is None
    assert "ditfast is off by 1.0e-02" in remarks[0]


def test_every_sample_of_a_small_model_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    right = DiT.forward

    def forward(self: DiT, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out = right(self, x, t, y).clone()
        out[len(out) // 2] *= 2
        return out

    monkeypatch.setattr(DiT, "forward", forward)
    (_, fast), _ = digits_rows()
    assert not fast.parity


def test_four_samples_of_a_large_model_are_compared() -> None:
    assert timing.compared_samples(DiTConfig.from_name("DiT-XL/2"), 32) == [0, 1, 30, 31]
    assert timing.compared_samples(DiTConfig.from_name("DiT-XL/2"), 1) == [0]


def test_compile_is_skipped_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    names, notes = rivals.available_rivals(["eager", "compile", "max-autotune", "ditfast"], on_gpu=False)
    assert names == ["eager", "ditfast"]
    assert [note.partition(":")[0] for note in notes] == ["compile", "max-autotune"]
    assert "needs a C++ compiler" in notes[0]


def test_diffusers_is_skipped_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda name: None)
    names, notes = rivals.available_rivals(["ditfast", "diffusers", "ditfast-swapped"], on_gpu=False)
    assert names == ["ditfast"]
    assert notes == ["diffusers: skipped, it is not installed (pip install diffusers)"]


def test_openvino_is_skipped_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = rivals.importlib.util.find_spec
    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda name: None if name == "nncf" else find_spec("torch"))
    names, notes = rivals.available_rivals(["openvino", "openvino-int8", "ditfast"], on_gpu=False)
    assert names == ["openvino", "ditfast"]
    assert notes == ["openvino-int8: skipped, it needs nncf (pip install 'ditfast[openvino]')"]
    names, notes = rivals.available_rivals(["openvino", "ditfast"], on_gpu=True)
    assert "openvino" not in names
    assert notes == ["openvino: skipped, it runs on CPU only"]


class FakeOpenVino(types.ModuleType):
    """Converts nothing: runs the model that it was given, in NumPy arrays."""

    def __init__(self) -> None:
        super().__init__("openvino")
        self.settings: dict[str, object] = {}

    def convert_model(
        self, model: torch.nn.Module, *, example_input: tuple[torch.Tensor, ...], input: list[torch.Size]
    ) -> object:
        assert [part.shape for part in example_input] == input
        assert not any(parameter.is_inference() for parameter in model.parameters())
        return model

    def Core(self) -> "FakeOpenVino":
        return self

    def compile_model(self, model: torch.nn.Module, device: str, settings: dict[str, object]) -> "FakeOpenVino":
        assert device == "CPU"
        self.model, self.settings = model, settings
        return self

    def create_infer_request(self) -> "FakeOpenVino":
        return self

    def infer(self, arrays: list[object], *, share_inputs: bool, share_outputs: bool) -> list[object]:
        return [self.model(*map(torch.as_tensor, arrays)).numpy()]


@pytest.mark.usefixtures("one_thread")
@torch.inference_mode()
def test_openvino_gets_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeOpenVino()
    monkeypatch.setitem(sys.modules, "openvino", fake)
    config = DiTConfig(depth=1, hidden_size=32, num_heads=2, input_size=4, num_classes=10)
    case = rivals.random_case("tiny", config, 2, torch.device("cpu"), "fp32")
    rows, notes = bench_case(case, ["eager", "openvino", "ditfast+table"], 5, lambda phase: None)
    assert notes == []
    assert [row.rival for row in rows] == ["eager", "openvino", "ditfast+table"]
    assert rows[1].error == rows[0].error
    assert all(row.ms_median for row in rows)
    assert fake.settings["INFERENCE_PRECISION_HINT"] == "f32"
    assert fake.settings["INFERENCE_NUM_THREADS"] == 1


def tiny_case() -> rivals.Case:
    config = DiTConfig(depth=2, hidden_size=64, num_heads=2, input_size=8, num_classes=10)
    return rivals.random_case("tiny", config, 2, CPU, "fp32")


@pytest.mark.skipif(cpu.found()[0] is None, reason="needs the CPU engine")
def test_int8_is_timed_beside_its_error(capsys: pytest.CaptureFixture[str]) -> None:
    rows, remarks = bench_case(tiny_case(), ["eager", *rivals.OURS], 5, lambda phase: None)
    assert remarks == []
    errors = {row.rival: row.error for row in rows}
    assert all(100 * errors["ditfast"] < errors[rival] < 0.1 for rival in ("ditfast-int8", "ditfast-int8+table"))
    assert all(row.ms_median for row in rows)
    print_tables(Console(width=80), rows)
    lines = capsys.readouterr().out.splitlines()
    assert any("ditfast-int8+table" in line and f"{errors['ditfast-int8+table']:.1e}" in line for line in lines)


def test_int8_without_an_engine_is_no_fp32_under_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "found", lambda: (None, "the CPU engine needs a C++ compiler, and 'g++' is not installed"))
    rows, remarks = bench_case(tiny_case(), ["ditfast", "ditfast-int8"], 5, lambda phase: None)
    assert [row.rival for row in rows] == ["ditfast"]
    assert len(remarks) == 1
    assert remarks[0].startswith("tiny fp32 batch 2: ditfast-int8 failed: ValueError")
    assert remarks[0].endswith("'g++' is not installed")


def test_int8_is_for_cpus() -> None:
    names, notes = rivals.available_rivals(["ditfast", *rivals.OURS_IN_INT8], on_gpu=True)
    assert names == ["ditfast", "ditfast+graph"]
    assert notes == [f"{name}: skipped, it runs on CPU only" for name in rivals.OURS_IN_INT8]


def test_diffusers_takes_adaln_zero_only(tmp_path: Path) -> None:
    config = DiTConfig(depth=1, hidden_size=64, num_heads=2, input_size=8, conditioning="in_context")
    case = rivals.random_case("tiny", config, 1, CPU, "fp32")
    args = bench.parse_arguments(["--device", "cpu", "--out", str(tmp_path)])
    assert bench._possible(case, ["eager", "diffusers", "diffusers+graph"], args) == ["eager"]


def test_cuda_adds_graphs() -> None:
    names, _ = rivals.available_rivals(["eager", "ditfast"], on_gpu=True)
    assert names == ["eager", "ditfast", "eager+graph", "ditfast+graph"]


# ------------------------------------------------------------------------------------------------ failures
@pytest.mark.parametrize(
    ("error", "words"),
    [
        pytest.param(torch.OutOfMemoryError("CUDA out of memory"), "ditfast skipped, out of memory: take", id="out of memory"),
        pytest.param(RuntimeError("cuBLAS\nin 40 lines"), "ditfast failed: RuntimeError: cuBLAS", id="anything else"),
    ],
)
@pytest.mark.parametrize("calls", [1, 4], ids=["at its first call", "while it is timed"])
def test_a_failure_costs_its_rivals_row(error: Exception, words: str, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, count = DiT.forward, []

    def forward(self: DiT, *inputs: torch.Tensor) -> torch.Tensor:
        count.append(1)
        if len(count) >= calls:
            raise error
        return plain(self, *inputs)

    monkeypatch.setattr(DiT, "forward", forward)
    finished: list[Row] = []
    rows, remarks = bench_case(tiny_case(), ["eager", "ditfast", "ditfast+table"], 5, lambda phase: None, None, finished.append)
    times = {row.rival: row.ms_median for row in rows}
    assert times["eager"] is not None
    assert times["ditfast+table"] is not None
    assert times.get("ditfast") is None
    assert finished == rows
    assert len(remarks) == 1
    assert words in remarks[0]


def test_a_lost_gpu_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: DiT, *inputs: torch.Tensor) -> torch.Tensor:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(DiT, "forward", forward)
    with pytest.raises(timing.DeviceLost, match=r"^tiny fp32 batch 2: ditfast lost the GPU: CUDA error: an illegal"):
        bench_case(tiny_case(), ["eager", "ditfast"], 5, lambda phase: None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "DiT-M/2"], "expected one of DiT-S/2"),
        (["--models", "DiT-S/2@100"], "multiples of 8"),
        (["--models", "DiT-S/4:0"], "argument --models: got '0', expected a positive integer"),
        (["--models", "DiT-S/4:"], "argument --models: got '', expected a positive integer"),
        (["--models", "DiT-S/4:8@512"], "expected a positive integer"),
        (["--batch", "0"], "positive integer"),
        (["--rounds", "3"], "at least 5"),
        (["--dtype", "int8"], "choose from"),
        (["--rivals", "magic"], "choose from"),
        (["--models", "DiT-S/2@x"], "or with @512 behind"),
        (["--device", "gpu"], "expected cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "got 'cuda:99', but"),
        (["--out", "/dev/null/results"], "expected a folder"),
    ],
)
def test_bad_values_say_what_is_allowed(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.parse_arguments(arguments)
    assert message in capsys.readouterr().err
