"""Tokens to the image they are the patches of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..argument_checks import check_grid, check_tokens, token_rows
from ..dispatch.op import Op, TritonOp
from ..dispatch.selection import select_backend


def unpatchify(x: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Lays each token's values out as the patch of an image.

    Args:
        x: [B, T, p*p*C] fp32, fp16 or bf16, unit inner stride; a token's values lie as (row, column, channel) of its patch.
        grid: (h, w), the patches in a column and in a row of the image; h * w = T.
        patch_size: p.

    Returns:
        [B, C, h*p, w*p], contiguous, of the dtype of x.

    Raises:
        ValueError: an argument's shape, dtype or inner stride, or a grid or patch size that does not fit x; the message
            names it.
    """
    return _op(x, grid, patch_size)


def _select(x: Tensor, grid: tuple[int, int], patch_size: int, training: bool) -> str:
    check_tokens("x", x)
    check_grid(x, grid, x.shape[2], patch_size)
    return select_backend(x, "unpatchify", token_rows(x), (x.shape[2],), training)


def torch_unpatchify(x: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    (h, w), p = grid, patch_size
    B, C = x.shape[0], x.shape[-1] // (p * p)
    x = x.reshape(B, h, w, p, p, C)  # [B, h, w, p, p, C]
    image = x.permute(0, 5, 1, 3, 2, 4)  # [B, C, h, p, w, p]
    if image.is_contiguous():  # reshape would return a view of x
        return image.reshape(B, C, h * p, w * p).clone()
    return image.reshape(B, C, h * p, w * p).contiguous()  # [B, C, H, W]


def empty_image(x: Tensor, grid: Sequence[int], patch_size: int, features: int) -> Tensor:
    return x.new_empty(x.shape[0], features // patch_size**2, grid[0] * patch_size, grid[1] * patch_size)


def _fake(x: Tensor, grid: Sequence[int], patch_size: int) -> Tensor:
    return empty_image(x, grid, patch_size, x.shape[2])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.patch_size = inputs[2]


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    return _backward_op(dy, ctx.patch_size), None, None


def _backward_fake(dy: Tensor, patch_size: int) -> Tensor:
    B, C, H, W = dy.shape
    return dy.new_empty(B, (H // patch_size) * (W // patch_size), C * patch_size**2)


_triton = TritonOp("unpatchify(Tensor x, int[] grid, int patch_size) -> Tensor", _fake, save=_save, backward=_backward)
_op = Op(_select, _triton, torch=torch_unpatchify)
_backward_op = TritonOp("unpatchify_backward(Tensor dy, int patch_size) -> Tensor", _backward_fake)
