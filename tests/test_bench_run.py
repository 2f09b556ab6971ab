"""What bench.py runs by default, its estimate, and that files keep what was measured."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support import randomize
from torch._dynamo.utils import counters

import ditfast
from ditfast import DiTConfig
from ditfast.benchmarks import ahead, bench, estimate, rivals
from ditfast.benchmarks.precision import fix_precision
from ditfast.benchmarks.timing import bench_case
from ditfast.flops import DEVICES

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
TINY = DiTConfig(depth=1, hidden_size=64, num_heads=2, input_size=8, num_classes=10)


# ------------------------------------------------------------------------------------------------ defaults
def plans_of(tmp_path: Path, *arguments: str) -> tuple[list[bench.Plan], list[str]]:
    return bench._plans(bench.parse_arguments(["--device", "cpu", "--out", str(tmp_path), *arguments]))


@pytest.fixture(params=[True, False], ids=["diffusers", "no diffusers"])
def has_diffusers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Let diffusers seem to be installed, or not."""
    find_spec = importlib.util.find_spec
    spec = importlib.machinery.ModuleSpec("diffusers", None) if request.param else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "diffusers" else find_spec(name))
    return request.param


def test_defaults_on_cpu(has_diffusers: bool, tmp_path: Path) -> None:
    args = bench.parse_arguments(["--device", "cpu", "--out", str(tmp_path)])
    assert [model for model, _ in args.models] == ["DiT-S/8", "DiT-S/2", "DiT-B/4"]
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


def test_all_models_in_full(has_diffusers: bool, tmp_path: Path) -> None:
    plans, _ = plans_of(tmp_path, "--full")
    assert {plan.case.model for plan in plans} == {*bench.MODEL_NAMES, "DiT-XL/2@512", "digits"}
    assert all({"compile", "max-autotune"} <= set(plan.rivals) for plan in plans)
    assert {"ditfast-swapped" in plan.rivals for plan in plans} == {has_diffusers}


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
@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    ditfast.save_checkpoint(randomize(ditfast.DiT(TINY)), tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


def test_a_killed_run_has_kept_its_finished_rows(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "ditfast.benchmarks.bench", "--device", "cpu", "--dtype", "fp32", "--out", str(out)]
    command += ["--checkpoint", str(checkpoint), "--batch", "1", "8192", "--rivals", "eager", "ditfast", "--rounds", "20"]
    process = subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        end = time.monotonic() + 300
        while len(rows_in(out)) < 2 and time.monotonic() < end and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL
    rows = rows_in(out)
    assert [(row["batch"], row["rival"]) for row in rows] == [(1, "eager"), (1, "ditfast")]
    assert all(row["ms_median"] and row["speedup_over"] for row in rows)
    assert "tiny.safetensors fp32 batch 1" in (out / "bench.txt").read_text()


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
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "results_path", lambda device, date: tmp_path / "results/a-cpu-today.json")
    arguments = ["--device", "cpu", "--dtype", "fp32", "--checkpoint", str(checkpoint), "--rivals", "eager", "--rounds", "5"]
    assert bench.main([*arguments, "--save", "--out", str(tmp_path / "out")]) == 0
    saved = (tmp_path / "results/a-cpu-today.json").read_text()
    assert saved == (tmp_path / "out/bench.json").read_text()
    assert f"wrote {tmp_path / 'results/a-cpu-today.json'}" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ the estimate
def test_the_estimate_names_its_constants(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        bench.parse_arguments(["--help"])
    shown = capsys.readouterr().out
    for field in estimate.dataclasses.fields(estimate.Constants):
        assert f"  {field.name} " in shown


def test_an_estimate_follows_the_host_and_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    case = rivals.random_case("DiT-S/8", DiTConfig.from_name("DiT-S/8"), 1, CPU, "fp32")
    found = {}
    for slowness in (1, 3):
        monkeypatch.setattr(estimate, "_seconds", lambda run, slowness=slowness: slowness * estimate.PROBE_S)
        estimator = estimate.Estimator(CPU, None, 7)
        found[slowness] = (
            estimator.case(case, ["eager", "compile"]),
            estimator.start(),
            estimator.compiling([(12, False)] * 3, 2),
        )
    assert found[3][1:] == pytest.approx([3 * seconds for seconds in found[1][1:]])
    assert 2 < found[3][0] / found[1][0] < 3  # short rounds are filled up, on a fast machine more than on a slow one
    c = estimator.constants
    assert found[1][2] == c.worker_s + 2 * (c.compile_s + 12 * c.compile_block_s)  # of three alike, one process has two
    assert estimator.compiling([], 1) == 0


def test_the_default_on_a_cpu_ends_in_four_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own estimate, on two idle cores of the CPU whose constants it has."""
    milliseconds = {"DiT-S/8": 40, "DiT-S/2": 130, "DiT-B/4": 110, "digits": 42}  # of eager PyTorch, docs/cpu-bench.json
    monkeypatch.setattr(estimate, "_seconds", lambda run: estimate.PROBE_S)
    estimator = estimate.Estimator(CPU, None, 7)
    plans, _ = plans_of(tmp_path)
    estimator.timed = {
        (plan.case.config, plan.case.batch, plan.case.dtype_name): 1e-3 * milliseconds[plan.case.model] for plan in plans
    }
    jobs = [(job.blocks, False) for plan in plans for job in plan.jobs()]
    seconds = estimator.start() + sum(estimator.case(plan.case, plan.rivals) for plan in plans) + estimator.compiling(jobs, 2)
    assert len(jobs) == len(bench.QUICK_MODELS["cpu"])
    assert 60 < seconds < 200


def test_the_default_on_a_gpu_ends_in_ten_minutes() -> None:
    """By its own estimate, whose constants nothing has measured."""
    device = torch.device("cuda", 0)
    estimator = estimate.Estimator(device, DEVICES["H200"], 7)
    seconds, jobs = estimator.start(), []
    for model in bench.QUICK_MODELS["cuda"]:
        config = DiTConfig.from_name(model)
        for batch in bench.BATCHES["cuda"]:
            names = [name for name in bench.QUICK_RIVALS if name != "compile" or batch in bench.COMPILED_BATCHES]
            names += [f"{name}+graph" for name in names]
            seconds += estimator.case(rivals.random_case(model, config, batch, device, "bf16"), names)
            jobs += [(config.depth, False) for name in ("compile", "ditfast") if name in names]
    seconds += estimator.compiling(jobs, 16)
    assert 120 < seconds < 600


# ------------------------------------------------------------------------------------------------ compiling ahead
@pytest.mark.full
def test_what_another_process_compiled_is_found_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    make = functools.partial(rivals.random_case, "tiny", TINY, 2, CPU, "fp32")
    job = ahead.Job("tiny", make, "compile", 1)
    assert not ahead.is_compiled(job)
    assert list(ahead.compile_ahead([job], 1)) == [(job, None)]
    assert ahead.is_compiled(job)
    counters.clear()
    fix_precision()
    rows, remarks = bench_case(make(), ["compile"], 5, lambda phase: None)
    assert remarks == []
    assert rows[0].ms_median
    assert counters["aot_autograd"]["autograd_cache_hit"] == 1
    assert counters["inductor"]["fxgraph_cache_miss"] == 0


def test_a_job_that_fails_costs_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    job = ahead.Job("no model", functools.partial(rivals.checkpoint_case, tmp_path / "none", 1, CPU, "fp32"), "compile", 1)
    ((ended, error),) = ahead.compile_ahead([job], 1)
    assert ended == job
    assert error is not None
    assert "CheckpointError" in error
    assert not ahead.is_compiled(job)
