"""The ops in eager PyTorch, in a dtype of choice: float64 makes them the oracle, the op's own dtype the bar."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

MODULATIONS = ("chunk6", "per_token", "fp32", "none", "shift_only", "scale_only")
WIDTHS = (200, 384, 768, 1024, 1152)
TOKENS = (16, 17, 64, 256, 1024)
GEMM_TOKENS = (16, 17, 64, 256)  # products take the simulator long, fp32 ones five times as long
MODEL_WIDTHS = (384, 768, 1024, 1152)  # DiT-S, B, L and XL
MODEL_TOKENS = (16, 64, 256)  # patches of 8, 4 and 2 at 256 pixels
GRIDS = {"1x4": (1, 4), "3x5": (3, 5), "8x8": (8, 8)}


def output_width(K: int, dtype: str) -> int:
    """Of the products that tests check for K inputs."""
    return 64 if dtype == "fp32" else K


def modulation(kind: str, x: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """gate, shift and scale for x, as models make them: views of one product, fp32 beside bf16, one a token, or none."""
    B, T, D = x.shape
    if kind == "none":
        return None, None, None
    if kind == "per_token":
        gate, shift, scale = torch.randn(B, T, 6 * D, device=x.device).to(x.dtype).chunk(6, dim=2)[:3]
        return gate, shift, scale
    whole = torch.randn(B, 6 * D, device=x.device).to(torch.float32 if kind == "fp32" else x.dtype)
    gate, shift, scale = whole.chunk(6, dim=1)[:3]
    return gate, None if kind == "scale_only" else shift, None if kind == "shift_only" else scale


def with_flat_rows(x: Tensor, value: float, nearly: bool) -> Tensor:
    """Return [B, T, D] with every second row constant, as padding is; if ``nearly``, half of them but for a last bit."""
    x = x.clone()
    x[:, ::2] = value
    if nearly:
        x[:, ::4, -1] = torch.nextafter(x[:, ::4, -1], torch.zeros_like(x[:, ::4, -1]))
    return x


def layer_norm_modulate(x: Tensor, shift: Tensor | None, scale: Tensor | None, dtype: torch.dtype, eps: float = 1e-6) -> Tensor:
    normalised = F.layer_norm(x.to(dtype), x.shape[-1:], eps=eps)
    return normalised * (1 + _over_tokens(scale, 0.0, dtype)) + _over_tokens(shift, 0.0, dtype)


def gated_residual(x: Tensor, h: Tensor, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) + _over_tokens(gate, 1.0, dtype) * h.to(dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    return F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype))


def mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, dtype: torch.dtype) -> Tensor:
    return linear(linear_gelu(x, w1, b1, dtype), w2, b2, dtype)


def linear_gated_residual(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, gate: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return gated_residual(residual, linear(x, weight, bias, dtype), gate, dtype)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    return F.gelu(F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype)), approximate="tanh")


def attention(qkv: Tensor, dtype: torch.dtype) -> Tensor:
    return cross_attention(qkv[:, :, 0], qkv[:, :, 1:], dtype)


def cross_attention(q: Tensor, kv: Tensor, dtype: torch.dtype) -> Tensor:
    q = q.to(dtype).transpose(1, 2)
    k, v = kv.to(dtype).permute(2, 0, 3, 1, 4)
    weights = torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def _over_tokens(vector: Tensor | None, otherwise: float, dtype: torch.dtype) -> Tensor | float:
    if vector is None:
        return otherwise
    return (vector if vector.dim() == 3 else vector[:, None]).to(dtype)


def patch_embed(x: Tensor, weight: Tensor, bias: Tensor, pos_embed: Tensor, dtype: torch.dtype) -> Tensor:
    convolved = F.conv2d(x.to(dtype), weight.to(dtype), bias.to(dtype), stride=weight.shape[-1])
    return convolved.flatten(2).transpose(1, 2) + pos_embed.to(dtype)


def unpatchify(x: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    patches = x.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, grid)
    return torch.einsum("bhwpqc->bchpwq", patches).flatten(4).flatten(2, 3)


def linear_unpatchify(
    x: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int], patch_size: int, dtype: torch.dtype
) -> Tensor:
    return unpatchify(F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype)), grid, patch_size)


def final_layer(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    grid: tuple[int, int],
    patch_size: int,
    dtype: torch.dtype,
    eps: float = 1e-6,
) -> Tensor:
    u = layer_norm_modulate(x, shift, scale, dtype, eps)
    return linear_unpatchify(u, weight, bias, grid, patch_size, dtype)


def classifier_free_guidance(out: Tensor, scale: float, channels: int, dtype: torch.dtype) -> Tensor:
    conditional, unconditional = out.to(dtype).chunk(2)
    guided = unconditional + scale * (conditional - unconditional)
    return torch.cat([torch.cat([guided[:, :channels], half[:, channels:]], dim=1) for half in (conditional, unconditional)])
