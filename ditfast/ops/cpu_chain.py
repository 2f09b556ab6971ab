"""Chains of sublayers on a CPU: in one call of the engine, or on torch's kernels where there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..cpu import engine as cpu_engine
from ..cpu import unfit
from ..cpu.chain import DoesNotFit, Final, Step, is_here
from ..cpu.kept import KeptChain
from ..cpu.packed import PRODUCTS, Linears
from ..dispatch.override import current_override
from ..torch_modes import autocast_dtype, computes_now
from . import torch_chain

FEW_ROWS = 16  # faster than torch up to there: weights of [28416, 384] and [149504, 1024], one thread of a Zen 3


def runs_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether there is an engine for tensors of this kind, and nothing else is forced."""
    return _is_free() and device.type == "cpu" and dtype in PRODUCTS and cpu_engine.found()[0] is not None


def takes(x: Tensor) -> bool:
    """Return whether ``run`` is for x [B, T, D]: without gradients, on a CPU, on which nothing else is forced."""
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
    override = current_override()
    return override.backend is None and override.attention is None


def run(x: Tensor, steps: Sequence[Step], final: Final) -> tuple[Tensor, Tensor] | None:
    """Run a chain by this machine's engine or ``torch_chain``, where ``takes(x)``; None where something does not fit."""
    engine, _ = cpu_engine.found()
    try:
        return torch_chain.run(x, steps, final) if engine is None else engine.run(x, steps, final)
    except DoesNotFit:
        return None


def run_kept(
    kept: KeptChain, x: Tensor, vectors: Sequence[Tensor], steps: Callable[[], tuple[Sequence[Step], Final]]
) -> tuple[Tensor, Tensor] | None:
    """Run a chain that is kept between calls on this machine's engine, if ``takes(x)``; None where something does not fit."""
    engine, _ = cpu_engine.found()
    if engine is None:
        return None
    try:
        return kept.run(engine, x, vectors, steps)
    except DoesNotFit:
        return None


def grouped_linear(x: Tensor, linears: Linears) -> Tensor | None:
    """Return ``Engine.grouped_linear`` of this machine's; None where it does not take them."""
    if not _are_linear(x, linears) or len(x) > FEW_ROWS:
        return None
    if not all(weight.is_contiguous() and bias.is_contiguous() for weight, bias in linears):
        return None
    engine, _ = cpu_engine.found()
    return None if engine is None else engine.grouped_linear(x, linears)


def int8_weights_linear(x: Tensor, linears: Linears) -> Tensor | None:
    """Return ``Engine.int8_weights_linear`` of this machine's; None where it does not take them."""
    if not _are_linear(x, linears):
        return None
    engine, _ = cpu_engine.found()
    return None if engine is None else engine.int8_weights_linear(x, linears)


def _are_linear(x: Tensor, linears: Linears) -> bool:
    if x.dim() != 2 or not takes(x) or autocast_dtype(x.device) is not None:
        return False
    K, dtype = x.shape[1], x.dtype
    return all(
        weight.shape == (bias.shape[0], K) and weight.dtype == bias.dtype == dtype and is_here(weight) and is_here(bias)
        for weight, bias in linears
    )


def check_int8(name: str, parameters: Iterable[Tensor]) -> None:
    """Raise ValueError where the CPU engine would not run a model of these parameters in int8; ``name`` is the argument's."""
    others = unfit(parameters)
    if others:
        raise ValueError(f"{name}: got int8 for {others}, expected fp32 or bf16 weights on the CPU")
    engine, why = cpu_engine.found()
    if engine is None:
        raise ValueError(f"{name}: got int8, but {why}")
    if not _is_free():
        raise ValueError(f"{name}: got int8, which only the CPU engine has, where another backend or attention is forced")
