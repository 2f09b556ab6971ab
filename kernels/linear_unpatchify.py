"""unpatchify(x @ weight.T + bias): the linear's tile is stored as the pixels that it predicts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gemm import multiply, tile_position
from .launch import interpreted, launch, target
from .linear_backward import linear_backward
from .patches import channel_last, image_shape, patch_offset, pixel_offset, to_tokens
from .tiles import FULL_PRECISION, INTERPRETER, GemmTile, first_that_fits, those_that_fit, tuned

# Few columns (p*p*C: 32, 128, 512): reading x takes the time, so tiles are low enough for many programs to read at once.
FEW = (GemmTile(16, 64, 128, num_warps=4, num_stages=4), GemmTile(16, 64, 64, num_warps=4, num_stages=4))
MANY = (GemmTile(64, 128, 64, num_warps=4, num_stages=3), GemmTile(64, 128, 64, num_warps=4, num_stages=2))
FEW_ROWS = 2048


def linear_unpatchify_tile(M: int, N: int, K: int, dtype: torch.dtype) -> GemmTile:
    if interpreted():
        return INTERPRETER
    choices = FULL_PRECISION if dtype == torch.float32 else FEW if M <= FEW_ROWS else MANY
    arch, widest = target(), max(16, triton.next_power_of_2(N))
    others = choices if dtype == torch.float32 else (*FEW, *MANY)
    fitting = [tile._replace(n=min(tile.n, widest)) for tile in those_that_fit(others, dtype, arch)]
    builtin = first_that_fits(choices, dtype, arch)
    return tuned("linear_unpatchify", dtype, M, (N, K), builtin._replace(n=min(builtin.n, widest)), lambda: fitting)


@triton.jit
def store_pixels(
    image_ptr,
    rows,
    columns,
    value,
    M,
    grid_h,
    grid_w,
    channels,
    PATCH: tl.constexpr,
):
    """value [tokens, features], features in the order (channel, row, column)."""
    offset = patch_offset(rows, grid_h, grid_w, channels, PATCH)[:, None]
    offset += pixel_offset(columns, grid_h, grid_w, PATCH)[None, :]
    mask = (rows < M)[:, None] & (columns < channels * PATCH * PATCH)[None, :]
    tl.store(image_ptr + offset, value.to(image_ptr.dtype.element_ty), mask=mask)


@triton.jit
def linear_unpatchify_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    image_ptr,
    grid_h,
    grid_w,
    channels,
    M,
    K,
    PATCH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    N = channels * PATCH * PATCH
    tile_m, tile_n = tile_position(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # The tile's columns are in the order of the image, not of the weight: neighbours are pixels side by side.
    features = channel_last(columns % N, channels, PATCH)
    y = multiply(x_ptr, weight_ptr, rows, features, 0, K, M, N, K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K)
    y += tl.load(bias_ptr + features).to(tl.float32)[None, :]
    store_pixels(image_ptr, rows, columns, y, M, grid_h, grid_w, channels, PATCH)


def linear_unpatchify(x: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """x [B, h*w, K], weight [p*p*C, K] with rows as (row, column, channel), bias [p*p*C]. Returns [B, C, h*p, w*p]."""
    N, K = weight.shape
    M = x.numel() // K
    image = torch.empty(image_shape(x, grid, patch_size, N), dtype=x.dtype, device=x.device)
    tile = linear_unpatchify_tile(M, N, K, x.dtype)
    launch(
        linear_unpatchify_kernel,
        tile.grid(M, N),
        x_ptr=x.contiguous(),
        weight_ptr=weight.contiguous(),
        bias_ptr=bias.contiguous(),
        image_ptr=image,
        grid_h=grid[0],
        grid_w=grid[1],
        channels=N // patch_size**2,
        M=M,
        K=K,
        PATCH=patch_size,
        **tile.options(K),
    )
    return image


def linear_unpatchify_backward(dy: Tensor, x: Tensor, weight: Tensor, patch_size: int, needed: list[bool]) -> list[Tensor]:
    """dy [B, C, h*p, w*p]. Of dx, dweight and dbias, those needed."""
    return linear_backward(to_tokens(dy, patch_size, channel_last=True), x, weight, needed)
