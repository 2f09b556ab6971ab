"""Patches through a convolution with a stride of the patch size, plus bias and positions: the image read once, one store."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gemm import store_tile, tile_position
from .launch import interpreted, launch, target
from .linear_backward import bias_gradient, input_gradient, weight_gradient
from .patches import patch_offset, pixel_offset, to_image, to_tokens
from .tiles import FULL_PRECISION, INTERPRETER, GemmTile, first_that_fits, those_that_fit, tuned

# The product is short (K = 16, 64, 256 for the paper's patches): writing the tokens is what takes the time.
FEW = (GemmTile(16, 128, 64, num_warps=4, num_stages=2),)
MANY = (GemmTile(64, 128, 64, num_warps=4, num_stages=2),)
OTHERS = (GemmTile(32, 128, 64, num_warps=4, num_stages=2), GemmTile(128, 128, 64, num_warps=8, num_stages=2))
FEW_ROWS = 512


def patch_embed_tile(M: int, N: int, K: int, dtype: torch.dtype) -> GemmTile:
    if interpreted():
        return INTERPRETER
    choices = FULL_PRECISION if dtype == torch.float32 else FEW if M <= FEW_ROWS else MANY
    arch, longest = target(), max(16, triton.next_power_of_2(K))
    others = choices if dtype == torch.float32 else (*FEW, *MANY, *OTHERS)
    fitting = [tile._replace(k=min(tile.k, longest)) for tile in those_that_fit(others, dtype, arch)]
    builtin = first_that_fits(choices, dtype, arch)
    return tuned("patch_embed", dtype, M, (N, K), builtin._replace(k=min(builtin.k, longest)), lambda: fitting)


@triton.jit
def patch_embed_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    position_ptr,
    y_ptr,
    grid_h,
    grid_w,
    channels,
    M,
    N,
    PATCH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    K = channels * PATCH * PATCH
    tile_m, tile_n = tile_position(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    patches = x_ptr + patch_offset(rows % M, grid_h, grid_w, channels, PATCH)[:, None]
    weights = weight_ptr + (columns % N).to(tl.int64)[:, None] * K
    y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = (start + tl.arange(0, BLOCK_K))[None, :]
        if EVEN_K:
            patch = tl.load(patches + pixel_offset(k, grid_h, grid_w, PATCH))
            weight = tl.load(weights + k)
        else:
            patch = tl.load(patches + pixel_offset(k, grid_h, grid_w, PATCH), mask=k < K, other=0.0)
            weight = tl.load(weights + k, mask=k < K, other=0.0)
        if weight_ptr.dtype.element_ty == tl.float32:
            y = y - tl.dot(patch, -weight.T, input_precision="ieee")  # as in gemm.multiply
        else:
            y = tl.dot(patch, weight.T, y)
    y += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    position = (rows % (grid_h * grid_w)).to(tl.int64)[:, None] * N + columns[None, :]
    y += tl.load(position_ptr + position, mask=mask, other=0.0).to(tl.float32)
    store_tile(y_ptr, rows, columns, y, M, N)


def patch_embed(x: Tensor, weight: Tensor, bias: Tensor, pos_embed: Tensor, dtype: torch.dtype) -> Tensor:
    """x [B, C, h*p, w*p], weight [D, C, p, p], bias [D], pos_embed [h*w, D]. Returns [B, h*w, D] of the given dtype."""
    D, C, p, _ = weight.shape
    h, w = x.shape[2] // p, x.shape[3] // p
    y = torch.empty(len(x), h * w, D, dtype=dtype, device=x.device)
    M, K = len(x) * h * w, C * p * p
    tile = patch_embed_tile(M, D, K, x.dtype)
    launch(
        patch_embed_kernel,
        tile.grid(M, D),
        x_ptr=x.contiguous(),
        weight_ptr=weight.contiguous(),
        bias_ptr=bias.contiguous(),
        position_ptr=pos_embed.contiguous(),
        y_ptr=y,
        grid_h=h,
        grid_w=w,
        channels=C,
        M=M,
        N=D,
        PATCH=p,
        **tile.options(K),
    )
    return y


def patch_embed_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias_dtype: torch.dtype, position_dtype: torch.dtype, needed: list[bool]
) -> list[Tensor]:
    """dy [B, T, D]. Of the gradients of x, weight, bias and pos_embed [T, D], those needed."""
    D, _, p, _ = weight.shape
    grid = (x.shape[2] // p, x.shape[3] // p)
    dproduct = dy.to(weight.dtype)
    gradients = (
        lambda: to_image(input_gradient(dproduct, weight.flatten(1)), grid, p, channel_last=False),
        lambda: weight_gradient(dproduct, to_tokens(x, p, channel_last=False)).view(weight.shape),
        lambda: bias_gradient(dy, bias_dtype),
        lambda: bias_gradient(dy.flatten(1), position_dtype).view(-1, D),
    )
    return [gradient() for gradient, need in zip(gradients, needed, strict=True) if need]
