"""The loss by its name, and how timesteps are drawn for it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..config import DiTConfig
from ..diffusion import NUM_TRAIN_STEPS, FlowMatching, GaussianDiffusion
from .settings import TrainSettings

Model = Callable[[Tensor, Tensor, Tensor], Tensor]


class UniformSteps:
    """Sampler of timesteps 0..999, all equally likely."""

    def draw(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Return times t and the weights of their losses, both [B], from numbers in [0, 1)."""
        return (uniform * NUM_TRAIN_STEPS).long().clamp(max=NUM_TRAIN_STEPS - 1), torch.ones_like(uniform)

    def observe(self, t: Tensor, loss: Tensor) -> None:
        """Take note of the losses [B] of a step, over all ranks."""

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that change from step to step, in place."""
        return {}


class UniformTimes(UniformSteps):
    """Sampler of times in [0, 1)."""

    def draw(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        return uniform, torch.ones_like(uniform)


class ImportanceSteps(UniformSteps):
    """In proportion to the root mean square of the last ten losses of each (Nichol & Dhariwal 2021, equation 18).

    Until every timestep has ten losses they are drawn uniformly. One draw in a thousand stays uniform, so that a step whose
    losses were tiny is seen again.
    """

    HISTORY = 10
    UNIFORM_PART = 1e-3

    def __init__(self) -> None:
        self._losses = torch.zeros(NUM_TRAIN_STEPS, self.HISTORY, dtype=torch.float64, device="cpu")
        self._seen = torch.zeros(NUM_TRAIN_STEPS, dtype=torch.int64, device="cpu")

    def draw(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = self._probabilities()
        ends = probabilities.cumsum(0) / probabilities.sum()
        t = torch.searchsorted(ends, uniform.double().cpu(), right=True).clamp(max=NUM_TRAIN_STEPS - 1)
        weights = 1 / (NUM_TRAIN_STEPS * probabilities[t])
        return t.to(uniform.device), weights.to(uniform.device, uniform.dtype)

    def observe(self, t: Tensor, loss: Tensor) -> None:
        for step, value in zip(t.tolist(), loss.tolist(), strict=True):
            self._losses[step, self._seen[step] % self.HISTORY] = value
            self._seen[step] += 1

    def state(self) -> dict[str, Tensor]:
        return {"losses": self._losses, "seen": self._seen}

    def _probabilities(self) -> Tensor:
        if (self._seen < self.HISTORY).any():
            return torch.full((NUM_TRAIN_STEPS,), 1 / NUM_TRAIN_STEPS, dtype=torch.float64, device="cpu")
        size = self._losses.square().mean(1).sqrt()
        return (1 - self.UNIFORM_PART) * size / size.sum() + self.UNIFORM_PART / NUM_TRAIN_STEPS


class Objective:
    """What a run minimises; the target is the ``prediction`` of the model's config."""

    def __init__(self, settings: TrainSettings, config: DiTConfig):
        self.mse_only = settings.loss == "mse"
        self.sampler: UniformSteps
        self.process: FlowMatching | GaussianDiffusion
        if settings.loss == "flow":
            self.process, self.sampler = FlowMatching(settings.path), UniformTimes()
        else:
            self.process = GaussianDiffusion(learn_sigma=config.learn_sigma, prediction=config.prediction)
            self.sampler = ImportanceSteps() if settings.timesteps == "importance" else UniformSteps()

    def losses(self, model: Model, x0: Tensor, t: Tensor, y: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """``loss`` [B] and its parts, ``mse`` and perhaps ``vb``, [B] each.

        Args:
            model: called as ``model(x_t, t, y)``.
            x0: [B, C, H, W] clean latents.
            t: [B], as the sampler drew them.
            y: [B] labels.
            noise: [B, C, H, W].
        """
        found = self.process.training_losses(model, x0, t, y, noise)
        return {"loss": found["mse"], "mse": found["mse"]} if self.mse_only else found
