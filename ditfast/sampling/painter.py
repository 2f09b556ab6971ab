"""Images by their numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .. import vae as autoencoder
from ..diffusion.solvers import Step
from ..images import Pixels, to_pixels
from ..model import DiT
from .loop import sample


@dataclass(frozen=True)
class Painter:
    """Numbers to pixels; the same numbers give the same bytes, and the same number in another batch nearly the same.

    Args:
        model: in eval mode.
        steps: of a solver.
        label: the class of an image.
        seed: with an image's number it decides its noise.
        vae: decodes; None where the model makes pixels.
        options: more of ``sample``'s.
    """

    model: DiT
    steps: Sequence[Step]
    label: Callable[[int], int]
    seed: int = 0
    vae: autoencoder.VAE | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        channels, *size = self.model.config.input_shape
        if self.vae is None:
            return size[0], size[1], channels
        return autoencoder.image_size(self.vae, size[0]), autoencoder.image_size(self.vae, size[1]), 3

    def paint(self, numbers: Sequence[int], advance: Callable[[float], None] = lambda images: None) -> Pixels:
        """[n, height, width, C] 8-bit.

        Args:
            numbers: of the images.
            advance: called after each step with how many images' work that was.

        Raises:
            FloatingPointError: an image holds infinities or NaN, which have no pixels.
        """
        labels = torch.tensor([self.label(number) for number in numbers])
        done = len(numbers) / len(self.steps)
        given = {"seed": self.seed, "images": numbers, "on_step": lambda: advance(done), **self.options}
        images = sample(self.model, self.steps, labels, **given)  # [n, C, H, W]
        if self.vae is not None:
            images = autoencoder.decode(self.vae, images)  # [n, 3, H, W]
        finite = images.isfinite().flatten(1).all(1)
        if not finite.all():
            raise FloatingPointError(f"image {numbers[int((~finite).nonzero()[0])]} came out infinite or NaN")
        return to_pixels(images)


def drawn_label(classes: Sequence[int], image: int, seed: int) -> int:
    """One of the classes, evenly drawn for an image of a seed, whatever the order; a part of the stream of its noise."""
    stream = np.random.Philox(key=np.array([seed, image], np.uint64), counter=np.array([0, 0, 0, 1], np.uint64))
    return classes[int(stream.random_raw()) % len(classes)]
