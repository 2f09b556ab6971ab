"""Noise that belongs to an image: the same bits whatever the batch, the order or the number of devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..argument_checks import LARGEST_SEED, as_int, as_list

Generators: TypeAlias = torch.Generator | list[torch.Generator]  # one for a batch, or one for each image


def image_noise(shape: Sequence[int], images: Sequence[int], seed: int, step: int = 0) -> Tensor:
    """[len(images), *shape] fp32 normal noise on the CPU; image k of a seed has a stream of its own, and each step a part.

    Philox (Salmon et al. 2011) keyed by seed and image, with the step in its counter.

    Args:
        shape: of one image, such as (C, H, W).
        images: their numbers, 0..2^64-1.
        seed: 0..2^64-1.
        step: 0 is where sampling starts from.

    Raises:
        ValueError: a number out of its range; the message names the argument.
        TypeError: likewise, one of the wrong kind.
    """
    sizes = [as_int("shape", size, 0) for size in as_list("shape", shape, "the sizes of one image")]
    seed, step = (as_int(name, value, 0, LARGEST_SEED) for name, value in (("seed", seed), ("step", step)))
    numbers = [as_int("images", image, 0, LARGEST_SEED) for image in as_list("images", images, "their numbers")]
    counter = np.array([0, 0, step, 0], dtype=np.uint64)
    drawn = np.empty((len(numbers), *sizes), np.float32)
    for place, image in enumerate(numbers):
        bits = np.random.Philox(key=np.array([seed, image], dtype=np.uint64), counter=counter)
        np.random.Generator(bits).standard_normal(out=drawn[place], dtype=np.float32)
    return torch.from_numpy(drawn)


def generated_noise(shape: Sequence[int], generators: Generators) -> Tensor:
    """Draw fp32 normal noise (B, C, H, W) on the generators' device, with the bits that diffusers' pipelines draw."""
    if isinstance(generators, torch.Generator):
        return torch.randn(*shape, generator=generators, device=generators.device, dtype=torch.float32)
    parts = [torch.randn(1, *shape[1:], generator=g, device=g.device, dtype=torch.float32) for g in generators]
    return torch.cat(parts) if parts else torch.empty(*shape, dtype=torch.float32)
