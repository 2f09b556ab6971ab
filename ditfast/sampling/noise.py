"""Noise that belongs to an image: the same bits whatever the batch, the order or the number of devices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def image_noise(shape: Sequence[int], images: Sequence[int], seed: int, step: int = 0) -> Tensor:
    """[len(images), *shape] fp32 normal noise on the CPU; image k of a seed has a stream of its own, and each step a part.

    Philox (Salmon et al. 2011) keyed by seed and image, with the step in its counter.

    Args:
        shape: of one image, such as (C, H, W).
        images: their numbers, 0..2^64-1.
        seed: 0..2^64-1.
        step: 0 is where sampling starts from.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: got {seed}, expected 0..2^64-1")
    counter = np.array([0, 0, step, 0], dtype=np.uint64)
    drawn = np.empty((len(images), *shape), np.float32)
    for place, image in enumerate(images):
        bits = np.random.Philox(key=np.array([seed, image], dtype=np.uint64), counter=counter)
        np.random.Generator(bits).standard_normal(out=drawn[place], dtype=np.float32)
    return torch.from_numpy(drawn)
