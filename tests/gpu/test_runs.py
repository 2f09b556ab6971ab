"""Whole runs on a device: sampling with a graph and without, training that resumes, and what they leave in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from devices import Place, growth, inputs, new_model
from support import randomize

from ditfast import DiT, DiTConfig
from ditfast.diffusion import GaussianDiffusion, steps
from ditfast.modulation_table import offloaded_conditioning
from ditfast.sampling import Sampler
from ditfast.sampling.run import Run
from ditfast.training import Digits, RunOptions, Trainer, TrainSettings
from ditfast.training.data import Record

DDPM = steps(GaussianDiffusion("6"), "ddpm")
LABELS = torch.tensor([0, 3, 4])
TOKENS_256 = DiTConfig(depth=1, hidden_size=32, num_heads=2, patch_size=2, input_size=32, in_channels=1, num_classes=10)


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


class LargeDigits(Digits):
    """The digits at 32x32."""

    input_shape = (1, 32, 32)

    def __getitem__(self, index: int) -> Record:
        record = super().__getitem__(index)
        return record._replace(values=record.values.repeat_interleave(4, -1).repeat_interleave(4, -2))


class Killed(Exception):
    pass


def kill(report: object, done: int, speed: object) -> None:
    if done == 2:
        raise Killed


def train(place: Place, out: Path, dtype: str, resume: bool = False, on_step: Callable[..., None] = lambda *_: None) -> Trainer:
    """Three steps, saved after each."""
    torch.manual_seed(0)
    settings = TrainSettings(steps=3, batch=2, rate=1e-2, ema=(0.9,), dtype=dtype, deterministic=True)
    model = randomize(DiT(TOKENS_256)).to(place.device)
    trainer = Trainer(model, LargeDigits(), settings, out, RunOptions(save_every=1), on_step=on_step)
    trainer.run(resume)
    return trainer


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_a_deterministic_run_killed_and_resumed_has_the_same_bits(dtype: str, place: Place, tmp_path: Path) -> None:
    whole = train(place, tmp_path / "whole", dtype)
    with pytest.raises(Killed):
        train(place, tmp_path / "killed", dtype, on_step=kill)
    again = train(place, tmp_path / "killed", dtype, resume=True)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), name
    for name, average in whole.averages.by_decay[0.9].items():
        assert torch.equal(average, again.averages.by_decay[0.9][name]), name
    assert (tmp_path / "whole" / "log.jsonl").read_bytes() == (tmp_path / "killed" / "log.jsonl").read_bytes()
