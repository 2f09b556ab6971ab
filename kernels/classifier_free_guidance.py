"""Classifier-free guidance of a batch's two halves: each read once, each written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

ELEMENTS = 1024  # of a program, in each half


@triton.jit
def classifier_free_guidance_kernel(
    in_ptr,
    out_ptr,
    scale,
    half_size,
    sample_size,
    guided_size,
    blocks,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BACKWARD: from the gradients of the guided halves to those of the halves."""
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    offset = (tl.program_id(0) // blocks).to(tl.int64) * sample_size + i
    mask, guided = i < sample_size, i < guided_size
    first = tl.load(in_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(in_ptr + half_size + offset, mask=mask, other=0.0).to(tl.float32)
    if BACKWARD:
        total = first + second
        first, second = tl.where(guided, scale * total, first), tl.where(guided, (1.0 - scale) * total, second)
    else:
        # As torch.lerp: from the nearer end, so that scale 0 is one half exactly and 1 the other.
        guidance = tl.where(scale < 0.5, second + scale * (first - second), first - (1.0 - scale) * (first - second))
        first, second = tl.where(guided, guidance, first), tl.where(guided, guidance, second)
    tl.store(out_ptr + offset, first.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + half_size + offset, second.to(out_ptr.dtype.element_ty), mask=mask)


def classifier_free_guidance(out: Tensor, scale: float, channels: int) -> Tensor:
    """out [2B, C, H, W], conditional, then unconditional. Returns it with the first channels guided, in both halves."""
    return _guide(out, scale, channels, backward=False)


def classifier_free_guidance_backward(dy: Tensor, scale: float, channels: int) -> Tensor:
    return _guide(dy, scale, channels, backward=True)


def _guide(source: Tensor, scale: float, channels: int, backward: bool) -> Tensor:
    batch, _, height, width = source.shape
    result = torch.empty(source.shape, dtype=source.dtype, device=source.device)
    half_size = source.numel() // 2
    sample_size = half_size // max(1, batch // 2)
    blocks = triton.cdiv(sample_size, ELEMENTS)
    launch(
        classifier_free_guidance_kernel,
        batch // 2 * blocks,
        in_ptr=source.contiguous(),
        out_ptr=result,
        scale=float(scale),
        half_size=half_size,
        sample_size=sample_size,
        guided_size=channels * height * width,
        blocks=blocks,
        BACKWARD=backward,
        BLOCK=ELEMENTS,
        num_warps=4,
    )
    return result
