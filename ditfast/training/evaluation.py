"""What a run's average is looked at by: samples, its loss on numbers that stay the same, and on digits a Frechet distance."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..diffusion import FlowMatching, GaussianDiffusion, steps
from ..evaluation.digits_classifier import digits_quality
from ..images import labelled_grid, save_png
from ..model import DiT
from ..sampling import sample
from .data import BadRecord, Data, Digits, Record
from .draws import Draws
from .objective import Objective
from .settings import TrainSettings

CLASSES = 10
PER_CLASS = 4
STEPS = 50
RECORDS = 256
DIGITS = 500
GUIDANCE = 2.0
NO_STEP = 2**62  # whose draws no step of training sees


def preview(path: Path, model: DiT, settings: TrainSettings, decode: Callable[[Tensor], Tensor] | None) -> None:
    """Save a labelled grid of the first ten classes, drawn from the run's seed; without ``decode`` latents are images."""
    classes = list(range(min(CLASSES, model.config.num_classes)))
    labels = torch.tensor(classes).repeat_interleave(PER_CLASS)
    latents = _samples(model, settings, labels, clip=decode is None)  # [N, C, H, W]
    images = latents if decode is None else decode(latents)
    by_class = dict(zip(classes, images.cpu().split(PER_CLASS), strict=True))
    save_png(path, labelled_grid(by_class, scale=max(1, 32 // images.shape[-1])))


def evaluate(model: DiT, data: Data, settings: TrainSettings) -> dict[str, float]:
    """Return ``loss`` on the first readable records, with the same timesteps and noise every time.

    Of digits also ``frechet_distance`` and ``accuracy``.
    """
    found = {"loss": _fixed_loss(model, data, settings)}
    if isinstance(data, Digits):
        labels = torch.arange(DIGITS) % model.config.num_classes
        samples = _samples(model, settings, labels, clip=True).cpu()
        found["frechet_distance"], found["accuracy"] = digits_quality(samples, labels)
    return found


@torch.no_grad()
def _fixed_loss(model: DiT, data: Data, settings: TrainSettings) -> float:
    device, records = model.pos_embed.device, list(itertools.islice(_readable(data), RECORDS))
    draws = Draws(settings.seed, NO_STEP, len(records), device)
    noise = draws.normal("noise", model.config.input_shape)  # [N, C, H, W]
    values = torch.stack([record.values for record in records]).to(device)
    unflipped = torch.zeros(len(records), dtype=torch.bool, device=device)
    x0 = data.clean(values, unflipped, draws.normal("moments", model.config.input_shape))  # [N, C, H, W]
    objective = Objective(settings, model.config)
    t, _ = objective.sampler.draw(draws.uniform("times"))  # [N]
    y = torch.tensor([record.label for record in records], device=device)
    parts = [tensor.split(32) for tensor in (x0, t, y, noise)]
    return torch.cat([objective.losses(model, *part)["loss"] for part in zip(*parts, strict=True)]).double().mean().item()


def _readable(data: Data) -> Iterator[Record]:
    for index in range(len(data)):
        try:
            yield data[index]
        except BadRecord:
            continue


def _samples(model: DiT, settings: TrainSettings, labels: Tensor, clip: bool) -> Tensor:
    if settings.loss == "flow":
        schedule = steps(FlowMatching(settings.path, STEPS), "euler")
    else:
        schedule = steps(GaussianDiffusion(f"ddim{STEPS}", learn_sigma=model.config.learn_sigma), "ddim")
    scale = GUIDANCE if model.config.has_null_class else 1.0
    return sample(model, schedule, labels, cfg_scale=scale, seed=settings.seed, clip=clip)
