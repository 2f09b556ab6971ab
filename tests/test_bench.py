"""The main job on small models: its files, its refusals, and that nothing wrong is ever timed."""

import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from rich.console import Console
from support import randomize

import ditfast
from ditfast import DiT, DiTConfig, cpu
from ditfast.benchmarks import bench, estimate, rivals, timing
from ditfast.benchmarks.gpu import open_gpu
from ditfast.benchmarks.report import print_tables
from ditfast.benchmarks.rows import Row, fill
from ditfast.benchmarks.timing import bench_case
from ditfast.cpu import dispatch
from ditfast.flops import DEVICES

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
    assert max(map(len, done.stdout.splitlines()[:-4])) <= 80  # the last ones are paths
    assert done.stdout.isascii()  # no boxes, no progress bar
    report = json.loads((tmp_path / "out/bench.json").read_text())
    assert {"device", "cpu features", "threads", "estimated_s", "taken_s"} <= set(report["machine"])
    assert {"torch", "diffusers", "openvino", "nncf"} <= set(report["versions"])
    assert report["command"] == " ".join(["python", *command[1:]])
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
    assert line.startswith("bench: ")


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
    monkeypatch.setattr(dispatch, "found", lambda: (None, "the CPU engine needs a C++ compiler, and 'g++' is not installed"))
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


@pytest.mark.gpu
def test_on_a_gpu_with_every_default_rival(tmp_path: Path) -> None:
    models = ["--models", "DiT-S/8:1"]
    assert bench.main(["--device", "cuda", *models, "--rounds", "5", "--out", str(tmp_path / "out")]) == 0
    rows = json.loads((tmp_path / "out/bench.json").read_text())["rows"]
    names, _ = rivals.available_rivals(bench.QUICK_RIVALS, on_gpu=True)
    assert [row["rival"] for row in rows if row["model"] == "DiT-S/8"] == names
    assert {row["rival"] for row in rows if row["model"] == "digits"} == {name for name in names if "compile" not in name}
    assert all(row["parity"] and row["launches"] and row["joules_per_image"] for row in rows)


@pytest.mark.gpu
def test_a_graph_follows_its_arguments() -> None:
    case = rivals.digits_case("bf16", torch.device("cuda", 0))
    with torch.inference_mode():
        plain = case.rival("ditfast", {})
        graph = case.rival("ditfast+graph", {"ditfast": plain}, open_gpu(case.device))
        x, t, y = case.inputs()
        for inputs in ((x, t, y), (x.flip(0), t.flip(0), y.flip(0))):
            torch.testing.assert_close(graph(*inputs), plain(*inputs))


# ------------------------------------------------------------------------------------------------ defaults
def plans_of(tmp_path: Path, *arguments: str) -> tuple[list[bench.Plan], list[str]]:
    return bench._plans(bench.parse_arguments(["--device", "cpu", "--out", str(tmp_path), *arguments]))


@pytest.mark.parametrize("has_diffusers", [True, False])
def test_defaults_on_cpu(has_diffusers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda name: object() if has_diffusers else None)
    args = bench.parse_arguments(["--device", "cpu", "--out", str(tmp_path)])
    assert [wanted.model for wanted in args.models] == ["DiT-S/8", "DiT-S/4", "DiT-S/2", "DiT-B/4", "DiT-B/2"]
    assert args.batch == [1]
    (*models, digits), notes = plans_of(tmp_path)
    expected = ["eager", "compile", *["diffusers"] * has_diffusers, "ditfast"]
    assert all(plan.rivals == expected for plan in models)
    assert digits.rivals == [name for name in expected if name != "compile"]
    assert notes == ([] if has_diffusers else ["diffusers: skipped, it is not installed (pip install diffusers)"])


@pytest.mark.parametrize(("slow", "dtype"), [({torch.bfloat16}, "fp32"), (set(), "bf16")])
def test_bf16_is_no_default_where_it_is_slow(
    slow: set[torch.dtype], dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "SLOW_DTYPES", frozenset(slow))
    args = bench.parse_arguments(["--device", "cpu", "--out", str(tmp_path)])
    assert args.dtype == [dtype]
    assert [note.partition(",")[0] for note in args.notes] == ["dtype: fp32"] * len(slow)
    assert bench.parse_arguments(["--device", "cpu", "--out", str(tmp_path), "--dtype", "bf16"]).notes == []


def test_all_models_in_full(tmp_path: Path) -> None:
    plans, _ = plans_of(tmp_path, "--full")
    assert {plan.case.model for plan in plans} == {*bench.MODEL_NAMES, "DiT-XL/2@512", "digits"}
    assert all({"compile", "max-autotune", "ditfast-swapped"} <= set(plan.rivals) for plan in plans)


def test_torch_compile_is_asked_at_two_batches(tmp_path: Path) -> None:
    batches = ["--models", "DiT-S/8", "--batch", "1", "8", "32", "128"]
    plans, _ = plans_of(tmp_path, *batches)
    assert [plan.case.batch for plan in plans if "compile" in plan.rivals] == [1, 32]
    plans, _ = plans_of(tmp_path, *batches, "--rivals", "compile")
    assert [plan.case.batch for plan in plans] == [1, 8, 32, 128, rivals.DIGITS_BATCH]
    assert all(plan.rivals == ["compile"] for plan in plans)


def test_a_model_may_have_a_batch_of_its_own(tmp_path: Path) -> None:
    models = ["DiT-S/8", "DiT-S/4:8", "DiT-B/2@512:2"]
    plans, _ = plans_of(tmp_path, "--rivals", "eager", "--batch", "1", "3", "--models", *models)
    assert [(case.model, case.batch, case.config.input_shape[1]) for case, *_ in plans[:-1]] == [
        ("DiT-S/8", 1, 32),
        ("DiT-S/8", 3, 32),
        ("DiT-S/4", 8, 32),
        ("DiT-B/2@512", 2, 64),
    ]


# ------------------------------------------------------------------------------------------------ files
def test_a_killed_run_has_kept_its_finished_rows(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "ditfast.benchmarks.bench", "--device", "cpu", "--dtype", "fp32", "--out", str(out)]
    command += ["--models", "DiT-S/8:1", "DiT-S/8:2", "--rivals", "eager", "ditfast", "--rounds", "1000"]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 300
        while len(rows_in(out)) < 2 and time.monotonic() < end and process.poll() is None:
            time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL
    rows = rows_in(out)
    assert [(row["batch"], row["rival"]) for row in rows] == [(1, "eager"), (1, "ditfast")]
    assert all(row["ms_median"] and row["speedup_over"] for row in rows)
    assert "DiT-S/8 fp32 batch 1" in (out / "bench.txt").read_text()


def rows_in(out: Path) -> list[dict[str, object]]:
    path = out / "bench.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def test_an_older_result_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("bench-results", "bench-results-2"):
        assert bench.parse_arguments(["--device", "cpu"]).out == Path(name)
    (tmp_path / "bench-results/bench.json").write_text("{}")
    with pytest.raises(SystemExit, match="2"):
        bench.parse_arguments(["--device", "cpu", "--out", "bench-results"])
    assert "argument --out: got 'bench-results', which has bench.json of an earlier run" in capsys.readouterr().err


def test_a_saved_result_has_a_name_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "results_path", lambda device, date: tmp_path / "results/a-cpu-today.json")
    arguments = ["--device", "cpu", "--dtype", "fp32", "--models", "DiT-S/8", "--rivals", "eager", "--rounds", "5"]
    assert bench.main([*arguments, "--save", "--out", str(tmp_path / "out")]) == 0
    saved = (tmp_path / "results/a-cpu-today.json").read_text()
    assert saved == (tmp_path / "out/bench.json").read_text()
    assert f"wrote {tmp_path / 'results/a-cpu-today.json'}" in capsys.readouterr().out


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


# ------------------------------------------------------------------------------------------------ the estimate
def test_the_estimate_names_its_constants(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        bench.parse_arguments(["--help"])
    shown = capsys.readouterr().out
    for field in estimate.dataclasses.fields(estimate.Constants):
        assert f"  {field.name} " in shown


def test_the_default_on_a_gpu_ends_in_ten_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own estimate, whose constants nothing has measured."""
    device = torch.device("cuda", 0)
    estimator = estimate.Estimator(device, DEVICES["H200"], 7)
    seconds, jobs = estimator.constants.start_s, []
    for model in bench.QUICK_MODELS["cuda"]:
        config = DiTConfig.from_name(model)
        for batch in bench.BATCHES["cuda"]:
            names = [name for name in bench.QUICK_RIVALS if name != "compile" or batch in bench.COMPILED_BATCHES]
            names += [f"{name}+graph" for name in names]
            seconds += estimator.case(estimate.Work(config, batch, "bf16", names))
            jobs += [(config.depth, False) for name in ("compile", "ditfast") if name in names]
    seconds += estimator.compiling(jobs, 16)
    assert 120 < seconds < 600


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
        (["--device", "cuda:99"], "CUDA devices"),
        (["--out", "/dev/null/results"], "expected a folder"),
    ],
)
def test_bad_values_say_what_is_allowed(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.parse_arguments(arguments)
    assert message in capsys.readouterr().err
