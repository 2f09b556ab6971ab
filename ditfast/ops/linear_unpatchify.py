"""The output linear; its results go straight to their pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..argument_checks import check_grid, check_linear, token_rows
from ..dispatch.op import Op, TritonOp
from ..dispatch.selection import select_backend
from .cpu_products import torch_linear
from .linear import needed_gradients
from .unpatchify import empty_image, torch_unpatchify


def linear_unpatchify(u: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """``unpatchify(u @ weight.T + bias)``, without the tensor between the two.

    Args:
        u: [B, T, K] fp32, fp16 or bf16, unit inner stride.
        weight: [p*p*C, K], of the dtype of u; rows lie as (row, column, channel) of the patch.
        bias: [p*p*C], of the dtype of u.
        grid: (h, w), the patches in a column and in a row of the image; h * w = T.
        patch_size: p.

    Returns:
        [B, C, h*p, w*p], contiguous, of the dtype of u, or autocast's.

    Raises:
        ValueError: an argument's shape, dtype, device or inner stride, or a grid or patch size that does not fit; the
            message names it.
    """
    return _op(u, weight, bias, grid, patch_size)


def _select(u: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int], patch_size: int, training: bool) -> str:
    check_linear(u, weight, bias, of="u")
    check_grid(u, grid, len(weight), patch_size)
    return select_backend(u, "linear_unpatchify", token_rows(u), tuple(weight.shape), training)


def _torch(u: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    return torch_unpatchify(torch_linear(u, weight, bias), grid, patch_size)


def _fake(u: Tensor, weight: Tensor, bias: Tensor, grid: Sequence[int], patch_size: int) -> Tensor:
    return empty_image(u, grid, patch_size, weight.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    u, weight, _, _, ctx.patch_size = inputs
    ctx.save_for_backward(u, weight)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *needed_gradients(ctx, 3, _backward_op, dy, *ctx.saved_tensors, ctx.patch_size), None, None


def _backward_fake(dy: Tensor, u: Tensor, weight: Tensor, patch_size: int, needed: list[bool]) -> list[Tensor]:
    shapes = (u.shape, weight.shape, weight.shape[:1])
    return [u.new_empty(shape) for shape, need in zip(shapes, needed, strict=True) if need]


_triton = TritonOp(
    "linear_unpatchify(Tensor u, Tensor weight, Tensor bias, int[] grid, int patch_size) -> Tensor",
    _fake,
    save=_save,
    backward=_backward,
)
_op = Op(_select, _triton, autocast=slice(0, 3), torch=_torch)
_backward_op = TritonOp(
    "linear_unpatchify_backward(Tensor dy, Tensor u, Tensor weight, int patch_size, bool[] needed) -> Tensor[]",
    _backward_fake,
)
