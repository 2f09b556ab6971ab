"""ditfast: Diffusion Transformers on fused Triton kernels."""

from importlib import import_module
from typing import TYPE_CHECKING

from . import interrupt as interrupt  # acts while the rest is imported

# isort: split
from . import diffusion, flops, ops, reference
from .accelerate import accelerate, accelerated, acceleration_report, restore
from .checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from .config import DiTConfig
from .digits import load_digits
from .dispatch.override import attention_engine, backend, checkpoint_contexts
from .model import DiT
from .refresh import refresh
from .version import __version__ as __version__

if TYPE_CHECKING:
    from . import evaluation, sampling, training
    from .sampling.api import sample
    from .training import Trainer

__all__ = [
    "CheckpointError",
    "DiT",
    "DiTConfig",
    "Trainer",
    "accelerate",
    "accelerated",
    "acceleration_report",
    "attention_engine",
    "backend",
    "checkpoint_contexts",
    "diffusion",
    "evaluation",
    "flops",
    "load_checkpoint",
    "load_digits",
    "ops",
    "reference",
    "refresh",
    "restore",
    "sample",
    "sampling",
    "save_checkpoint",
    "training",
]


def __dir__() -> list[str]:
    return sorted(__all__)


if not TYPE_CHECKING:  # else a type checker would take every name

    def __getattr__(name):
        """Import what few programs need, when it is first asked for."""
        if name in ("evaluation", "sampling", "training"):
            return import_module(f"{__name__}.{name}")
        if name == "Trainer":
            return import_module(f"{__name__}.training").Trainer
        if name == "sample":
            return import_module(f"{__name__}.sampling.api").sample
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
