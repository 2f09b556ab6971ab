"""The Triton kernels, installed as ``ditfast.kernels``: one op, one file. Imports torch and triton, nothing else."""

if __name__ == "kernels":
    raise ImportError(
        "`import kernels` found ditfast's source folder, because the current directory is on sys.path. "
        "Ours is `ditfast.kernels`; for Hugging Face's package `kernels`, leave this directory."
    )

from .gated_residual import gated_residual
from .gated_residual_layer_norm_modulate import gated_residual_layer_norm_modulate
from .launch import check_launchable, target
from .layer_norm_modulate import layer_norm_modulate
from .linear_gelu import linear_gelu

__all__ = [
    "check_launchable",
    "gated_residual",
    "gated_residual_layer_norm_modulate",
    "layer_norm_modulate",
    "linear_gelu",
    "target",
]
