"""Self-attention, packed or not, on the engine that is expected to win: flash-attn, torch's SDPA or our Triton kernels."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from .checks import check_dtype
from .cpu_products import torch_attention
from .dispatch import define_op, force, forced, has_triton, needs_gradient, under_autocast

ENGINES = ("flash", "sdpa", "triton")
LARGEST_HEAD = 256  # of flash-attn, and of our kernels
# Where libraries pad head dim 72 to 96 (flash-attn) or 128, and our 64 + 16 shows against what a launch costs.
LONG_SEQUENCE = 1024


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


def attention(qkv: Tensor | tuple[Tensor, Tensor, Tensor], engine: str | None = None) -> Tensor:
    """``softmax(q k.T / sqrt(d)) v`` for each head, without a mask (Vaswani et al. 2017).

    Args:
        qkv: [B, T, 3, H, d] fp32, fp16 or bf16, contiguous in its last three dimensions: the output of the qkv linear. Or
            q, k and v apart, each [B, T, H, d]: SDPA reads them in place, the other engines have them packed first.
        engine: one of ``"flash"``, ``"sdpa"``, ``"triton"``; None for the one that is expected to win.

    Returns:
        [B, T, H*d], contiguous, of the dtype of qkv, or autocast's.

    Raises:
        ValueError: the shape, dtype or strides of qkv, or the name of the engine.
        RuntimeError: an engine that was asked for cannot run here; the message says why, and what to do.
    """
    if not isinstance(qkv, Tensor):
        q, k, v = under_autocast(*qkv)
        return _attention_apart(q, k, v, engine)
    (qkv,) = under_autocast(qkv)
    check_heads("qkv", qkv, "[B, T, 3, H, d]", packed=3)
    _, T, _, _, d = qkv.shape
    engine, _ = choose_engine(qkv.device, qkv.dtype, d, T, engine)
    if engine == "triton":
        return _op(qkv, needs_gradient(qkv))[0]
    return _flash(qkv) if engine == "flash" else torch_attention(*qkv.unbind(2))


def _attention_apart(q: Tensor, k: Tensor, v: Tensor, engine: str | None) -> Tensor:
    for name, heads in (("q", q), ("k", k), ("v", v)):
        check_heads(name, heads, "[B, T, H, d]")
        if (heads.shape, heads.dtype, heads.device) != (q.shape, q.dtype, q.device):
            got = f"{tuple(heads.shape)} {heads.dtype} on {heads.device}"
            raise ValueError(f"{name}: got {got}, expected {tuple(q.shape)} {q.dtype} on {q.device}, as q")
    engine, _ = choose_engine(q.device, q.dtype, q.shape[3], q.shape[1], engine)
    return torch_attention(q, k, v) if engine == "sdpa" else attention(torch.stack((q, k, v), dim=2), engine)


def check_heads(name: str, tensor: Tensor, expected: str, packed: int = 0) -> None:
    """[B, T, H, d], or [B, T, packed, H, d], contiguous from its third dimension on."""
    if tensor.dim() != (5 if packed else 4) or (packed and tensor.shape[2] != packed):
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {expected}")
    check_dtype(name, tensor)
    H, d = tensor.shape[-2:]
    if H * d == 0:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected at least one head of at least one dimension")
    if tensor.numel() and tensor.stride()[2:] != (H * d, d, 1)[-(tensor.dim() - 2) :]:
        raise ValueError(
            f"{name}: got strides {tensor.stride()}, expected {expected} to be contiguous from its third dimension on"
        )


def attention_engine(name: str) -> contextlib.AbstractContextManager[None]:
    """Forces ``attention`` inside the ``with`` block, in this thread, onto ``"flash"``, ``"sdpa"`` or ``"triton"``.

    Raises:
        ValueError: none of these names.
    """
    return force("attention", name, ENGINES)


def choose_engine(
    device: torch.device, dtype: torch.dtype, head_dim: int, num_tokens: int, wanted: str | None = None
) -> tuple[str, str]:
    """The engine that ``attention`` takes, ``"flash"``, ``"sdpa"`` or ``"triton"``, and why.

    Raises:
        ValueError: an engine is wanted that does not exist.
        RuntimeError: a wanted or forced engine cannot run; the message says why, and what to do.
    """
    if wanted is not None:
        if wanted not in ENGINES:
            raise ValueError(f"engine: got {wanted!r}, expected one of {', '.join(ENGINES)}")
        _check_possible(wanted, device, dtype, head_dim)
        return wanted, "asked for"
    choice = forced()
    if choice.attention is not None:
        _check_possible(choice.attention, device, dtype, head_dim)
        return choice.attention, "forced by ditfast.attention_engine"
    if choice.backend == "triton":
        _check_possible("triton", device, dtype, head_dim)
        return "triton", "forced by ditfast.backend"
    why_not_flash = _why_not_flash(device, dtype, head_dim)
    library = ("sdpa", why_not_flash) if why_not_flash else ("flash", "flash-attn is installed")
    if choice.backend == "torch" or device.type != "cuda" or dtype == torch.float32:
        return library
    if not HAS_TRITON or head_dim > LARGEST_HEAD:
        return library
    if torch.version.hip:
        return "triton", "the same tiles on AMD; expected to win, not measured"
    if head_dim == 72 and num_tokens >= LONG_SEQUENCE and "compute capability" not in why_not_flash:
        return "triton", "64 + 16 does 1.11x the useful work, flash-attn's 96 1.33x; expected to win, not measured"
    return library


def _why_not_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    if device.type != "cuda":
        return f"flash-attn does not run on {device.type}"
    if dtype == torch.float32:
        return "flash-attn does not take float32"
    if torch.cuda.is_available() and not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
        return "flash-attn needs compute capability 8.0 or later"
    if head_dim > LARGEST_HEAD or head_dim % 8:
        return f"flash-attn does not take head dim {head_dim}"
    return WHY_NO_FLASH


def _check_possible(engine: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    why = ""
    if engine == "flash":
        why = _why_not_flash(device, dtype, head_dim)
    elif engine == "triton" and head_dim > LARGEST_HEAD:
        why = f"the Triton kernels take head dims up to {LARGEST_HEAD}, not {head_dim}"
    if why:
        raise RuntimeError(f"attention was forced onto {engine!r}, but {why}: ditfast.attention_engine('sdpa') takes any input")


def _flash(qkv: Tensor) -> Tensor:
    from flash_attn import flash_attn_qkvpacked_func

    if qkv.numel() == 0:  # which flash-attn refuses
        return _fake(qkv, False)[0]
    return flash_attn_qkvpacked_func(qkv, causal=False).flatten(2)


def _fake(qkv: Tensor, training: bool) -> tuple[Tensor, Tensor]:
    B, T, _, H, d = qkv.shape
    return qkv.new_empty((B, T, H * d)), qkv.new_empty((B, H, T) if training else (0,), dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(inputs[0], out, lse)


def _backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return _backward_op(dout, *ctx.saved_tensors), None


def _backward_fake(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    return qkv.new_empty(qkv.shape)


_op = define_op("attention(Tensor qkv, bool training) -> (Tensor, Tensor)", _fake, save=_save, backward=_backward)
_backward_op = define_op("attention_backward(Tensor dout, Tensor qkv, Tensor out, Tensor lse) -> Tensor", _backward_fake)
