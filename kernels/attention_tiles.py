"""How attention cuts heads into blocks of columns and sequences into tiles."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton

from .launch import interpreted, target
from .tiles import SHARED_BYTES, SMALLEST_SHARED_BYTES
from .tuned import tuned

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
