"""From labels to images."""

from .loop import sample
from .noise import image_noise

__all__ = ["image_noise", "sample"]
