"""Attention, forward: softmax(q k.T / sqrt(d)) v for each head, a tile of queries at a time (Dao 2023, FlashAttention-2).

q, k and v are read where they lie, packed with each other or not. A head is read as one or two blocks of columns: head dim 72
as 64 + 16 does 1.11 times the useful work, where the next power of two does 1.78 times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import interpreted, launch, target
from .tiles import SHARED_BYTES, SMALLEST_SHARED_BYTES, tuned

LOG2_E = 1.4426950408889634

# ------------------------------------------------------------------------------------------------ tiles
SMALLEST = 16  # of any dimension of a product of matrices


class HeadBlocks(NamedTuple):
    """The columns of a head: as many blocks of ``main`` as it holds, and one of ``rest``, masked, for what is left over."""

    head: int
    main: int
    rest: int

    @property
    def width(self) -> int:
        """Of all blocks together."""
        return self.head // self.main * self.main + self.rest

    def options(self) -> dict[str, int]:
        return {"HEAD": self.head, "MAIN": self.main, "REST": self.rest}


def head_blocks(head_dim: int, dtype: torch.dtype) -> HeadBlocks:
    """Powers of two: 72 = 64 + 8 of 16, 96 = 64 + 32, but 100 of 128. In fp32, whose products take registers, 32 at most."""
    largest = 32 if dtype == torch.float32 else 128
    main = min(largest, max(SMALLEST, 1 << (head_dim.bit_length() - 1)))
    if main < largest and head_dim % main > main // 2:
        main *= 2
    rest = head_dim % main
    return HeadBlocks(head_dim, main, max(SMALLEST, triton.next_power_of_2(rest)) if rest else 0)


class AttentionTile(NamedTuple):
    """A program's queries and keys, and how its loop over the others is pipelined."""

    m: int
    n: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, "num_warps": self.num_warps, "num_stages": self.num_stages}

    def shrunk(self, kernel: str, T: int, S: int) -> AttentionTile:
        """Without rows that no query or key would fill; each warp keeps its share of the rows that make the result."""
        m = min(self.m, max(SMALLEST, triton.next_power_of_2(T)))
        n = min(self.n, max(SMALLEST, triton.next_power_of_2(S)))
        if kernel == "key_value_gradient":
            m = m if n == self.n else min(m, SHORT.m)  # fewer warps, more registers a thread for the rows that pass
            return AttentionTile(m, n, max(1, self.num_warps * n // self.n), self.num_stages)
        return AttentionTile(m, n, max(1, self.num_warps * m // self.m), self.num_stages)

    def shared_bytes(self, kernel: str, arch: str, width: int, itemsize: int) -> int:
        """Of the heads that stay (q; q and dout; k and v), and of two in flight with the statistics of their rows."""
        staying, passing = (self.n, self.m) if kernel == "key_value_gradient" else (self.m, self.n)
        stages = self.num_stages + (-1 if arch.startswith("gfx") else arch == "sm_100")  # in registers; for tensor memory
        heads = staying * (1 if kernel == "forward" else 2) + passing * 2 * stages
        return heads * width * itemsize + passing * 8 * stages + BARRIERS


BARRIERS = 256  # bytes of shared memory, and more than sm_100 takes for its own
INTERPRETER = AttentionTile(128, 128, num_warps=1, num_stages=1)  # which costs per program and operation, not per element
TALL = AttentionTile(128, 64, num_warps=8, num_stages=3)
DEEP = AttentionTile(64, 64, num_warps=4, num_stages=3)
SQUARE = AttentionTile(64, 64, num_warps=4, num_stages=2)
TWO_WAVES = AttentionTile(64, 64, num_warps=2, num_stages=2)  # four would do part of the products twice
SHORT_TWO_WAVES = AttentionTile(32, 64, num_warps=2, num_stages=2)
BY_EIGHT = AttentionTile(64, 64, num_warps=8, num_stages=2)
SHORT = AttentionTile(32, 64, num_warps=4, num_stages=2)
HALF = AttentionTile(64, 32, num_warps=4, num_stages=2)
NARROW = AttentionTile(64, 32, num_warps=4, num_stages=1)
SMALL = AttentionTile(32, 32, num_warps=4, num_stages=1)
AMPERE_QUERY = ((80, (SQUARE,)), (96, (HALF,)), (128, (SQUARE, HALF)), (math.inf, (SMALL,)))
A100_KEY_VALUE = ((80, (SQUARE,)), (96, (SHORT,)), (128, (BY_EIGHT, SHORT)), (math.inf, (SMALL,)))
AMPERE_KEY_VALUE = ((64, (SQUARE,)), *A100_KEY_VALUE[1:])  # the same code, in a few registers more
# By kernel, architecture, and the largest width of a head; of the tiles of one line the first that fits shared memory.
TILES: dict[str, dict[str, tuple[tuple[float, tuple[AttentionTile, ...]], ...]]] = {
    "forward": {
        "sm_100": ((128, (TALL, SQUARE)), (math.inf, (NARROW,))),  # its tensor cores take 128 rows at a time
        "gfx942": ((80, (TWO_WAVES,)), (128, (DEEP, SQUARE)), (math.inf, (NARROW,))),
        "default": ((128, (DEEP, SQUARE)), (math.inf, (NARROW,))),
    },
    "query_gradient": {
        "sm_80": AMPERE_QUERY,
        "sm_86": AMPERE_QUERY,
        "sm_89": AMPERE_QUERY,
        "gfx942": ((80, (TWO_WAVES,)), (128, (SQUARE, HALF)), (math.inf, (SMALL,))),
        "sm_120": ((64, (SQUARE,)), (96, (HALF,)), (128, (SQUARE, HALF)), (math.inf, (SMALL,))),
        "default": ((128, (SQUARE, HALF)), (math.inf, (SMALL,))),
    },
    # dk and dv are two accumulators: where they share the registers with the operands, they leave room for smaller tiles only.
    "key_value_gradient": {
        "sm_80": A100_KEY_VALUE,
        "sm_86": AMPERE_KEY_VALUE,
        "sm_89": AMPERE_KEY_VALUE,
        "sm_90": ((96, (SQUARE,)), (128, (SHORT,)), (math.inf, (SMALL,))),
        "sm_100": ((128, (SQUARE,)), (math.inf, (SMALL,))),
        "gfx942": ((96, (SHORT_TWO_WAVES,)), (128, (SHORT,)), (math.inf, (SMALL,))),
        "default": ((48, (SQUARE,)), (96, (SHORT,)), (128, (BY_EIGHT, SHORT)), (math.inf, (SMALL,))),
    },
}
# What measuring on a device may prefer to the choices above.
OTHERS = (
    *(TALL, DEEP, SQUARE, TWO_WAVES, SHORT_TWO_WAVES, BY_EIGHT, SHORT, HALF, NARROW, SMALL),
    AttentionTile(128, 64, num_warps=4, num_stages=3),
    AttentionTile(128, 64, num_warps=8, num_stages=2),
    AttentionTile(128, 128, num_warps=8, num_stages=2),
)
FULL_PRECISION = {
    "forward": AttentionTile(32, 32, num_warps=4, num_stages=1),
    "query_gradient": AttentionTile(16, 32, num_warps=4, num_stages=1),
    "key_value_gradient": AttentionTile(16, 16, num_warps=8, num_stages=1),
}


def attention_tile(kernel: str, heads: int, T: int, S: int, blocks: HeadBlocks, dtype: torch.dtype) -> AttentionTile:
    """Of ``"forward"``, ``"query_gradient"`` or ``"key_value_gradient"``, for T queries and S keys of so many heads in all."""
    if interpreted():
        return INTERPRETER
    arch = target()
    if dtype == torch.float32:
        choices: tuple[AttentionTile, ...] = (FULL_PRECISION[kernel],)
    else:
        by_width = TILES[kernel].get(arch, TILES[kernel]["default"])
        choices = (*next(tiles for largest, tiles in by_width if blocks.width <= largest), SMALL)
    limit = SHARED_BYTES.get(arch, SMALLEST_SHARED_BYTES)

    def that_fit(tiles: tuple[AttentionTile, ...]) -> list[AttentionTile]:
        fitting = (tile for tile in tiles if tile.shared_bytes(kernel, arch, blocks.width, dtype.itemsize) <= limit)
        return [tile.shrunk(kernel, T, S) for tile in fitting]

    fitting = that_fit(choices)
    if not fitting:
        raise RuntimeError(f"no tile of {choices} fits the {limit} bytes of shared memory of {arch} at head dim {blocks.head}")
    others = choices if dtype == torch.float32 else OTHERS
    return tuned(f"attention_{kernel}", dtype, heads, (T, S, blocks.head), fitting[0], lambda: that_fit(others))


# ------------------------------------------------------------------------------------------------ kernels


@triton.jit
def load_head(pointer, rows, stride, num_rows, HEAD: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, EVEN: tl.constexpr):
    """Rows of one head [rows, HEAD] as a tuple of column blocks; zeros past the head and, unless EVEN, past num_rows."""
    pointers = pointer + rows.to(tl.int64)[:, None] * stride
    blocks = ()
    for i in tl.static_range(HEAD // MAIN):
        blocks = blocks + (_load_columns(pointers + i * MAIN, rows, num_rows, MAIN, MAIN, EVEN),)
    if REST > 0:
        start: tl.constexpr = HEAD // MAIN * MAIN
        blocks = blocks + (_load_columns(pointers + start, rows, num_rows, HEAD - start, REST, EVEN),)
    return blocks


@triton.jit
def _load_columns(pointers, rows, num_rows, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    column = tl.arange(0, BLOCK)[None, :]
    if EVEN and COLUMNS == BLOCK:
        return tl.load(pointers + column)
    elif EVEN:
        return tl.load(pointers + column, mask=column < COLUMNS, other=0.0)
    elif COLUMNS == BLOCK:
        return tl.load(pointers + column, mask=(rows < num_rows)[:, None], other=0.0)
    else:
        return tl.load(pointers + column, mask=(rows < num_rows)[:, None] & (column < COLUMNS), other=0.0)


@triton.jit
def store_head(pointer, rows, stride, num_rows, blocks, HEAD: tl.constexpr, MAIN: tl.constexpr, scale=1.0):
    pointers = pointer + rows.to(tl.int64)[:, None] * stride
    inside = (rows < num_rows)[:, None]
    for i in tl.static_range(len(blocks)):
        column = i * MAIN + tl.arange(0, blocks[i].shape[1])[None, :]
        tl.store(pointers + column, (blocks[i] * scale).to(pointer.dtype.element_ty), mask=inside & (column < HEAD))


@triton.jit
def zeros_like_head(ROWS: tl.constexpr, HEAD: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    blocks = ()
    for _ in tl.static_range(HEAD // MAIN):
        blocks = blocks + (tl.zeros([ROWS, MAIN], tl.float32),)
    if REST > 0:
        blocks = blocks + (tl.zeros([ROWS, REST], tl.float32),)
    return blocks


@triton.jit
def add_product(total, a, b):
    if a.dtype == tl.float32:
        return total - tl.dot(a, -b, input_precision="ieee")  # as in gemm.py: the compiler would fold an addition
    else:
        return tl.dot(a, b, total)


@triton.jit
def dot_rows(a, b):
    """a @ b.T of two heads: fp32 [rows of a, rows of b]."""
    total = tl.dot(a[0], b[0].T, input_precision="ieee")
    for i in tl.static_range(1, len(a)):
        total = add_product(total, a[i], b[i].T)
    return total


@triton.jit
def fold_scale(q, log2_scale):
    """q and what its scores are still to be multiplied with.

    In fp32 nothing: a score less the largest is then exact, where a multiply-add of the product would leave its rounding.
    """
    if q[0].dtype == tl.float32:
        scaled = ()
        for i in tl.static_range(len(q)):
            scaled = scaled + (q[i] * log2_scale,)
        return scaled, 1.0
    else:
        return q, log2_scale


@triton.jit
def add_weighted(total, weights, rows):
    """total + weights @ rows, block by block."""
    added = ()
    for i in tl.static_range(len(rows)):
        added = added + (add_product(total[i], weights, rows[i]),)
    return added


@triton.jit
def scale_rows(blocks, factor):
    scaled = ()
    for i in tl.static_range(len(blocks)):
        scaled = scaled + (blocks[i] * factor[:, None],)
    return scaled


@triton.jit
def attention_kernel(
    q_ptr,
    q_batch_stride,
    q_token_stride,
    k_ptr,
    v_ptr,
    kv_batch_stride,
    kv_token_stride,
    out_ptr,
    lse_ptr,
    T,
    S,
    H,
    log2_scale,
    HEAD: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN_N: tl.constexpr,
):
    """Strides come in units of UNIT elements, from which the compiler sees that 16-byte loads are aligned."""
    tiles = tl.cdiv(T, BLOCK_M)
    sequence = tl.program_id(0) // tiles
    batch, head = (sequence // H).to(tl.int64), sequence % H
    rows = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    q_ptr += batch * q_batch_stride * UNIT + head * HEAD
    k_ptr += batch * kv_batch_stride * UNIT + head * HEAD
    v_ptr += batch * kv_batch_stride * UNIT + head * HEAD
    q_stride = tl.cast(q_token_stride, tl.int64) * UNIT
    kv_stride = tl.cast(kv_token_stride, tl.int64) * UNIT
    # Rows past the last query wrap around, and are dropped at the store.
    q = load_head(q_ptr, rows % T, q_stride, T, HEAD, MAIN, REST, True)
    q, log2_scale = fold_scale(q, log2_scale)
    out = zeros_like_head(BLOCK_M, HEAD, MAIN, REST)
    # The least finite number: a score of -inf is less by infinity, and weighs nothing even where a query has no other.
    largest = tl.full([BLOCK_M], -3.4028234663852886e38, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, S, BLOCK_N):
        k = load_head(k_ptr, column, kv_stride, S - start, HEAD, MAIN, REST, EVEN_N)
        score = dot_rows(q, k)
        if not EVEN_N:
            score = tl.where((column < S - start)[None, :], score, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(score, 1) * log2_scale)
        weight = tl.exp2(score * log2_scale - new_largest[:, None])
        decay = tl.exp2(largest - new_largest)
        total = total * decay + tl.sum(weight, 1)
        largest = new_largest
        v = load_head(v_ptr, column, kv_stride, S - start, HEAD, MAIN, REST, EVEN_N)
        out = add_weighted(scale_rows(out, decay), weight.to(v_ptr.dtype.element_ty), v)
        k_ptr += BLOCK_N * kv_stride
        v_ptr += BLOCK_N * kv_stride
    total = tl.where(total == 0.0, 1.0, total)
    out = scale_rows(out, 1.0 / total)
    store_head(out_ptr + (batch * T * H + head) * HEAD, rows, H * HEAD, T, out, HEAD, MAIN)
    if lse_ptr is not None:
        tl.store(lse_ptr + sequence.to(tl.int64) * T + rows, largest + tl.log2(total), mask=rows < T)


def attention(qkv: Tensor, training: bool) -> tuple[Tensor, Tensor]:
    """qkv [B, T, 3, H, d], contiguous in its last three dimensions.

    Returns out [B, T, H*d] and, for the backward, log2 of each query's sum of exponentials, fp32 [B, H, T] (of no elements
    unless training).
    """
    return _attention(qkv.unbind(2), training)


def cross_attention(q: Tensor, kv: Tensor, training: bool) -> tuple[Tensor, Tensor]:
    """q [B, T, H, d] and kv [B, S, 2, H, d], contiguous in their last two and three dimensions. Returns as ``attention``."""
    return _attention((q, *kv.unbind(2)), training)


def _attention(inputs: Sequence[Tensor], training: bool) -> tuple[Tensor, Tensor]:
    q, k, v = inputs
    B, T, H, d = q.shape
    S = k.shape[1]
    out = torch.empty(B, T, H * d, dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, T) if training else (0,), dtype=torch.float32, device=q.device)
    unit = alignment(q, k)
    blocks = head_blocks(d, q.dtype)
    tile = attention_tile("forward", B * H, T, S, blocks, q.dtype)
    launch(
        attention_kernel,
        triton.cdiv(T, tile.m) * B * H,
        q_ptr=q,
        **strides("q", q, unit),
        k_ptr=k,
        v_ptr=v,
        **strides("kv", v, unit),
        out_ptr=out,
        lse_ptr=lse if training else None,
        T=T,
        S=S,
        H=H,
        log2_scale=LOG2_E * d**-0.5,
        UNIT=unit,
        EVEN_N=S % tile.n == 0,
        **blocks.options(),
        **tile.options(),
    )
    return out, lse


def alignment(*tensors: Tensor) -> int:
    """Of how many elements, at most 16 bytes, the heads and strides of [B, T, H, d] tensors are multiples."""
    return math.gcd(16 // tensors[0].itemsize, *(n for tensor in tensors for n in (*tensor.stride()[:2], tensor.shape[3])))


def strides(name: str, tensor: Tensor, unit: int) -> dict[str, int]:
    """Return the kernel's ``<name>_batch_stride`` and ``<name>_token_stride`` of [B, T, H, d], in units of elements."""
    return {f"{name}_batch_stride": tensor.stride(0) // unit, f"{name}_token_stride": tensor.stride(1) // unit}
