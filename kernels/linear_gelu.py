"""y = GELU(x @ weight.T + bias), the first half of the MLP: the activation is applied before the store."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gemm import gelu_tanh, gelu_tanh_derivative, linear_tile, store_tile
from .launch import launch
from .linear_backward import linear_backward
from .tiles import MANY, gemm_tile

ELEMENTS = 1024  # of a program of the elementwise kernel


@triton.jit
def linear_gelu_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    z_ptr,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    rows, columns, z = linear_tile(x_ptr, weight_ptr, bias_ptr, M, N, K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K)
    if z_ptr is not None:
        store_tile(z_ptr, rows, columns, z, M, N)
    store_tile(y_ptr, rows, columns, gelu_tanh(z), M, N)


@triton.jit
def gelu_backward_kernel(dy_ptr, z_ptr, dz_ptr, count, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dy = tl.load(dy_ptr + i, mask=i < count, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + i, mask=i < count, other=0.0).to(tl.float32)
    tl.store(dz_ptr + i, (dy * gelu_tanh_derivative(z)).to(dz_ptr.dtype.element_ty), mask=i < count)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, training: bool) -> tuple[Tensor, Tensor]:
    """x [..., K], weight [N, K], bias [N].

    Returns y [..., N] and z, the same before GELU, which the backward needs (of no elements unless training).
    """
    N, K = weight.shape
    M = x.numel() // K
    y = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    z = torch.empty(y.shape if training else (0,), dtype=x.dtype, device=x.device)
    if training:
        tile = gemm_tile("linear_gelu_training", M, N, K, x.dtype, largest=MANY)
    else:
        tile = gemm_tile("linear_gelu", M, N, K, x.dtype)
    launch(
        linear_gelu_kernel,
        tile.grid(M, N),
        x_ptr=x.contiguous(),
        weight_ptr=weight.contiguous(),
        bias_ptr=bias.contiguous(),
        y_ptr=y,
        z_ptr=z if training else None,
        M=M,
        N=N,
        K=K,
        **tile.options(K),
    )
    return y, z


def linear_gelu_backward(dy: Tensor, x: Tensor | None, z: Tensor, weight: Tensor | None, needed: list[bool]) -> list[Tensor]:
    """Of dx, dweight and dbias, those needed."""
    dz = torch.empty_like(z)
    launch(
        gelu_backward_kernel,
        triton.cdiv(z.numel(), ELEMENTS),
        dy_ptr=dy.contiguous(),
        z_ptr=z,
        dz_ptr=dz,
        count=z.numel(),
        BLOCK=ELEMENTS,
        num_warps=4,
    )
    return linear_backward(dz, x, weight, needed)
