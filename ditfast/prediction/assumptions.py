"""What predictions assume beyond data sheets and counts: each a name, a value and a reason. None of it was measured here."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

Value = TypeVar("Value", float, dict[str, float])


class Assumption(NamedTuple):
    name: str
    value: float | dict[str, float]  # one for each architecture, or tile
    reason: str


ASSUMPTIONS: list[Assumption] = []


def _assumed(name: str, value: Value, reason: str) -> Value:
    ASSUMPTIONS.append(Assumption(name, value, reason))
    return value


STREAM = _assumed(
    "share of bandwidth, streaming kernel",
    {"sm_80": 0.87, "sm_90": 0.85, "sm_100": 0.8, "gfx942": 0.75},
    "copies of large tensors are reported at 80 to 92% on NVIDIA, less on MI300X; no credit for what lies in L2",
)
TORCH_NORM = _assumed(
    "of that, torch's LayerNorm", 0.8, "one block a row: statistics and a barrier between reading and writing"
)
ISSUE = _assumed("share of issue slots, any kernel", 0.8, "stalls at barriers and on latencies that no other warp covers")
KERNEL_US = _assumed(
    "us of a kernel beside its work",
    2.0,
    "start, first loads and tail, one after the other; the smallest kernels take about that inside a CUDA graph",
)
LIBRARY_PRODUCT = _assumed(
    "share of 16-bit peak, library GEMM",
    {"sm_80": 0.8, "sm_90": 0.7, "sm_100": 0.65, "gfx942": 0.45},
    "full waves of large tiles; the power limit holds clocks below the data sheet's from Hopper on, and hipBLASLt trails",
)
LIBRARY_TILES = _assumed(
    "of that, by tile of the library",
    {"128x256": 1.0, "128x128": 0.92, "64x128": 0.8, "64x64": 0.6},
    "smaller tiles read more for each product; the library is taken to choose the best, whole or with K in 2 or 4 parts",
)
TRITON_PRODUCT = _assumed(
    "share of 16-bit peak, Triton GEMM",
    {"sm_80": 0.72, "sm_90": 0.55, "sm_100": 0.35, "gfx942": 0.4},
    "pointer loads: near the library on Ampere; neither TMA nor warp specialisation on Hopper; one-CTA products on Blackwell",
)
FULL_PRECISION = _assumed("share of fp32 peak, library GEMM", 0.8, "no tf32; the vector units at near full rate")
STEP_US = _assumed(
    "least us of a step of a lone program's main loop", 0.15, "one barrier and one product's latency; resident programs overlap"
)
LIBRARY_ATTENTION = _assumed(
    "share of 16-bit peak, library attention",
    {"sm_80": 0.6, "sm_90": 0.35, "sm_100": 0.2, "gfx942": 0.25},
    "flash-attn 2, and SDPA, which has the same kernels: written for Ampere; of the padded products",
)
TRITON_ATTENTION = _assumed(
    "share of 16-bit peak, Triton attention",
    {"sm_80": 0.5, "sm_90": 0.35, "sm_100": 0.2, "gfx942": 0.25},
    "half of peak at most, as softmax takes as many issue slots as products take cycles; less where products are asynchronous",
)
ATTENTION_BACKWARD = _assumed("of that, attention's backward", 0.75, "two accumulators, and scores computed again")
FULL_PRECISION_ATTENTION = _assumed("share of fp32 peak, SDPA", 0.4, "the memory-efficient kernel, without tensor cores")
HOST_ATEN_US = _assumed("us of the host, one kernel of torch", 5.0, "4 to 5 us are usual for an ATen call in eager mode")
HOST_LIBRARY_US = _assumed(
    "us of the host, one library op of ditfast", 12.0, "an ATen call, and checks and a choice of backend in Python"
)
HOST_TRITON_US = _assumed(
    "us of the host, one Triton op of ditfast", 25.0, "the same, torch.library, a launcher in Python, Triton's specialisation"
)
# What the padding of heads costs the library is no share but a shape: the kernels that it ships.
LIBRARY_HEADS = (32, 64, 96, 128, 192, 256)
LIBRARY_ATTENTION_TILE = (128, 64)
_assumed(
    "head dim 72, library attention", 96.0, f"padded to the next of {', '.join(map(str, LIBRARY_HEADS))}; tiles of 128 queries"
)
