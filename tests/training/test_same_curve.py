"""The digits recipe with ditfast's model against the reference's: the same losses, step by step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import ditfast
from ditfast import reference
from ditfast.digits import DIGITS_CONFIG
from ditfast.training import Digits, Trainer, TrainSettings

STEPS = 200
LAST = 50  # of which the loss is averaged: both runs see the same records, timesteps and noise

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def losses(model: nn.Module, dtype: str, out: Path) -> list[float]:
    recipe = TrainSettings(steps=STEPS, batch=64, rate=1e-3, warm_up=50, ema=(0.999,), flip=False, dtype=dtype)
    Trainer(model, Digits(), recipe, out).run()
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


def new_fast() -> nn.Module:
    torch.manual_seed(0)
    return ditfast.DiT(DIGITS_CONFIG)


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses(new_fast(), "fp32", tmp_path_factory.mktemp("fast") / "run")


def test_fp32_takes_the_reference_s_losses(fast: list[float], tmp_path: Path) -> None:
    oracle = reference.DiT(DIGITS_CONFIG)
    oracle.load_state_dict(new_fast().state_dict())
    theirs = losses(oracle, "fp32", tmp_path / "run")
    assert fast[-1] < 0.3 * fast[0]
    worst = max(abs(a - b) / b for a, b in zip(fast, theirs, strict=True))
    print(f"largest relative difference of {STEPS} losses: {worst:.1e}")
    assert worst <= 1e-4


def test_bf16_ends_where_fp32_does(fast: list[float], tmp_path: Path) -> None:
    half = losses(new_fast(), "bf16", tmp_path / "run")
    ends = [sum(run[-LAST:]) / LAST for run in (fast, half)]
    print(f"mean loss of the last {LAST} steps: fp32 {ends[0]:.4f}, bf16 {ends[1]:.4f}")
    assert ends[1] == pytest.approx(ends[0], rel=0.02)
