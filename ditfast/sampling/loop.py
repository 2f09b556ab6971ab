"""The denoising loop: from labels to images, doing nothing in a step that can be done once."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..argument_checks import LARGEST_SEED, as_bool, as_int, check_callable
from ..diffusion.solvers import Step, fit_steps
from ..modulation_table import BUDGET_BYTES, can_tabulate, offloaded_conditioning
from .checks import as_first_step, as_generators, as_images, as_interval, as_labels, as_latents, as_scales, check_steps
from .models import Denoiser
from .noise import generated_noise
from .run import Batch, Before, Run, Stopped
from .scheduler import check_scheduler

Callback: TypeAlias = Callable[[int, float, Tensor], Tensor | None]


def sample(
    model: Any,
    steps: Sequence[Step],
    labels: Tensor | Sequence[int],
    *,
    cfg_scale: float | Sequence[float] = 1.0,
    cfg_interval: tuple[float, float] = (-math.inf, math.inf),
    guidance_channels: int | None = None,
    seed: int = 0,
    images: Sequence[int] | None = None,
    clip: bool = False,
    table_bytes: int = BUDGET_BYTES,
    offload_conditioning: bool = False,
    batch_invariant: bool = False,
    scheduler: Any = None,
    on_step: Callable[[], None] = lambda: None,
    config: Any = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    latents: Tensor | None = None,
    start_time: float | None = None,
    callback: Callback | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """Denoise one image for each label.

    Args:
        model: in eval mode, on any device, of any of its dtypes; the state between steps is fp32. A ``ditfast.DiT``, a
            compiled, averaged or otherwise wrapped one, an official or diffusers' DiT, or any that is called as
            ``model(x, t, y)``.
        steps: of a solver, such as ``diffusion.steps(GaussianDiffusion("250"), "ddpm")``; not read with a ``scheduler``. Steps
            for epsilon, the default, are rewritten for what ``model.config.prediction`` names.
        labels: [B] integer classes, of any integer dtype, or a list of them.
        cfg_scale: strength of classifier-free guidance, one or one an image; where all are 1 the conditional model runs
            alone.
        cfg_interval: the lowest and highest time the model is told that are guided (Kynkäänniemi et al. 2024); other steps
            run the conditional model alone.
        guidance_channels: how many of the first channels are guided; the flavour's unless given (official: 3).
        seed: 0..2^64-1; with an image's number it decides its noise.
        images: [B] the images' numbers; 0, 1, ... unless given.
        clip: clamp the predicted x_0 to [-1, 1] (pixel-space models).
        table_bytes: memory for a ``ModulationTable``; 0 computes the vectors in each step, as for a model whose forward is
            its own or hooked.
        offload_conditioning: keep adaLN's weights in the host's memory meanwhile: a third of the model, of which the table
            brings one layer at a time to the device.
        batch_invariant: call the model with one image at a time, so that an image's bits do not depend on the batch (a
            library's GEMM may round differently for other numbers of rows); slower.
        scheduler: a diffusers scheduler, its timesteps set, that takes the steps instead; its ``prediction_type`` is the
            model's. A copy is stepped, anew for each batch.
        on_step: called after each step of each batch (progress).
        config: describes a model that does not describe itself: a ``DiTConfig``, or any object with ``in_channels``,
            ``input_size`` and ``num_classes``, and where they differ ``learn_sigma`` (False unless given) and
            ``class_dropout_prob`` (0: there is no null class).
        generator: draws all noise instead of ``seed``, with the bits of diffusers' pipelines: one, or one for each image.
        latents: [B, C, H, W] to begin from: the noise of the first step, or with ``start_time`` what was noised up to it.
        start_time: the time of the step to begin with, in the model's own unit: 999..0, or 0..1 for a SiT. A solver ends in
            the bits of the whole run. A scheduler with a history begins it anew.
        callback: called before each step as ``callback(step, time, latents)``, with the step's place in the whole run, the
            time that the model is about to be told and the latents that it is about to be given. It may return other latents
            to go on with, or raise StopIteration to end the run: the latents then come back as they are.
        batch_size: how many images are computed together; all unless given.

    Returns:
        [B, C, H, W] fp32 on the model's device; fewer than labels after a stop in a batch before the last.

    Raises:
        ValueError: an argument; the message names it.
        TypeError: likewise, one of the wrong kind.
    """
    sampler = Sampler(
        model,
        steps,
        cfg_interval=cfg_interval,
        guidance_channels=guidance_channels,
        seed=seed,
        clip=clip,
        table_bytes=table_bytes,
        offload_conditioning=offload_conditioning,
        batch_invariant=batch_invariant,
        scheduler=scheduler,
        config=config,
    )
    return sampler(
        labels,
        cfg_scale=cfg_scale,
        images=images,
        on_step=on_step,
        generator=generator,
        latents=latents,
        start_time=start_time,
        callback=callback,
        batch_size=batch_size,
    )


@dataclass(frozen=True)
class Sampler:
    """``sample`` of one batch after another: what one batch had captured as a CUDA graph, the next of its size replays.

    Fields are ``sample``'s arguments. A graph reads the weights where they were: a model that is moved, cast or changed in its
    layers needs another sampler. Models with hooks, or of other classes, are called step by step.
    """

    model: Any
    steps: Sequence[Step]
    cfg_interval: tuple[float, float] = (-math.inf, math.inf)
    guidance_channels: int | None = None
    seed: int = 0
    clip: bool = False
    table_bytes: int = BUDGET_BYTES
    offload_conditioning: bool = False
    batch_invariant: bool = False
    scheduler: Any = None
    config: Any = None

    def __post_init__(self) -> None:
        config = self.denoiser.config
        given = {
            "cfg_interval": as_interval(self.cfg_interval),
            "seed": as_int("seed", self.seed, 0, LARGEST_SEED),
            "table_bytes": as_int("table_bytes", self.table_bytes, 0),
            **{name: as_bool(name, getattr(self, name)) for name in ("clip", "offload_conditioning", "batch_invariant")},
        }
        if self.guidance_channels is not None:
            given["guidance_channels"] = as_int("guidance_channels", self.guidance_channels, 0, config.in_channels)
        for name, value in given.items():
            object.__setattr__(self, name, value)
        self._check_offload()
        if self.scheduler is None:
            check_steps(self.steps)
            object.__setattr__(self, "steps", fit_steps(self.steps, config.prediction))
        else:
            check_scheduler(self.scheduler, config.prediction)

    @torch.no_grad()  # tensors of inference mode could not be trained on
    def __call__(
        self,
        labels: Tensor | Sequence[int],
        *,
        cfg_scale: float | Sequence[float] = 1.0,
        images: Sequence[int] | None = None,
        on_step: Callable[[], None] = lambda: None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        start_time: float | None = None,
        callback: Callback | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """Return [B, C, H, W] fp32 on the model's device. Arguments and errors are those of ``sample``."""
        if getattr(self.denoiser.model, "training", False):
            raise ValueError("model: got a model in training mode, expected model.eval()")
        self._check_offload()
        whole = self._batch(labels, cfg_scale, images, generator, latents, start_time)
        count = len(whole.labels)
        size = count if batch_size is None else as_int("batch_size", batch_size, 1)
        size = 1 if self.batch_invariant else max(1, size)
        check_callable("on_step", on_step)
        before, run = self._watched(callback), self._run
        parts = []
        with offloaded_conditioning(self.denoiser.model) if self.offload_conditioning else contextlib.nullcontext():
            for start in range(0, max(1, count), size):
                batch = whole.part(slice(start, start + size))
                if self.scheduler is None:
                    states = run.solved(self.steps, batch, before)
                else:
                    states = run.scheduled(self.scheduler, batch, before)
                try:
                    for x in states:
                        latest = x
                        on_step()
                except Stopped as stop:
                    parts.append(stop.latents)
                    break
                parts.append(latest.clone())
        return torch.cat(parts)

    @cached_property
    def denoiser(self) -> Denoiser:
        """The model as it is called, with its config."""
        return self.model if isinstance(self.model, Denoiser) else Denoiser(self.model, self.config)

    @cached_property
    def _run(self) -> Run:
        own = self.denoiser.config.guidance_channels
        channels = own if self.guidance_channels is None else self.guidance_channels
        return Run(self.denoiser, self.clip, self.cfg_interval, channels, self.seed, self.table_bytes)

    def starts(self) -> list[tuple[int, float]]:
        """Return index and time of each step that a run may begin with: all but the second halves of Heun's and its kind."""
        if self.scheduler is None:
            return [(i, step.t) for i, step in enumerate(self.steps) if not step.corrects]
        times = [float(t) for t in self.scheduler.timesteps]
        return list(enumerate(times))[:: getattr(self.scheduler, "order", 1)]

    def _batch(self, labels: Any, cfg_scale: Any, images: Any, generator: Any, latents: Any, start_time: float | None) -> Batch:
        config, device = self.denoiser.config, self.denoiser.device
        labels = as_labels(labels, config.label_rows, device)
        count = len(labels)
        scale = as_scales(cfg_scale, count, device)
        if scale is not None and not config.has_null_class:
            raise ValueError("cfg_scale: this model has no null class to guide away from, expected 1")
        generators = as_generators(generator, count)
        first = as_first_step(start_time, self.starts())
        shape = (count, *config.input_shape)
        if latents is not None:
            latents = as_latents("latents", latents, shape, device)
        elif start_time is not None:
            raise ValueError(f"latents: got None, expected those of start_time {start_time}")
        elif generators is not None:  # for all images at once, whatever the batches
            latents = generated_noise(shape, generators).to(device)
        return Batch(labels, as_images(images, count), scale, latents, first, generators, start_time is not None)

    def _watched(self, callback: Callback | None) -> Before:
        if callback is None:
            return lambda i, x: x
        check_callable("callback", callback)
        steps = {i: (number, time) for number, (i, time) in enumerate(self.starts())}

        def before(i: int, x: Tensor) -> Tensor:
            if i not in steps:
                return x
            try:
                changed = callback(*steps[i], x.clone())  # which the caller may keep or change
            except StopIteration:
                raise Stopped(x.clone()) from None
            return x if changed is None else as_latents("callback", changed, x.shape, x.device)

        return before

    def _check_offload(self) -> None:
        if self.offload_conditioning and not (self.table_bytes and can_tabulate(self.denoiser.model)):
            raise ValueError(
                "offload_conditioning: got True, but without a table, without adaLN, or with hooks, the steps need all weights"
            )
