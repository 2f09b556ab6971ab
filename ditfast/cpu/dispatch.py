"""Who runs a chain of sublayers on a CPU, and when: the engine, or torch's kernels where there is none."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from ..files import cache_folder
from ..ops.dispatch import autocast_dtype, computes_now, forced
from . import library, torch_chain
from .chain import DoesNotFit, Final, Step, is_here
from .engine import Engine
from .packed import PRODUCTS, Linears

FEW_ROWS = 16  # faster than torch up to there: weights of [28416, 384] and [149504, 1024], one thread of a Zen 3


@functools.cache
def found() -> tuple[Engine | None, str]:
    """This machine's engine, built at the first call; or None, and why, with a warning if the user could help."""
    try:
        options = library.options_for(library.cpu_features())
        return Engine(library.load(library.build(options, cache_folder("cpu")))), ""
    except library.Unavailable as error:
        if isinstance(error, library.NotBuilt):
            warnings.warn(f"{error}; without it blocks run on torch's kernels, slower", stacklevel=2)
        return None, str(error)


def runs_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is an engine for tensors of this kind, and nothing else is forced."""
    return _is_free() and device.type == "cpu" and dtype in PRODUCTS and found()[0] is not None


def takes(x: Tensor) -> bool:
    """Whether ``run`` is for x [B, T, D]: without gradients, on a CPU, on which nothing else is forced."""
    return (
        x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and computes_now()
        and type(x) is Tensor
        and x.numel() > 0
        and x.dtype in PRODUCTS
        and (autocast_dtype(x.device) or x.dtype) in PRODUCTS
        and _is_free()
    )


def _is_free() -> bool:
    """Whether no backend or attention is forced."""
    return forced().backend is None and forced().attention is None


def run(x: Tensor, steps: Sequence[Step], final: Final) -> tuple[Tensor, Tensor] | None:
    """``Engine.run`` of this machine's, or ``torch_chain.run``, where ``takes(x)``; None where something does not fit."""
    engine, _ = found()
    try:
        return torch_chain.run(x, steps, final) if engine is None else engine.run(x, steps, final)
    except DoesNotFit:
        return None


def linear_of_few(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor | None:
    """``F.linear`` of x [M, K] by this machine's engine; None where it does not take them."""
    if not _are_linear(x, ((weight, bias),)) or len(x) > FEW_ROWS or not weight.is_contiguous():
        return None
    engine, _ = found()
    return None if engine is None else engine.linear_of_few(x, weight, bias)


def int8_weights_linear(x: Tensor, linears: Linears) -> Tensor | None:
    """``Engine.int8_weights_linear`` of this machine's; None where it does not take them."""
    if not _are_linear(x, linears):
        return None
    engine, _ = found()
    return None if engine is None else engine.int8_weights_linear(x, linears)


def _are_linear(x: Tensor, linears: Linears) -> bool:
    """Whether they are for x [M, K], and that is for the engine."""
    if x.dim() != 2 or not takes(x) or autocast_dtype(x.device) is not None:
        return False
    K, dtype = x.shape[1], x.dtype
    return all(
        weight.shape == (bias.shape[0], K) and weight.dtype == bias.dtype == dtype and is_here(weight) and is_here(bias)
        for weight, bias in linears
    )
