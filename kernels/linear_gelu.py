"""y = GELU(x @ weight.T + bias), the activation applied before the store; and the MLP, whose first half it is."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gemm import gelu_tanh, gelu_tanh_derivative, linear_tile, store_tile
from .launch import launch
from .linear import linear
from .linear_backward import (
    bias_gradient,
    input_gradient,
    input_gradient_through_gelu,
    linear_backward,
    weight_gradient,
)
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


def mlp(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor, training: bool
) -> tuple[Tensor, Tensor]:
    """x [..., K], fc1 [H, K], fc2 [N, H]. Returns y [..., N], and z as ``linear_gelu`` does.

    One kernel for both products would need the [rows, N] accumulator of the second in registers while it streams all weights
    through every program: it does not fit at any of the paper's widths. Of the hidden layer the backward keeps one tensor, not
    two: the activation is recomputed in the epilogue that needs its derivative anyway.
    """
    hidden, z = linear_gelu(x, fc1_weight, fc1_bias, training)
    return linear(hidden, fc2_weight, fc2_bias), z


def mlp_backward(dy: Tensor, x: Tensor, z: Tensor, fc1_weight: Tensor, fc2_weight: Tensor, needed: list[bool]) -> list[Tensor]:
    """Of dx and the gradients of fc1's weight and bias, fc2's weight and bias, those needed."""
    dy = dy.contiguous()
    dz, hidden = input_gradient_through_gelu(dy, fc2_weight, z)
    gradients = (
        lambda: input_gradient(dz, fc1_weight),
        lambda: weight_gradient(dz, x),
        lambda: bias_gradient(dz),
        lambda: weight_gradient(dy, hidden),
        lambda: bias_gradient(dy),
    )
    return [gradient() for gradient, need in zip(gradients, needed, strict=True) if need]
