"""Images in one call: ``ditfast.sample``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import vae as autoencoder
from ..argument_checks import as_int, check_choice, describe
from ..class_names import ClassNameError, class_called
from ..config import VELOCITY
from ..diffusion import SOLVERS, Step
from .checks import as_labels
from .loop import Callback, Sampler
from .models import Denoiser
from .recipe import (
    FLOW_SOLVERS,
    check_solver,
    default_cfg_scale,
    default_num_steps,
    default_solver,
    default_vae,
    fitted_vae,
    is_digits,
    solver_steps,
)
from .samples import Samples
from .scheduler import set_timesteps


def sample(
    model: Any,
    labels: Tensor | Sequence[int] | Sequence[str],
    *,
    num_steps: int | str | None = None,
    solver: str | None = None,
    cfg_scale: float | Sequence[float] | None = None,
    cfg_interval: tuple[float, float] | None = None,
    seed: int = 0,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    latents: Tensor | None = None,
    start_time: float | None = None,
    scheduler: Any = None,
    config: Any = None,
    guidance_channels: int | None = None,
    clip: bool | None = None,
    vae: autoencoder.VAE | str | Path | None = None,
    callback: Callback | None = None,
    batch_size: int | None = None,
    batch_invariant: bool = False,
) -> Samples:
    """Generate one image for each label.

    Times are in the model's own unit: 999 (noise) to 0 for a DiT, 0 (noise) to 1 for a flow-matching model such as SiT.

    Args:
        model: in eval mode. A ``ditfast.DiT``, a compiled, averaged or otherwise wrapped one, an official or diffusers' DiT,
            or any that is called as ``model(x, t, y)``.
        labels: [N] integer classes: a list, an array or a tensor; or a list of names, where the checkpoint has class names
            (``model.source.trained_for.class_names``).
        num_steps: how many steps, or for ddpm and ddim a respacing such as ``"ddim50"`` or ``"10,15,20"``; 250 unless given
            (digits: ``"ddim50"``, or 50). A ``scheduler``'s ``set_timesteps`` is called with it.
        solver: ``"ddpm"`` or ``"ddim"`` of a DiT; ``"euler"``, ``"heun"`` or ``"sde"`` of a flow-matching model. Which of them
            a loaded model is, its checkpoint says (``model.source.trained_for``), and ``config`` may say otherwise; of a model
            that nothing describes it is what the solver says. Unless given: euler of a flow-matching model; of others ddpm
            (digits, and steps like ``"ddim50"``: ddim).
        cfg_scale: strength of classifier-free guidance, one or one an image, 1 for none; 4 unless given (digits: 2; a model
            without a null class: 1).
        cfg_interval: the lowest and highest time that are guided; all unless given.
        seed: 0..2^64-1; with an image's place it decides its noise, whatever the batch.
        generator: draws all noise instead, with the bits of diffusers' pipelines: one, or a list of one for each image.
        latents: [N, C, H, W] to begin from: the noise of the first step, or with ``start_time`` what was noised up to it
            (``diffusion.GaussianDiffusion().add_noise``).
        start_time: the time of the step to begin with, one of the run's. A solver ends in the bits of the whole run; a
            scheduler with a history begins it anew.
        scheduler: a diffusers scheduler that takes the steps instead of a solver.
        config: describes a model that does not describe itself: a ``DiTConfig``, or any object with ``in_channels``,
            ``input_size`` and ``num_classes``, and where they differ ``learn_sigma`` (False unless given) and
            ``class_dropout_prob`` (0: there is no null class). It also overrules what a checkpoint says that the model
            predicts: ``dataclasses.replace(model.config, prediction="velocity")``.
        guidance_channels: how many of the first channels are guided; the model's default unless given.
        clip: clamp the predicted clean image to [-1, 1]; that of a model that makes pixels unless given.
        vae: decodes latents: diffusers' ``AutoencoderKL``, a folder or a name on the hub; unless given the checkpoint's own,
            or the official one, loaded when images are asked for.
        callback: called before each step as ``callback(step, time, latents)``, with the step's place in the whole run, the
            time that the model is about to be told and the latents [B, C, H, W] that it is about to be given. It may return
            other latents to go on with, or raise StopIteration to end the run: the latents then come back as they are, and
            batches that have not begun are left out. Latents and time together are what another run can begin from.
        batch_size: how many images are computed together; all unless given.
        batch_invariant: call the model with one image at a time, so that an image's bits do not depend on the batch; slower.

    Returns:
        Latents, and images [N, H, W, 3] when they are asked for.

    Raises:
        ValueError: an argument; the message names it.
        TypeError: likewise, one of the wrong kind.
    """
    denoiser = Denoiser(model, config)
    config = denoiser.config
    digits = is_digits(config)
    steps: list[Step] = []
    if scheduler is None:
        solver, num_steps = _solver(denoiser, digits, solver, num_steps)
        steps = solver_steps(solver, num_steps, config, denoiser.trained_for)
    else:
        if solver is not None:
            raise ValueError(f"solver: got {describe(solver)}, expected None with a scheduler, which takes its steps")
        if num_steps is not None:
            scheduler = set_timesteps(scheduler, as_int("num_steps", num_steps, 1))
    if cfg_scale is None:
        cfg_scale = default_cfg_scale(digits, config)
    numbers = _numbers(labels, denoiser)
    vae = _vae(vae, denoiser)
    sampler = Sampler(
        denoiser,
        steps,
        cfg_interval=(-math.inf, math.inf) if cfg_interval is None else cfg_interval,
        guidance_channels=guidance_channels,
        seed=seed,
        clip=vae is None if clip is None else clip,
        batch_invariant=batch_invariant,
        scheduler=scheduler,
    )
    made = sampler(
        numbers,
        cfg_scale=cfg_scale,
        generator=generator,
        latents=latents,
        start_time=start_time,
        callback=callback,
        batch_size=batch_size,
    )
    settings = {
        "solver": solver if scheduler is None else type(scheduler).__name__,
        "num_steps": num_steps if scheduler is None else len(scheduler.timesteps),
        "cfg_scale": cfg_scale,
        "cfg_interval": cfg_interval,
        "seed": seed if generator is None else None,
        "start_time": start_time,
        "clip": sampler.clip,
    }
    classes = as_labels(numbers, config.label_rows, torch.device("cpu"))[: len(made)]
    return Samples(made, classes, settings, vae, partial(fitted_vae, config=config, trained_for=denoiser.trained_for))


def _solver(denoiser: Denoiser, digits: bool, solver: str | None, num_steps: int | str | None) -> tuple[str, str]:
    if num_steps is not None and not isinstance(num_steps, str):
        num_steps = str(as_int("num_steps", num_steps, 1))
    if solver is None:
        solver = default_solver(denoiser.trained_for, digits, num_steps)
    check_choice("solver", solver, SOLVERS)
    if denoiser.source is not None or denoiser.config.prediction != "epsilon":
        prediction = VELOCITY if solver in FLOW_SOLVERS else "epsilon"
        hint = f"; to insist: config=dataclasses.replace(model.config, prediction={prediction!r})"
        check_solver(solver, denoiser.trained_for, "solver", hint, ", or scheduler=")
    return solver, default_num_steps(digits, solver) if num_steps is None else num_steps


def _numbers(labels: Any, denoiser: Denoiser) -> Any:
    """Return the classes of a list of names; other labels as they are."""
    if not isinstance(labels, (list, tuple)) or not any(isinstance(label, str) for label in labels):
        return labels
    names = denoiser.trained_for.class_names
    if names is None:
        raise TypeError(f"labels: got {describe(labels)}, expected integers, as the checkpoint has no class names")
    try:
        return [class_called(label, names) if isinstance(label, str) else label for label in labels]
    except ClassNameError as error:
        raise ClassNameError(f"labels: {error}") from error


def _vae(vae: autoencoder.VAE | str | Path | None, denoiser: Denoiser) -> autoencoder.VAE | str | None:
    """Return the VAE of a model's latents, or the name of one to load later; None for a model that makes pixels."""
    if vae is None:
        path = None if denoiser.source is None else denoiser.source.path
        return default_vae(denoiser.config, path, denoiser.trained_for)
    vae = autoencoder.load_vae(vae).to(denoiser.device) if isinstance(vae, (str, Path)) else vae
    return fitted_vae(vae, denoiser.config, denoiser.trained_for)
