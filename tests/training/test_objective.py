"""Losses by name against formulas in float64, and timesteps drawn by importance."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ditfast import DiTConfig
from ditfast.diffusion import GaussianDiffusion
from ditfast.training import TrainSettings
from ditfast.training.objective import ImportanceSteps, Objective, UniformSteps

CONFIG = DiTConfig(depth=1, hidden_size=16, num_heads=2, patch_size=2, input_size=4, in_channels=2, num_classes=3)


def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return torch.cat([0.3 * x + 0.1, 0.2 * x], dim=1)


@pytest.fixture
def samples() -> tuple[Tensor, Tensor, Tensor]:
    x0, noise = (torch.randn(5, 2, 4, 4, dtype=torch.float64) for _ in range(2))
    return x0, noise, torch.zeros(5, dtype=torch.int64)


def test_mse_is_the_noise_s_squared_error(samples: tuple[Tensor, Tensor, Tensor]) -> None:
    x0, noise, y = samples
    t = torch.tensor([0, 10, 500, 998, 999])
    bar = torch.tensor(np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))[t]).view(5, 1, 1, 1)
    x = bar.sqrt() * x0 + (1 - bar).sqrt() * noise
    expected = (noise - (0.3 * x + 0.1)).square().mean((1, 2, 3))
    found = Objective(TrainSettings(steps=1, loss="mse"), CONFIG).losses(model, x0, t, y, noise)
    torch.testing.assert_close(found["loss"], expected, rtol=1e-12, atol=0)
    assert list(found) == ["loss", "mse"]


@pytest.mark.parametrize("loss", ["mse", "hybrid"])
def test_the_target_is_what_the_model_predicts(loss: str, samples: tuple[Tensor, Tensor, Tensor]) -> None:
    x0, noise, y = samples
    t = torch.tensor([0, 10, 500, 998, 999])
    bar = torch.tensor(np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))[t]).view(5, 1, 1, 1)
    x = bar.sqrt() * x0 + (1 - bar).sqrt() * noise
    expected = (bar.sqrt() * noise - (1 - bar).sqrt() * x0 - (0.3 * x + 0.1)).square().mean((1, 2, 3))
    objective = Objective(TrainSettings(steps=1, loss=loss), dataclasses.replace(CONFIG, prediction="v"))
    torch.testing.assert_close(objective.losses(model, x0, t, y, noise)["mse"], expected, rtol=1e-12, atol=0)


def test_hybrid_adds_the_variational_bound(samples: tuple[Tensor, Tensor, Tensor]) -> None:
    x0, noise, y = samples
    t = torch.tensor([1, 10, 500, 998, 999])
    found = Objective(TrainSettings(steps=1), CONFIG).losses(model, x0, t, y, noise)
    torch.testing.assert_close(found["loss"], found["mse"] + found["vb"], rtol=1e-12, atol=0)
    betas = np.linspace(1e-4, 2e-2, 1000)
    bars = np.cumprod(1 - betas)
    bar, previous = (torch.tensor(b).view(5, 1, 1, 1) for b in (bars[t], bars[t - 1]))
    beta = torch.tensor(betas[t]).view(5, 1, 1, 1)
    posterior = beta * (1 - previous) / (1 - bar)
    x = bar.sqrt() * x0 + (1 - bar).sqrt() * noise
    place = (0.2 * x + 1) / 2
    log_variance = place * beta.log() + (1 - place) * posterior.log()
    difference = beta / (1 - bar).sqrt() / (1 - beta).sqrt() * ((0.3 * x + 0.1) - noise)  # of the two means
    divergence = 0.5 * (log_variance - posterior.log() - 1 + (posterior + difference.square()) / log_variance.exp())
    torch.testing.assert_close(found["vb"], divergence.mean((1, 2, 3)) / math.log(2), rtol=1e-9, atol=0)


@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_flow_is_the_velocity_s_squared_error(path: str, samples: tuple[Tensor, Tensor, Tensor]) -> None:
    x0, noise, y = samples
    t = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    a, s = (t, 1 - t) if path == "linear" else (torch.sin(t * math.pi / 2), torch.cos(t * math.pi / 2))
    da, ds = (1 + 0 * t, -1 + 0 * t) if path == "linear" else (s * math.pi / 2, -a * math.pi / 2)
    a, s, da, ds = (v.view(5, 1, 1, 1) for v in (a, s, da, ds))
    expected = (da * x0 + ds * noise - (0.3 * (a * x0 + s * noise) + 0.1)).square().mean((1, 2, 3))
    found = Objective(TrainSettings(steps=1, loss="flow", path=path), CONFIG).losses(model, x0, t, y, noise)
    torch.testing.assert_close(found["loss"], expected, rtol=1e-10, atol=0)


def test_uniform_steps_reach_both_ends() -> None:
    t, weights = UniformSteps().draw(torch.tensor([0.0, 0.5, 1 - 2**-24]))
    assert t.tolist() == [0, 500, 999]
    assert weights.tolist() == [1, 1, 1]


def filled(losses: Tensor) -> ImportanceSteps:
    """Each timestep has seen its loss ten times."""
    sampler = ImportanceSteps()
    for _ in range(ImportanceSteps.HISTORY):
        sampler.observe(torch.arange(1000), losses)
    return sampler


def test_importance_is_uniform_until_all_timesteps_were_seen_often_enough() -> None:
    sampler = filled(torch.ones(1000))
    sampler.state()["seen"][17] -= 1
    u = torch.rand(100)
    assert torch.equal(sampler.draw(u)[0], UniformSteps().draw(u)[0])


def test_importance_draws_in_proportion_to_the_loss_without_bias() -> None:
    losses = torch.linspace(0.1, 2, 1000, dtype=torch.float64)
    t, weights = filled(losses).draw((torch.arange(200_000) + 0.5) / 200_000)  # every part of [0, 1) alike
    counts = torch.bincount(t, minlength=1000) / 200_000
    expected = 0.999 * losses / losses.sum() + 0.001 / 1000
    torch.testing.assert_close(counts.double(), expected, rtol=0.1, atol=1e-5)
    assert (weights.double() * losses[t]).mean().item() == pytest.approx(losses.mean().item(), rel=1e-3)


def test_importance_looks_at_the_last_ten_losses() -> None:
    sampler = filled(torch.ones(1000))
    for _ in range(ImportanceSteps.HISTORY):
        sampler.observe(torch.tensor([3]), torch.tensor([100.0]))
    t, _ = sampler.draw(torch.rand(2000))
    assert 100 < (t == 3).sum() < 300  # 100 of 1,099


def test_losses_of_a_model_without_variance() -> None:
    config = DiTConfig(
        depth=1, hidden_size=16, num_heads=2, patch_size=2, input_size=4, in_channels=2, num_classes=3, learn_sigma=False
    )
    objective = Objective(TrainSettings(steps=1), config)
    assert isinstance(objective.process, GaussianDiffusion)
    x = torch.randn(2, 2, 4, 4)
    found = objective.losses(lambda x, t, y: x, x, torch.tensor([5, 6]), torch.tensor([0, 1]), torch.randn_like(x))
    assert list(found) == ["loss", "mse"]
