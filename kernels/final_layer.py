"""The model's last layer in one kernel: unpatchify(linear(LayerNorm(x) * (1 + scale) + shift)).

x is read for its statistics, then, out of the cache, chunk by chunk in front of the product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import interpreted, launch, target
from .linear_unpatchify import store_pixels
from .patches import channel_last
from .rows import load, modulate, modulation, row_offset
from .tiles import INTERPRETER, GemmTile, first_that_fits, those_that_fit, tuned


class NormTile(GemmTile):
    def shared_bytes(self, itemsize: int) -> int:
        """Also of a tile of the shift and one of the scale."""
        return max(self.num_stages * (3 * self.m + self.n) * self.k * itemsize, self.m * self.n * 4)


# A program covers all output columns of its rows: another one beside it would normalise them once more.
FULL_PRECISION = (NormTile(32, 128, 16, num_warps=8, num_stages=2),)
FEW = (NormTile(16, 128, 64, num_warps=4, num_stages=3), NormTile(16, 128, 64, num_warps=4, num_stages=2))
MANY = (
    NormTile(64, 128, 64, num_warps=8, num_stages=3),
    NormTile(64, 128, 64, num_warps=8, num_stages=2),
    NormTile(32, 128, 64, num_warps=4, num_stages=2),
)
FEW_ROWS = 2048


def final_layer_tile(M: int, N: int, K: int, dtype: torch.dtype) -> GemmTile:
    columns = max(16, triton.next_power_of_2(N))
    if interpreted():
        return INTERPRETER._replace(n=columns)
    choices = FULL_PRECISION if dtype == torch.float32 else FEW if M <= FEW_ROWS else MANY
    arch = target()
    choices = tuple(tile._replace(n=columns) for tile in choices)
    others = choices if dtype == torch.float32 else [tile._replace(n=columns) for tile in (*FEW, *MANY)]
    builtin = first_that_fits(choices, dtype, arch)
    return tuned("final_layer", dtype, M, (N, K), builtin, lambda: those_that_fit(others, dtype, arch))


@triton.jit
def row_statistics(x_ptr, x_row, in_rows, eps, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Mean, offset and reciprocal deviation [BLOCK_M, 1] of rows, as in ``rows.store_stats``.

    In one pass that cancels nothing (Welford 1962, a mean a lane).
    """
    count = tl.zeros([1, BLOCK_K], tl.float32)
    mean = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in range(0, K, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)[None, :]
        count += tl.where(column < K, 1.0, 0.0)
        x = load(x_ptr, x_row + column, in_rows & (column < K))
        delta = tl.where(column < K, x - mean, 0.0)
        mean += delta * (1.0 / tl.maximum(count, 1.0))
        squares += delta * (x - mean)
    row_mean = tl.fma(tl.sum(mean * count, 1)[:, None], 1.0 / K, 0.0)  # as in rows.normalise
    deviation = mean - row_mean
    rest = tl.sum(deviation * count, 1)[:, None] * (1.0 / K)
    variance = tl.sum(squares + count * deviation * deviation, 1)[:, None] * (1.0 / K) - rest * rest
    rstd = tl.rsqrt(variance + eps)
    return row_mean, rest * rstd, rstd


@triton.jit
def final_layer_kernel(
    x_ptr,
    x_batch_stride,
    x_token_stride,
    shift_ptr,
    shift_batch_stride,
    shift_token_stride,
    scale_ptr,
    scale_batch_stride,
    scale_token_stride,
    weight_ptr,
    bias_ptr,
    image_ptr,
    grid_h,
    grid_w,
    channels,
    M,
    eps,
    K: tl.constexpr,
    PATCH: tl.constexpr,
    ONE_SAMPLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    num_tokens = grid_h * grid_w
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = (rows < M)[:, None]
    x_row = row_offset(rows, num_tokens, x_batch_stride, x_token_stride)
    mean, offset, rstd = row_statistics(x_ptr, x_row, in_rows, eps, K, BLOCK_M, BLOCK_K)
    # Where the rows are of one sample, one row of its modulation serves them all.
    modulated = tl.program_id(0) * BLOCK_M + tl.arange(0, 1 if ONE_SAMPLE else BLOCK_M)
    shift_row = row_offset(modulated, num_tokens, shift_batch_stride, shift_token_stride)
    scale_row = row_offset(modulated, num_tokens, scale_batch_stride, scale_token_stride)
    columns = tl.arange(0, BLOCK_N)
    features = channel_last(columns % (channels * PATCH * PATCH), channels, PATCH)
    weights = weight_ptr + features[:, None] * K
    y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        weight = tl.load(weights + k, mask=k < K, other=0.0)
        x = load(x_ptr, x_row + k, in_rows & (k < K))
        in_modulation = (modulated < M)[:, None] & (k < K)
        u = modulate((x - mean) * rstd - offset, shift_ptr, shift_row + k, scale_ptr, scale_row + k, in_modulation)
        if K % BLOCK_K != 0:  # -mean * rstd may be infinite in fp16
            u = tl.where(k < K, u, 0.0)
        if weight_ptr.dtype.element_ty == tl.float32:
            y = y - tl.dot(u, -weight.T, input_precision="ieee")  # as in gemm.multiply
        else:
            y = tl.dot(u.to(weight_ptr.dtype.element_ty), weight.T, y)
    y += tl.load(bias_ptr + features).to(tl.float32)[None, :]
    store_pixels(image_ptr, rows, columns, y, M, grid_h, grid_w, channels, PATCH)


def final_layer(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    grid: tuple[int, int],
    patch_size: int,
    eps: float,
) -> Tensor:
    """x [B, h*w, K]; shift and scale [B, K] or [B, h*w, K], or None; weight [p*p*C, K], p*p*C at most 128; bias [p*p*C].

    Returns [B, C, h*p, w*p].
    """
    N, K = weight.shape
    batch, tokens, _ = x.shape
    channels, (h, w) = N // patch_size**2, grid
    image = torch.empty((batch, channels, h * patch_size, w * patch_size), dtype=x.dtype, device=x.device)
    tile = final_layer_tile(batch * tokens, N, K, x.dtype)
    per_sample = all(vector is None or vector.dim() == 2 for vector in (shift, scale))
    launch(
        final_layer_kernel,
        triton.cdiv(batch * tokens, tile.m),
        x_ptr=x,
        x_batch_stride=x.stride(0),
        x_token_stride=x.stride(1),
        **modulation("shift", shift),
        **modulation("scale", scale),
        weight_ptr=weight.contiguous(),
        bias_ptr=bias.contiguous(),
        image_ptr=image,
        grid_h=grid[0],
        grid_w=grid[1],
        channels=N // patch_size**2,
        M=batch * tokens,
        eps=eps,
        K=K,
        PATCH=patch_size,
        ONE_SAMPLE=per_sample and tokens % tile.m == 0,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return image
