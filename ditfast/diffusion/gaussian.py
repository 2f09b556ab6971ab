"""Gaussian diffusion with an epsilon-predicting model: the training loss and the steps back.

Sources: Ho et al. 2020 (posterior), Nichol & Dhariwal 2021 (learned range of the variance, hybrid loss), Song et al. 2021
(DDIM).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .schedule import NUM_TRAIN_STEPS, betas, respaced_timesteps


class Coefficients(NamedTuple):
    """Per-sample constants of a step, each [B, 1, 1, 1]; ``bar`` is the product of all alphas up to the step."""

    bar: Tensor
    bar_previous: Tensor
    mean_from_x0: Tensor
    mean_from_x: Tensor
    log_variance_min: Tensor
    log_variance_max: Tensor
    log_variance_fixed: Tensor


class GaussianDiffusion:
    """A schedule and its steps. Every ``t`` is [B], integers, original steps in 0..999 that ``timesteps`` keeps.

    Args:
        respacing: which steps are kept (see ``respaced_timesteps``); None keeps all 1000, as training does.
        betas: ``"linear"`` (the paper's) or ``"cosine"``.
        learn_sigma: the model returns [B, 2C, H, W], noise and variance; else [B, C, H, W], noise only.

    Tensors come back in the dtype of ``x``; the arithmetic is fp32, float64 for a float64 ``x``.
    """

    def __init__(self, respacing: str | Sequence[int] | None = None, betas: str = "linear", learn_sigma: bool = True):
        self.timesteps = respaced_timesteps(respacing)
        self.learn_sigma = learn_sigma
        self._tables = {torch.device("cpu"): _coefficient_table(self.timesteps, betas)}

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """A sample of x_t given x_0: [B, C, H, W]."""
        step = self._coefficients(x0, t)
        return (step.bar.sqrt() * x0 + (1 - step.bar).sqrt() * noise).to(x0.dtype)

    def mean_variance(self, model_output: Tensor, x: Tensor, t: Tensor, clip: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """The model's Gaussian over the step before t.

        Args:
            model_output: [B, 2C, H, W] with ``learn_sigma``, else [B, C, H, W].
            x: [B, C, H, W], the noised input at t.
            clip: clamp the predicted x_0 to [-1, 1] (pixel-space models).

        Returns:
            mean, log_variance and x0, each [B, C, H, W].
        """
        step = self._coefficients(x, t)
        mean, log_variance, x0 = self._mean_variance(model_output, x, step, clip)
        return mean.to(x.dtype), log_variance.to(x.dtype), x0.to(x.dtype)

    def ddim_step(
        self, model_output: Tensor, x: Tensor, t: Tensor, eta: float = 0.0, clip: bool = False, noise: Tensor | None = None
    ) -> Tensor:
        """x at the kept step before t (x_0 at the first), [B, C, H, W]; eta=0 is deterministic, eta=1 like DDPM.

        ``noise`` [B, C, H, W] is drawn from torch's generator unless given; it is not read at eta=0.
        """
        step = self._coefficients(x, t)
        _, _, x0 = self._mean_variance(model_output, x, step, clip)
        epsilon = (x - step.bar.sqrt() * x0) / (1 - step.bar).sqrt()
        variance = (1 - step.bar_previous) / (1 - step.bar) * (1 - step.bar / step.bar_previous)
        sigma = eta * variance.sqrt()
        previous = step.bar_previous.sqrt() * x0 + (1 - step.bar_previous - sigma**2).clamp(min=0).sqrt() * epsilon
        if eta > 0:
            previous = previous + sigma * (torch.randn_like(x) if noise is None else noise)
        return previous.to(x.dtype)

    def training_losses(
        self, model: Callable[..., Tensor], x0: Tensor, t: Tensor, y: Tensor, noise: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The hybrid loss of the recipe, per sample.

        Args:
            model: called as ``model(x_t, t, y)``.
            x0: [B, C, H, W] clean latents.
            y: [B] labels.
            noise: [B, C, H, W]; drawn unless given.

        Returns:
            ``mse`` [B] on the noise; with ``learn_sigma`` also ``vb`` [B], the variational bound in bits per dimension
            with the mean detached; ``loss`` [B], their sum.
        """
        noise = torch.randn_like(x0) if noise is None else noise
        x = self.add_noise(x0, t, noise)
        output = model(x, t, y)
        step = self._coefficients(x, t)
        epsilon, variance = self._split(output, x)
        mse = (noise - epsilon).square().flatten(1).mean(1)
        if variance is None:
            return {"loss": mse, "mse": mse}
        vb = self._variational_bound(torch.cat([epsilon.detach(), variance], dim=1), x0, x, t, step)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def _variational_bound(self, output: Tensor, x0: Tensor, x: Tensor, t: Tensor, step: Coefficients) -> Tensor:
        mean, log_variance, _ = self._mean_variance(output, x, step, clip=False)
        true_mean = step.mean_from_x0 * x0 + step.mean_from_x * x
        divergence = _gaussian_kl(true_mean, step.log_variance_min, mean, log_variance)
        likelihood = -_discretized_log_likelihood(x0, mean, log_variance / 2)
        first = (t == self.timesteps[0]).view(-1, 1, 1, 1)
        return torch.where(first, likelihood, divergence).flatten(1).mean(1) / math.log(2)

    def _mean_variance(self, model_output: Tensor, x: Tensor, step: Coefficients, clip: bool) -> tuple[Tensor, Tensor, Tensor]:
        epsilon, variance = self._split(model_output, x)
        x0 = (x - (1 - step.bar).sqrt() * epsilon) / step.bar.sqrt()
        x0 = x0.clamp(-1, 1) if clip else x0
        mean = step.mean_from_x0 * x0 + step.mean_from_x * x
        if variance is None:
            return mean, step.log_variance_fixed.expand_as(mean), x0
        fraction = (variance + 1) / 2
        log_variance = fraction * step.log_variance_max + (1 - fraction) * step.log_variance_min
        return mean, log_variance, x0

    def _split(self, model_output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        channels = x.shape[1]
        expected = (x.shape[0], channels * (2 if self.learn_sigma else 1), *x.shape[2:])
        if model_output.shape != expected:
            raise ValueError(
                f"model_output: got shape {tuple(model_output.shape)}, expected {expected} "
                f"for x {tuple(x.shape)} with learn_sigma={self.learn_sigma}"
            )
        output = model_output.to(_compute_dtype(x))
        return (output[:, :channels], output[:, channels:]) if self.learn_sigma else (output, None)

    def _coefficients(self, x: Tensor, t: Tensor) -> Coefficients:
        if t.shape != x.shape[:1] or t.is_floating_point():
            raise ValueError(f"t: got {t.dtype} {tuple(t.shape)}, expected {x.shape[0]} integers, one for each sample of x")
        if t.device not in self._tables:
            self._tables[t.device] = self._tables[torch.device("cpu")].to(t.device)
        if t.device.type == "cpu" and not set(t.tolist()) <= set(self.timesteps):
            raise ValueError(
                f"t: got {t.tolist()}, expected original steps that .timesteps keeps: {_abbreviated(self.timesteps)}"
            )
        rows = self._tables[t.device][t].to(_compute_dtype(x))
        return Coefficients(*rows.view(*rows.shape, *[1] * (x.dim() - 1)).unbind(1))


def _coefficient_table(timesteps: list[int], schedule: str) -> Tensor:
    """[1000, 7] float64, in the order of ``Coefficients``; NaN where a step is not kept."""
    bar = torch.cumprod(1 - betas(schedule), dim=0)[timesteps]
    bar_previous = torch.cat([bar.new_ones(1), bar[:-1]])
    beta = 1 - bar / bar_previous
    variance = beta * (1 - bar_previous) / (1 - bar)
    # The first step's posterior variance is zero: its logarithm is taken from the second, as Nichol & Dhariwal do.
    floor = variance[1] if len(timesteps) > 1 else beta[0]
    variance = torch.cat([floor[None], variance[1:]])
    kept = Coefficients(
        bar=bar,
        bar_previous=bar_previous,
        mean_from_x0=beta * bar_previous.sqrt() / (1 - bar),
        mean_from_x=(1 - bar_previous) * (1 - beta).sqrt() / (1 - bar),
        log_variance_min=variance.log(),
        log_variance_max=beta.log(),
        log_variance_fixed=torch.cat([variance[:1], beta[1:]]).log(),
    )
    table = torch.full((NUM_TRAIN_STEPS, len(kept)), math.nan, dtype=torch.float64, device="cpu")
    table[timesteps] = torch.stack(kept, dim=1)
    return table


def _gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    difference = log_variance1 - log_variance2
    return 0.5 * (difference.exp() - 1 - difference + (mean1 - mean2).square() * torch.exp(-log_variance2))


def _discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Of 8-bit values scaled to [-1, 1]: the normal's mass over a bin of 2/255, the outer bins open."""
    inverse = torch.exp(-log_scale)
    above = torch.special.ndtr((x - mean + 1 / 255) * inverse)
    below = torch.special.ndtr((x - mean - 1 / 255) * inverse)
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return mass.clamp(min=1e-12).log()


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _abbreviated(steps: list[int]) -> str:
    return ", ".join(map(str, steps)) if len(steps) <= 8 else f"{steps[0]}, {steps[1]}, ..., {steps[-1]}"
