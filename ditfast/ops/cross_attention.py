"""Cross-attention: queries of the tokens to keys and values of a context, as DiT's cross-attention design has it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch.backends import LARGEST_HEAD
from ..dispatch.op import Op, TritonOp
from ..dispatch.selection import select_backend
from .attention import check_heads
from .cpu_products import save_attention, torch_attention


def cross_attention(q: Tensor, kv: Tensor) -> Tensor:
    """``softmax(q k.T / sqrt(d)) v`` for each head, without a mask (Vaswani et al. 2017).

    A query whose scores are all -inf gets zeros, as in ``attention``.

    Args:
        q: [B, T, H, d] fp32, fp16 or bf16, contiguous in its last two dimensions: the output of the q linear.
        kv: [B, S, 2, H, d], S at least 1, of the dtype of q, contiguous in its last three dimensions: that of the kv linear.

    Returns:
        [B, T, H*d], contiguous, of the dtype of q, or autocast's.

    Raises:
        ValueError: an argument's shape, dtype, device or strides; the message names it.
    """
    return _op(q, kv)


def _select(q: Tensor, kv: Tensor, training: bool) -> str:
    check_heads("q", q, "[B, T, H, d]")
    check_heads("kv", kv, "[B, S, 2, H, d]", packed=2)
    B, T, H, d = q.shape
    if (kv.shape[0], *kv.shape[3:]) != (B, H, d) or kv.shape[1] == 0:
        raise ValueError(f"kv: got shape {tuple(kv.shape)}, expected {(B, 'S', 2, H, d)} for q {tuple(q.shape)}, S at least 1")
    if kv.dtype != q.dtype:
        raise ValueError(f"kv: got dtype {kv.dtype}, expected {q.dtype}, as q")
    if kv.device != q.device:
        raise ValueError(f"kv: got a tensor on {kv.device}, expected {q.device}, as q")
    backend = select_backend(q, "cross_attention", B * T, (T, kv.shape[1], H, d), training)
    if backend == "triton" and d > LARGEST_HEAD:
        raise ValueError(f"q: got head dim {d}, expected at most {LARGEST_HEAD}; ditfast.backend('torch') takes any")
    return backend


def _torch(q: Tensor, kv: Tensor) -> Tensor:
    return torch_attention(q, *kv.unbind(2))


def _fake(q: Tensor, kv: Tensor, training: bool) -> tuple[Tensor, Tensor]:
    B, T, H, d = q.shape
    return q.new_empty((B, T, H * d)), q.new_empty((B, H, T) if training else (0,), dtype=torch.float32)


def _backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward_op(dout, *ctx.saved_tensors), None)


def _backward_fake(dout: Tensor, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), kv.new_empty(kv.shape)


_triton = TritonOp(
    "cross_attention(Tensor q, Tensor kv, bool training) -> (Tensor, Tensor)",
    _fake,
    save=save_attention,
    backward=_backward,
    outputs=1,
)
_op = Op(_select, _triton, autocast=slice(0, 2), torch=_torch)
_backward_op = TritonOp(
    "cross_attention_backward(Tensor dout, Tensor q, Tensor kv, Tensor out, Tensor lse) -> (Tensor, Tensor)", _backward_fake
)
