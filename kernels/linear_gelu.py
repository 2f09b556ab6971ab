"""y = GELU(x @ weight.T + bias), the first half of the MLP: the activation is applied before the only store."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gemm import gelu_tanh, gemm_tile, multiply, tile_position
from .launch import launch


@triton.jit
def linear_gelu_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    tile_m, tile_n = tile_position(M, N, BLOCK_M, BLOCK_N)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = multiply(x_ptr, weight_ptr, rows, columns, M, N, K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K)
    bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
    y = gelu_tanh(acc + bias[None, :])
    y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [B, T, K], weight [N, K], bias [N]. Returns [B, T, N], contiguous."""
    N, K = weight.shape
    rows = x.reshape(-1, K).contiguous()
    M = len(rows)
    y = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    tile = gemm_tile(M, x.dtype)
    launch(
        linear_gelu_kernel,
        tile.grid(M, N),
        x.device,
        rows,
        weight.contiguous(),
        bias.contiguous(),
        y,
        M,
        N,
        K,
        **tile.options(K),
    )
    return y
