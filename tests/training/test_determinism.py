"""``--deterministic``: what it sets and restores. That such a run resumes to the bit is in tests/gpu/test_runs.py."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
import torch
from fake_cuda import FakeCuda
from fake_cuda.fixtures import fake_gpu
from support import randomize
from torch import Tensor

import ditfast
from ditfast import DiTConfig, cli
from ditfast.dispatch import selection
from ditfast.dispatch.backends import Choice
from ditfast.dispatch.override import current_override
from ditfast.training import Digits, RunError, Trainer, TrainSettings
from ditfast.training.determinism import WORKSPACE, deterministic

__all__ = ["fake_gpu"]
pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = DiTConfig(depth=1, hidden_size=32, num_heads=2, patch_size=2, input_size=8, in_channels=1, num_classes=10)
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
CHANCE = torch.Generator()  # which no seed of a run sets back


def train(out: Path, fixed: bool = True) -> list[Tensor]:
    """The weights after a step on the GPU."""
    torch.manual_seed(0)
    settings = TrainSettings(steps=1, batch=2, rate=1e-2, ema=(0.9,), deterministic=fixed)
    trainer = Trainer(randomize(ditfast.DiT(CONFIG)).to(CUDA), Digits(), settings, out)
    trainer.run()
    return list(trainer.model.state_dict().values())


class AddsInAnyOrder(torch.autograd.Function):
    """A library's attention, whose backward adds with atomics: no two have the same bits."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, dy: Tensor) -> Tensor:
        return dy * (1 + 1e-2 * torch.rand(dy.shape, generator=CHANCE).to(dy))


@pytest.mark.parametrize("fixed", [True, False], ids=["deterministic", "default"])
def test_no_library_s_attention_is_in_a_deterministic_step(
    fixed: bool, fake_gpu: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = torch.nn.functional.scaled_dot_product_attention

    def atomic(q: Tensor, k: Tensor, v: Tensor, **given: object) -> Tensor:
        return library(AddsInAnyOrder.apply(q), k, v, **given)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", atomic)
    decided = Choice("sdpa", "the fastest"), Choice("torch", "the fastest")
    monkeypatch.setattr(selection, "select", lambda device, shape: decided[shape.op != "attention"])
    runs = [train(tmp_path / name, fixed) for name in ("one", "two")]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True)) == fixed


def state() -> tuple[object, ...]:
    cudnn = torch.backends.cudnn
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        cudnn.deterministic,
        cudnn.benchmark,
        current_override().attention,
    )


@pytest.mark.parametrize("warn_only", [True, False], ids=["warns", "off"])
def test_settings_are_strict_inside_and_restored(warn_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    torch.use_deterministic_algorithms(warn_only, warn_only=True)
    try:
        before = state()
        with contextlib.suppress(KeyError), deterministic(CUDA):
            assert state() == (True, False, True, False, "triton")
            raise KeyError
        assert state() == before
        with deterministic(CPU):
            assert state() == (True, False, True, False, None)
    finally:
        torch.use_deterministic_algorithms(False)


def test_compiled_kernels_are_chosen_without_timing() -> None:
    from torch._inductor import config

    with deterministic(CPU, compiled=True):
        assert config.deterministic
    assert not config.deterministic


@pytest.mark.parametrize(("found", "got"), [(None, f"no {WORKSPACE} in the environment"), (":0:0", f"{WORKSPACE}=:0:0")])
def test_without_a_fixed_workspace_a_run_says_what_to_set(
    found: str | None, got: str, fake_gpu: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(WORKSPACE, raising=False)
    if found is not None:
        monkeypatch.setenv(WORKSPACE, found)
    with pytest.raises(RunError, match=f"^deterministic: got {got}, expected :4096:8: set it before the process starts$"):
        train(tmp_path / "run")
    train(tmp_path / "free", fixed=False)


def test_the_command_sets_it_and_a_resumed_run_has_to_be_the_same(
    fake_gpu: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(WORKSPACE, raising=False)
    ditfast.save_checkpoint(randomize(ditfast.DiT(CONFIG)), tmp_path / "init.safetensors")
    command = f"train --data digits --steps 1 --batch 2 --init {tmp_path}/init.safetensors --out {tmp_path}/run --resume auto"
    given = [*command.split(), "--schedule", "constant", "--device", "cuda:0"]
    assert cli.main([*given, "--deterministic"]) == 0
    assert os.environ[WORKSPACE] == ":4096:8"
    assert cli.main(given) == 2
    assert "deterministic: was true, is absent" in capsys.readouterr().err
