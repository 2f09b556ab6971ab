"""Solver, steps, guidance and VAE that a model is sampled with where nobody says otherwise."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import torch

from .. import vae as autoencoder
from ..argument_checks import describe
from ..checkpoints.trained_for import SCHEDULES, TrainedFor
from ..config import VELOCITY, DiTConfig
from ..diffusion import FlowMatching, GaussianDiffusion, Step, steps
from ..diffusion.flow import MOST_STEPS
from ..digits import DIGITS_CONFIG

FLOW_SOLVERS = ("euler", "heun", "sde")
GAUSSIAN_SOLVERS = ("ddpm", "ddim")
PIXEL_CHANNELS = (1, 3)
_PREDICTED = {"epsilon": "the noise", "x0": "the clean image", "v": "v", VELOCITY: "a velocity"}


def is_digits(config: DiTConfig) -> bool:
    """True for the digits model, whatever it was trained to predict."""
    return dataclasses.replace(config, prediction=DIGITS_CONFIG.prediction) == DIGITS_CONFIG


def is_pixels(config: DiTConfig, trained_for: TrainedFor) -> bool:
    """True for a model that makes pixels, not latents of a VAE."""
    if trained_for.latent_scale is not None:
        return False
    return config.in_channels in PIXEL_CHANNELS or trained_for.image_size == config.input_shape[1:]


def default_solver(trained_for: TrainedFor, digits: bool, num_steps: str | None) -> str:
    if trained_for.is_flow:
        return "euler"
    return "ddim" if digits or (num_steps or "").startswith("ddim") else "ddpm"


def default_num_steps(digits: bool, solver: str) -> str:
    if not digits:
        return "250"
    return "50" if solver in FLOW_SOLVERS else "ddim50"


def default_cfg_scale(digits: bool, config: DiTConfig) -> float:
    """Return the scale of guidance; 1, which is none, of a model without a null class to guide away from."""
    if not config.has_null_class:
        return 1.0
    return 2.0 if digits else 4.0


def default_dtype(device: torch.device) -> str:
    """Return bf16 on a GPU, all of which multiply it at 12 to 15 times fp32's rate (older ones are refused); else fp32."""
    return "fp32" if device.type == "cpu" else "bf16"


def default_vae(config: DiTConfig, checkpoint: str | None, trained_for: TrainedFor) -> str | None:
    """Return the folder or name of the VAE that decodes a model's latents; None for a model that makes pixels."""
    if is_pixels(config, trained_for):
        return None
    folder = Path(checkpoint or "")
    folders = [] if checkpoint is None else [folder, *([folder.parent] if folder.name == "transformer" else [])]
    return next((str(folder) for folder in folders if (folder / "vae").is_dir()), autoencoder.OFFICIAL)


def fitted_vae(vae: autoencoder.VAE, config: DiTConfig, trained_for: TrainedFor) -> autoencoder.VAE:
    """Return the VAE with the scale of the latents that the model was trained on.

    Raises:
        VAEError: it decodes other channels, or to another size of images.
    """
    autoencoder.check_channels(vae, config.in_channels)
    height, width = (autoencoder.image_size(vae, side) for side in config.input_shape[1:])
    if trained_for.image_size not in (None, (height, width)):
        expected = " x ".join(map(str, trained_for.image_size or ()))
        raise autoencoder.VAEError(f"vae: decodes to {height} x {width} pixels, but the model was trained for {expected}")
    return vae if trained_for.latent_scale is None else autoencoder.with_scaling(vae, *trained_for.latent_scale)


def check_solver(solver: str, trained_for: TrainedFor, name: str, hint: str, schedule_hint: str) -> None:
    """Raise ValueError for a solver of another kind than a model was trained for, or a schedule that no solver has.

    The message begins with the ``name`` of the argument, and ends with how to insist on the solver, or with what to do about
    the schedule.
    """
    fitting = FLOW_SOLVERS if trained_for.is_flow else GAUSSIAN_SOLVERS
    if solver not in fitting:
        kind = "flow matching" if trained_for.is_flow else "a Gaussian diffusion"
        why = f"this model predicts {_PREDICTED[trained_for.prediction]} of {kind}"
        if not trained_for.stated and trained_for.prediction == "epsilon":
            why = "this model is taken for a DiT, which predicts the noise, as its checkpoint does not say what it predicts"
        raise ValueError(f"{name}: got {solver}, but {why}, expected {', '.join(fitting[:-1])} or {fitting[-1]}{hint}")
    known = SCHEDULES[trained_for.prediction]
    if trained_for.schedule not in known:
        why = f"this model was trained with the schedule {trained_for.schedule!r}, expected {' or '.join(known)}"
        raise ValueError(f"{name}: got {solver}, but {why}{schedule_hint}")


def insisted(solver: str, config: DiTConfig, trained_for: TrainedFor) -> tuple[DiTConfig, TrainedFor]:
    """Return a config and record for which a solver fits: the model's own where it does, else the usual of its kind."""
    is_flow = solver in FLOW_SOLVERS
    if is_flow == trained_for.is_flow and trained_for.schedule in SCHEDULES[trained_for.prediction]:
        return config, trained_for
    if is_flow != trained_for.is_flow:
        config = dataclasses.replace(config, prediction=VELOCITY if is_flow else "epsilon")
    usual = TrainedFor.of_config(config)
    return config, dataclasses.replace(trained_for, prediction=usual.prediction, schedule=usual.schedule)


def solver_steps(
    solver: str, num_steps: str, config: DiTConfig, trained_for: TrainedFor, name: str = "num_steps"
) -> list[Step]:
    """Return the steps of a solver that fits the model.

    Raises:
        ValueError: no such number of steps, nor for ddpm and ddim a respacing such as ``"ddim50"``; it begins with ``name``.
    """
    if solver in FLOW_SOLVERS:
        if not re.fullmatch("[0-9]{1,9}", num_steps) or not 1 <= int(num_steps) <= MOST_STEPS:
            got = f"{name}: got {describe(num_steps)}"
            raise ValueError(f"{got}, expected a positive integer with {solver}, up to {MOST_STEPS}")
        path = trained_for.schedule if trained_for.is_flow else "linear"
        return steps(FlowMatching(path, num_steps=int(num_steps)), solver)
    learned = config.learn_sigma and trained_for.learned_variance
    try:
        process = GaussianDiffusion(num_steps, trained_for.schedule, learn_sigma=learned)
    except ValueError as error:
        raise ValueError(f"{name}: {str(error).removeprefix('respacing: ')}") from error
    return steps(process, solver)
