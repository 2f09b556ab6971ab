"""Whole runs on a device: sampling with a graph and without, training that resumes, and what they leave in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from devices import Place, growth, inputs, new_model

from ditfast import DiT, DiTConfig
from ditfast.diffusion import GaussianDiffusion, steps
from ditfast.modulation_table import offloaded_conditioning
from ditfast.sampling import Sampler
from ditfast.sampling.run import Run
from ditfast.training import Digits, RunOptions, Trainer, TrainSettings

DDPM = steps(GaussianDiffusion("6"), "ddpm")
LABELS = torch.tensor([0, 3, 4])
TINY = DiTConfig(depth=2, hidden_size=32, num_heads=2, input_size=8, in_channels=1, num_classes=10)


def new_sampler(model: DiT, graphs: bool = True) -> Sampler:
    sampler = Sampler(model, DDPM)
    if not graphs:
        run: Run = sampler._run
        run.advance, run.predict = run._advance, run._predict
    return sampler


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_sampling_with_a_graph_and_without_has_the_same_bits(dtype: torch.dtype, place: Place) -> None:
    model = new_model(place, dtype)
    plain = new_sampler(model, graphs=False)(LABELS, cfg_scale=4.0)
    sampler = new_sampler(model)
    assert plain.isfinite().all()
    for _ in range(2):  # the second replays what the first has captured
        assert torch.equal(sampler(LABELS, cfg_scale=4.0), plain)


def test_sampling_leaves_nothing(place: Place) -> None:
    sampler = new_sampler(new_model(place, torch.bfloat16))
    blocks = 1 + place.many // len(DDPM)
    assert growth(type(place)(many=blocks), lambda: sampler(LABELS, cfg_scale=4.0)) == 0


def test_training_steps_leave_nothing(place: Place) -> None:
    model, (x, t, y) = new_model(place).train(), inputs(place)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        with torch.autocast(place.device.type, torch.bfloat16):
            loss = model(x, t, y).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    assert growth(place, step) == 0


def test_offloaded_conditioning_frees_its_memory(place: Place) -> None:
    model = new_model(place)
    weights = sum(parameter.nbytes for linear in model.adaln_linears() for parameter in linear.parameters())
    before = place.allocated()
    with offloaded_conditioning(model):
        freed = before - place.allocated()
    assert freed >= (weights if place.device.type == "cuda" else 0)  # from a CPU's memory to the host's nothing moves
    assert place.allocated() <= before


def train(place: Place, out: Path, dtype: str, steps: int, resume: bool = False) -> Trainer:
    torch.manual_seed(0)
    settings = TrainSettings(steps=steps, batch=8, rate=1e-3, ema=(0.9,), dtype=dtype)
    model = DiT(TINY).to(place.device)
    trainer = Trainer(model, Digits(), settings, out, RunOptions(save_every=5))
    trainer.run(resume)
    return trainer


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_a_resumed_run_is_the_same_to_the_bit(dtype: str, place: Place, tmp_path: Path) -> None:
    """20 steps at once, and 10 and 10."""
    whole = train(place, tmp_path / "whole", dtype, 20)
    train(place, tmp_path / "parts", dtype, 10)
    parts = train(place, tmp_path / "parts", dtype, 20, resume=True)
    assert whole.skipped <= 2  # of fp16, whose scale has to be found
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, parts.model.state_dict()[name]), name
    for name, average in whole.averages.by_decay[0.9].items():
        assert torch.equal(average, parts.averages.by_decay[0.9][name]), name
