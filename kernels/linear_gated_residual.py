"""residual + gate * (x @ weight.T + bias): the gate and the residual in the GEMM's epilogue."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gemm import linear_tile
from .launch import launch
from .rows import modulation
from .tiles import gemm_tile


@triton.jit
def linear_gated_residual_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    gate_ptr,
    gate_batch_stride,
    gate_token_stride,
    y_ptr,
    num_tokens,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    ONE_GATE: tl.constexpr,
):
    rows, columns, h = linear_tile(x_ptr, weight_ptr, bias_ptr, M, N, K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K)
    # In two halves: the whole residual beside the whole accumulator does not fit the registers of large tiles.
    left, right = tl.split(tl.permute(tl.reshape(h, [BLOCK_M, 2, BLOCK_N // 2]), [0, 2, 1]))
    half = tl.multiple_of(tl.min(columns, 0), BLOCK_N) + tl.arange(0, BLOCK_N // 2)
    for i in tl.static_range(2):
        h = left if i == 0 else right
        c = half + i * (BLOCK_N // 2)
        mask = (rows < M)[:, None] & (c < N)[None, :]
        if gate_ptr is not None:
            if ONE_GATE:
                sample = (tl.min(rows, 0) // num_tokens).to(tl.int64)
                h *= tl.load(gate_ptr + sample * gate_batch_stride + c, mask=c < N, other=0.0).to(tl.float32)[None, :]
            else:
                offset = (rows // num_tokens).to(tl.int64) * gate_batch_stride
                offset += (rows % num_tokens).to(tl.int64) * gate_token_stride
                h *= tl.load(gate_ptr + offset[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
        offset = rows.to(tl.int64)[:, None] * N + c[None, :]
        y = tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32) + h
        tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


def linear_gated_residual(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, gate: Tensor | None) -> Tensor:
    """x [B, T, K], weight [N, K], bias [N], residual [B, T, N], gate [B, N] or [B, T, N] or None. Returns [B, T, N]."""
    N, K = weight.shape
    tokens = x.shape[1]
    M = x.numel() // K
    y = torch.empty(residual.shape, dtype=residual.dtype, device=x.device)
    tile = gemm_tile("linear_gated_residual", M, N, K, x.dtype)
    launch(
        linear_gated_residual_kernel,
        tile.grid(M, N),
        x_ptr=x.contiguous(),
        weight_ptr=weight.contiguous(),
        bias_ptr=bias.contiguous(),
        residual_ptr=residual.contiguous(),
        **modulation("gate", gate),
        y_ptr=y,
        num_tokens=tokens,
        M=M,
        N=N,
        K=K,
        ONE_GATE=gate is not None and gate.dim() == 2 and tokens % tile.m == 0,
        **tile.options(K),
    )
    return y
