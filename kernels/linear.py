"""y = x @ weight.T + bias."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gemm import linear_tile, store_tile
from .launch import launch
from .tiles import gemm_tile


@triton.jit
def linear_kernel(
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
    rows, columns, y = linear_tile(x_ptr, weight_ptr, bias_ptr, M, N, K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K)
    store_tile(y_ptr, rows, columns, y, M, N)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [..., K], weight [N, K], bias [N]. Returns [..., N], contiguous."""
    N, K = weight.shape
    M = x.numel() // K
    y = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    tile = gemm_tile("linear", M, N, K, x.dtype)
    launch(
        linear_kernel,
        tile.grid(M, N),
        x_ptr=x.contiguous(),
        weight_ptr=weight.contiguous(),
        bias_ptr=bias.contiguous(),
        y_ptr=y,
        M=M,
        N=N,
        K=K,
        **tile.options(K),
    )
    return y
