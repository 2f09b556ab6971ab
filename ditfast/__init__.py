"""ditfast: Diffusion Transformers on fused Triton kernels."""

from . import diffusion, flops, ops, reference
from .accelerate import accelerate, accelerated, acceleration_report, restore
from .checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from .config import DiTConfig
from .digits import load_digits
from .model import DiT
from .ops.attention import attention_engine
from .ops.dispatch import backend, checkpoint_contexts

__version__ = "0.1.0"
__all__ = [
    "CheckpointError",
    "DiT",
    "DiTConfig",
    "accelerate",
    "accelerated",
    "acceleration_report",
    "attention_engine",
    "backend",
    "checkpoint_contexts",
    "diffusion",
    "flops",
    "load_checkpoint",
    "load_digits",
    "ops",
    "reference",
    "restore",
    "save_checkpoint",
]
