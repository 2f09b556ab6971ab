"""What the matrix kernels share: the order of programs, the loop over the summed dimension, GELU and its derivative."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_position(program, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr = 8):
    """Row and column of a program's tile, walked in groups of GROUP_M tile rows so that neighbours share weights in L2."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_in_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first_m = program // tiles_in_group * GROUP_M
    group_m = min(tiles_m - first_m, GROUP_M)
    within = program % tiles_in_group
    return first_m + within % group_m, within // group_m


@triton.jit
def multiply(
    a_ptr,
    b_ptr,
    rows,
    columns,
    first_k,
    last_k,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    A_BY_K: tl.constexpr = False,
    B_BY_K: tl.constexpr = False,
):
    """fp32 [BLOCK_M, BLOCK_N] of the product over k in [first_k, last_k): sum of a[row, k] * b[column, k].

    a is stored [M, K], or [K, M] if A_BY_K; b is stored [N, K], or [K, N] if B_BY_K. Rows and columns past the edge wrap
    around, and are dropped at the store.
    """
    k = first_k + tl.arange(0, BLOCK_K)
    a_ptrs = _tile(a_ptr, rows % M, k, M, K, A_BY_K)
    b_ptrs = _tile(b_ptr, columns % N, k, N, K, B_BY_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(first_k, last_k, BLOCK_K):
        a = _load(a_ptrs, last_k - start, BLOCK_K, EVEN_K, A_BY_K)
        b = _load(b_ptrs, last_k - start, BLOCK_K, EVEN_K, B_BY_K)
        if A_BY_K:
            a = a.T
        if not B_BY_K:
            b = b.T
        if a_ptr.dtype.element_ty == tl.float32:
            # One chain of K roundings costs accuracy that no library GEMM loses: sum blocks. The compiler would fold
            # `acc + dot` back into the chain; it keeps the subtraction.
            acc = acc - tl.dot(a, -b, input_precision="ieee")
        else:
            acc = tl.dot(a, b, acc)
        a_ptrs += BLOCK_K * M if A_BY_K else BLOCK_K
        b_ptrs += BLOCK_K * N if B_BY_K else BLOCK_K
    return acc


@triton.jit
def _tile(pointer, outer, k, OUTER, K, BY_K: tl.constexpr):
    """Pointers to a tile as it lies in memory: [outer, k], or [k, outer] if BY_K."""
    if BY_K:
        return pointer + k.to(tl.int64)[:, None] * OUTER + outer[None, :]
    else:
        return pointer + outer.to(tl.int64)[:, None] * K + k[None, :]


@triton.jit
def _load(pointers, left, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, BY_K: tl.constexpr):
    if EVEN_K:
        return tl.load(pointers)
    elif BY_K:
        return tl.load(pointers, mask=tl.arange(0, BLOCK_K)[:, None] < left, other=0.0)
    else:
        return tl.load(pointers, mask=tl.arange(0, BLOCK_K)[None, :] < left, other=0.0)


@triton.jit
def linear_tile(
    x_ptr,
    weight_ptr,
    bias_ptr,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """This program's tile of x @ weight.T + bias in fp32, and which rows and columns it covers."""
    tile_m, tile_n = tile_position(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    y = multiply(x_ptr, weight_ptr, rows, columns, 0, K, M, N, K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K)
    y += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    return rows, columns, y


@triton.jit
def store_tile(pointer, rows, columns, value, M, N):
    offset = rows.to(tl.int64)[:, None] * N + columns[None, :]
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(pointer + offset, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_tile(pointer, rows, columns, M, N):
    offset = rows.to(tl.int64)[:, None] * N + columns[None, :]
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    return tl.load(pointer + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def gelu_tanh(x):
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), rewritten over exp2: 12 instructions, of which 2 special functions."""
    return x / (1.0 + tl.exp2(x * (-2.302208198144325 - 0.10294324 * x * x)))


@triton.jit
def gelu_tanh_derivative(x):
    # Bounded, so that exp * sigmoid stays a number; and taken for 1 - sigmoid, which would cancel.
    exp = tl.exp2(tl.minimum(x * (-2.302208198144325 - 0.10294324 * x * x), 100.0))
    sigmoid = 1.0 / (1.0 + exp)
    return sigmoid * (1.0 + x * (exp * sigmoid) * (1.5957691216057308 + 0.2140644488 * x * x))
