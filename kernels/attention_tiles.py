"""How attention cuts heads into blocks of columns and sequences into tiles."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton

from .launch import interpreted, target
from .tiles import SHARED_BYTES, SMALLEST_SHARED_BYTES

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

    def shrunk(self, T: int, S: int, by_keys: bool) -> AttentionTile:
        """Without rows that no query or key would fill; each warp keeps its share of the rows that make the result."""
        m = min(self.m, max(SMALLEST, triton.next_power_of_2(T)))
        n = min(self.n, max(SMALLEST, triton.next_power_of_2(S)))
        kept, before = (n, self.n) if by_keys else (m, self.m)
        return AttentionTile(m, n, max(1, self.num_warps * kept // before), self.num_stages)

    def shared_bytes(self, width: int, itemsize: int, by_keys: bool) -> int:
        """Of two operands kept, and of two in flight with the statistics of their rows."""
        kept, passing = (self.n, self.m) if by_keys else (self.m, self.n)
        return 2 * kept * width * itemsize + self.num_stages * passing * (2 * width * itemsize + 8) + BARRIERS


BARRIERS = 256  # bytes of shared memory, and more than sm_100 takes for its own
INTERPRETER = AttentionTile(128, 128, num_warps=1, num_stages=1)  # which costs per program and operation, not per element
TALL = AttentionTile(128, 64, num_warps=8, num_stages=3)
DEEP = AttentionTile(64, 64, num_warps=4, num_stages=3)
SQUARE = AttentionTile(64, 64, num_warps=4, num_stages=2)
BY_EIGHT = AttentionTile(64, 64, num_warps=8, num_stages=2)
SHORT = AttentionTile(32, 64, num_warps=4, num_stages=2)
NARROW = AttentionTile(64, 32, num_warps=4, num_stages=1)
SMALL = AttentionTile(32, 32, num_warps=4, num_stages=1)
# By kernel, architecture, and the largest width of a head; of the tiles of one line the first that fits shared memory.
TILES: dict[str, dict[str, tuple[tuple[float, tuple[AttentionTile, ...]], ...]]] = {
    "forward": {
        "sm_100": ((128, (TALL, SQUARE)), (math.inf, (NARROW,))),  # its tensor cores take 128 rows at a time
        "default": ((128, (DEEP, SQUARE)), (math.inf, (NARROW,))),
    },
    "query_gradient": {"default": ((128, (SQUARE, NARROW)), (math.inf, (SMALL,)))},
    # dk and dv are two accumulators: where they share the registers with the operands, they leave room for smaller tiles only.
    "key_value_gradient": {
        "sm_90": ((96, (SQUARE,)), (128, (SHORT,)), (math.inf, (SMALL,))),
        "sm_100": ((128, (SQUARE,)), (math.inf, (SMALL,))),
        "gfx942": ((128, (SHORT,)), (math.inf, (SMALL,))),
        "default": ((48, (SQUARE,)), (96, (SHORT,)), (128, (BY_EIGHT, SHORT)), (math.inf, (SMALL,))),
    },
}
FULL_PRECISION = {
    "forward": AttentionTile(32, 32, num_warps=4, num_stages=1),
    "query_gradient": AttentionTile(16, 32, num_warps=4, num_stages=1),
    "key_value_gradient": AttentionTile(16, 16, num_warps=4, num_stages=1),
}


def attention_tile(kernel: str, T: int, S: int, blocks: HeadBlocks, dtype: torch.dtype) -> AttentionTile:
    """Of ``"forward"``, ``"query_gradient"`` or ``"key_value_gradient"``, for T queries and S keys."""
    if interpreted():
        return INTERPRETER
    by_keys = kernel == "key_value_gradient"
    arch = target()
    if dtype == torch.float32:
        return FULL_PRECISION[kernel].shrunk(T, S, by_keys)
    by_width = TILES[kernel].get(arch, TILES[kernel]["default"])
    choices = next(tiles for largest, tiles in by_width if blocks.width <= largest)
    limit = SHARED_BYTES.get(arch, SMALLEST_SHARED_BYTES)
    for tile in choices:
        if tile.shared_bytes(blocks.width, dtype.itemsize, by_keys) <= limit:
            return tile.shrunk(T, S, by_keys)
    raise RuntimeError(f"no tile of {choices} fits the {limit} bytes of shared memory of {arch} at head dim {blocks.head}")
