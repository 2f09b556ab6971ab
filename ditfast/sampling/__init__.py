"""From labels to images."""

from .loop import Sampler, sample
from .noise import image_noise

__all__ = ["Sampler", "image_noise", "sample"]
