"""Denoising steps as numbers: a solver is a list of rows, and one formula applies any of them.

Sources: Ho et al. 2020 (ddpm), Song et al. 2021 (ddim), Lipman et al. 2023 (euler, heun), Ma et al. 2024 (sde).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..argument_checks import as_bool, as_float, check_device, check_same_shape, check_tensor, check_type, describe
from ..config import VELOCITY

SOLVERS = ("ddpm", "ddim", "euler", "heun", "sde")


class Update(NamedTuple):
    """``x0 = clamp(x0_from_x * x + x0_from_output * output)``; the next x is ``from_x0 * x0 + from_x * x + sigma * noise``.

    log sigma^2 lies between the two ends, at the place (v + 1) / 2 that the model's second half of channels v names (Nichol &
    Dhariwal 2021); with equal ends v is not read, and -inf for both is no noise. The clamp to [-1, 1] is left out unless
    clipping is asked for. Where the samples of a batch are at different steps, every field is a tensor [B, 1, 1, 1].
    """

    x0_from_x: float
    x0_from_output: float
    from_x0: float
    from_x: float
    log_variance_min: float
    log_variance_max: float

    @property
    def adds_noise(self) -> bool:
        return self.log_variance_max > -math.inf


class Step(NamedTuple):
    """One call of the model, told ``t``, and what becomes of x.

    With ``corrects`` (Heun's second half) the update takes the x from before the previous step, and the mean of that step's
    output and this one's. ``prediction`` is what the update takes the output for.
    """

    t: float
    update: Update
    corrects: bool = False
    prediction: str = "epsilon"


class Process(Protocol):
    """What ``steps`` takes: ``GaussianDiffusion`` or ``FlowMatching``."""

    @property
    def solvers(self) -> Mapping[str, Callable[..., list[Step]]]: ...


def steps(process: Process, solver: str, **options: Any) -> list[Step]:
    """The steps from noise to an image, in order.

    Args:
        process: says which times there are.
        solver: one of ``SOLVERS`` that the process has.
        options: of that solver, such as ``eta`` of ddim (``GaussianDiffusion.ddim_steps``).

    Raises:
        ValueError: a solver that the process lacks.
        TypeError: an argument of the wrong kind; the message names it.
    """
    if not isinstance(getattr(process, "solvers", None), Mapping):
        raise TypeError(f"process: got {describe(process)}, expected a GaussianDiffusion or a FlowMatching")
    check_type("solver", solver, str, f"one of {', '.join(process.solvers)}")
    if solver not in process.solvers:
        raise ValueError(f"solver: got {solver!r}, but {type(process).__name__} has {', '.join(process.solvers)}")
    return process.solvers[solver](**options)


def fit_steps(steps: Sequence[Step], prediction: str) -> list[Step]:
    """Rewrite steps that take the output for epsilon, the default, for a model that predicts something else.

    With x = alpha x0 + sigma noise, x0 is x / alpha - sigma / alpha epsilon, and alpha x - sigma v.

    Raises:
        ValueError: steps that take the output for something else again. A model of epsilon takes a flow's steps too: models
            that no file describes say nothing else.
    """
    taken = (prediction, VELOCITY) if prediction == "epsilon" else (prediction,)
    return [step if step.prediction in taken else _fitted(step, prediction) for step in steps]


def _fitted(step: Step, prediction: str) -> Step:
    if prediction == VELOCITY or step.prediction != "epsilon":
        gaussian = f"steps(GaussianDiffusion(prediction={prediction!r}), 'ddim')"
        hint = "steps(FlowMatching(), 'euler')" if prediction == VELOCITY else gaussian
        raise ValueError(f"steps: got those of a model that predicts {step.prediction}, expected {prediction}'s, as of {hint}")
    from_x, from_epsilon = step.update[:2]  # 1 / alpha, -sigma / alpha
    from_x, from_output = (0.0, 1.0) if prediction == "x0" else (1 / from_x, from_epsilon / from_x)
    return step._replace(update=step.update._replace(x0_from_x=from_x, x0_from_output=from_output), prediction=prediction)


def apply_update(x: Tensor, output: Tensor, noise: Tensor | None, update: Update, clip: bool = False) -> Tensor:
    """The next x in plain torch, [B, C, H, W] in the dtype of x; arithmetic in fp32, in float64 for a float64 x.

    Args:
        x: [B, C, H, W].
        output: [B, C, H, W] or [B, 2C, H, W], guided and averaged already.
        noise: as x; not read, and None will do, where the update adds none.
        update: numbers, one row for the batch.
        clip: clamp x0 to [-1, 1] (pixel-space models).

    Raises:
        ValueError: output or noise does not fit x and the update.
    """
    check_samples("x", x)
    check_tensor("output", output, "[B, C, H, W] or [B, 2C, H, W]")
    check_type("update", update, Update, "an Update of numbers")
    clip = as_bool("clip", clip)
    for value in update:
        if value != -math.inf:
            as_float("update", value)
    single, double = tuple(x.shape), (x.shape[0], 2 * x.shape[1], *x.shape[2:])
    learned = update.log_variance_min != update.log_variance_max
    if output.shape != double and (learned or output.shape != single):
        expected = double if learned else f"{single} or {double}"
        raise ValueError(f"output: got shape {tuple(output.shape)}, expected {expected} for x {single}")
    check_device("output", output, x)
    if update.adds_noise and noise is None:
        raise ValueError(f"noise: got None, expected {single}, as x")
    if update.adds_noise:
        check_same_shape("noise", noise, x, "x")
    mean, log_variance, _ = step_gaussian(x, output, update, clip)
    return draw(mean, log_variance, noise if update.adds_noise else None).to(x.dtype)


def step_gaussian(x: Tensor, output: Tensor, update: Update, clip: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, log variance ([B, C, H, W] or broadcast to it) and x0 of a step, in the dtype of the arithmetic."""
    dtype, channels = compute_dtype(x), x.shape[1]
    x, output = x.to(dtype), output.to(dtype)
    x0 = update.x0_from_x * x + update.x0_from_output * output[:, :channels]
    x0 = x0.clamp(-1, 1) if clip else x0
    mean = update.from_x0 * x0 + update.from_x * x
    low, high = (torch.as_tensor(end, dtype=dtype, device=x.device) for end in update[4:])
    if output.shape[1] == channels:
        return mean, high, x0
    place = (output[:, channels:] + 1) / 2
    return mean, torch.where(low == high, high, low + place * (high - low)), x0


def check_samples(name: str, x: Tensor) -> None:
    """Raise unless x is floating, [B, C, H, W] or of another rank."""
    check_tensor(name, x, "[B, C, H, W]")
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(f"{name}: got {x.dtype} {tuple(x.shape)}, expected [B, C, H, W] of floats")


def draw(mean: Tensor, log_variance: Tensor, noise: Tensor | None) -> Tensor:
    return mean if noise is None else mean + torch.exp(log_variance / 2) * noise


def compute_dtype(x: Tensor) -> torch.dtype:
    """fp32, or float64 for a float64 x."""
    return torch.promote_types(x.dtype, torch.float32)
