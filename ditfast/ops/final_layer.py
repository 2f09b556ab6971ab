"""The model's last layer: norm, modulation, output linear, pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..argument_checks import check_grid, check_linear, check_modulation, check_number, check_tokens, check_weight, token_rows
from ..dispatch.op import Op, TritonOp
from ..dispatch.selection import select_backend
from .layer_norm_modulate import layer_norm_modulate
from .linear_unpatchify import linear_unpatchify
from .unpatchify import empty_image

MOST_FEATURES = 128  # that one program computes for its rows: p*p*C up to patch size 4 with learned variances


def final_layer(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    grid: tuple[int, int],
    patch_size: int,
    eps: float = 1e-6,
) -> Tensor:
    """``linear_unpatchify(layer_norm_modulate(x, shift, scale, eps), weight, bias, grid, patch_size)``.

    In one kernel where a program can hold all the output features of its rows: the normalised tokens then never reach
    memory, and x is read once from there and once more from the cache. Patch size 8 has 512 features: several programs
    would each normalise the same rows, and in tiles so low that the weights' traffic outweighs what that saves. So there,
    for gradients, and where autocast makes the product's dtype another than that of x, it is two kernels.

    Args:
        x: [B, T, K] fp32, fp16 or bf16, unit inner stride.
        shift: [B, K], or [B, T, K] for one vector a token; any of the dtypes, any outer strides; None for none.
        scale: as shift.
        weight: [p*p*C, K], of the dtype of x; rows lie as (row, column, channel) of the patch.
        bias: [p*p*C], of the dtype of x.
        grid: (h, w), the patches in a column and in a row of the image; h * w = T.
        patch_size: p.
        eps: added to the variance.

    Returns:
        [B, C, h*p, w*p], contiguous, of the dtype of x, or autocast's.

    Raises:
        ValueError: an argument's shape, dtype, device or inner stride, or a grid or patch size that does not fit; the
            message names it.
    """
    return _op(x, shift, scale, weight, bias, grid, patch_size, eps)


def _select(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    grid: tuple[int, int],
    patch_size: int,
    eps: float,
    training: bool,
) -> str:
    check_tokens("x", x)
    check_weight("weight", weight)
    check_number("eps", eps, 0)
    if (
        training
        or len(weight) > MOST_FEATURES
        or weight.dtype != x.dtype
        or select_backend(x, "final_layer", token_rows(x), (len(weight), x.shape[2])) == "torch"
    ):
        return "torch"
    check_linear(x, weight, bias)
    check_modulation("shift", shift, x)
    check_modulation("scale", scale, x)
    check_grid(x, grid, len(weight), patch_size)
    return "triton"


def _two_ops(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    grid: tuple[int, int],
    patch_size: int,
    eps: float,
) -> Tensor:
    return linear_unpatchify(layer_norm_modulate(x, shift, scale, eps), weight, bias, grid, patch_size)


def _fake(x: Tensor, shift: Any, scale: Any, weight: Tensor, bias: Any, grid: Sequence[int], patch_size: int, _: Any) -> Tensor:
    return empty_image(x, grid, patch_size, weight.shape[0])


_triton = TritonOp(
    "final_layer(Tensor x, Tensor? shift, Tensor? scale, Tensor weight, Tensor bias, int[] grid, int patch_size, float eps)"
    " -> Tensor",
    _fake,
)
_op = Op(_select, _triton, autocast=slice(3, 5), torch=_two_ops)
