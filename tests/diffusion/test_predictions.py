"""A model of v or x0 is a model of epsilon in other words: the same samples by every solver, the same bound, its own loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import raises_naming
from torch import Tensor

from ditfast.diffusion import FlowMatching, GaussianDiffusion, Step, apply_update, betas, steps
from ditfast.diffusion.solvers import fit_steps

BAR = torch.cumprod(1 - betas("linear"), 0)
SOLVERS = [("ddpm", {}), ("ddim", {}), ("ddim", {"eta": 0.5})]
NAMES = [f"{solver}{options.get('eta', '')}" for solver, options in SOLVERS]


def epsilon_model(x: Tensor, t: Tensor) -> Tensor:
    """[B, 2C, H, W] epsilon and the variance's place, of x [B, C, H, W] at the original steps t [B]."""
    return torch.cat([torch.tanh(x + t.view(-1, 1, 1, 1) / 1000), torch.sin(x)], dim=1)


def model_of(prediction: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The same model, whose output is translated into another prediction by the papers' formulas."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        epsilon, variance = epsilon_model(x, t).chunk(2, dim=1)
        bar = BAR[t.long()].view(-1, 1, 1, 1)
        x0 = (x - (1 - bar).sqrt() * epsilon) / bar.sqrt()
        output = {"epsilon": epsilon, "x0": x0, "v": bar.sqrt() * epsilon - (1 - bar).sqrt() * x0}[prediction]
        return torch.cat([output, variance], dim=1)

    return model


def sampled(schedule: list[Step], model: Callable[[Tensor, Tensor], Tensor], clip: bool) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=generator)
    for step in schedule:
        noise = torch.randn(x.shape, dtype=x.dtype, generator=generator)
        x = apply_update(x, model(x, torch.full((2,), step.t)), noise, step.update, clip)
    return x


@pytest.mark.parametrize("clip", [False, True], ids=["free", "clipped"])
@pytest.mark.parametrize(("solver", "options"), SOLVERS, ids=NAMES)
@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_every_solver_draws_the_same_samples(prediction: str, solver: str, options: dict[str, Any], clip: bool) -> None:
    plain = steps(GaussianDiffusion("12"), solver, **options)
    expected = sampled(plain, model_of("epsilon"), clip)
    own = steps(GaussianDiffusion("12", prediction=prediction), solver, **options)
    assert {step.prediction for step in own} == {prediction}
    for schedule in (own, fit_steps(plain, prediction), fit_steps(own, prediction)):
        torch.testing.assert_close(sampled(schedule, model_of(prediction), clip), expected, rtol=1e-9, atol=1e-9)
    wrong = sampled(plain, model_of(prediction), clip)
    assert (wrong - expected).abs().max() > 1e-3  # so the comparison can fail


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_v_is_trained_on_v_with_the_same_bound(schedule: str) -> None:
    """v = alpha epsilon - sigma x0 (Salimans & Ho 2022, appendix D)."""
    bar = torch.cumprod(1 - betas(schedule), 0)
    x0, noise = torch.rand(3, 2, 4, 4).double() * 2 - 1, torch.randn(3, 2, 4, 4).double()
    t = torch.tensor([0, 40, 700])
    alpha, sigma = (value.sqrt().view(3, 1, 1, 1) for value in (bar[t], 1 - bar[t]))
    x = alpha * x0 + sigma * noise
    output = torch.randn(3, 4, 4, 4).double()
    found = GaussianDiffusion(betas=schedule, prediction="v").training_losses(lambda *_: output, x0, t, t, noise)
    expected = (alpha * noise - sigma * x0 - output[:, :2]).square().mean((1, 2, 3))
    torch.testing.assert_close(found["mse"], expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(found["loss"], found["mse"] + found["vb"], rtol=1e-12, atol=0)
    epsilon = torch.cat([alpha * output[:, :2] + sigma * x, output[:, 2:]], dim=1)
    by_epsilon = GaussianDiffusion(betas=schedule).training_losses(lambda *_: epsilon, x0, t, t, noise)
    torch.testing.assert_close(found["vb"], by_epsilon["vb"], rtol=1e-7, atol=1e-12)


def test_v_needs_no_division_where_there_is_nearly_no_signal() -> None:
    last = GaussianDiffusion([999], betas="cosine", prediction="v").ddim_steps()[0].update
    assert math.hypot(last.x0_from_x, last.x0_from_output) == pytest.approx(1)
    assert abs(last.x0_from_output) <= 1


@pytest.mark.parametrize(
    "schedule",
    [steps(FlowMatching(num_steps=2), "heun"), steps(GaussianDiffusion("2", prediction="x0"), "ddim")],
    ids=["velocity", "x0"],
)
def test_steps_of_another_prediction_are_refused(schedule: list[Step]) -> None:
    message = raises_naming("steps", lambda: fit_steps(schedule, "v"))
    assert "GaussianDiffusion(prediction='v')" in message


def test_an_epsilon_model_takes_steps_of_epsilon_or_a_flow_only() -> None:
    for schedule in (steps(FlowMatching(num_steps=2), "heun"), steps(GaussianDiffusion("2"), "ddim")):
        assert fit_steps(schedule, "epsilon") == schedule  # a file that says nothing may be of a flow's model
    for prediction in ("v", "x0"):
        schedule = steps(GaussianDiffusion("2", prediction=prediction), "ddim")
        message = raises_naming("steps", lambda schedule=schedule: fit_steps(schedule, "epsilon"))
        assert "GaussianDiffusion(prediction='epsilon')" in message
