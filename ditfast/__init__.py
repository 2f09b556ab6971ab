"""ditfast: Diffusion Transformers on fused Triton kernels."""

from . import diffusion, flops, ops, reference
from .config import DiTConfig
from .digits import load_digits
from .model import DiT
from .ops.dispatch import backend

__version__ = "0.1.0"
__all__ = ["DiT", "DiTConfig", "backend", "diffusion", "flops", "load_digits", "ops", "reference"]
