"""The backends of each op, which of them a device can run, and which one an op takes by default."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import NamedTuple

import torch

from ..devices import why_too_old
from .shapes import SIZES, OpShape, size_names

# The first is plain torch; others that win replace it.
BACKENDS = {op: ("torch", "triton") for op in SIZES} | {
    "linear_gelu": ("torch", "cublaslt", "triton"),
    "attention": ("sdpa", "flash", "triton"),
}
LARGEST_HEAD = 256  # of flash-attn, and of our kernels
# Where libraries pad head dim 72 to 96 (flash-attn) or 128, and our 64 + 16 shows against what a launch costs.
LONG_SEQUENCE = 1024


class Default(NamedTuple):
    """A row of the default table."""

    inference: str
    training: str  # forward and backward
    why_torch: str = ""


GEMM = "the library's GEMM adds the bias in its epilogue too"
GRADIENTS = "its gradients are plain products, the library's GEMM at its best"

# What an op takes on a GPU where nothing is forced and nothing was measured. Plain torch where Triton cannot run.
DEFAULTS = {
    "layer_norm_modulate": Default("triton", "triton"),
    "gated_residual": Default("triton", "triton"),
    "gated_residual_layer_norm_modulate": Default("triton", "triton"),
    "linear": Default("torch", "torch", GEMM),
    "grouped_linear": Default("triton", "triton"),
    "linear_gelu": Default("triton", "torch", GRADIENTS),
    "linear_gated_residual": Default("triton", "triton"),
    "mlp": Default("triton", "torch", GRADIENTS),
    "attention": Default("library", "library"),  # flash-attn, else SDPA; Triton where ``_default_attention`` says
    "cross_attention": Default("triton", "triton"),
    "patch_embed": Default("triton", "triton"),
    "final_layer": Default("triton", "triton"),
    "linear_unpatchify": Default("triton", "triton"),
    "unpatchify": Default("triton", "triton"),
    "timestep_embedding": Default("triton", "triton"),
    "classifier_free_guidance": Default("triton", "triton"),
    "denoise_update": Default("triton", "triton"),
}


class Choice(NamedTuple):
    """A backend, and why an op takes it."""

    backend: str
    why: str


def default(device: torch.device, shape: OpShape) -> Choice:
    """Return what an op takes on CUDA where nothing was measured."""
    size_names(shape.op)
    if shape.op == "attention":
        return _default_attention(device, shape)
    reason, row = why_not_triton(device, shape), DEFAULTS[shape.op]
    backend = row.training if shape.training else row.inference
    if reason or backend == "torch":
        return Choice("torch", reason or row.why_torch)
    return Choice(backend, "the default on CUDA")


def _default_attention(device: torch.device, shape: OpShape) -> Choice:
    library, (num_tokens, _, head_dim) = library_attention(device, shape), shape.sizes
    if shape.dtype == torch.float32 or why_not_triton(device, shape):
        return library
    if torch.version.hip:
        return Choice("triton", "the same tiles on AMD; expected to win, not measured")
    if head_dim == 72 and num_tokens >= LONG_SEQUENCE:
        return Choice("triton", "64 + 16 does 1.11x the useful work, flash-attn's 96 1.33x; expected to win, not measured")
    return library


def library_attention(device: torch.device, shape: OpShape) -> Choice:
    """Return flash-attn where it can be called, else torch's attention."""
    why = why_not("flash", device, shape)
    return Choice("sdpa", why) if why else Choice("flash", "flash-attn is installed")


def why_not(backend: str, device: torch.device, shape: OpShape) -> str:
    """Return why the device cannot run a backend of the op; empty if it can."""
    if backend == "triton":
        return why_not_triton(device, shape)
    if backend == "flash":
        return why_not_flash(device, shape.dtype, shape.sizes[-1])
    if backend == "cublaslt":
        return why_not_cublaslt(device, shape)
    return ""


def why_not_triton(device: torch.device, shape: OpShape) -> str:
    if not HAS_TRITON:
        return "triton is not installed"
    if device.type == "cuda" and (too_old := why_too_old(device)):
        return too_old
    if shape.op in ("attention", "cross_attention") and shape.sizes[-1] > LARGEST_HEAD:
        return f"the Triton kernels take head dims up to {LARGEST_HEAD}, not {shape.sizes[-1]}"
    return ""


def why_not_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    if device.type != "cuda":
        return f"flash-attn does not run on {device.type}"
    if dtype == torch.float32:
        return "flash-attn does not take float32"
    if why_too_old(device):
        return "flash-attn needs compute capability 8.0 or later"
    if head_dim > LARGEST_HEAD or head_dim % 8:
        return f"flash-attn does not take head dim {head_dim}"
    return WHY_NO_FLASH


def why_not_cublaslt(device: torch.device, shape: OpShape) -> str:
    if device.type != "cuda":
        return "GELU in its tanh form is in the library's epilogue on CUDA only"
    return "the library's epilogue keeps nothing for the backward" if shape.training else ""


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def why_no_flash() -> str:
    """Return why flash-attn cannot be called here; empty if it can."""
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    try:
        module = importlib.import_module("flash_attn")
    except Exception as error:  # built for another torch or CUDA: anything may come out of it
        return f"flash-attn is installed but does not import: {error}"
    return "" if hasattr(module, "flash_attn_qkvpacked_func") else "this flash-attn has no flash_attn_qkvpacked_func"


# Looked up once, at import: a graph that torch.compile traces cannot look for modules.
WHY_NO_FLASH = why_no_flash()
HAS_TRITON = has_triton()
