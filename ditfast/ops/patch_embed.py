"""The model's first layer: patches, the linear over them, positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..argument_checks import check_branch, check_dtype, check_integer, check_parameter, check_tensor
from ..dispatch.op import Op, TritonOp
from ..dispatch.selection import select_backend
from .cpu_products import torch_linear
from .linear import needed_gradients


def patch_embed(latents: Tensor, weight: Tensor, bias: Tensor, pos_embed: Tensor, patch_size: int) -> Tensor:
    """``conv2d(latents, weight, bias, stride=patch_size)`` as tokens, plus positions (Dosovitskiy et al. 2020), rounded once.

    Args:
        latents: [B, C, H, W] fp32, fp16 or bf16, of any strides; H and W multiples of p.
        weight: [D, C, p, p], of the dtype of latents and of any strides.
        bias: [D], of the dtype of latents.
        pos_embed: [1, T, D] or [T, D] for T = (H/p) * (W/p) tokens, row by row; any of the dtypes.
        patch_size: p.

    Returns:
        [B, T, D], contiguous, of the dtype of weight. Under autocast the product takes autocast's dtype, and the sum, as
        torch's would, keeps that of the weight.

    Raises:
        ValueError: an argument's shape, dtype, device or inner stride; the message names it.
    """
    check_tensor("weight", weight, "[D, C, p, p]")
    return _op(latents, weight, bias, pos_embed, patch_size, weight.dtype)


def _select(
    latents: Tensor, weight: Tensor, bias: Tensor, pos_embed: Tensor, patch_size: int, dtype: torch.dtype, training: bool
) -> str:
    _check(latents, weight.contiguous(), bias, pos_embed, patch_size)
    rows, sizes = latents.shape[0] * pos_embed.shape[-2], (len(weight), weight.shape[1:].numel())
    return select_backend(latents, "patch_embed", rows, sizes, training)


def _torch(latents: Tensor, weight: Tensor, bias: Tensor, pos_embed: Tensor, patch_size: int, dtype: torch.dtype) -> Tensor:
    patches = torch_patchify(latents, patch_size)  # [B, T, C*p*p]
    return (torch_linear(patches, weight.flatten(1), bias) + _positions(pos_embed)).to(dtype).contiguous()  # [B, T, D]


def _prepare(
    latents: Tensor, weight: Tensor, bias: Tensor, pos_embed: Tensor, patch_size: int, dtype: torch.dtype
) -> tuple[Any, ...]:
    return latents, weight.contiguous(), bias, _positions(pos_embed), dtype


def _positions(pos_embed: Tensor) -> Tensor:
    """Return [1, T, D] or [T, D] as [T, D]."""
    return pos_embed[0] if pos_embed.dim() == 3 and len(pos_embed) == 1 else pos_embed


def _check(latents: Tensor, weight: Tensor, bias: Tensor, pos_embed: Tensor, patch_size: int) -> None:
    check_integer("patch_size", patch_size, 1)
    check_tensor("latents", latents, "[B, C, H, W]")
    if latents.dim() != 4 or 0 in latents.shape[1:] or latents.shape[2] % patch_size or latents.shape[3] % patch_size:
        raise ValueError(f"latents: got shape {tuple(latents.shape)}, expected [B, C, H, W], H and W multiples of {patch_size}")
    check_dtype("latents", latents)
    if weight.dim() != 4:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected [D, C, {patch_size}, {patch_size}]")
    D, T = len(weight), (latents.shape[2] // patch_size) * (latents.shape[3] // patch_size)
    check_parameter("weight", weight, latents, (D, latents.shape[1], patch_size, patch_size), "latents")
    check_parameter("bias", bias, latents, (D,), "latents")
    check_tensor("pos_embed", pos_embed, "[1, T, D] or [T, D]")
    check_branch("pos_embed", _positions(pos_embed), latents, (T, D), "latents")


def torch_patchify(x: Tensor, patch_size: int) -> Tensor:
    """[B, C, H, W] -> [B, T, C*p*p], the order of a patch's values that a convolution's weight has."""
    B, C, H, W = x.shape
    p = patch_size
    x = x.reshape(B, C, H // p, p, W // p, p)  # [B, C, h, p, w, p]
    return x.permute(0, 2, 4, 1, 3, 5).reshape(B, (H // p) * (W // p), C * p * p)  # [B, T, C*p*p]


def _fake(x: Tensor, weight: Tensor, bias: Tensor, pos_embed: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty((x.shape[0], *pos_embed.shape), dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, pos_embed, _ = inputs
    ctx.dtypes = bias.dtype, pos_embed.dtype
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *needed_gradients(ctx, 4, _backward_op, dy, *ctx.saved_tensors, *ctx.dtypes), None


def _backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, bias_dtype: torch.dtype, position_dtype: torch.dtype, needed: list[bool]
) -> list[Tensor]:
    likes = (
        (x.shape, x.dtype),
        (weight.shape, weight.dtype),
        (weight.shape[:1], bias_dtype),
        (dy.shape[1:], position_dtype),
    )
    return [dy.new_empty(shape, dtype=dtype) for (shape, dtype), need in zip(likes, needed, strict=True) if need]


_triton = TritonOp(
    "patch_embed(Tensor latents, Tensor weight, Tensor bias, Tensor pos_embed, ScalarType dtype) -> Tensor",
    _fake,
    save=_save,
    backward=_backward,
)
_op = Op(_select, _triton, _prepare, autocast=slice(0, 3), torch=_torch)
_backward_op = TritonOp(
    "patch_embed_backward(Tensor dy, Tensor latents, Tensor weight, ScalarType bias_dtype, ScalarType position_dtype,"
    " bool[] needed) -> Tensor[]",
    _backward_fake,
)
