"""The gradients of y = x @ weight.T + bias, for every op that ends in one: dx = dy @ weight, dweight = dy.T @ x, dbias.

``input_gradient`` takes GELU's backward into its epilogue: for y = GELU(z), z = x @ weight.T + bias, the mlp asks its
second linear for the gradient of z, and for the activation again, which is cheaper to recompute than to keep.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gemm import gelu_tanh, gelu_tanh_derivative, load_tile, multiply, store_tile, tile_position
from .launch import launch
from .reduce import sum_partials
from .tiles import HALF, gemm_tile

ENOUGH_PROGRAMS = 128  # to occupy most of an A100 or H100
LEAST_ROWS_A_PART = 512
ROWS_AT_ONCE = 32  # of a column sum
MOST_PARTIALS = 128  # which the second kernel adds one after the other
COLUMNS_A_PARTIAL = 128


@triton.jit
def input_gradient_kernel(
    dy_ptr,
    weight_ptr,
    z_ptr,
    dx_ptr,
    activation_ptr,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """dx [M, N] = dy [M, K] @ weight [K, N], times GELU'(z) if there is a z."""
    tile_m, tile_n = tile_position(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    dx = multiply(dy_ptr, weight_ptr, rows, columns, 0, K, M, N, K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, False, True)
    if z_ptr is not None:
        z = load_tile(z_ptr, rows, columns, M, N)
        dx *= gelu_tanh_derivative(z)
        store_tile(activation_ptr, rows, columns, gelu_tanh(z), M, N)
    store_tile(dx_ptr, rows, columns, dx, M, N)


@triton.jit
def weight_gradient_kernel(
    dy_ptr,
    x_ptr,
    dweight_ptr,
    M,
    N,
    K,
    tiles,
    rows_per_part,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """dweight [M, N] = dy [K, M].T @ x [K, N]; with several parts, each part's sum over its rows of dy and x."""
    part = tl.program_id(0) // tiles
    tile_m, tile_n = tile_position(tl.program_id(0) % tiles, M, N, BLOCK_M, BLOCK_N)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    first = part * rows_per_part
    last = min(first + rows_per_part, K)
    dweight = multiply(dy_ptr, x_ptr, rows, columns, first, last, M, N, K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, True, True)
    store_tile(dweight_ptr + part.to(tl.int64) * M * N, rows, columns, dweight, M, N)


@triton.jit
def column_sum_kernel(
    dy_ptr,
    partial_ptr,
    num_rows,
    N,
    blocks,
    rows_per_partial,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0) // blocks
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    first = group * rows_per_partial
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, rows_per_partial, ROWS):
        total += load_tile(dy_ptr, first + start + tl.arange(0, ROWS), columns, num_rows, N)
    tl.store(partial_ptr + group.to(tl.int64) * N + columns, tl.sum(total, 0), mask=columns < N)


def input_gradient(dy: Tensor, weight: Tensor) -> Tensor:
    """dy [..., N], weight [N, K]. Returns dy @ weight, [..., K]."""
    return _input_gradient(dy, weight, None)[0]


def input_gradient_through_gelu(dy: Tensor, weight: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """For y = GELU(z) @ weight.T: dy [..., N], weight [N, K], z [..., K]. Returns the gradient of z, and GELU(z)."""
    dz, activation = _input_gradient(dy, weight, z)
    assert activation is not None
    return dz, activation


def _input_gradient(dy: Tensor, weight: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor | None]:
    N, K = weight.shape
    M = dy.numel() // N
    dx = torch.empty((*dy.shape[:-1], K), dtype=dy.dtype, device=dy.device)
    activation = None if z is None else torch.empty_like(dx)
    if z is None:
        tile = gemm_tile("input_gradient", M, K, N, dy.dtype)
    else:
        tile = gemm_tile("input_gradient_through_gelu", M, K, N, dy.dtype, largest=HALF)
    launch(
        input_gradient_kernel,
        tile.grid(M, K),
        dy_ptr=dy.contiguous(),
        weight_ptr=weight.contiguous(),
        z_ptr=z,
        dx_ptr=dx,
        activation_ptr=activation,
        M=M,
        N=K,
        K=N,
        **tile.options(N),
    )
    return dx, activation


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dy [..., N], x [..., K]. Returns dy.T @ x, [N, K], summed over the other dimensions.

    Few tiles would leave most of the machine idle: the rows are then summed in parts, and the parts in a fixed order.
    """
    N, K = dy.shape[-1], x.shape[-1]
    rows = x.numel() // K
    tile = gemm_tile("weight_gradient", N, K, triton.next_power_of_2(rows), x.dtype)
    tiles = tile.grid(N, K)
    parts = max(1, min(ENOUGH_PROGRAMS // tiles, rows // LEAST_ROWS_A_PART))
    rows_per_part = triton.cdiv(triton.cdiv(rows, parts), tile.k) * tile.k
    parts = max(1, triton.cdiv(rows, rows_per_part)) if rows else 1
    shape, dtype = ((N, K), x.dtype) if parts == 1 else ((parts, N * K), torch.float32)
    dweight = torch.empty(shape, dtype=dtype, device=x.device)
    launch(
        weight_gradient_kernel,
        tiles * parts,
        dy_ptr=dy.contiguous(),
        x_ptr=x.contiguous(),
        dweight_ptr=dweight,
        M=N,
        N=K,
        K=rows,
        tiles=tiles,
        rows_per_part=rows_per_part,
        **tile.options(rows),
    )
    return dweight if parts == 1 else sum_partials([dweight], 1, [x.dtype])[0].view(N, K)


def bias_gradient(dy: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """dy [..., N]. Returns its sum over all other dimensions, [N], of the given dtype or that of dy."""
    N = dy.shape[-1]
    rows = dy.numel() // N
    rows_per_partial = triton.cdiv(triton.cdiv(rows, MOST_PARTIALS), ROWS_AT_ONCE) * ROWS_AT_ONCE
    groups, blocks = triton.cdiv(rows, max(rows_per_partial, 1)), triton.cdiv(N, COLUMNS_A_PARTIAL)
    partial = torch.empty(groups, N, dtype=torch.float32, device=dy.device)
    launch(
        column_sum_kernel,
        groups * blocks,
        dy_ptr=dy.contiguous(),
        partial_ptr=partial,
        num_rows=rows,
        N=N,
        blocks=blocks,
        rows_per_partial=rows_per_partial,
        ROWS=ROWS_AT_ONCE,
        BLOCK=COLUMNS_A_PARTIAL,
        num_warps=4,
    )
    return sum_partials([partial], 1, [dtype or dy.dtype])[0].view(N)


def linear_backward(dy: Tensor, x: Tensor | None, weight: Tensor | None, needed: list[bool]) -> list[Tensor]:
    """Of dx, dweight and dbias, those needed; dx needs the weight, dweight needs x."""
    dy = dy.contiguous()
    need_x, need_weight, need_bias = needed
    gradients = [input_gradient(dy, weight)] if need_x and weight is not None else []
    if need_weight and x is not None:
        gradients.append(weight_gradient(dy, x))
    if need_bias:
        gradients.append(bias_gradient(dy))
    return gradients
