"""The format of results, and the settings of precision: one for all benches."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import environment
from support import outside_pytest, randomize

import ditfast
from ditfast.benchmarks import bench, digits_quality, results, sampling, training
from ditfast.benchmarks.precision import fix_precision, precision
from ditfast.benchmarks.results import Results, new_results, read, results_path, rows_as
from ditfast.files import free_path

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
SETTINGS = {
    "float32 matmul": "highest",
    "cudnn tf32": False,
    "bf16 reductions in bf16": True,
    "fp16 reductions in fp16": True,
}
RUNS = {
    "bench": (bench.main, ["--checkpoint", "tiny.safetensors", "--dtype", "fp32", "--rivals", "eager", "--rounds", "5"]),
    "sampling": (sampling.main, ["--width", "S", "--depth", "1", "--steps", "2", "--rounds", "1", "--rivals", "model"]),
    "training": (
        training.main,
        ["--models", "DiT-S/8", "--depth", "1", "--batch", "2", "--rounds", "2", "--rivals", "eager:fp32"],
    ),
}


@dataclasses.dataclass
class Row:
    rival: str
    ms: float


# ------------------------------------------------------------------------------------------------ the format
def test_what_was_written_is_read(tmp_path: Path) -> None:
    written = new_results("a bench", CPU, "python a.py")
    written.rows, written.notes = [Row("eager", 2.0), Row("ditfast", 1.0)], ["a note"]
    written.write(tmp_path / "a.json", tmp_path / "b.json")
    found = read(tmp_path / "a.json")
    assert rows_as(Row, found, tmp_path) == written.rows
    assert dataclasses.replace(found, rows=written.rows) == written
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert set(json.loads((tmp_path / "a.json").read_text())) == {field.name for field in dataclasses.fields(Results)}


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"bench": "bench", "rows": []}'], ids=["empty", "a-list", "no-fields", "some-fields"]
)
def test_another_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json: got no results .*, expected what the benches of benchmarks/ write"):
        read(tmp_path / "a.json")


def test_rows_of_another_version_are_refused(tmp_path: Path) -> None:
    written = new_results("a bench", CPU)
    written.rows = [{"rival": "eager", "seconds": 2.0}]
    with pytest.raises(ValueError, match=r"a\.json: got rows of another version \(.*seconds.*\), expected those of a Row"):
        rows_as(Row, written, tmp_path / "a.json")


def test_a_taken_name_gets_a_number(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for expected in ("a.json", "a-2.json", "a-3.json"):
        assert free_path(path).name == expected
        free_path(path).touch()


@pytest.mark.parametrize(("clone", "folder"), [(True, "clone/benchmarks/results"), (False, "here")], ids=["clone", "installed"])
def test_results_are_kept_in_a_clone_or_here(clone: bool, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("clone/benchmarks", "here"):
        (tmp_path / name).mkdir(parents=True)
    if clone:
        (tmp_path / "clone/.git").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(results, "__file__", str(tmp_path / "clone/benchmarks/results.py"))
    assert results_path("NVIDIA H200 (SXM)", "2026-11-30") == tmp_path / folder / "nvidia-h200-sxm-2026-11-30.json"


# ------------------------------------------------------------------------------------------------ precision
@pytest.fixture
def other_precision() -> Iterator[None]:
    """Settings that somebody else left, all of them other than the benches'."""
    reductions = torch.backends.cuda.matmul
    before = precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    reductions.allow_bf16_reduced_precision_reduction = reductions.allow_fp16_reduced_precision_reduction = False
    assert all(precision()[name] != value for name, value in SETTINGS.items())
    yield
    fix_precision()
    torch.set_float32_matmul_precision(str(before[0]["float32 matmul"]))
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.usefixtures("other_precision")
@pytest.mark.parametrize("name", RUNS)
def test_every_bench_has_one_precision_and_format(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ditfast.DiTConfig(depth=1, hidden_size=64, num_heads=2, input_size=8, num_classes=10)
    ditfast.save_checkpoint(randomize(ditfast.DiT(config)), tmp_path / "tiny.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "_peak_memory", lambda *case: 10**9)
    monkeypatch.setattr("ditfast.benchmarks.timing.SHORTEST_ROUND_S", 0.001)
    main, arguments = RUNS[name]
    seen = settings_at_work(monkeypatch)
    assert main([*arguments, "--device", "cpu", "--out", str(tmp_path)]) == 0
    found = read(tmp_path / f"{name}.json")
    assert found.bench == name
    assert found.rows
    assert {key: found.machine[key] for key in SETTINGS} == SETTINGS
    assert seen
    assert all(settings == SETTINGS for settings in seen)


def settings_at_work(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return a list that gets the settings of each forward of a reference model."""
    seen: list[dict[str, Any]] = []
    forward: Callable[..., Any] = ditfast.reference.DiT.forward
    monkeypatch.setattr(ditfast.reference.DiT, "forward", lambda *args: seen.append(precision()) or forward(*args))
    return seen


@pytest.mark.usefixtures("other_precision")
def test_digits_have_the_same_precision_and_format(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    arguments = ["--seeds", "2", "--images", "10", "--steps", "ddim2", "--variants", "reference", "--out", str(tmp_path)]
    digits_quality.main(arguments)
    found = read(tmp_path / "digits_quality.json")
    assert {key: found.machine[key] for key in SETTINGS} == SETTINGS


@pytest.mark.full
def test_kernels_have_the_same_precision_and_format(tmp_path: Path) -> None:
    names = "classifier_free_guidance and S/2 and b8 and not compile"
    command = [sys.executable, "-m", "pytest", "-p", "ditfast.benchmarks.gpu_first", "benchmarks/kernels.py", "-k", names]
    command += ["--benchmark-json", str(tmp_path / "kernels.json")]
    settings = {"DRY": "1", "OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env={**outside_pytest(), **environment(), **settings}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = read(tmp_path / "kernels.json")
    assert [row["implementation"] for row in found.rows] == ["eager", "triton"]
    assert {key: found.machine[key] for key in SETTINGS} == SETTINGS
