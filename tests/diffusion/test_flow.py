import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import raises_naming

from ditfast.diffusion import FlowMatching, Step, apply_update

PATHS = ["linear", "gvp"]


def alpha_sigma(path: str, t: float) -> tuple[float, float]:
    return (t, 1 - t) if path == "linear" else (math.sin(math.pi * t / 2), math.cos(math.pi * t / 2))


def rates(path: str, t: float) -> tuple[float, float]:
    """Derivatives of alpha and sigma."""
    alpha, sigma = alpha_sigma(path, t)
    return (1, -1) if path == "linear" else (math.pi / 2 * sigma, -math.pi / 2 * alpha)


@pytest.mark.parametrize("path", PATHS)
def test_noise_at_0_and_the_image_at_1(path: str) -> None:
    x0, noise = torch.randn(2, 3, 2, 4, 4)
    flow = FlowMatching(path)
    torch.testing.assert_close(flow.add_noise(x0, torch.zeros(3), noise), noise)
    torch.testing.assert_close(flow.add_noise(x0, torch.ones(3), noise), x0)


@pytest.mark.parametrize("path", PATHS)
def test_between_the_ends(path: str) -> None:
    x0, noise = torch.randn(2, 3, 2, 4, 4).double()
    times = [0.1, 0.5, 0.83]
    found = FlowMatching(path).add_noise(x0, torch.tensor(times, dtype=torch.float64), noise)
    for i, t in enumerate(times):
        alpha, sigma = alpha_sigma(path, t)
        torch.testing.assert_close(found[i], alpha * x0[i] + sigma * noise[i])


@pytest.mark.parametrize("channels", [2, 4])
@pytest.mark.parametrize("path", PATHS)
def test_loss_by_hand(path: str, channels: int) -> None:
    x0, noise = torch.randn(2, 3, 2, 4, 4).double()
    output = torch.randn(3, channels, 4, 4).double()
    t, y = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64), torch.tensor([1, 2, 3])
    flow, calls = FlowMatching(path), []

    def model(*arguments: object) -> torch.Tensor:
        calls.append(arguments)
        return output

    losses = flow.training_losses(model, x0, t, y, noise)
    ((x, told, label),) = calls
    torch.testing.assert_close(x, flow.add_noise(x0, t, noise))
    assert told is t
    assert label is y
    for i in range(3):
        alpha_rate, sigma_rate = rates(path, t[i].item())
        error = alpha_rate * x0[i] + sigma_rate * noise[i] - output[i, :2]
        assert losses["mse"][i].item() == pytest.approx(error.square().mean().item(), rel=1e-12)
    assert set(losses) == {"loss", "mse"}
    assert torch.equal(losses["loss"], losses["mse"])


def test_a_perfect_model_has_no_loss() -> None:
    x0, noise = torch.randn(2, 3, 2, 4, 4)
    losses = FlowMatching().training_losses(lambda x, t, y: x0 - noise, x0, torch.rand(3), torch.zeros(3), noise)
    assert losses["loss"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("path", PATHS)
@given(t=st.floats(0.01, 0.99), mean=st.floats(-2, 2), spread=st.floats(0.1, 2))
@settings(max_examples=30, deadline=None)
def test_score_of_normal_data(path: str, t: float, mean: float, spread: float) -> None:
    """x_t is normal, so that its score is known, and so is the velocity E[d x_t / dt | x_t]."""
    alpha, sigma = alpha_sigma(path, t)
    alpha_rate, sigma_rate = rates(path, t)
    variance = (alpha * spread) ** 2 + sigma**2
    x = torch.linspace(-3, 3, 7).double().view(7, 1, 1, 1)
    score = -(x - alpha * mean) / variance
    velocity = alpha_rate * (mean - alpha * spread**2 * score) - sigma_rate * sigma * score
    flow, times = FlowMatching(path), torch.full((7,), t, dtype=torch.float64)
    torch.testing.assert_close(flow.score(velocity, x, times), score, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(flow.velocity(score, x, times), velocity, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", PATHS)
def test_euler_adds_the_velocity(path: str) -> None:
    x, velocity = torch.randn(2, 2, 3, 4, 4).double()
    euler = FlowMatching(path, num_steps=8).euler_steps()
    assert [step.t for step in euler] == [k / 8 for k in range(8)]
    for step in euler:
        torch.testing.assert_close(apply_update(x, velocity, None, step.update), x + velocity / 8)


@pytest.mark.parametrize("path", PATHS)
def test_clip_holds_the_image_that_the_velocity_points_at(path: str) -> None:
    x0, noise = 0.5 * torch.randn(2, 2, 3, 4, 4).double()
    far = x0 * 5
    for step in FlowMatching(path, num_steps=8).euler_steps():
        alpha, sigma = alpha_sigma(path, step.t)
        alpha_rate, sigma_rate = rates(path, step.t)
        x = alpha * far + sigma * noise
        found = apply_update(x, alpha_rate * far + sigma_rate * noise, None, step.update, clip=True)
        near = far.clamp(-1, 1)
        velocity = alpha_rate * near + sigma_rate * (x - alpha * near) / sigma
        torch.testing.assert_close(found, x + velocity / 8, rtol=1e-9, atol=1e-9)


def test_heun_is_euler_with_a_correction() -> None:
    flow = FlowMatching("gvp", num_steps=3)
    heun, euler = flow.heun_steps(), flow.euler_steps()
    assert heun[::2] == euler
    assert [step.t for step in heun[1::2]] == pytest.approx([1 / 3, 2 / 3, 1])
    assert all(step.corrects and step.update == first.update for step, first in zip(heun[1::2], euler, strict=True))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("diffusion", "shape"),
    [
        ("sigma", lambda path, t: alpha_sigma(path, t)[1]),
        ("linear", lambda path, t: 1 - t),
        ("decreasing", lambda path, t: (1 + math.cos(math.pi * t)) ** 2 / 4),
        ("increasing-decreasing", lambda path, t: math.sin(math.pi * t) ** 2),
    ],
)
def test_sde_adds_drift_and_noise(path: str, diffusion: str, shape: object) -> None:
    flow = FlowMatching(path, num_steps=7)
    x, velocity, noise = torch.randn(3, 2, 3, 4, 4).double()
    sde = flow.sde_steps(diffusion, diffusion_norm=0.5, last_step=0.1)
    assert [step.t for step in sde] == pytest.approx([0.15 * k for k in range(7)])
    for step in sde:
        length = 0.1 if step is sde[-1] else 0.15
        w = 0.5 * shape(path, step.t)  # type: ignore[operator]
        drift = velocity + w * flow.score(velocity, x, torch.full((2,), step.t, dtype=torch.float64))
        expected = x + length * drift + (0 if step is sde[-1] else math.sqrt(2 * w * length)) * noise
        torch.testing.assert_close(apply_update(x, velocity, noise, step.update), expected)
    assert not sde[-1].update.adds_noise


def test_sde_without_diffusion_is_euler() -> None:
    flow = FlowMatching(num_steps=10)
    assert flow.sde_steps(diffusion_norm=0, last_step=0.1)[0] == flow.euler_steps()[0]
    assert not any(step.update.adds_noise for step in flow.sde_steps(diffusion_norm=0))


def test_a_single_step() -> None:
    flow = FlowMatching(num_steps=1)
    assert flow.euler_steps() == [Step(0.0, flow.euler_steps()[0].update, prediction="velocity")]
    (mean,) = flow.sde_steps()
    assert not mean.update.adds_noise


def test_dtypes() -> None:
    flow, t = FlowMatching("gvp"), torch.tensor([0.1, 0.6])
    x, other = torch.randn(2, 2, 3, 4, 4)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        low = x.to(dtype), other.to(dtype)
        assert flow.add_noise(low[0], t, low[1]).dtype == dtype
        assert flow.score(*low, t).dtype == dtype
        assert flow.velocity(*low, t).dtype == dtype
    losses = flow.training_losses(lambda x, t, y: other.bfloat16(), x.bfloat16(), t, t, other.bfloat16())
    assert losses["loss"].dtype == torch.float32


def test_errors_name_the_argument() -> None:
    flow, x = FlowMatching(), torch.randn(2, 3, 4, 4)
    assert "linear, gvp" in raises_naming("path", lambda: FlowMatching("vp"))
    raises_naming("num_steps", lambda: FlowMatching(num_steps=0))
    assert "sigma, linear" in raises_naming("diffusion", lambda: flow.sde_steps("sbdm"))
    for norm in (-1.0, math.nan):
        raises_naming("diffusion_norm", lambda norm=norm: flow.sde_steps(diffusion_norm=norm))
    for length in (0.0, 1.0, math.nan):
        raises_naming("last_step", lambda length=length: flow.sde_steps(last_step=length))
    assert "2 floats" in raises_naming("t", lambda: flow.add_noise(x, torch.zeros(2, dtype=torch.long), x))
    assert "2 floats" in raises_naming("t", lambda: flow.add_noise(x, torch.zeros(1), x))
    for time in (1.1, -0.1, math.nan):
        assert "[0, 1]" in raises_naming("t", lambda time=time: flow.add_noise(x, torch.full((2,), time), x))
    for wrong in (x[:, :2], x[:1]):
        message = raises_naming(
            "model", lambda wrong=wrong: flow.training_losses(lambda *_: wrong, x, torch.rand(2), torch.zeros(2))
        )
        assert "(2, 3, 4, 4) or (2, 6, 4, 4)" in message
