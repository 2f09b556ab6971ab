"""Against the formulas of the papers, written out in Python's floats for single values."""

import math

import pytest
import torch
from support import raises_naming
from torch import Tensor

from ditfast.diffusion import GaussianDiffusion, betas

BAR = torch.cumprod(1 - betas("linear"), 0).tolist()
RESPACINGS = [None, "250", "ddim50", [0, 100, 999]]


def inputs(t: int, channels: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """model output, x and t for two samples, float64."""
    return torch.randn(2, 2 * channels, 4, 4).double(), torch.randn(2, channels, 4, 4).double(), torch.full((2,), t)


def alphas(diffusion: GaussianDiffusion, t: int) -> tuple[float, float]:
    """The cumulative product at a kept step and at the one before it."""
    position = diffusion.timesteps.index(t)
    return BAR[t], BAR[diffusion.timesteps[position - 1]] if position else 1.0


@pytest.mark.parametrize("respacing", RESPACINGS)
@pytest.mark.parametrize("place", [1, -1])
def test_posterior_by_hand(respacing: object, place: int) -> None:
    diffusion = GaussianDiffusion(respacing)  # type: ignore[arg-type]
    step = diffusion.timesteps[place]
    output, x, t = inputs(step)
    mean, log_variance, x0 = diffusion.mean_variance(output, x, t)
    bar, previous = alphas(diffusion, step)
    beta = 1 - bar / previous
    e, v, z = output[1, 0, 2, 3].item(), output[1, 2, 2, 3].item(), x[1, 0, 2, 3].item()
    clean = (z - math.sqrt(1 - bar) * e) / math.sqrt(bar)
    assert x0[1, 0, 2, 3].item() == pytest.approx(clean)
    expected = (math.sqrt(previous) * beta * clean + math.sqrt(1 - beta) * (1 - previous) * z) / (1 - bar)
    assert mean[1, 0, 2, 3].item() == pytest.approx(expected)
    smallest, largest = math.log(beta * (1 - previous) / (1 - bar)), math.log(beta)
    assert log_variance[1, 0, 2, 3].item() == pytest.approx((v + 1) / 2 * largest + (1 - v) / 2 * smallest)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("respacing", RESPACINGS)
def test_rows_are_those_of_a_process_with_the_respaced_betas(respacing: object, schedule: str) -> None:
    """Nichol & Dhariwal 2021, section 4: new betas from the kept products, then Ho et al.'s formulas in those betas alone."""
    diffusion = GaussianDiffusion(respacing, schedule)  # type: ignore[arg-type]
    original, product, products = betas(schedule).tolist(), 1.0, []
    for beta in original:
        product *= 1 - beta
        products.append(product)
    previous, respaced = 1.0, []
    for t in diffusion.timesteps:
        respaced.append(1 - products[t] / previous)
        previous = products[t]
    rows = diffusion.ddpm_steps()[::-1]
    assert [row.t for row in rows] == diffusion.timesteps
    bar = 1.0
    for i, (beta, (_, row, *_)) in enumerate(zip(respaced, rows, strict=True)):
        before, bar = bar, bar * (1 - beta)
        expected = (
            math.sqrt(1 / bar),
            -math.sqrt(1 / bar - 1),
            math.sqrt(before) * beta / (1 - bar),
            math.sqrt(1 - beta) * (1 - before) / (1 - bar),
            math.log((1 - before) / (1 - bar) * beta) if i else -math.inf,
            math.log(beta) if i else -math.inf,
        )
        assert tuple(row) == pytest.approx(expected, rel=1e-7, abs=1e-15)  # 1 - beta is as small as 1e-9


def test_three_rows_to_the_last_digit() -> None:
    """Computed from the 1000 linear betas with forty decimal digits."""
    last, middle, first = (step.update for step in GaussianDiffusion([0, 500, 999]).ddpm_steps())
    assert tuple(first) == pytest.approx(
        (1.0000500037503125, -0.010000500037503125, 1, 0, -math.inf, -math.inf), rel=1e-12, abs=1e-15
    )
    assert tuple(middle) == pytest.approx(
        (
            3.5852506938754506,
            -3.4429671125258226,
            0.99994156237316708,
            0.000030246525669932859,
            -9.2103488088103936,
            -0.080997972503380762,
        ),
        rel=1e-11,
    )
    assert tuple(last) == pytest.approx(
        (
            157.41045725150048,
            -157.40728081040743,
            0.27878708014168893,
            0.021005361851219980,
            -0.081468077630610834,
            -0.00051890107351271664,
        ),
        rel=1e-11,
    )


def test_first_step_takes_the_second_ones_variance() -> None:
    diffusion = GaussianDiffusion("250")
    output, x, t = inputs(0)
    output[:, 2:] = -1  # the lower end of the learned range
    _, log_variance, _ = diffusion.mean_variance(output, x, t)
    bar, previous = alphas(diffusion, diffusion.timesteps[1])
    beta = 1 - bar / previous
    assert log_variance.unique().tolist() == pytest.approx([math.log(beta * (1 - previous) / (1 - bar))])


def test_fixed_variance_without_learn_sigma() -> None:
    diffusion = GaussianDiffusion(learn_sigma=False)
    output, x, t = inputs(400)
    _, log_variance, _ = diffusion.mean_variance(output[:, :2], x, t)
    assert log_variance.unique().tolist() == pytest.approx([math.log(betas("linear")[400].item())])


def test_fixed_variance_in_every_row() -> None:
    for row in GaussianDiffusion("250", learn_sigma=False).ddpm_steps():
        assert row.update.log_variance_min == row.update.log_variance_max


def test_ddpm_draws_from_the_models_gaussian() -> None:
    diffusion = GaussianDiffusion("250")
    output, x, t = inputs(diffusion.timesteps[7])
    mean, log_variance, _ = diffusion.mean_variance(output, x, t)
    noise = torch.randn_like(x)
    torch.testing.assert_close(diffusion.ddpm_step(output, x, t, noise=noise), mean + (log_variance / 2).exp() * noise)
    torch.manual_seed(3)
    drawn = diffusion.ddpm_step(output, x, t)
    torch.manual_seed(3)
    assert torch.equal(drawn, diffusion.ddpm_step(output, x, t, noise=torch.randn_like(x)))


def test_ddpm_ends_at_the_mean() -> None:
    diffusion = GaussianDiffusion("250")
    output, x, _ = inputs(0)
    t = torch.tensor([0, diffusion.timesteps[1]])
    mean, _, x0 = diffusion.mean_variance(output, x, t)
    previous = diffusion.ddpm_step(output, x, t)
    torch.testing.assert_close(previous[0], mean[0])
    torch.testing.assert_close(previous[0], x0[0])
    assert not torch.allclose(previous[1], mean[1])


@pytest.mark.parametrize("clip", [False, True])
def test_x0_prediction_is_the_same_step(clip: bool) -> None:
    output, x, t = inputs(500)
    by_epsilon, by_x0 = (GaussianDiffusion("ddim50", prediction=prediction) for prediction in ("epsilon", "x0"))
    _, _, x0 = by_epsilon.mean_variance(output, x, t)
    direct, noise = torch.cat([x0, output[:, 2:]], dim=1), torch.randn_like(x)
    for step in ("ddpm_step", "ddim_step"):
        expected = getattr(by_epsilon, step)(output, x, t, clip=clip, noise=noise)
        torch.testing.assert_close(getattr(by_x0, step)(direct, x, t, clip=clip, noise=noise), expected)


def test_x0_prediction_is_trained_on_x0() -> None:
    by_epsilon, by_x0 = (GaussianDiffusion(prediction=prediction) for prediction in ("epsilon", "x0"))
    x0, noise = torch.rand(2, 3, 1, 4, 4).double() * 2 - 1
    t, y = torch.tensor([0, 300, 999]), torch.zeros(3)
    output = torch.randn(3, 2, 4, 4).double()
    _, _, predicted = by_epsilon.mean_variance(output, by_epsilon.add_noise(x0, t, noise), t)
    direct = torch.cat([predicted, output[:, 1:]], dim=1)
    losses = by_x0.training_losses(lambda x, t, y: direct, x0, t, y, noise)
    torch.testing.assert_close(losses["mse"], (x0 - predicted).square().flatten(1).mean(1))
    torch.testing.assert_close(losses["vb"], by_epsilon.training_losses(lambda x, t, y: output, x0, t, y, noise)["vb"])


def test_clip() -> None:
    output, x, t = inputs(900)
    _, _, x0 = GaussianDiffusion().mean_variance(output, x, t, clip=True)
    assert x0.min() == -1
    assert x0.max() == 1


def test_ddim_by_hand() -> None:
    diffusion = GaussianDiffusion("ddim50")
    output, x, t = inputs(500)
    noise = torch.randn_like(x)
    bar, previous = alphas(diffusion, 500)
    e, z, n = output[0, 1, 0, 0].item(), x[0, 1, 0, 0].item(), noise[0, 1, 0, 0].item()
    clean = (z - math.sqrt(1 - bar) * e) / math.sqrt(bar)
    plain = diffusion.ddim_step(output, x, t)[0, 1, 0, 0].item()
    assert plain == pytest.approx(math.sqrt(previous) * clean + math.sqrt(1 - previous) * e)
    sigma = 0.7 * math.sqrt((1 - previous) / (1 - bar)) * math.sqrt(1 - bar / previous)
    noisy = diffusion.ddim_step(output, x, t, eta=0.7, noise=noise)[0, 1, 0, 0].item()
    assert noisy == pytest.approx(math.sqrt(previous) * clean + math.sqrt(1 - previous - sigma**2) * e + sigma * n)


def test_deterministic_ddim_neither_draws_nor_reads_noise() -> None:
    diffusion = GaussianDiffusion("ddim50")
    output, x, t = inputs(500)
    generator = torch.get_rng_state()
    previous = diffusion.ddim_step(output, x, t)
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(diffusion.ddim_step(output, x, t, noise=x * math.nan), previous)


def test_ddim_ends_at_x0() -> None:
    diffusion = GaussianDiffusion("ddim50")
    output, x, t = inputs(0)
    _, _, x0 = diffusion.mean_variance(output, x, t)
    torch.testing.assert_close(diffusion.ddim_step(output, x, t), x0)
    torch.testing.assert_close(diffusion.ddim_step(output, x, t, eta=1.0), x0)


@pytest.mark.parametrize("respacing", RESPACINGS)
def test_ddim_with_the_true_noise_walks_back_exactly(respacing: object) -> None:
    diffusion = GaussianDiffusion(respacing, learn_sigma=False)  # type: ignore[arg-type]
    x0, noise = torch.randn(2, 2, 3, 4, 4).double()
    x = diffusion.add_noise(x0, torch.full((2,), 999 if respacing != "ddim50" else 980), noise)
    for step in reversed(diffusion.timesteps):
        x = diffusion.ddim_step(noise, x, torch.full((2,), step))
    torch.testing.assert_close(x, x0)


def test_loss_is_the_hybrid() -> None:
    diffusion = GaussianDiffusion()
    x0, noise = torch.rand(2, 3, 1, 4, 4).double() * 2 - 1
    t = torch.tensor([0, 300, 999])
    output = torch.randn(3, 2, 4, 4).double().requires_grad_()
    losses = diffusion.training_losses(lambda x, t, y: output, x0, t, torch.zeros(3), noise)
    torch.testing.assert_close(losses["mse"], (noise - output[:, :1]).square().flatten(1).mean(1))
    torch.testing.assert_close(losses["loss"], losses["mse"] + losses["vb"])
    epsilon_gradient, variance_gradient = torch.autograd.grad(losses["vb"].sum(), output)[0].chunk(2, dim=1)
    assert not epsilon_gradient.any(), "the variational bound must not train the mean"
    assert variance_gradient.all()


def test_variational_bound_by_hand() -> None:
    """One value an image: the KL of two normals in bits, and at t = 0 the mass of an 8-bit bin."""
    diffusion = GaussianDiffusion()
    x0, noise = torch.tensor([0.2, 0.2]).double().view(2, 1, 1, 1), torch.tensor([0.5, 0.5]).double().view(2, 1, 1, 1)
    output = torch.tensor([[0.4, 0.3], [0.4, 0.3]]).double().view(2, 2, 1, 1)
    t = torch.tensor([300, 0])
    x = diffusion.add_noise(x0, t, noise)
    vb = diffusion.training_losses(lambda x, t, y: output, x0, t, torch.zeros(2), noise)["vb"].tolist()
    mean, log_variance, _ = (v.flatten().tolist() for v in diffusion.mean_variance(output, x, t))
    bar, previous = alphas(diffusion, 300)
    beta = 1 - bar / previous
    true_mean = (math.sqrt(previous) * beta * 0.2 + math.sqrt(1 - beta) * (1 - previous) * x[0].item()) / (1 - bar)
    true_log = math.log(beta * (1 - previous) / (1 - bar))
    gap = log_variance[0] - true_log
    kl = 0.5 * (gap + (math.exp(true_log) + (true_mean - mean[0]) ** 2) / math.exp(log_variance[0]) - 1)
    assert vb[0] == pytest.approx(kl / math.log(2))
    scale = math.exp(log_variance[1] / 2)
    upper, lower = (0.5 * (1 + math.erf((0.2 + side / 255 - mean[1]) / scale / math.sqrt(2))) for side in (1, -1))
    assert vb[1] == pytest.approx(-math.log2(max(upper - lower, 1e-12)), rel=1e-6)


def test_perfect_model_has_no_loss() -> None:
    diffusion = GaussianDiffusion(learn_sigma=False)
    x0, noise = torch.randn(2, 3, 1, 4, 4)
    losses = diffusion.training_losses(lambda x, t, y: noise, x0, torch.tensor([0, 5, 999]), torch.zeros(3), noise)
    assert losses["loss"].tolist() == [0, 0, 0]
    assert "vb" not in losses


def test_dtypes() -> None:
    diffusion = GaussianDiffusion("ddim50")
    output, x, t = inputs(500)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert diffusion.ddim_step(output.to(dtype), x.to(dtype), t).dtype == dtype
        assert all(part.dtype == dtype for part in diffusion.mean_variance(output.to(dtype), x.to(dtype), t))
    single = diffusion.ddim_step(output.float(), x.float(), t)
    torch.testing.assert_close(single.double(), diffusion.ddim_step(output, x, t), rtol=1e-5, atol=1e-5)


def test_errors_name_the_argument() -> None:
    diffusion = GaussianDiffusion("ddim50")
    output, x, t = inputs(500)
    assert ".timesteps keeps: 0, 20" in raises_naming("t", lambda: diffusion.ddim_step(output, x, t + 1))
    assert "2 integers" in raises_naming("t", lambda: diffusion.ddim_step(output, x, t[:1]))
    assert "2 integers" in raises_naming("t", lambda: diffusion.ddim_step(output, x, t.float()))
    assert "(2, 4, 4, 4)" in raises_naming("model_output", lambda: diffusion.ddim_step(output[:, :2], x, t))
    for step in (diffusion.mean_variance, diffusion.ddpm_step):
        assert "(2, 4, 4, 4)" in raises_naming("model_output", lambda step=step: step(output[:, :2], x, t))
        assert ".timesteps keeps: 0, 20" in raises_naming("t", lambda step=step: step(output, x, t + 1))
    for eta in (-0.1, 1.1, math.nan):
        raises_naming("eta", lambda eta=eta: diffusion.ddim_step(output, x, t, eta=eta))
    assert "epsilon, x0, v" in raises_naming("prediction", lambda: GaussianDiffusion(prediction="velocity"))
    raises_naming("betas", lambda: GaussianDiffusion(betas="sqrt"))
    raises_naming("respacing", lambda: GaussianDiffusion("ddim51"))
