"""Self-attention, packed or not, on the engine that wins: flash-attn, torch's SDPA or our Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..argument_checks import check_dtype, check_tensor, wrong_type
from ..dispatch.backends import Choice
from ..dispatch.op import Op, TritonOp
from ..dispatch.override import ATTENTION_BACKENDS
from ..dispatch.selection import check_possible, choose, select_backend
from ..dispatch.shapes import OpShape
from .cpu_products import save_attention, torch_attention


def attention(qkv: Tensor | tuple[Tensor, Tensor, Tensor], engine: str | None = None) -> Tensor:
    """``softmax(q k.T / sqrt(d)) v`` for each head, without a mask (Vaswani et al. 2017).

    A query whose scores are all -inf, as products may overflow to, gets zeros, as torch's attention has it.

    Args:
        qkv: [B, T, 3, H, d] fp32, fp16 or bf16, contiguous in its last three dimensions, of any outer strides: the output of
            the qkv linear. Or q, k and v apart, each [B, T, H, d]: SDPA reads them in place, the other engines have them
            packed first.
        engine: one of ``"flash"``, ``"sdpa"``, ``"triton"``; None for the one that ``ditfast doctor`` names.

    Returns:
        [B, T, H*d], contiguous, of the dtype of qkv, or autocast's.

    Raises:
        ValueError: the shape, dtype or strides of qkv, or the name of the engine.
        RuntimeError: an engine that was asked for cannot run here; the message says why, and what to do.
    """
    packed, apart = _OPS[None if engine is None else _check_engine(engine)]
    if not isinstance(qkv, Tensor):
        if not isinstance(qkv, Sequence) or isinstance(qkv, str) or len(qkv) != 3:
            raise wrong_type("qkv", qkv, "a tensor [B, T, 3, H, d] or three, each [B, T, H, d]")
        return apart(*qkv)
    return packed(qkv)


def _select_packed(engine: str | None, qkv: Tensor, training: bool) -> str:
    check_heads("qkv", qkv, "[B, T, 3, H, d]", packed=3)
    B, T, _, H, d = qkv.shape
    return _select(engine, qkv, (B, T, H, d), training)


def _select_apart(engine: str | None, q: Tensor, k: Tensor, v: Tensor, training: bool) -> str:
    for name, heads in (("q", q), ("k", k), ("v", v)):
        check_heads(name, heads, "[B, T, H, d]")
        if (heads.shape, heads.dtype, heads.device) != (q.shape, q.dtype, q.device):
            got = f"{tuple(heads.shape)} {heads.dtype} on {heads.device}"
            raise ValueError(f"{name}: got {got}, expected {tuple(q.shape)} {q.dtype} on {q.device}, as q")
    return _select(engine, q, q.shape, training)


def _select(engine: str | None, x: Tensor, shape: Sequence[int], training: bool) -> str:
    B, *sizes = shape
    rows = B * sizes[0]
    if engine is None:
        return select_backend(x, "attention", rows, tuple(sizes), training)
    return choose_engine(x.device, OpShape("attention", x.dtype, rows, tuple(sizes), training), engine).backend


def _sdpa(qkv: Tensor) -> Tensor:
    return torch_attention(*qkv.unbind(2))


def check_heads(name: str, tensor: Tensor, expected: str, packed: int = 0) -> None:
    """[B, T, H, d], or [B, T, packed, H, d], contiguous from its third dimension on."""
    check_tensor(name, tensor, expected)
    if tensor.dim() != (5 if packed else 4) or (packed and tensor.shape[2] != packed):
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {expected}")
    check_dtype(name, tensor)
    H, d = tensor.shape[-2:]
    if H * d == 0:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected at least one head of at least one dimension")
    usual = tensor.stride()[2:] == (H * d, d, 1)[-(tensor.dim() - 2) :]
    if tensor.numel() and not (usual or tensor[0, 0].is_contiguous()):
        raise ValueError(
            f"{name}: got strides {tensor.stride()}, expected {expected} to be contiguous from its third dimension on"
        )


def choose_engine(device: torch.device, shape: OpShape, wanted: str | None = None) -> Choice:
    """The engine that ``attention`` takes, ``"flash"``, ``"sdpa"`` or ``"triton"``, and why.

    Raises:
        ValueError: an engine is wanted that does not exist.
        RuntimeError: a wanted or forced engine cannot run; the message says why, and what to do.
    """
    if wanted is None:
        return choose(device, shape)
    check_possible(_check_engine(wanted), device, shape)
    return Choice(wanted, "asked for")


def _check_engine(name: str) -> str:
    if not isinstance(name, str) or name not in ATTENTION_BACKENDS:
        raise ValueError(f"engine: got {name!r}, expected one of {', '.join(ATTENTION_BACKENDS)}")
    return name


def _flash(qkv: Tensor) -> Tensor:
    from flash_attn import flash_attn_qkvpacked_func

    if qkv.numel() == 0:  # which flash-attn refuses
        return _fake(qkv, False)[0]
    return flash_attn_qkvpacked_func(qkv, causal=False).flatten(2)


def _fake(qkv: Tensor, training: bool) -> tuple[Tensor, Tensor]:
    B, T, _, H, d = qkv.shape
    return qkv.new_empty((B, T, H * d)), qkv.new_empty((B, H, T) if training else (0,), dtype=torch.float32)


def _backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return _backward_op(dout, *ctx.saved_tensors), None


def _backward_fake(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    return qkv.new_empty(qkv.shape)


_triton = TritonOp(
    "attention(Tensor qkv, bool training) -> (Tensor, Tensor)", _fake, save=save_attention, backward=_backward, outputs=1
)
_backward_op = TritonOp("attention_backward(Tensor dout, Tensor qkv, Tensor out, Tensor lse) -> Tensor", _backward_fake)


def _ops(engine: str | None) -> tuple[Op, Op]:
    """Return the ops for packed heads and for q, k and v apart, which SDPA alone reads in place."""
    options: Any = {"is_asked": engine is not None, "autocast": slice(0, 3)}

    def pack(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        return (torch.stack((q, k, v), dim=2),)

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _flash(*pack(q, k, v))

    packed = Op(partial(_select_packed, engine), _triton, sdpa=_sdpa, flash=_flash, **options)
    apart = Op(partial(_select_apart, engine), _triton, pack, sdpa=torch_attention, flash=flash, **options)
    return packed, apart


_OPS = {engine: _ops(engine) for engine in (None, *ATTENTION_BACKENDS)}
