"""Tokens to the image they are the patches of."""

from __future__ import annotations

from torch import Tensor

from .patches import to_image, to_tokens


def unpatchify(x: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """x [B, h*w, p*p*C], a token's values as (row, column, channel). Returns [B, C, h*p, w*p]."""
    return to_image(x, grid, patch_size, channel_last=True)


def unpatchify_backward(dy: Tensor, patch_size: int) -> Tensor:
    """dy [B, C, h*p, w*p]. Returns [B, h*w, p*p*C]."""
    return to_tokens(dy, patch_size, channel_last=True)
