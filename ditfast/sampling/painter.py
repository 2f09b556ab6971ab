"""Images by their numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .. import vae as autoencoder
from ..images import Pixels, to_pixels
from .loop import Sampler


@dataclass(frozen=True)
class Painter:
    """Numbers to pixels; the same numbers give the same bytes, and the same number in another batch nearly the same.

    Args:
        sampler: labels and numbers to latents, or to pixels in [-1, 1].
        label: the class of an image.
        cfg_scale: strength of guidance.
        vae: decodes latents; None where the model makes pixels.
    """

    sampler: Sampler
    label: Callable[[int], int]
    cfg_scale: float = 1.0
    vae: autoencoder.VAE | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        channels, *size = self.sampler.denoiser.config.input_shape
        if self.vae is None:
            return size[0], size[1], channels
        return autoencoder.image_size(self.vae, size[0]), autoencoder.image_size(self.vae, size[1]), 3

    def paint(self, numbers: Sequence[int], advance: Callable[[float], None] = lambda images: None) -> Pixels:
        """Return images [n, height, width, C] 8-bit; each step calls ``advance`` with how many images' work it was.

        Raises:
            FloatingPointError: an image holds infinities or NaN, which have no pixels.
        """
        labels = [self.label(number) for number in numbers]
        done = len(numbers) / len(self.sampler.steps)
        images = self.sampler(labels, cfg_scale=self.cfg_scale, images=numbers, on_step=lambda: advance(done))  # [n, C, H, W]
        return decode_pixels(images, self.vae, numbers)


def decode_pixels(latents: Tensor, vae: autoencoder.VAE | None, numbers: Sequence[int]) -> Pixels:
    """Return images [n, height, width, C] 8-bit of latents [n, C, h, w], or without a VAE of pixels in [-1, 1].

    Raises:
        FloatingPointError: an image, named by its number, holds infinities or NaN, which have no pixels.
    """
    images = latents if vae is None else autoencoder.decode(vae, latents)  # [n, 1 or 3, H, W]
    finite = images.isfinite().flatten(1).all(1)
    if not finite.all():
        raise FloatingPointError(f"image {numbers[int((~finite).nonzero()[0])]} came out infinite or NaN")
    return to_pixels(images)


def label_of(image: int, classes: Sequence[int], per_class: int | None, seed: int) -> int:
    """The class of a run's image: so many of each class in turn, or, without ``per_class``, drawn."""
    return drawn_label(classes, image, seed) if per_class is None else classes[image // per_class]


def drawn_label(classes: Sequence[int], image: int, seed: int) -> int:
    """One of the classes, evenly drawn for an image of a seed, whatever the order; a part of the stream of its noise."""
    stream = np.random.Philox(key=np.array([seed, image], np.uint64), counter=np.array([0, 0, 0, 1], np.uint64))
    return classes[int(stream.random_raw()) % len(classes)]
