"""What the matrix kernels share: tiles, the order of programs, the loop over K, GELU."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import interpreted


class GemmTile(NamedTuple):
    """A program's share of y [M, N] = a [M, K] @ w [N, K].T, and how its loop is pipelined."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int

    def grid(self, M: int, N: int) -> int:
        return triton.cdiv(M, self.m) * triton.cdiv(N, self.n)

    def options(self, K: int) -> dict[str, int | bool]:
        return {
            "BLOCK_M": self.m,
            "BLOCK_N": self.n,
            "BLOCK_K": self.k,
            "EVEN_K": K % self.k == 0,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


INTERPRETER = GemmTile(64, 128, 128, num_warps=1, num_stages=1)
FULL_PRECISION = GemmTile(64, 64, 32, num_warps=4, num_stages=3)
FEW_ROWS = GemmTile(64, 64, 64, num_warps=4, num_stages=4)
MANY_ROWS = GemmTile(128, 128, 64, num_warps=8, num_stages=3)


def gemm_tile(M: int, dtype: torch.dtype) -> GemmTile:
    """Small tiles up to M = 512, where large ones would leave most of the multiprocessors idle."""
    if interpreted():
        return INTERPRETER
    if dtype == torch.float32:
        return FULL_PRECISION
    return FEW_ROWS if M <= 512 else MANY_ROWS


@triton.jit
def tile_position(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr = 8):
    """Row and column of this program's tile, walked in groups of GROUP_M tile rows so that neighbours share weights in L2."""
    program = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_in_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first_m = program // tiles_in_group * GROUP_M
    group_m = min(tiles_m - first_m, GROUP_M)
    within = program % tiles_in_group
    return first_m + within % group_m, within // group_m


@triton.jit
def multiply(
    a_ptr,
    w_ptr,
    rows,
    columns,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """fp32 [BLOCK_M, BLOCK_N] of a @ w.T; rows and columns past the edge wrap around, and are dropped at the store."""
    k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + (rows % M).to(tl.int64)[:, None] * K + k[None, :]
    w_ptrs = w_ptr + (columns % N).to(tl.int64)[:, None] * K + k[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_ptrs)
            w = tl.load(w_ptrs)
        else:
            inside = k[None, :] < K - start
            a = tl.load(a_ptrs, mask=inside, other=0.0)
            w = tl.load(w_ptrs, mask=inside, other=0.0)
        if a_ptr.dtype.element_ty == tl.float32:
            # One chain of K roundings costs accuracy that no library GEMM loses: sum blocks. The compiler would fold
            # `acc + dot` back into the chain; it keeps the subtraction.
            acc = acc - tl.dot(a, -w.T, input_precision="ieee")
        else:
            acc = tl.dot(a, w.T, acc)
        a_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    return acc


@triton.jit
def gelu_tanh(x):
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), rewritten over exp2: 12 instructions, of which 2 special functions."""
    return x / (1.0 + tl.exp2(x * (-2.302208198144325 - 0.10294324 * x * x)))
