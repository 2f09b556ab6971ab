"""`main` of every bench and command on a fake H200, with each way to name the GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_cuda
import pytest
from fake_cuda import FakeCuda
from fake_cuda.fixtures import fake_gpu

from ditfast.benchmarks import bench, digits_quality, predictions, sampling, training
from ditfast.cli import main
from ditfast.ops import decisions

__all__ = ["fake_gpu"]

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("h200", "one_thread")]

ROOT = Path(__file__).parents[1]
DEVICES = pytest.mark.parametrize(
    "device", [[], ["--device", "cuda"], ["--device", "cuda:0"]], ids=["default", "cuda", "cuda:0"]
)


@pytest.fixture
def h200(fake_gpu: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """The fake in this process and in those that it starts, without what a user's cache or torchrun says."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("DITFAST_TUNING", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, value in fake_cuda.environment().items():
        monkeypatch.setenv(name, value)
    decisions.forget()
    yield fake_gpu
    decisions.forget()


# ------------------------------------------------------------------ commands
def test_doctor(h200: FakeCuda, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "NVIDIA H200" in shown
    assert "parity with the float64 reference: relative error" in shown
    assert "on cuda:0" in shown
    assert h200.launches > 0


@DEVICES
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_sample_into_a_folder(dtype: str, device: list[str], h200: FakeCuda, tmp_path: Path) -> None:
    arguments = ["--num", "3", "--batch", "2", "--steps", "2", "--dtype", dtype, *device]
    assert main(["sample", "--out", str(tmp_path / "images"), *arguments]) == 0
    assert len(list((tmp_path / "images").glob("*.png"))) == 3
    assert json.loads((tmp_path / "images" / "run.json").read_text())["settings"]["device"] == "NVIDIA H200"
    assert h200.launches > 0


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "euler", "heun", "sde"])
def test_sample_a_grid_with_each_solver(solver: str, tmp_path: Path) -> None:
    arguments = ["--classes", "3", "--per-class", "2", "--steps", "2", "--solver", solver, "--device", "cuda"]
    assert main(["sample", "--out", str(tmp_path / "grid.png"), *arguments]) == 0
    assert (tmp_path / "grid.png").exists()


@DEVICES
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_train(dtype: str, device: list[str], h200: FakeCuda, tmp_path: Path) -> None:
    arguments = ["train", "--data", "digits", "--batch", "4", "--out", str(tmp_path / "run"), "--dtype", dtype, *device]
    assert main([*arguments, "--steps", "2"]) == 0
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert h200.launches > 0


@pytest.mark.parametrize("option", ["--compile", "--checkpoint-activations"])
def test_train_with_an_option(option: str, tmp_path: Path) -> None:
    arguments = ["--data", "digits", "--batch", "4", "--steps", "1", "--device", "cuda", option]
    assert main(["train", "--out", str(tmp_path / "run"), *arguments]) == 0


@DEVICES
def test_extract_latents(device: list[str], tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from extraction import SIZE, photographs
    from tiny_vae import saved

    photographs(tmp_path / "photographs")
    arguments = ["--vae", str(saved(tmp_path / "vae")), "--image-size", str(SIZE), "--batch", "2", *device]
    assert main(["extract-latents", str(tmp_path / "photographs"), str(tmp_path / "latents"), *arguments]) == 0


def test_tune(tmp_path: Path) -> None:
    assert main(["tune", "--model", "DiT-S/8", "--batch", "1", "--budget", "1"]) == 0
    assert list((tmp_path / "cache" / "ditfast" / "tuning").glob("nvidia-h200.json"))


def test_compile(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "--arch", "sm_90", "--model", "digits", "--batch", "1", "--dtype", "fp32"]) == 0


def test_convert(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from checkpoint_files import weights_of

    from ditfast import DiTConfig, load_checkpoint, save_checkpoint

    config = DiTConfig(depth=1, hidden_size=32, num_heads=2, input_size=8, num_classes=10)
    save_checkpoint(load_checkpoint(weights_of(config), config=config), tmp_path / "dit.safetensors")
    assert main(["convert", str(tmp_path / "dit.safetensors"), str(tmp_path / "dit"), "--to", "diffusers"]) == 0


def test_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    arguments = ["--num", "80", "--steps", "1", "--batch", "80", "--cfg", "1", "--device", "cuda"]
    assert main(["sample", "--out", str(tmp_path / "digits"), *arguments]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "digits"), "--reference", "digits", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["count"] == 80


# ------------------------------------------------------------------ benches
@DEVICES
def test_bench(device: list[str], tmp_path: Path) -> None:
    arguments = ["--models", "DiT-S/8", "--batch", "1", "--dtype", "bf16", "--out", str(tmp_path), *device]
    assert bench.main([*arguments, "--rivals", "eager", "ditfast", "--rounds", "5"]) == 0
    assert_on_the_gpu(tmp_path / "bench.json")


@DEVICES
def test_sampling(device: list[str], tmp_path: Path) -> None:
    arguments = ["--width", "S", "--depth", "1", "--steps", "2", "--rounds", "1", "--out", str(tmp_path), *device]
    assert sampling.main(arguments) == 0
    assert_on_the_gpu(tmp_path / "sampling.json")


@DEVICES
def test_training(device: list[str], tmp_path: Path) -> None:
    arguments = ["--models", "DiT-S/8", "--depth", "1", "--batch", "2", "--rounds", "1", "--out", str(tmp_path), *device]
    assert training.main([*arguments, "--rivals", "eager:fp32", "ditfast:bf16", "ditfast:fp32:checkpoint"]) == 0
    assert all(row["peak_memory_gb"] > 0 for row in assert_on_the_gpu(tmp_path / "training.json"))


def test_kernels() -> None:
    """In a process of its own, whose pytest runs the file."""
    case = "gated_residual-forward-DiT-S/2-b8"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/kernels.py", "-k", case]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_digits_quality(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    arguments = ["--seeds", "2", "--images", "80", "--steps", "ddim2", "--variants", "bf16", "--out", str(tmp_path)]
    assert digits_quality.main(arguments) in (0, 1)  # 1: a distance of so few images is not within noise
    assert [row["variant"] for row in json.loads((tmp_path / "digits_quality.json").read_text())["rows"]] == ["fp32", "bf16"]


@pytest.mark.parametrize("what", ["--inference", "--training", "--summary"])
def test_predictions(what: str, tmp_path: Path) -> None:
    assert predictions.main([what, "--out", str(tmp_path / "predictions.md")]) == 0
    assert "H100" in (tmp_path / "predictions.md").read_text()


def assert_on_the_gpu(path: Path) -> list[dict[str, Any]]:
    report = json.loads(path.read_text())
    assert report["environment"]["device"] == "NVIDIA H200"
    assert report["rows"]
    return report["rows"]
