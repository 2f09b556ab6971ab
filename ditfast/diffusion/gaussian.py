"""Gaussian diffusion: the training loss and the steps back.

Sources: Ho et al. 2020 (posterior), Nichol & Dhariwal 2021 (respacing, learned range of the variance, hybrid loss), Song et
al. 2021 (DDIM), Salimans & Ho 2022 (v-prediction).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..argument_checks import as_bool, as_float, check_callable, check_choice, check_device, check_same_shape, check_tensor
from ..config import PREDICTIONS
from . import schedule
from .schedule import respaced_timesteps
from .solvers import Step, Update, check_samples, compute_dtype, draw, step_gaussian
from .step_table import StepTable


class GaussianDiffusion:
    """A schedule and its steps. Every ``t`` is [B], integers, original steps in 0..999 that ``timesteps`` keeps.

    Args:
        respacing: which steps are kept (see ``respaced_timesteps``); None keeps all 1000, as training does.
        betas: ``"linear"`` (the paper's) or ``"cosine"``.
        learn_sigma: the model returns [B, 2C, H, W], prediction and variance; else [B, C, H, W], prediction only, and the
            variance is the upper end of the learned range.
        prediction: of the model: ``"epsilon"``, the noise; ``"x0"``, the clean image; or ``"v"``, alpha noise - sigma x0 for
            x = alpha x0 + sigma noise.

    Tensors come back in the dtype of ``x``; the arithmetic is fp32, float64 for a float64 ``x``.
    """

    def __init__(
        self,
        respacing: str | Sequence[int] | None = None,
        betas: str = "linear",
        learn_sigma: bool = True,
        prediction: str = "epsilon",
    ):
        check_choice("prediction", prediction, PREDICTIONS)
        self.timesteps = respaced_timesteps(respacing)
        self._respacing = respacing if respacing is None or isinstance(respacing, str) else self.timesteps
        self._betas = betas
        self.learn_sigma = as_bool("learn_sigma", learn_sigma)
        self.prediction = prediction
        bar = torch.cumprod(1 - schedule.betas(betas), dim=0)[self.timesteps]  # [kept] float64: products of alphas
        self._bar, self._bar_previous = bar, torch.cat([bar.new_ones(1), bar[:-1]])
        self._marginal = StepTable(self.timesteps, self._bar.sqrt(), (1 - self._bar).sqrt())
        low, high = self._log_variances()
        self._posterior = self._posterior_table(low, high)
        self._ddpm = self._posterior_table(*(torch.cat([end.new_full((1,), -math.inf), end[1:]]) for end in (low, high)))
        self._ddim: dict[float, StepTable] = {}

    def __repr__(self) -> str:
        return (
            f"GaussianDiffusion({self._respacing!r}, betas={self._betas!r}, learn_sigma={self.learn_sigma}, "
            f"prediction={self.prediction!r})"
        )

    @property
    def solvers(self) -> Mapping[str, Callable[..., list[Step]]]:
        return {"ddpm": self.ddpm_steps, "ddim": self.ddim_steps}

    def ddpm_steps(self) -> list[Step]:
        """For each of ``timesteps``, from the last down, a draw from the model's Gaussian; at the first one its mean."""
        return self._ddpm.steps(self.prediction)

    def ddim_steps(self, eta: float = 0.0) -> list[Step]:
        """One DDIM step for each of ``timesteps``, from the last down; eta=0 is deterministic, eta=1 like DDPM."""
        return self._ddim_table(eta).steps(self.prediction)

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """A sample of x_t given x_0: [B, C, H, W]."""
        check_samples("x0", x0)
        check_same_shape("noise", noise, x0, "x0")
        signal, sigma = self._marginal.columns(t, x0)
        return (signal * x0 + sigma * noise).to(x0.dtype)

    def mean_variance(self, model_output: Tensor, x: Tensor, t: Tensor, clip: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """The model's Gaussian over the step before t.

        Args:
            model_output: [B, 2C, H, W] with ``learn_sigma``, else [B, C, H, W].
            x: [B, C, H, W], the noised input at t.
            clip: clamp the predicted x_0 to [-1, 1] (pixel-space models).

        Returns:
            mean, log_variance and x0, each [B, C, H, W].
        """
        self._check_output(model_output, x)
        clip = as_bool("clip", clip)
        mean, log_variance, x0 = step_gaussian(x, model_output, self._posterior.update(t, x), clip)
        return mean.to(x.dtype), log_variance.expand_as(mean).to(x.dtype), x0.to(x.dtype)

    def ddpm_step(self, model_output: Tensor, x: Tensor, t: Tensor, clip: bool = False, noise: Tensor | None = None) -> Tensor:
        """x at the kept step before t, [B, C, H, W]: a draw from the model's Gaussian; at the first step x_0, its mean.

        ``noise`` [B, C, H, W] is drawn from torch's generator unless given.
        """
        self._check_output(model_output, x)
        noise = torch.randn_like(x) if noise is None else noise
        return self._step(model_output, x, self._ddpm.update(t, x), clip, noise)

    def ddim_step(
        self, model_output: Tensor, x: Tensor, t: Tensor, eta: float = 0.0, clip: bool = False, noise: Tensor | None = None
    ) -> Tensor:
        """x at the kept step before t (x_0 at the first), [B, C, H, W]; eta=0 is deterministic, eta=1 like DDPM.

        ``noise`` [B, C, H, W] is drawn from torch's generator unless given; it is not read at eta=0.
        """
        self._check_output(model_output, x)
        update = self._ddim_table(eta).update(t, x)
        if eta == 0:
            noise = None
        elif noise is None:
            noise = torch.randn_like(x)
        return self._step(model_output, x, update, clip, noise)

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
            ``mse`` [B] on what the model predicts; with ``learn_sigma`` also ``vb`` [B], the variational bound in bits per
            dimension with the mean detached; ``loss`` [B], their sum.
        """
        check_callable("model", model)
        check_samples("x0", x0)
        noise = torch.randn_like(x0) if noise is None else noise
        x = self.add_noise(x0, t, noise)
        output = model(x, t, y)
        self._check_output(output, x, "model")
        predicted, variance = output.to(compute_dtype(x)).tensor_split([x.shape[1]], dim=1)
        mse = (self._target(x0, t, noise) - predicted).square().flatten(1).mean(1)
        if not self.learn_sigma:
            return {"loss": mse, "mse": mse}
        vb = self._variational_bound(torch.cat([predicted.detach(), variance], dim=1), x0, x, t)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def _target(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        if self.prediction != "v":
            return noise if self.prediction == "epsilon" else x0
        alpha, sigma = self._marginal.columns(t, x0)
        return alpha * noise - sigma * x0

    def _variational_bound(self, output: Tensor, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
        posterior = self._posterior.update(t, x)
        mean, log_variance, _ = step_gaussian(x, output, posterior, clip=False)
        true_mean = posterior.from_x0 * x0 + posterior.from_x * x
        divergence = _gaussian_kl(true_mean, posterior.log_variance_min, mean, log_variance)
        likelihood = -_discretized_log_likelihood(x0, mean, log_variance / 2)
        first = (t == self.timesteps[0]).view(-1, 1, 1, 1)
        return torch.where(first, likelihood, divergence).flatten(1).mean(1) / math.log(2)

    def _step(self, model_output: Tensor, x: Tensor, update: Update, clip: bool, noise: Tensor | None) -> Tensor:
        if noise is not None:
            check_same_shape("noise", noise, x, "x")
        mean, log_variance, _ = step_gaussian(x, model_output, update, as_bool("clip", clip))
        return draw(mean, log_variance, noise).to(x.dtype)

    def _check_output(self, model_output: Tensor, x: Tensor, name: str = "model_output") -> None:
        check_samples("x", x)
        check_tensor(name, model_output, "of predictions")
        expected = (x.shape[0], x.shape[1] * (2 if self.learn_sigma else 1), *x.shape[2:])
        if model_output.shape != expected:
            raise ValueError(
                f"{name}: got shape {tuple(model_output.shape)}, expected {expected} "
                f"for x {tuple(x.shape)} with learn_sigma={self.learn_sigma}"
            )
        check_device(name, model_output, x)

    def _posterior_table(self, low: Tensor, high: Tensor) -> StepTable:
        """The mean of q(x_previous | x, x0), and the ends of the logarithm of the model's variance."""
        bar, previous = self._bar, self._bar_previous
        from_x0 = (1 - bar / previous) * previous.sqrt() / (1 - bar)
        from_x = (1 - previous) * (bar / previous).sqrt() / (1 - bar)
        return StepTable(self.timesteps, *self._x0_columns(), from_x0, from_x, low, high)

    def _log_variances(self) -> tuple[Tensor, Tensor]:
        """The variance of q(x_previous | x, x0), and the kept steps' own beta: logarithms, [kept] each.

        The first step's posterior variance is zero: its logarithm is the second one's, as Nichol & Dhariwal have it.
        """
        beta = 1 - self._bar / self._bar_previous
        variance = beta * (1 - self._bar_previous) / (1 - self._bar)
        first = variance[1:2] if len(variance) > 1 else beta
        if self.learn_sigma:
            return torch.cat([first, variance[1:]]).log(), beta.log()
        fixed = torch.cat([first, beta[1:]]).log()
        return fixed, fixed

    def _ddim_table(self, eta: float) -> StepTable:
        eta = as_float("eta", eta, 0, 1)
        if eta not in self._ddim:
            bar, previous = self._bar, self._bar_previous
            variance = eta**2 * (1 - previous) / (1 - bar) * (1 - bar / previous)
            from_x = ((1 - previous - variance) / (1 - bar)).clamp(min=0).sqrt()
            from_x0 = previous.sqrt() - from_x * bar.sqrt()
            log_variance = variance.log()
            self._ddim[eta] = StepTable(self.timesteps, *self._x0_columns(), from_x0, from_x, log_variance, log_variance)
        return self._ddim[eta]

    def _x0_columns(self) -> tuple[Tensor, Tensor]:
        if self.prediction == "x0":
            return torch.zeros_like(self._bar), torch.ones_like(self._bar)
        if self.prediction == "v":
            return self._bar.sqrt(), -(1 - self._bar).sqrt()
        return self._bar.rsqrt(), -((1 - self._bar) / self._bar).sqrt()


def _gaussian_kl(mean1: Tensor, log_variance1: Tensor | float, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    difference = log_variance1 - log_variance2
    return 0.5 * (difference.exp() - 1 - difference + (mean1 - mean2).square() * torch.exp(-log_variance2))


def _discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Of 8-bit values scaled to [-1, 1]: the normal's mass over a bin of 2/255, the outer bins open."""
    inverse = torch.exp(-log_scale)
    above = torch.special.ndtr((x - mean + 1 / 255) * inverse)
    below = torch.special.ndtr((x - mean - 1 / 255) * inverse)
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return mass.clamp(min=1e-12).log()
