"""Self-attention from a packed qkv, on the best engine at hand: flash-attn if it can be imported, else torch's SDPA."""

from __future__ import annotations

import importlib
import importlib.util

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import check_dtype
from .dispatch import define_op, takes_torch

FLASH_LARGEST_HEAD = 256


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


def attention(qkv: Tensor) -> Tensor:
    """``softmax(q k.T / sqrt(d)) v`` for each head, without a mask (Vaswani et al. 2017).

    Args:
        qkv: [B, T, 3, H, d] fp32, fp16 or bf16, contiguous in its last three dimensions: the output of the qkv linear.

    Returns:
        [B, T, H*d], contiguous, of the dtype of qkv.

    Raises:
        ValueError: the shape, dtype or strides of qkv.
    """
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv: got shape {tuple(qkv.shape)}, expected [B, T, 3, H, d]")
    check_dtype("qkv", qkv)
    H, d = qkv.shape[3:]
    if qkv.stride()[2:] != (H * d, d, 1) and qkv.numel():
        raise ValueError(f"qkv: got strides {qkv.stride()}, expected its last three dimensions to be contiguous")
    if takes_torch(qkv):
        return _torch_version(qkv)
    return _op(qkv)


def choose_engine(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    """The engine that ``attention`` takes, ``"flash"`` or ``"sdpa"``, and why."""
    if device.type != "cuda":
        return "sdpa", f"flash-attn does not run on {device.type}"
    if dtype == torch.float32:
        return "sdpa", "flash-attn does not take float32"
    if torch.cuda.is_available() and not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
        return "sdpa", "flash-attn needs compute capability 8.0 or later"
    if head_dim > FLASH_LARGEST_HEAD or head_dim % 8:
        return "sdpa", f"flash-attn does not take head dim {head_dim}"
    return ("sdpa", WHY_NO_FLASH) if WHY_NO_FLASH else ("flash", "flash-attn is installed")


def _flash(qkv: Tensor) -> Tensor:
    from flash_attn import flash_attn_qkvpacked_func

    if qkv.numel() == 0:  # which flash-attn refuses
        return _fake(qkv)
    return flash_attn_qkvpacked_func(qkv, causal=False).flatten(2)


def _sdpa(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).contiguous()


_ENGINES = {"flash": _flash, "sdpa": _sdpa}


def _torch_version(qkv: Tensor) -> Tensor:
    engine, _ = choose_engine(qkv.device, qkv.dtype, qkv.shape[-1])
    return _ENGINES[engine](qkv)


def _fake(qkv: Tensor) -> Tensor:
    B, T, _, H, d = qkv.shape
    return qkv.new_empty((B, T, H * d))


_op = define_op("attention(Tensor qkv) -> Tensor", _torch_version, _fake, triton=False)
