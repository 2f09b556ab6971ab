"""Flow matching with a velocity-predicting model (SiT): the training loss and the steps from noise to an image.

Sources: Lipman et al. 2023 (flow matching), Albergo et al. 2023 (interpolants, their score), Ma et al. 2024 (SiT: both paths,
the SDE with a free diffusion coefficient).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..argument_checks import as_float, as_int, check_callable, check_choice, check_device, check_same_shape, check_tensor
from ..config import VELOCITY
from .solvers import Step, Update, check_samples, compute_dtype

MOST_STEPS = 100_000


class Path(NamedTuple):
    """x_t = alpha x0 + sigma noise and its velocity d x_t / dt = alpha_rate x0 + sigma_rate noise, for times of any shape."""

    alpha: Tensor
    sigma: Tensor
    alpha_rate: Tensor
    sigma_rate: Tensor

    @property
    def determinant(self) -> Tensor:
        """Of the map from (noise, x0) to (x_t, velocity)."""
        return self.sigma * self.alpha_rate - self.alpha * self.sigma_rate


def _linear(t: Tensor) -> Path:
    return Path(t, 1 - t, torch.ones_like(t), -torch.ones_like(t))


def _gvp(t: Tensor) -> Path:
    angle = t * (math.pi / 2)
    sine, cosine = torch.sin(angle), torch.cos(angle)
    return Path(sine, cosine, cosine * (math.pi / 2), sine * (-math.pi / 2))


PATHS: dict[str, Callable[[Tensor], Path]] = {"linear": _linear, "gvp": _gvp}
DIFFUSIONS: dict[str, Callable[[Tensor, Path], Tensor]] = {
    "sigma": lambda t, path: path.sigma,
    "linear": lambda t, path: 1 - t,
    "decreasing": lambda t, path: ((1 + torch.cos(math.pi * t)) / 2).square(),
    "increasing-decreasing": lambda t, path: torch.sin(math.pi * t).square(),
}


class FlowMatching:
    """A path from noise at t=0 to the clean image at t=1 (SiT's convention), and its steps.

    The model is told ``t`` in [0, 1] and predicts the velocity in its first C channels; x0 is the clean image, as everywhere
    in this package (SiT calls it x1). Tensors come back in the dtype of ``x``; the arithmetic is fp32, float64 for a float64
    ``x``.

    Args:
        path: ``"linear"``, t x0 + (1 - t) noise, or ``"gvp"``, sin(pi t / 2) x0 + cos(pi t / 2) noise.
        num_steps: how many steps the solvers take, up to 100,000.
    """

    def __init__(self, path: str = "linear", num_steps: int = 250):
        check_choice("path", path, PATHS)
        self.num_steps = as_int("num_steps", num_steps, 1, MOST_STEPS)
        self._name, self._path = path, PATHS[path]

    def __repr__(self) -> str:
        return f"FlowMatching({self._name!r}, num_steps={self.num_steps})"

    @property
    def solvers(self) -> Mapping[str, Callable[..., list[Step]]]:
        return {"euler": self.euler_steps, "heun": self.heun_steps, "sde": self.sde_steps}

    def euler_steps(self) -> list[Step]:
        """``num_steps`` equal steps along the velocity: first order, one call of the model each."""
        times = torch.linspace(0, 1, self.num_steps + 1, dtype=torch.float64, device="cpu")
        return self._euler_maruyama(times, torch.zeros(self.num_steps, dtype=torch.float64, device="cpu"))

    def heun_steps(self) -> list[Step]:
        """``num_steps`` equal steps along the mean of the velocities at both ends: second order, two calls each."""
        halves = self.euler_steps()
        ends = [step.t for step in halves[1:]] + [1.0]
        return [half for step, end in zip(halves, ends, strict=True) for half in (step, step._replace(t=end, corrects=True))]

    def sde_steps(self, diffusion: str = "sigma", diffusion_norm: float = 1.0, last_step: float = 0.04) -> list[Step]:
        """Euler-Maruyama steps of dx = (velocity + w score) dt + sqrt(2 w) dW, the last one without noise (SiT's "Mean").

        Args:
            diffusion: the shape of w over time: ``"sigma"``, the path's; ``"linear"``, 1 - t; ``"decreasing"``,
                (1 + cos(pi t))^2 / 4; ``"increasing-decreasing"``, sin(pi t)^2.
            diffusion_norm: times which it is taken; 0 leaves the ODE.
            last_step: length of the last step; the others share the rest of [0, 1] equally.
        """
        check_choice("diffusion", diffusion, DIFFUSIONS)
        diffusion_norm, last_step = as_float("diffusion_norm", diffusion_norm, 0), as_float("last_step", last_step)
        if not 0 < last_step < 1:
            raise ValueError(f"last_step: got {last_step}, expected between 0 and 1")
        starts = torch.linspace(0, 1 - last_step, self.num_steps, dtype=torch.float64, device="cpu")
        steps = self._euler_maruyama(
            torch.cat([starts, starts.new_ones(1)]), diffusion_norm * DIFFUSIONS[diffusion](starts, self._path(starts))
        )
        quiet = steps[-1].update._replace(log_variance_min=-math.inf, log_variance_max=-math.inf)
        return [*steps[:-1], steps[-1]._replace(update=quiet)]

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t, [B, C, H, W]; t is [B], floating, in [0, 1]."""
        path = self._path_at(t, x0, "x0")
        check_same_shape("noise", noise, x0, "x0")
        return (path.alpha * x0 + path.sigma * noise).to(x0.dtype)

    def score(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The gradient of log p(x_t), [B, C, H, W], from the velocity; infinite at t=1."""
        path = self._path_at(t, x)
        check_same_shape("velocity", velocity, x, "x")
        noise = (path.alpha_rate * x - path.alpha * velocity) / path.determinant
        return (-noise / path.sigma).to(x.dtype)

    def velocity(self, score: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The velocity, [B, C, H, W], from the gradient of log p(x_t); undefined at t=0, where the score does not name it."""
        path = self._path_at(t, x)
        check_same_shape("score", score, x, "x")
        noise = -path.sigma * score
        return ((path.alpha_rate * x - path.determinant * noise) / path.alpha).to(x.dtype)

    def training_losses(
        self, model: Callable[..., Tensor], x0: Tensor, t: Tensor, y: Tensor, noise: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The velocity's squared error, per sample.

        Args:
            model: called as ``model(x_t, t, y)``; returns [B, C, H, W], or [B, 2C, H, W] whose second half is ignored.
            x0: [B, C, H, W] clean latents.
            t: [B], floating, in [0, 1]; SiT draws it uniformly.
            y: [B] labels.
            noise: [B, C, H, W]; drawn unless given.

        Returns:
            ``mse`` [B] and ``loss`` [B], the same.
        """
        check_callable("model", model)
        path = self._path_at(t, x0, "x0")
        noise = torch.randn_like(x0) if noise is None else noise
        output = model(self.add_noise(x0, t, noise), t, y)
        check_tensor("model", output, "of velocities from it")
        single, double = tuple(x0.shape), (x0.shape[0], 2 * x0.shape[1], *x0.shape[2:])
        if output.shape not in (single, double):
            raise ValueError(f"model: got shape {tuple(output.shape)} from it, expected {single} or {double}")
        velocity = path.alpha_rate * x0 + path.sigma_rate * noise
        mse = (velocity - output[:, : x0.shape[1]]).square().flatten(1).mean(1)
        return {"loss": mse, "mse": mse}

    def _euler_maruyama(self, times: Tensor, diffusion: Tensor) -> list[Step]:
        """Steps from each time to the next, the drift written in x and x0 so that clipping x0 means what it does elsewhere."""
        starts, lengths = times[:-1], times.diff()
        path = self._path(starts)
        # velocity = (determinant x0 + sigma_rate x) / sigma, score = (alpha x0 - x) / sigma^2
        from_x0 = lengths * (path.determinant / path.sigma + diffusion * path.alpha / path.sigma.square())
        from_x = 1 + lengths * (path.sigma_rate / path.sigma - diffusion / path.sigma.square())
        log_variance = (2 * diffusion * lengths).log()
        x0_from_x, x0_from_output = -path.sigma_rate / path.determinant, path.sigma / path.determinant
        columns = [x0_from_x, x0_from_output, from_x0, from_x, log_variance, log_variance]
        rows = torch.stack(columns, dim=1).tolist()
        return [Step(t, Update(*row), prediction=VELOCITY) for t, row in zip(starts.tolist(), rows, strict=True)]

    def _path_at(self, t: Tensor, x: Tensor, name: str = "x") -> Path:
        check_samples(name, x)
        check_tensor("t", t, f"of floats, one for each sample of {name}")
        if t.shape != x.shape[:1] or not t.is_floating_point():
            raise ValueError(f"t: got {t.dtype} {tuple(t.shape)}, expected {x.shape[0]} floats, one for each sample of x")
        check_device("t", t, x, name)
        if t.device.type == "cpu" and not ((t >= 0) & (t <= 1)).all():
            raise ValueError(f"t: got {t.tolist()}, expected times in [0, 1]")
        return self._path(t.to(compute_dtype(x)).view(-1, *[1] * (x.dim() - 1)))
