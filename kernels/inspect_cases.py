"""What ``inspect`` compiles: every kernel, through its launcher, at shapes of DiT that between them take every tile.

A new kernel needs one more call in ``cases``, and where it has a bar of its own a line in ``BARS``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .attention import attention, cross_attention
from .attention_backward import attention_backward, cross_attention_backward
from .classifier_free_guidance import classifier_free_guidance, classifier_free_guidance_backward
from .denoise_update import denoise_update
from .final_layer import final_layer
from .gated_residual import gated_residual
from .gated_residual_layer_norm_modulate import gated_residual_layer_norm_modulate
from .grouped_linear import grouped_linear
from .joint_backward import joint_backward
from .layer_norm_modulate import layer_norm_modulate
from .linear import linear
from .linear_backward import bias_gradient, input_gradient, input_gradient_through_gelu, weight_gradient
from .linear_gated_residual import linear_gated_residual
from .linear_gelu import linear_gelu, linear_gelu_backward
from .linear_unpatchify import linear_unpatchify
from .patch_embed import patch_embed
from .patches import to_image, to_tokens
from .timestep_embedding import timestep_embedding, timestep_embedding_backward

EPS = 1e-6
WIDTHS = (384, 768, 1024, 1152)  # of DiT-S, B, L and XL


class Bars(NamedTuple):
    """What a kernel is held to, beside what all are: no spills, within shared memory, tensor cores for 16-bit products."""

    issue_share: float | None = None  # most of the issue budget on sm_90, for whole rows of width 1152
    wide_loads: bool = False  # every global load takes 128 bits a thread
    work: float | None = None  # most multiply-adds over the useful ones, at head dim 72


class Case(NamedTuple):
    label: str
    call: partial[Any]


BARS: dict[str, Bars] = {
    "layer_norm_modulate": Bars(issue_share=0.5, wide_loads=True),
    "gated_residual": Bars(issue_share=0.5, wide_loads=True),
    "gated_residual_layer_norm_modulate": Bars(issue_share=0.4, wide_loads=True),
    "joint_backward": Bars(issue_share=0.4),
    "attention": Bars(work=1.12),
    "query_gradient": Bars(work=1.12),
    "key_value_gradient": Bars(work=1.12),
}


class Known(NamedTuple):
    """A bar that a kernel is known to miss, how far at most, and why that is left so."""

    kernel: str
    archs: tuple[str, ...]
    tile: str  # as in the table; empty for any
    bar: str  # "spills", "shared", "mma", "loads", "issue" or "work"
    worst: float
    reason: str


ONE_MORE_PROGRAM = "ptxas settles for fewer registers, so that one more program fits, and parks a value in local memory"
EXCEPTIONS: tuple[Known, ...] = (
    Known("linear_gated_residual", ("sm_100",), "64x64x64 4w 4s", "spills", 2, ONE_MORE_PROGRAM),
    Known("weight_gradient", ("sm_120",), "16x64x128 4w 4s", "spills", 2, ONE_MORE_PROGRAM),
    Known("linear_unpatchify", ("sm_100", "sm_120"), "64x64x16 8w 3s", "spills", 2, ONE_MORE_PROGRAM),
    Known("joint_backward", ("sm_89",), "8x1024x0 2w", "spills", 2, ONE_MORE_PROGRAM),
    Known("joint_backward", ("sm_80",), "8x256x128 2w", "spills", 2, ONE_MORE_PROGRAM),
    Known("joint_backward", ("sm_80",), "8x1024x0 4w", "spills", 4, ONE_MORE_PROGRAM),
)


ATTENTION_PRODUCTS = {"attention": 2, "query_gradient": 3, "key_value_gradient": 4}


def useful_multiply_adds(kernel: str, constants: Mapping[str, int]) -> int | None:
    """Of one step of a matrix kernel's main loop; None for other kernels."""
    if "BLOCK_M" not in constants:
        return None
    depth = ATTENTION_PRODUCTS[kernel] * constants["HEAD"] if kernel in ATTENTION_PRODUCTS else constants["BLOCK_K"]
    return constants["BLOCK_M"] * constants["BLOCK_N"] * depth


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def cases() -> Iterator[Case]:
    bf16, fp32 = torch.bfloat16, torch.float32
    for width in WIDTHS:
        yield from row_cases(width, 8, 256, f"D={width}")
    yield from row_cases(1536, 8, 256, "D=1536 masked")
    yield from row_cases(1152, 8, 256, "D=1152 fp32", fp32)
    yield from per_token_cases(1152, 8, 256)
    # Of DiT-L: its widths, unlike those of XL, divide into the widest tiles. T=16: a tile holds tokens of several samples.
    for B, T in ((1, 16), (1, 256), (8, 256), (128, 256), (128, 16), (2048, 16)):
        yield from linear_cases(1024, B, T, bf16, f"M={B * T}" + (" T=16" if B > 1 and T == 16 else ""))
    yield from linear_cases(1024, 1, 256, fp32, "M=256 fp32")
    yield from grouped_linear_cases(1152, 28, bf16, "D=1152")
    yield from grouped_linear_cases(1152, 28, fp32, "D=1152 fp32")
    yield from linear_gradient_cases(1024)
    for head_dim in (32, 64, 72, 96, 128):
        yield from attention_cases(head_dim, 256)
    for tokens in (16, 64, 100):
        yield from attention_cases(72, tokens)
    yield from attention_cases(72, 256, fp32, " fp32")
    yield from cross_attention_cases(72, 256, 77)
    for patch_size in (2, 4, 8):
        for B in (1, 64):
            yield from end_cases(patch_size, B, bf16, f"p={patch_size} B={B}")
            yield from end_cases(patch_size, B, fp32, f"p={patch_size} B={B} fp32")
    yield from other_cases()


def row_cases(D: int, B: int, T: int, label: str, dtype: torch.dtype = torch.bfloat16) -> Iterator[Case]:
    x, h, du, dx_new = (tensor(B, T, D, dtype=dtype) for _ in range(4))
    stats = tensor(B, T, 3, dtype=torch.float32)
    gate, shift, scale = tensor(B, 6 * D, dtype=dtype).chunk(6, dim=1)[:3]
    for training, suffix in ((False, ""), (True, " training")):
        yield Case(label + suffix, partial(layer_norm_modulate, x, shift, scale, EPS, training))
        yield Case(label + suffix, partial(gated_residual_layer_norm_modulate, x, h, gate, shift, scale, EPS, training))
    yield Case(label, partial(gated_residual, x, h, gate))
    yield Case(f"{label} joint", partial(joint_backward, du, dx_new, x, stats, h, gate, shift, scale))
    yield Case(f"{label} norm", partial(joint_backward, du, None, x, stats, None, None, shift, scale))
    yield Case(f"{label} gate", partial(joint_backward, None, dx_new, None, None, h, gate, None, None))


def per_token_cases(D: int, B: int, T: int) -> Iterator[Case]:
    label = f"D={D} per token"
    x, h, du, dx_new = (tensor(B, T, D) for _ in range(4))
    stats = tensor(B, T, 3, dtype=torch.float32)
    gate, shift, scale = tensor(B, T, 6 * D).chunk(6, dim=2)[:3]
    yield Case(label, partial(layer_norm_modulate, x, shift, scale, EPS, False))
    yield Case(label, partial(gated_residual_layer_norm_modulate, x, h, gate, shift, scale, EPS, False))
    yield Case(f"{label} joint", partial(joint_backward, du, dx_new, x, stats, h, gate, shift, scale))


def linear_cases(D: int, B: int, T: int, dtype: torch.dtype, label: str) -> Iterator[Case]:
    """The linears of a block: fc1 widens to 4 D, fc2 ends in the gated residual."""
    H = 4 * D
    x, residual = tensor(B, T, D, dtype=dtype), tensor(B, T, D, dtype=dtype)
    hidden, z = tensor(B, T, H, dtype=dtype), tensor(B, T, H, dtype=dtype)
    fc1, bias1 = tensor(H, D, dtype=dtype), tensor(H, dtype=dtype)
    fc2, bias2 = tensor(D, H, dtype=dtype), tensor(D, dtype=dtype)
    gate = tensor(B, 6 * D, dtype=dtype).chunk(6, dim=1)[2]
    yield Case(label, partial(linear, x, fc1, bias1))
    yield Case(label, partial(linear_gelu, x, fc1, bias1, False))
    yield Case(f"{label} training", partial(linear_gelu, x, fc1, bias1, True))
    yield Case(label, partial(linear_gated_residual, hidden, fc2, bias2, residual, gate))
    yield Case(f"{label} no gate", partial(linear_gated_residual, hidden, fc2, bias2, residual, None))
    yield Case(label, partial(input_gradient, hidden, fc1))
    yield Case(f"{label} through GELU", partial(input_gradient_through_gelu, x, fc2, z))


def grouped_linear_cases(D: int, depth: int, dtype: torch.dtype, label: str) -> Iterator[Case]:
    """The adaLN linears of all blocks and of the final layer, for few rows."""
    widths = [6 * D] * depth + [2 * D]
    weights, biases = [tensor(N, D, dtype=dtype) for N in widths], [tensor(N, dtype=dtype) for N in widths]
    yield Case(label, partial(grouped_linear, tensor(2, D, dtype=dtype), weights, biases))


def linear_gradient_cases(D: int) -> Iterator[Case]:
    hidden, z, fc1 = tensor(8, 256, 4 * D), tensor(8, 256, 4 * D), tensor(4 * D, D)
    yield Case("", partial(linear_gelu_backward, hidden, tensor(8, 256, D), z, fc1, [False] * 3))
    yield Case("", partial(bias_gradient, hidden))
    # fc1's; the whole model's adaLN; rows that divide into no tile; the last linear, without and with learned variances.
    for N, rows in ((4 * D, 2048), (24 * 6 * D, 2048), (4 * D, 16), (16, 2048), (32, 2048)):
        yield Case(f"N={N} rows={rows}", partial(weight_gradient, tensor(rows, N), tensor(rows, D)))
    yield Case(f"N={D} in parts", partial(weight_gradient, tensor(16384, D), tensor(16384, D)))
    fp32 = tensor(2048, D, dtype=torch.float32), tensor(2048, D, dtype=torch.float32)
    yield Case(f"N={D} fp32", partial(weight_gradient, *fp32))


def attention_cases(d: int, T: int, dtype: torch.dtype = torch.bfloat16, suffix: str = "") -> Iterator[Case]:
    B, H, label = 8, 16, f"d={d} T={T}{suffix}"
    qkv = tensor(B, T, 3, H, d, dtype=dtype)
    out, dout = tensor(B, T, H * d, dtype=dtype), tensor(B, T, H * d, dtype=dtype)
    yield Case(label, partial(attention, qkv, False))
    yield Case(f"{label} training", partial(attention, qkv, True))
    yield Case(label, partial(attention_backward, dout, qkv, out, tensor(B, H, T, dtype=torch.float32)))


def cross_attention_cases(d: int, T: int, S: int) -> Iterator[Case]:
    B, H, label = 8, 16, f"d={d} T={T} S={S}"
    q, kv, out, dout = tensor(B, T, H, d), tensor(B, S, 2, H, d), tensor(B, T, H * d), tensor(B, T, H * d)
    yield Case(label, partial(cross_attention, q, kv, True))
    yield Case(label, partial(cross_attention_backward, dout, q, kv, out, tensor(B, H, T, dtype=torch.float32)))


def end_cases(p: int, B: int, dtype: torch.dtype, label: str) -> Iterator[Case]:
    """The first and last layer, for latents of 4 channels with learned variances."""
    D, grid = 1152, (32 // p, 32 // p)
    T, N = grid[0] * grid[1], p * p * 8
    image, weight, bias = tensor(B, 4, 32, 32, dtype=dtype), tensor(D, 4, p, p, dtype=dtype), tensor(D, dtype=dtype)
    x = tensor(B, T, D, dtype=dtype)
    shift, scale = tensor(B, 2 * D, dtype=dtype).chunk(2, dim=1)
    last_weight, last_bias = tensor(N, D, dtype=dtype), tensor(N, dtype=dtype)
    yield Case(label, partial(patch_embed, image, weight, bias, tensor(T, D, dtype=torch.float32), dtype))
    yield Case(label, partial(linear_unpatchify, x, last_weight, last_bias, grid, p))
    if N <= 128:  # more features take linear_unpatchify
        yield Case(label, partial(final_layer, x, shift, scale, last_weight, last_bias, grid, p, EPS))


def other_cases() -> Iterator[Case]:
    tokens, image = tensor(64, 256, 32), tensor(64, 8, 32, 32)
    for channel_last, order in ((True, "channel last"), (False, "channel first")):
        yield Case(f"to image, {order}", partial(to_image, tokens, (16, 16), 2, channel_last=channel_last))
        yield Case(f"to tokens, {order}", partial(to_tokens, image, 2, channel_last=channel_last))
    yield Case("", partial(classifier_free_guidance, image, 4.0, 3))
    yield Case("backward", partial(classifier_free_guidance_backward, image, 4.0, 3))
    state, update, scale = (tensor(*shape, dtype=torch.float32) for shape in ((32, 4, 32, 32), (6,), (32,)))
    yield Case("guided", partial(denoise_update, state, image, state, update, scale, 3, clip=False))
    yield Case("plain", partial(denoise_update, state, image[:32], None, update, None, 0, clip=True))
    t, frequencies, dy = (tensor(*shape, dtype=torch.float32) for shape in ((64,), (128,), (64, 256)))
    yield Case("", partial(timestep_embedding, t, frequencies))
    yield Case("", partial(timestep_embedding_backward, dy, t, frequencies))
