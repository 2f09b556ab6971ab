"""``benchmarks/training.py``: rivals begin with one loss, a rival that does not is told of, and what fails costs its row."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from ditfast.benchmarks import training
from ditfast.benchmarks.training import Rival, Training

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ["--models", "DiT-S/8", "--depth", "1", "--batch", "2", "--rounds", "2", "--device", "cpu"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_peak_memory", lambda *case: 10**9)  # else a process for each rival


def test_rivals_take_turns_from_one_loss(tmp_path: Path) -> None:
    names = ["eager:fp32", "ditfast:fp32:checkpoint"]
    assert training.main([*QUICK, "--rivals", *names, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "training.json").read_text())["rows"]
    assert [row["rival"] for row in rows] == names
    assert rows[1]["first_loss"] == pytest.approx(rows[0]["first_loss"], rel=1e-5)
    assert all(row["ms_median"] > 0 and row["mfu"] > 0 and row["peak_memory_gb"] > 0.1 for row in rows)


@pytest.mark.usefixtures("quick")
def test_another_loss_and_a_failure_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plain = Training.step

    def step(self: Training) -> float:
        if self.stepper.settings.dtype == "fp16":
            raise RuntimeError("no fp16 here\nat all")
        wrong = 1.01 if self.stepper.model.__module__ == "ditfast.model" else 1
        return wrong * plain(self)

    monkeypatch.setattr(Training, "step", step)
    assert training.main([*QUICK, "--rivals", "eager:fp32", "ditfast:fp32", "eager:fp16"]) == 1
    shown = capsys.readouterr().out
    assert "DiT-S/8: ditfast:fp32 begins with the loss" in shown
    assert "DiT-S/8: eager:fp16 failed: RuntimeError: no fp16 here\n" in shown


@pytest.mark.usefixtures("quick")
def test_a_failure_in_a_later_step_costs_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = Training.step

    def step(self: Training) -> float:
        if self.stepper.model.__module__ == "ditfast.model" and self.steps == 2:
            raise RuntimeError("no such kernel\nat all")
        return plain(self)

    monkeypatch.setattr(Training, "step", step)
    assert training.main([*QUICK, "--rivals", "ditfast:fp32", "eager:fp32", "--out", str(tmp_path)]) == 1
    report = json.loads((tmp_path / "training.json").read_text())
    assert [(row["rival"], row["speedup_over"]) for row in report["rows"]] == [("eager:fp32", {})]
    assert report["notes"] == ["DiT-S/8: ditfast:fp32 failed: RuntimeError: no such kernel"]
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


@pytest.mark.parametrize("text", ["jax:fp32", "eager:fp8", "eager:fp32:twice", "eager:fp32:checkpoint:checkpoint", ""])
def test_a_rival_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"^got .*, expected KIND:DTYPE"):
        Rival.parse(text)


def test_every_trained_parameter_carries_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the paper initialises as zero would leave most of a block without work."""
    seen: dict[str, bool] = {}

    def clip(optimizer: Any, *rest: Any) -> float:
        seen.update({str(i): bool(p.grad.any()) for i, p in enumerate(optimizer.param_groups[0]["params"])})
        return 1.0

    monkeypatch.setattr("ditfast.training.step.clip_gradients", clip)
    config = training.DiTConfig(depth=1, hidden_size=32, num_heads=2, input_size=8, num_classes=4)
    loss = Training(Rival("ditfast", "fp32", False), config, 4, training.torch.device("cpu")).step()
    assert isinstance(loss, float)
    assert not isinstance(loss, Tensor)
    assert len(seen) > 20
    assert all(seen.values())
