"""The end of a sampling step: guidance, and the solver's update of the state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..argument_checks import check_device, check_dtype, check_integer, check_tensor, check_type
from ..dispatch.op import Op, TritonOp
from ..dispatch.selection import select_backend


def denoise_update(
    x: Tensor,
    output: Tensor,
    noise: Tensor | None,
    update: Tensor,
    scale: Tensor | None = None,
    guided_channels: int = 0,
    clip: bool = False,
) -> Tensor:
    """``from_x0 * x0 + from_x * x + sigma * noise`` with ``x0 = x0_from_x * x + x0_from_output * guided``.

    Every first-order solver's step is such a row of six numbers (``ditfast.diffusion.solvers.Update``).

    Args:
        x: [B, C, H, W] fp32, of any strides, as all tensors here: the state.
        output: [B, C, H, W] or [B, 2C, H, W], fp32, fp16 or bf16: what the model returned; its second C channels v say where
            between its ends the logarithm of sigma^2 lies, at (v + 1) / 2. With a scale 2B samples: the conditional ones,
            then the unconditional.
        noise: as x; None for a step without.
        update: [6] fp32, in the order of ``Update``.
        scale: [B] fp32 guidance scales (Ho & Salimans 2022); None for no guidance.
        guided_channels: how many of the first C channels are guided; the others are the conditional ones.
        clip: clamp x0 to [-1, 1]; NaN stays NaN.

    Returns:
        [B, C, H, W] fp32, contiguous. There is no gradient.

    Raises:
        ValueError: an argument's shape, dtype or device; the message names it.
    """
    return _op(x, output, noise, update, scale, guided_channels, clip)


def _select(
    x: Tensor,
    output: Tensor,
    noise: Tensor | None,
    update: Tensor,
    scale: Tensor | None,
    guided_channels: int,
    clip: bool,
    training: bool,
) -> str:
    check_tensor("x", x, "[B, C, H, W]")
    check_tensor("output", output, "[B, C, H, W] or [B, 2C, H, W]")
    check_tensor("update", update, "[6]")
    if x.dim() != 4 or x.dtype != torch.float32:
        raise ValueError(f"x: got {tuple(x.shape)} {x.dtype}, expected [B, C, H, W] torch.float32")
    batch, channels, height, width = x.shape
    check_integer("guided_channels", guided_channels, 0, channels)
    check_dtype("output", output)
    samples = batch if scale is None else 2 * batch
    allowed = [(samples, channels, height, width), (samples, 2 * channels, height, width)]
    if tuple(output.shape) not in allowed:
        raise ValueError(f"output: got shape {tuple(output.shape)}, expected {allowed[0]} or {allowed[1]}")
    for name, tensor, shape in (("noise", noise, x.shape), ("update", update, (6,)), ("scale", scale, (batch,))):
        if tensor is None:
            continue
        check_tensor(name, tensor, shape)
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype != torch.float32:
            raise ValueError(f"{name}: got {tuple(tensor.shape)} {tensor.dtype}, expected {tuple(shape)} torch.float32")
    for name, tensor in (("output", output), ("noise", noise), ("update", update), ("scale", scale)):
        if tensor is not None:
            check_device(name, tensor, x)
    check_type("clip", clip, bool, "True or False")
    return select_backend(x, "denoise_update", batch, (x.shape[1:].numel(),))


def torch_denoise_update(
    x: Tensor,
    output: Tensor,
    noise: Tensor | None,
    update: Tensor,
    scale: Tensor | None,
    guided_channels: int,
    clip: bool,
) -> Tensor:
    batch, channels = x.shape[:2]
    predicted = output[:batch, :channels].float()  # [B, C, H, W]
    if scale is not None:
        unconditional = output[batch:, :guided_channels].float()  # [B, guided_channels, H, W]
        difference = predicted[:, :guided_channels] - unconditional
        guided = unconditional + scale[:, None, None, None] * difference
        predicted = torch.cat([guided, predicted[:, guided_channels:]], dim=1)  # [B, C, H, W]
    x0_from_x, x0_from_output, from_x0, from_x, lowest, highest = update.unbind()
    x0 = x0_from_x * x + x0_from_output * predicted
    result = from_x0 * (x0.clamp(-1, 1) if clip else x0) + from_x * x
    if noise is not None:
        if output.shape[1] > channels:
            lowest = lowest + (output[:batch, channels:].float() + 1) * 0.5 * (highest - lowest)
        result = result + (0.5 * lowest).exp() * noise
    return result.contiguous()


def _fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


_triton = TritonOp(
    "denoise_update(Tensor x, Tensor output, Tensor? noise, Tensor update, Tensor? scale, int guided_channels, bool clip)"
    " -> Tensor",
    _fake,
)
_op = Op(_select, _triton, torch=torch_denoise_update)
