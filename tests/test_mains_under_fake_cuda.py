"""``main`` of every bench and command on a fake H200, with each way to name the GPU.

``benchmarks/gpu_first.py`` runs under the fake in test_gpu_script.py.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_cuda
import pytest
import torch
from fake_cuda import FakeCuda
from fake_cuda.fixtures import cut_ceilings, fake_gpu
from support import outside_pytest, randomize

from ditfast import DiT, DiTConfig, load_checkpoint, save_checkpoint
from ditfast.benchmarks import bench, digits_quality, gauges, host, host_cases, sampling, training
from ditfast.cli import main
from ditfast.dispatch import selection
from ditfast.training import evaluation
from ditfast.tuning import graph_timer

__all__ = ["fake_gpu"]

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("h200", "one_thread")]

ROOT = Path(__file__).parents[1]
TINY = DiTConfig(depth=1, hidden_size=64, num_heads=2, input_size=8, num_classes=10)
DEVICES = pytest.mark.parametrize(
    "device", [[], ["--device", "cuda"], ["--device", "cuda:0"]], ids=["default", "cuda", "cuda:0"]
)
HALVES = pytest.mark.parametrize("dtype", ["bf16", "fp16"])


@pytest.fixture
def h200(fake_gpu: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """Install the fake in this process and in those that it starts, without a user's cache or torchrun's variables."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("DITFAST_TUNING", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in fake_cuda.environment().items():
        monkeypatch.setenv(name, value)
    selection.forget()
    yield fake_gpu
    selection.forget()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure peaks on small matrices, in short rounds."""
    cut_ceilings(monkeypatch)
    monkeypatch.setattr(gauges, "ENERGY_WINDOW_S", 0.01)
    monkeypatch.setattr(gauges, "MOST_COPIES", 2)
    monkeypatch.setattr("ditfast.benchmarks.timing.SHORTEST_ROUND_S", 0.001)


@pytest.fixture
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every name of a model mean a tiny one."""
    monkeypatch.setattr(DiTConfig, "from_name", classmethod(lambda cls, name, **settings: TINY))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_checkpoint(randomize(DiT(TINY)), tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


# ------------------------------------------------------------------ commands
def test_doctor(h200: FakeCuda, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "NVIDIA H200" in shown
    assert "parity with the float64 reference: relative error" in shown
    assert "on cuda:0" in shown
    assert h200.launches > 0


def sample_digits(out: Path, *arguments: str) -> None:
    assert main(["sample", "--out", str(out), "--num", "3", "--batch", "2", "--steps", "2", *arguments]) == 0
    assert len(list(out.glob("*.png"))) == 3
    assert json.loads((out / "run.json").read_text())["settings"]["device"] == "NVIDIA H200"


@DEVICES
def test_sample_into_a_folder(device: list[str], h200: FakeCuda, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample_digits(tmp_path / "images", *device)
    assert capsys.readouterr().out.endswith("seed 0, bf16\n")
    assert h200.launches > 0
    assert h200.captures > 0


@HALVES
def test_sample_in_half_precision(dtype: str, h200: FakeCuda, tmp_path: Path) -> None:
    sample_digits(tmp_path / "images", "--dtype", dtype)
    assert h200.launches > 0


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "euler", "heun", "sde"])
def test_sample_a_grid_with_each_solver(solver: str, h200: FakeCuda, tmp_path: Path) -> None:
    arguments = ["--classes", "3", "--per-class", "2", "--steps", "2", "--solver", solver, "--device", "cuda"]
    insists = [] if solver in ("ddpm", "ddim") else ["--force-solver"]  # the digits predict noise
    assert main(["sample", "--out", str(tmp_path / "grid.png"), *arguments, *insists]) == 0
    assert (tmp_path / "grid.png").exists()
    assert h200.launches > 0


def test_sample_latents_of_a_checkpoint_through_a_vae(checkpoint: Path, h200: FakeCuda, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from tiny_vae import saved

    arguments = ["--checkpoint", str(checkpoint), "--vae", str(saved(tmp_path / "vae")), "--num", "2", "--steps", "2"]
    assert main(["sample", "--out", str(tmp_path / "images"), *arguments, "--npz", "--device", "cuda"]) == 0
    assert len(list((tmp_path / "images").glob("*.png"))) == 2
    assert h200.launches > 0


def train_digits(out: Path, *arguments: str) -> list[dict[str, Any]]:
    """Return the lines of the log."""
    assert main(["train", "--data", "digits", "--batch", "4", "--steps", "2", "--out", str(out), *arguments]) == 0
    assert (out / "model.safetensors").exists()
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    return lines


@DEVICES
def test_train(device: list[str], h200: FakeCuda, tmp_path: Path) -> None:
    train_digits(tmp_path / "run", *device)
    assert h200.launches > 0


@HALVES
def test_train_in_half_precision(dtype: str, h200: FakeCuda, tmp_path: Path) -> None:
    train_digits(tmp_path / "run", "--dtype", dtype)
    assert h200.launches > 0


@pytest.mark.parametrize("option", ["--compile", "--checkpoint-activations", "--deterministic", "--accumulate=2"])
def test_train_with_an_option_to_the_same_loss(
    option: str, h200: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    plain, changed = (train_digits(tmp_path / name, *options) for name, options in (("plain", []), ("changed", [option])))
    assert changed[-1]["loss"] == pytest.approx(plain[-1]["loss"], rel=1e-4)


def test_train_resumes_samples_and_evaluates(h200: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    for name, value in (("STEPS", 2), ("DIGITS", 20), ("RECORDS", 20), ("PER_CLASS", 1)):
        monkeypatch.setattr(evaluation, name, value)
    often = [*(f"--{name}-every=2" for name in ("save", "sample", "evaluate")), "--schedule", "constant"]
    train_digits(tmp_path / "run", *often)
    arguments = ["--data", "digits", "--batch", "4", "--steps", "3", "--resume", "auto", *often]
    assert main(["train", "--out", str(tmp_path / "run"), *arguments]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3]
    assert all(line["frechet_distance"] > 0 for line in lines)
    assert (tmp_path / "run" / "samples" / "step-00000002.png").exists()


@DEVICES
def test_extract_latents(device: list[str], h200: FakeCuda, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from extraction import SIZE, photographs
    from tiny_vae import saved

    photographs(tmp_path / "photographs")
    arguments = ["--vae", str(saved(tmp_path / "vae")), "--image-size", str(SIZE), "--batch", "2", *device]
    assert main(["extract-latents", str(tmp_path / "photographs"), str(tmp_path / "latents"), *arguments]) == 0
    assert list((tmp_path / "latents").rglob("*.safetensors"))
    assert h200.launches > 0


@pytest.mark.usefixtures("tiny_models")
def test_tune(h200: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_timer, "MOST_COPIES", 1)
    monkeypatch.setattr(graph_timer, "ROUNDS", 1)
    monkeypatch.setattr(graph_timer.GraphTimer, "seconds", lambda self: time.process_time())  # on a busy machine the same tests
    assert main(["tune", "--model", "DiT-S/8", "--batch", "1", "--budget", "3"]) == 0
    (path,) = (tmp_path / "cache" / "ditfast" / "tuning").iterdir()
    assert path.name == "nvidia-h200.json"
    assert any("triton" in entry["ms"] for entry in json.loads(path.read_text())["entries"])
    assert h200.replays > 0


def test_compile(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "--arch", "sm_90", "--model", "digits", "--batch", "1", "--dtype", "fp32"]) == 0
    assert "sm_90" in capsys.readouterr().out


def test_convert(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    assert main(["convert", str(checkpoint), str(tmp_path / "dit"), "--to", "diffusers"]) == 0
    converted, original = (load_checkpoint(path).state_dict() for path in (tmp_path / "dit", checkpoint))
    assert all(torch.equal(converted[name], value) for name, value in original.items())


def test_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    arguments = ["--num", "80", "--steps", "1", "--batch", "80", "--cfg", "1", "--device", "cuda"]
    assert main(["sample", "--out", str(tmp_path / "digits"), *arguments]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "digits"), "--reference", "digits", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["count"] == 80


# ------------------------------------------------------------------ benches
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("run", [bench.main, lambda arguments: main(["bench", *arguments])], ids=["bench.py", "ditfast bench"])
def test_bench(run: Any, checkpoint: Path, h200: FakeCuda, tmp_path: Path) -> None:
    arguments = ["--checkpoint", str(checkpoint), "--batch", "2", "--dtype", "bf16", "--out", str(tmp_path / "out")]
    assert run([*arguments, "--rivals", "eager", "ditfast", "--rounds", "5"]) == 0
    rows = rows_on_the_gpu(tmp_path / "out" / "bench.json")
    assert [row["rival"] for row in rows] == ["eager", "ditfast", "eager+graph", "ditfast+graph"]
    assert all(row["launches"] > 0 for row in rows)
    assert h200.captures > 0


@DEVICES
def test_sampling(device: list[str], h200: FakeCuda, tmp_path: Path) -> None:
    arguments = ["--width", "S", "--depth", "1", "--steps", "2", "--rounds", "1", "--out", str(tmp_path), *device]
    assert sampling.main(arguments) == 0
    assert len(rows_on_the_gpu(tmp_path / "sampling.json")) > 5
    assert h200.captures > 0


@DEVICES
def test_training(device: list[str], tmp_path: Path) -> None:
    arguments = ["--models", "DiT-S/8", "--depth", "1", "--batch", "2", "--rounds", "2", "--out", str(tmp_path), *device]
    assert training.main([*arguments, "--rivals", "eager:fp32", "ditfast:bf16", "ditfast:fp32:checkpoint"]) == 0
    rows = rows_on_the_gpu(tmp_path / "training.json")
    assert len(rows) == 3
    assert all(row["peak_memory_gb"] > 0 for row in rows)


@DEVICES
def test_host(device: list[str], h200: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("layer_norm_modulate", "grouped_linear")
    monkeypatch.setattr(host_cases, "OPS", {name: host_cases.OPS[name] for name in names})
    monkeypatch.setattr(host_cases, "OP_CALLS", 2)
    assert host.main(["--quick", "--depth", "1", "--rounds", "2", "--out", str(tmp_path), *device]) == 0
    rows = rows_on_the_gpu(tmp_path / "host.json")
    assert {row["name"] for row in rows} == {"ditfast", *host_cases.CALLED, "eager", "aten.layer_norm", *names}
    assert {row["device"] for row in rows} == {"cuda"}
    assert h200.launches > 0


@pytest.mark.usefixtures("small", "tiny_models")
def test_kernels(h200: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ.keys() - outside_pytest().keys():
        monkeypatch.delenv(name)
    case = "gated_residual-forward-DiT-S/2-b8 and triton and not linear"
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "--benchmark-json", str(tmp_path / "kernels.json")]
    assert pytest.main([*options, str(ROOT / "benchmarks" / "kernels.py"), "-k", case]) == 0
    assert [row["implementation"] for row in rows_on_the_gpu(tmp_path / "kernels.json")] == ["triton"]
    assert h200.replays > 0


def test_digits_quality(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    arguments = ["--seeds", "2", "--images", "80", "--steps", "ddim2", "--variants", "bf16", "--out", str(tmp_path)]
    assert digits_quality.main(arguments) in (0, 1)  # 1: a distance of so few images is not within noise
    assert [row["variant"] for row in json.loads((tmp_path / "digits_quality.json").read_text())["rows"]] == ["fp32", "bf16"]


def rows_on_the_gpu(path: Path) -> list[dict[str, Any]]:
    report = json.loads(path.read_text())
    assert report["machine"]["device"] == "NVIDIA H200"
    return report["rows"]
