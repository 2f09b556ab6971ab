"""Self-attention, packed or not, on the engine that wins: flash-attn, torch's SDPA or our Triton kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..argument_checks import check_tensor, wrong_type
from ..problem import Problem
from .checks import check_dtype
from .cpu_products import torch_attention
from .dispatch import check_possible, choose, define_op, force, needs_gradient, route, under_autocast, untransformed
from .routes import Choice

ENGINES = ("flash", "sdpa", "triton")


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
    if not isinstance(qkv, Tensor):
        if not isinstance(qkv, Sequence) or isinstance(qkv, str) or len(qkv) != 3:
            raise wrong_type("qkv", qkv, "a tensor [B, T, 3, H, d] or three, each [B, T, H, d]")
        q, k, v = under_autocast(*qkv)
        return _attention_apart(q, k, v, engine)
    (qkv,) = under_autocast(qkv)
    check_heads("qkv", qkv, "[B, T, 3, H, d]", packed=3)
    training = needs_gradient(qkv)
    B, T, _, H, d = qkv.shape
    engine = _engine(qkv, (B, T, H, d), training, engine)
    if engine == "triton":
        return _op(qkv, training)[0]
    return _flash(qkv) if engine == "flash" else torch_attention(*qkv.unbind(2))


def _attention_apart(q: Tensor, k: Tensor, v: Tensor, engine: str | None) -> Tensor:
    for name, heads in (("q", q), ("k", k), ("v", v)):
        check_heads(name, heads, "[B, T, H, d]")
        if (heads.shape, heads.dtype, heads.device) != (q.shape, q.dtype, q.device):
            got = f"{tuple(heads.shape)} {heads.dtype} on {heads.device}"
            raise ValueError(f"{name}: got {got}, expected {tuple(q.shape)} {q.dtype} on {q.device}, as q")
    engine = _engine(q, q.shape, needs_gradient(q, k, v), engine)
    return torch_attention(q, k, v) if engine == "sdpa" else attention(torch.stack((q, k, v), dim=2), engine)


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


def attention_engine(name: str) -> contextlib.AbstractContextManager[None]:
    """Forces ``attention`` inside the ``with`` block, in this thread, onto ``"flash"``, ``"sdpa"`` or ``"triton"``.

    Raises:
        ValueError: none of these names.
    """
    return force("attention", name, ENGINES)


def choose_engine(device: torch.device, problem: Problem, wanted: str | None = None) -> Choice:
    """The engine that ``attention`` takes, ``"flash"``, ``"sdpa"`` or ``"triton"``, and why.

    Raises:
        ValueError: an engine is wanted that does not exist.
        RuntimeError: a wanted or forced engine cannot run; the message says why, and what to do.
    """
    if wanted is None:
        return choose(device, problem)
    if not isinstance(wanted, str) or wanted not in ENGINES:
        raise ValueError(f"engine: got {wanted!r}, expected one of {', '.join(ENGINES)}")
    check_possible(wanted, device, problem)
    return Choice(wanted, "asked for")


def _engine(x: Tensor, shape: Sequence[int], training: bool, wanted: str | None) -> str:
    """For x and the shape [B, T, H, d] of its heads."""
    B, *sizes = shape
    rows = B * sizes[0]
    if wanted is None:
        return route(x, "attention", rows, tuple(sizes), training)
    chosen = choose_engine(x.device, Problem("attention", x.dtype, rows, tuple(sizes), training), wanted).route
    return untransformed("attention", chosen, is_forced=True)


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
