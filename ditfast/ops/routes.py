"""The ways an op can be computed, which of them a device has, and which it takes as long as nobody knows better."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import NamedTuple

import torch

from ..devices import why_too_old
from ..problem import SIZES, Problem

# The first is plain torch; others that win replace it.
ROUTES = {op: ("torch", "triton") for op in SIZES} | {
    "linear_gelu": ("torch", "cublaslt", "triton"),
    "attention": ("sdpa", "flash", "triton"),
}
LARGEST_HEAD = 256  # of flash-attn, and of our kernels
# Where libraries pad head dim 72 to 96 (flash-attn) or 128, and our 64 + 16 shows against what a launch costs.
LONG_SEQUENCE = 1024
TORCH_BY_DEFAULT = {"linear": "the library's GEMM adds the bias in its epilogue too"}
TORCH_FOR_GRADIENTS = {op: "its gradients are plain products, the library's GEMM at its best" for op in ("linear_gelu", "mlp")}


class Choice(NamedTuple):
    route: str
    why: str


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def why_no_flash() -> str:
    """Why flash-attn cannot be called here; empty if it can."""
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


def why_not(route: str, device: torch.device, problem: Problem) -> str:
    """Why a route of the op cannot be taken on this device; empty if it can."""
    if route == "triton":
        return why_not_triton(device, problem)
    if route == "flash":
        return why_not_flash(device, problem.dtype, problem.sizes[-1])
    if route == "cublaslt":
        return why_not_cublaslt(device, problem)
    return ""


def why_not_triton(device: torch.device, problem: Problem) -> str:
    if not HAS_TRITON:
        return "triton is not installed"
    too_old = why_too_old(device)
    if too_old:
        return too_old
    if problem.op in ("attention", "cross_attention") and problem.sizes[-1] > LARGEST_HEAD:
        return f"the Triton kernels take head dims up to {LARGEST_HEAD}, not {problem.sizes[-1]}"
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


def why_not_cublaslt(device: torch.device, problem: Problem) -> str:
    if device.type != "cuda":
        return "GELU in its tanh form is in the library's epilogue on CUDA only"
    return "the library's epilogue keeps nothing for the backward" if problem.training else ""


def default(device: torch.device, problem: Problem) -> Choice:
    """What an op takes on CUDA where nothing was measured or predicted."""
    if problem.op == "attention":
        return _default_attention(device, problem)
    reason = why_not_triton(device, problem) or TORCH_BY_DEFAULT.get(problem.op, "")
    if not reason and problem.training:
        reason = TORCH_FOR_GRADIENTS.get(problem.op, "")
    return Choice("torch", reason) if reason else Choice("triton", "the default on CUDA")


def library_attention(device: torch.device, problem: Problem) -> Choice:
    """flash-attn where it can be called, else torch's."""
    why = why_not("flash", device, problem)
    return Choice("sdpa", why) if why else Choice("flash", "flash-attn is installed")


def _default_attention(device: torch.device, problem: Problem) -> Choice:
    library, (num_tokens, _, head_dim) = library_attention(device, problem), problem.sizes
    if problem.dtype == torch.float32 or why_not_triton(device, problem):
        return library
    if torch.version.hip:
        return Choice("triton", "the same tiles on AMD; expected to win, not measured")
    if head_dim == 72 and num_tokens >= LONG_SEQUENCE:
        return Choice("triton", "64 + 16 does 1.11x the useful work, flash-attn's 96 1.33x; expected to win, not measured")
    return library
