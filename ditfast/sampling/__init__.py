"""From labels to images."""

from .loop import Sampler, sample
from .noise import image_noise
from .samples import Samples

__all__ = ["Sampler", "Samples", "image_noise", "sample"]
