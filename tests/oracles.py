"""The ops in eager PyTorch, in a dtype of choice: float64 makes them the oracle, the op's own dtype the bar."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

MODULATIONS = ("chunk6", "per_token", "fp32", "none", "shift_only", "scale_only")
WIDTHS = (128, 200, 384, 768, 1024, 1152)
TOKENS = (1, 16, 17, 64, 257)


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


def layer_norm_modulate(x: Tensor, shift: Tensor | None, scale: Tensor | None, dtype: torch.dtype, eps: float = 1e-6) -> Tensor:
    normalised = F.layer_norm(x.to(dtype), x.shape[-1:], eps=eps)
    return normalised * (1 + _over_tokens(scale, 0.0, dtype)) + _over_tokens(shift, 0.0, dtype)


def gated_residual(x: Tensor, h: Tensor, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) + _over_tokens(gate, 1.0, dtype) * h.to(dtype)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    return F.gelu(F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype)), approximate="tanh")


def attention(qkv: Tensor, dtype: torch.dtype) -> Tensor:
    q, k, v = qkv.to(dtype).permute(2, 0, 3, 1, 4)
    weights = torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def _over_tokens(vector: Tensor | None, otherwise: float, dtype: torch.dtype) -> Tensor | float:
    if vector is None:
        return otherwise
    return (vector if vector.dim() == 3 else vector[:, None]).to(dtype)
