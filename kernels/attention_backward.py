"""Attention, backward, as two kernels: dq, then dk and dv.

Each computes the weights again, from q, k and the forward's log-sum-exp: seven products where one kernel with atomics would do
five. But every gradient is summed in one program, in a fixed order, so the bits are the same in every run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import (
    LOG2_E,
    add_weighted,
    alignment,
    attention_tile,
    dot_rows,
    fold_scale,
    head_blocks,
    load_head,
    store_head,
    strides,
    zeros_like_head,
)
from .launch import launch


@triton.jit
def query_gradient_kernel(
    q_ptr,
    q_batch_stride,
    q_token_stride,
    k_ptr,
    v_ptr,
    kv_batch_stride,
    kv_token_stride,
    out_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    dq_batch_stride,
    dq_token_stride,
    T,
    S,
    H,
    scale,
    log2_scale,
    HEAD: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN_N: tl.constexpr,
):
    """dq of a tile of queries, and delta, which the other kernel needs of every query too.

    delta is the sum over keys of weight * dweight. That is rowsum(out * dout), for which one need not have seen all keys; where
    one tile holds them all, there is no out_ptr, and the sum loses less to cancellation.
    """
    tiles = tl.cdiv(T, BLOCK_M)
    sequence = tl.program_id(0) // tiles
    batch, head = (sequence // H).to(tl.int64), sequence % H
    rows = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    q_ptr += batch * q_batch_stride * UNIT + head * HEAD
    k_ptr += batch * kv_batch_stride * UNIT + head * HEAD
    v_ptr += batch * kv_batch_stride * UNIT + head * HEAD
    dq_ptr += batch * dq_batch_stride * UNIT + head * HEAD
    kv_stride = tl.cast(kv_token_stride, tl.int64) * UNIT
    # Rows past the last query wrap around, and are dropped at the store.
    wrapped = rows % T
    q = load_head(q_ptr, wrapped, tl.cast(q_token_stride, tl.int64) * UNIT, T, HEAD, MAIN, REST, True)
    q, log2_scale = fold_scale(q, log2_scale)
    out_offset = (batch * T * H + head) * HEAD
    dout = load_head(dout_ptr + out_offset, wrapped, H * HEAD, T, HEAD, MAIN, REST, True)
    delta = tl.zeros([BLOCK_M], tl.float32)
    if out_ptr is not None:
        out = load_head(out_ptr + out_offset, wrapped, H * HEAD, T, HEAD, MAIN, REST, True)
        for i in tl.static_range(len(out)):
            delta += tl.sum(out[i].to(tl.float32) * dout[i].to(tl.float32), 1)
    statistics = sequence.to(tl.int64) * T
    lse = tl.load(lse_ptr + statistics + wrapped)
    dq = zeros_like_head(BLOCK_M, HEAD, MAIN, REST)
    for start in range(0, S, BLOCK_N):
        k = load_head(k_ptr, column, kv_stride, S - start, HEAD, MAIN, REST, EVEN_N)
        v = load_head(v_ptr, column, kv_stride, S - start, HEAD, MAIN, REST, EVEN_N)
        weight = tl.exp2(dot_rows(q, k) * log2_scale - lse[:, None])
        if not EVEN_N:
            weight = tl.where((column < S - start)[None, :], weight, 0.0)
        dweight = dot_rows(dout, v)
        if out_ptr is None:
            delta = tl.sum(weight * dweight, 1)
        dscore = weight * (dweight - delta[:, None])
        dq = add_weighted(dq, dscore.to(k_ptr.dtype.element_ty), k)
        k_ptr += BLOCK_N * kv_stride
        v_ptr += BLOCK_N * kv_stride
    tl.store(delta_ptr + statistics + rows, delta, mask=rows < T)
    store_head(dq_ptr, rows, tl.cast(dq_token_stride, tl.int64) * UNIT, T, dq, HEAD, MAIN, scale)


@triton.jit
def key_value_gradient_kernel(
    q_ptr,
    q_batch_stride,
    q_token_stride,
    k_ptr,
    v_ptr,
    kv_batch_stride,
    kv_token_stride,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    dkv_batch_stride,
    dkv_token_stride,
    T,
    S,
    H,
    scale,
    log2_scale,
    HEAD: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN_M: tl.constexpr,
):
    """dk and dv of a tile of keys."""
    tiles = tl.cdiv(S, BLOCK_N)
    sequence = tl.program_id(0) // tiles
    batch, head = (sequence // H).to(tl.int64), sequence % H
    rows = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    query = tl.arange(0, BLOCK_M)
    q_ptr += batch * q_batch_stride * UNIT + head * HEAD
    k_ptr += batch * kv_batch_stride * UNIT + head * HEAD
    v_ptr += batch * kv_batch_stride * UNIT + head * HEAD
    dk_ptr += batch * dkv_batch_stride * UNIT + head * HEAD
    dv_ptr += batch * dkv_batch_stride * UNIT + head * HEAD
    dout_ptr += (batch * T * H + head) * HEAD
    lse_ptr += sequence.to(tl.int64) * T
    delta_ptr += sequence.to(tl.int64) * T
    q_stride = tl.cast(q_token_stride, tl.int64) * UNIT
    kv_stride = tl.cast(kv_token_stride, tl.int64) * UNIT
    # Rows past the last key wrap around, and are dropped at the store.
    k = load_head(k_ptr, rows % S, kv_stride, S, HEAD, MAIN, REST, True)
    v = load_head(v_ptr, rows % S, kv_stride, S, HEAD, MAIN, REST, True)
    dk = zeros_like_head(BLOCK_N, HEAD, MAIN, REST)
    dv = zeros_like_head(BLOCK_N, HEAD, MAIN, REST)
    for start in range(0, T, BLOCK_M):
        q = load_head(q_ptr, query, q_stride, T - start, HEAD, MAIN, REST, EVEN_M)
        dout = load_head(dout_ptr, query, H * HEAD, T - start, HEAD, MAIN, REST, EVEN_M)
        inside = query < T - start
        lse = tl.load(lse_ptr + query, mask=inside, other=float("inf"))  # whose weights are zeros
        delta = tl.load(delta_ptr + query, mask=inside, other=0.0)
        scored, factor = fold_scale(q, log2_scale)
        weight = tl.exp2(dot_rows(k, scored) * factor - lse[None, :])
        dv = add_weighted(dv, weight.to(dout_ptr.dtype.element_ty), dout)
        dscore = weight * (dot_rows(v, dout) - delta[None, :])
        dk = add_weighted(dk, dscore.to(q_ptr.dtype.element_ty), q)
        q_ptr += BLOCK_M * q_stride
        dout_ptr += BLOCK_M * H * HEAD
        lse_ptr += BLOCK_M
        delta_ptr += BLOCK_M
    dkv_stride = tl.cast(dkv_token_stride, tl.int64) * UNIT
    store_head(dk_ptr, rows, dkv_stride, S, dk, HEAD, MAIN, scale)
    store_head(dv_ptr, rows, dkv_stride, S, dv, HEAD, MAIN)


def attention_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """dout and out [B, T, H*d]; qkv as for ``attention``, which returned out and lse. Returns dqkv, contiguous."""
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    _attention_backward(dout, qkv.unbind(2), out, lse, dqkv.unbind(2))
    return dqkv


def cross_attention_backward(dout: Tensor, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """As ``attention_backward``, for ``cross_attention``. Returns dq and dkv, contiguous."""
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dkv = torch.empty(kv.shape, dtype=kv.dtype, device=kv.device)
    _attention_backward(dout, (q, *kv.unbind(2)), out, lse, (dq, *dkv.unbind(2)))
    return dq, dkv


def _attention_backward(dout: Tensor, inputs: Sequence[Tensor], out: Tensor, lse: Tensor, gradients: Sequence[Tensor]) -> None:
    q, k, v = inputs
    dq, dk, dv = gradients
    B, T, H, d = q.shape
    S = k.shape[1]
    dout = dout.contiguous()
    delta = torch.empty_like(lse)
    unit = alignment(q, k, dq, dk)
    blocks = head_blocks(d, q.dtype)
    scale = d**-0.5
    tile = attention_tile("query_gradient", B * H, T, S, blocks, q.dtype)
    launch(
        query_gradient_kernel,
        triton.cdiv(T, tile.m) * B * H,
        q_ptr=q,
        **strides("q", q, unit),
        k_ptr=k,
        v_ptr=v,
        **strides("kv", v, unit),
        out_ptr=None if tile.n >= S else out,
        dout_ptr=dout,
        lse_ptr=lse,
        delta_ptr=delta,
        dq_ptr=dq,
        **strides("dq", dq, unit),
        T=T,
        S=S,
        H=H,
        scale=scale,
        log2_scale=LOG2_E * scale,
        UNIT=unit,
        EVEN_N=S % tile.n == 0,
        **blocks.options(),
        **tile.options(),
    )
    tile = attention_tile("key_value_gradient", B * H, T, S, blocks, q.dtype)
    launch(
        key_value_gradient_kernel,
        triton.cdiv(S, tile.n) * B * H,
        q_ptr=q,
        **strides("q", q, unit),
        k_ptr=k,
        v_ptr=v,
        **strides("kv", v, unit),
        dout_ptr=dout,
        lse_ptr=lse,
        delta_ptr=delta,
        dk_ptr=dk,
        dv_ptr=dv,
        **strides("dkv", dv, unit),
        T=T,
        S=S,
        H=H,
        scale=scale,
        log2_scale=LOG2_E * scale,
        UNIT=unit,
        EVEN_M=T % tile.m == 0,
        **blocks.options(),
        **tile.options(),
    )
