"""Solvers on normal data, where the perfect model is known.

Every x stays normal and every step is affine in x, so that the mean and the deviation of the samples follow without sampling.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ditfast.diffusion import FlowMatching, GaussianDiffusion, Step, apply_update, betas, steps

MEAN, DEVIATION = 0.7, 0.4
Model = Callable[[Tensor, float], Tensor]
Moments = tuple[float, float]  # mean, deviation
BARS = {schedule: torch.cumprod(1 - betas(schedule), 0).tolist() for schedule in ("linear", "cosine")}


def velocity_model(path: str) -> Model:
    """E[d x_t / dt | x_t]."""

    def model(x: Tensor, t: float) -> Tensor:
        angle = math.pi * t / 2
        alpha, sigma = (t, 1 - t) if path == "linear" else (math.sin(angle), math.cos(angle))
        alpha_rate, sigma_rate = (1, -1) if path == "linear" else (math.pi / 2 * sigma, -math.pi / 2 * alpha)
        slope = (alpha_rate * alpha * DEVIATION**2 + sigma_rate * sigma) / (alpha**2 * DEVIATION**2 + sigma**2)
        return alpha_rate * MEAN + slope * (x - alpha * MEAN)

    return model


def marginal(schedule: str, t: float) -> Moments:
    """Of x_t."""
    bar = BARS[schedule][int(t)]
    return math.sqrt(bar) * MEAN, math.sqrt(bar * DEVIATION**2 + 1 - bar)


def gaussian_model(schedule: str, prediction: str = "epsilon") -> Model:
    """E[epsilon | x_t], or E[x0 | x_t]."""

    def model(x: Tensor, t: float) -> Tensor:
        bar = BARS[schedule][int(t)]
        mean, deviation = marginal(schedule, t)
        standardised = (x - mean) / deviation**2
        if prediction == "epsilon":
            return math.sqrt(1 - bar) * standardised
        return MEAN + math.sqrt(bar) * DEVIATION**2 * standardised

    return model


def walk(model: Model, walked: list[Step], x: Tensor, draw: Callable[[Tensor], Tensor] = torch.zeros_like) -> Tensor:
    """The sampling loop, with Heun's second halves."""
    before = output_before = torch.empty(0)
    for step in walked:
        output = model(x, step.t)
        start = before if step.corrects else x
        before, output_before, output = x, output, (output + output_before) / 2 if step.corrects else output
        x = apply_update(start, output, draw(x), step.update)
    return x


def moments(model: Model, walked: list[Step], start: Moments) -> Moments:
    """Of the samples: each stretch of steps up to one that adds noise maps x to slope * x + offset."""
    mean, variance = start[0], start[1] ** 2
    stretch: list[Step] = []
    for step in walked:
        stretch.append(step)
        if step.update.adds_noise or step is walked[-1]:
            offset, end = walk(model, stretch, torch.tensor([0.0, 1.0]).double().view(2, 1, 1, 1)).flatten().tolist()
            slope = end - offset
            mean, variance = slope * mean + offset, slope**2 * variance + math.exp(step.update.log_variance_max)
            stretch = []
    return mean, math.sqrt(variance)


def errors(model: Model, walked: list[Step], start: Moments = (0.0, 1.0)) -> Moments:
    mean, deviation = moments(model, walked, start)
    return abs(mean - MEAN), abs(deviation - DEVIATION)


def from_last(diffusion: GaussianDiffusion, schedule: str) -> Moments:
    return marginal(schedule, diffusion.timesteps[-1])


# ------------------------------------------------------------------------------------------------ Gaussian diffusion
SAMPLERS: list[tuple[str, dict[str, float], float]] = [
    ("ddim", {}, 1.5e-3),
    ("ddim", {"eta": 0.5}, 2e-3),
    ("ddim", {"eta": 1.0}, 4e-3),
    ("ddpm", {}, 1e-3),
]


@pytest.mark.parametrize("prediction", ["epsilon", "x0"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("solver", "options", "bound"), SAMPLERS)
def test_a_thousand_steps(solver: str, options: dict[str, float], bound: float, schedule: str, prediction: str) -> None:
    """The mean is exact at any step size, since the mean of x_t is; the deviation within the first order of 1/1000."""
    diffusion = GaussianDiffusion(None, schedule, learn_sigma=False, prediction=prediction)
    walked = steps(diffusion, solver, **options)
    mean, deviation = errors(gaussian_model(schedule, prediction), walked, from_last(diffusion, schedule))
    assert mean < 1e-9
    assert deviation < bound


@pytest.mark.parametrize(("solver", "options", "bound"), SAMPLERS)
def test_the_error_is_of_first_order(solver: str, options: dict[str, float], bound: float) -> None:
    few, many = (GaussianDiffusion(respacing, learn_sigma=False) for respacing in ("ddim125", "ddim500"))
    coarse, fine = (
        errors(gaussian_model("linear"), steps(diffusion, solver, **options), from_last(diffusion, "linear"))[1]
        for diffusion in (few, many)
    )
    assert coarse / fine == pytest.approx(4, rel=0.25)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("respacing", ["250", "ddim10", [0, 100, 999]])
def test_ddpm_with_the_best_variance_is_exact(respacing: str | list[int], schedule: str) -> None:
    """The variance of x_previous given x_t lies in the learned range; with it few steps lose nothing but the last noise."""
    diffusion = GaussianDiffusion(respacing, schedule)
    model = gaussian_model(schedule)
    mean, deviation = from_last(diffusion, schedule)
    for step in diffusion.ddpm_steps():
        bar, spread = BARS[schedule][int(step.t)], marginal(schedule, step.t)[1]
        of_x0 = (1 - bar) * (DEVIATION / spread) ** 2  # the variance of x0 given x_t
        if step.update.adds_noise:
            low, high = step.update[4:]
            best = math.log(math.exp(low) + step.update.from_x0**2 * of_x0)
            assert low <= best <= high
            v = 2 * (best - low) / (high - low) - 1
        else:
            best, v = -math.inf, 0.0
        x = torch.tensor([0.0, 1.0]).double().view(2, 1, 1, 1)
        output = torch.cat([model(x, step.t), torch.full_like(x, v)], dim=1)
        offset, end = apply_update(x, output, torch.zeros_like(x), step.update).flatten().tolist()
        noise = apply_update(x, output, torch.ones_like(x), step.update)[0].item() - offset
        mean = (end - offset) * mean + offset
        deviation = math.hypot((end - offset) * deviation, noise)
    assert mean == pytest.approx(MEAN, abs=1e-9)
    assert deviation == pytest.approx(math.sqrt(DEVIATION**2 - of_x0), abs=1e-9)


def test_fp32_follows_float64() -> None:
    walked = GaussianDiffusion("250", learn_sigma=False).ddim_steps()
    x = torch.randn(64, 1, 4, 4)
    exact = walk(gaussian_model("linear"), walked, x.double())
    torch.testing.assert_close(walk(gaussian_model("linear"), walked, x).double(), exact, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------ flow matching
PATHS = ["linear", "gvp"]


@pytest.mark.parametrize("path", PATHS)
def test_heun_beats_euler_at_equal_evaluations(path: str) -> None:
    model = velocity_model(path)
    euler, heun = FlowMatching(path, 80).euler_steps(), FlowMatching(path, 40).heun_steps()
    assert len(euler) == len(heun) == 80
    euler_error, heun_error = (max(errors(model, walked)) for walked in (euler, heun))
    assert euler_error < 1e-2
    assert heun_error < euler_error / 10


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_the_solver(solver: str, order: int, path: str) -> None:
    coarse, fine = (max(errors(velocity_model(path), steps(FlowMatching(path, count), solver))) for count in (50, 100))
    assert coarse / fine == pytest.approx(2**order, rel=0.1)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("diffusion", ["sigma", "linear", "decreasing", "increasing-decreasing"])
def test_sde(diffusion: str, path: str) -> None:
    """Within the bias of the last step, which shrinks with it; the noise of a wrong variance would not."""
    model = velocity_model(path)
    assert max(errors(model, FlowMatching(path, 250).sde_steps(diffusion))) < 0.011
    assert max(errors(model, FlowMatching(path, 1000).sde_steps(diffusion, last_step=1e-3))) < 1e-3


def test_sde_by_sampling() -> None:
    generator = torch.Generator().manual_seed(0)
    walked = FlowMatching(num_steps=100).sde_steps()
    x = torch.randn(100, 1, 16, 16, generator=generator)
    samples = walk(velocity_model("linear"), walked, x, lambda x: torch.randn(x.shape, generator=generator))
    mean, deviation = moments(velocity_model("linear"), walked, (0.0, 1.0))
    standard_error = DEVIATION / math.sqrt(samples.numel())
    assert samples.mean().item() == pytest.approx(mean, abs=4 * standard_error)
    assert samples.std().item() == pytest.approx(deviation, abs=4 * standard_error / math.sqrt(2))
    assert deviation == pytest.approx(DEVIATION, abs=0.01)


def test_ddpm_by_sampling() -> None:
    torch.manual_seed(0)
    diffusion = GaussianDiffusion("100", learn_sigma=False)
    model = gaussian_model("linear")
    x = torch.randn(100, 1, 16, 16)
    for t in reversed(diffusion.timesteps):
        x = diffusion.ddpm_step(model(x, t), x, torch.full((100,), t))
    mean, deviation = moments(model, diffusion.ddpm_steps(), (0.0, 1.0))
    standard_error = DEVIATION / math.sqrt(x.numel())
    assert x.mean().item() == pytest.approx(mean, abs=4 * standard_error)
    assert x.std().item() == pytest.approx(deviation, abs=4 * standard_error / math.sqrt(2))
