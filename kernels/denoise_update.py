"""Guidance and one step of a solver, in one pass over what the model returned."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

ELEMENTS = 1024  # of a program, in each tensor


@triton.jit
def denoise_update_kernel(
    x_ptr,
    output_ptr,
    noise_ptr,
    update_ptr,
    scale_ptr,
    out_ptr,
    state_size,
    output_size,
    guided_size,
    unconditional,
    blocks,
    CLIP: tl.constexpr,
    LEARNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sizes are of one sample: the state [C, H, W], the output, and its guided channels."""
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = i < state_size
    x = tl.load(x_ptr + sample * state_size + i, mask=mask, other=0.0)
    predicted = tl.load(output_ptr + sample * output_size + i, mask=mask, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + sample)
        guided = mask & (i < guided_size)
        other = tl.load(output_ptr + unconditional + sample * output_size + i, mask=guided, other=0.0).to(tl.float32)
        predicted = tl.where(i < guided_size, other + scale * (predicted - other), predicted)
    x0 = tl.load(update_ptr) * x + tl.load(update_ptr + 1) * predicted
    if CLIP:
        x0 = tl.maximum(x0, -1.0, propagate_nan=tl.PropagateNan.ALL)
        x0 = tl.minimum(x0, 1.0, propagate_nan=tl.PropagateNan.ALL)
    result = tl.load(update_ptr + 2) * x0 + tl.load(update_ptr + 3) * x
    if noise_ptr is not None:
        log_variance = tl.load(update_ptr + 4) + tl.zeros([BLOCK], tl.float32)
        if LEARNED:
            place = tl.load(output_ptr + sample * output_size + state_size + i, mask=mask, other=0.0).to(tl.float32)
            log_variance += (place + 1.0) * 0.5 * (tl.load(update_ptr + 5) - log_variance)
        noise = tl.load(noise_ptr + sample * state_size + i, mask=mask, other=0.0)
        result += tl.exp(0.5 * log_variance) * noise
    tl.store(out_ptr + sample * state_size + i, result, mask=mask)


def denoise_update(
    x: Tensor, output: Tensor, noise: Tensor | None, update: Tensor, scale: Tensor | None, guided_channels: int, clip: bool
) -> Tensor:
    """x and noise [B, C, H, W] fp32, output [B or 2B, C or 2C, H, W], update [6] fp32, scale [B] fp32."""
    batch, channels, height, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    state_size, output_size = channels * height * width, output.shape[1] * height * width
    blocks = triton.cdiv(state_size, ELEMENTS)
    launch(
        denoise_update_kernel,
        batch * blocks,
        x_ptr=x.contiguous(),
        output_ptr=output.contiguous(),
        noise_ptr=noise if noise is None else noise.contiguous(),
        update_ptr=update.contiguous(),
        scale_ptr=scale if scale is None else scale.contiguous(),
        out_ptr=out,
        state_size=state_size,
        output_size=output_size,
        guided_size=guided_channels * height * width,
        unconditional=batch * output_size,
        blocks=blocks,
        CLIP=clip,
        LEARNED=output.shape[1] > channels,
        BLOCK=ELEMENTS,
        num_warps=4,
    )
    return out
