"""Sinusoidal features of timesteps."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from ..argument_checks import check_integer, check_tensor
from ..config import TIMESTEP_FEATURES
from ..dispatch.op import Op, TritonOp, is_eager
from ..dispatch.selection import select_backend

_tables: dict[tuple[torch.device, int, int], Tensor] = {}  # by device, number of frequencies and divisor


def timestep_embedding(t: Tensor, dim: int = TIMESTEP_FEATURES, frequency_divisor: int | None = None) -> Tensor:
    """Sinusoidal features of timesteps, cosines first: fp32 [B, dim] (Ho et al. 2020; Vaswani et al. 2017).

    Args:
        t: [B] timesteps up to 10^8, any real dtype; fractions are kept.
        dim: number of features, even.
        frequency_divisor: how finely the frequencies 1 .. 1/10000 are cut; dim // 2 unless given (see ``Flavour``).

    Raises:
        ValueError: t is not one-dimensional or not real, or dim is odd.
    """
    return _op(t, dim, frequency_divisor)


def _select(t: Tensor, dim: int, frequency_divisor: int | None, training: bool) -> str:
    check_tensor("t", t, "[B]")
    if t.dim() != 1:
        raise ValueError(f"t: got shape {tuple(t.shape)}, expected [B]")
    if t.is_complex() or t.dtype == torch.bool:
        raise ValueError(f"t: got dtype {t.dtype}, expected real timesteps")
    check_integer("dim", dim, 0)
    if frequency_divisor is not None:
        check_integer("frequency_divisor", frequency_divisor, 1)
    if dim % 2:
        raise ValueError(f"dim: got {dim}, expected an even number")
    return select_backend(_with_frequencies(t, dim, frequency_divisor)[1], "timestep_embedding", t.shape[0], (dim,), training)


def _torch(t: Tensor, dim: int, frequency_divisor: int | None) -> Tensor:
    _, frequencies = _with_frequencies(t, dim, frequency_divisor)
    angles = t.float()[:, None] * frequencies  # [B, dim/2]
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _with_frequencies(t: Tensor, dim: int, frequency_divisor: int | None) -> tuple[Tensor, Tensor]:
    half = dim // 2
    return t, _frequencies(t, half, frequency_divisor or half)  # [B], [dim/2]


def _frequencies(t: Tensor, half: int, divisor: int) -> Tensor:
    """Return the fp32 frequencies [half] on t's device, with the bits that the CPU's exp gives.

    Another device's exp may differ in the last bit, which a large timestep makes 1.8e-5 of a feature.
    """
    device = t.device
    if torch.compiler.is_dynamo_compiling():
        return _table(device, half, divisor)
    if not is_eager() and is_fake(t):  # tracing takes numbers as constants, and tensors with data not always
        return torch.tensor(_table(torch.device("cpu"), half, divisor).tolist(), device=device)
    if device.type == "cuda" and (device, half, divisor) not in _tables and torch.cuda.is_current_stream_capturing():
        return _captured_table(device, half, divisor)
    return _table(device, half, divisor)


def _table(device: torch.device, half: int, divisor: int) -> Tensor:
    """Return the frequencies that are kept for a device; to torch.compile they are a constant."""
    key = device, half, divisor
    if key not in _tables:
        # Inference, fake-tensor and functorch modes belong to a thread, and what is kept must come from none of them.
        with ThreadPoolExecutor(1) as pool:
            _tables.setdefault(key, pool.submit(_compute, *key).result())
    return _tables[key]


# What torch.compiler.assume_constant_result does, which would import all of torch.compile for it.
vars(_table)["_dynamo_marked_constant"] = True


def _compute(device: torch.device, half: int, divisor: int) -> Tensor:
    index = torch.arange(half, dtype=torch.float32, device="cpu")
    return torch.exp(-math.log(10000) * index / divisor).to(device)  # waits, so that any stream may read it


def _captured_table(device: torch.device, half: int, divisor: int) -> Tensor:
    """Return a table that the CUDA graph fills itself and owns: numbers as kernel arguments, since no copy can be captured."""
    table = torch.zeros(half, dtype=torch.float32, device=device)
    if half:
        torch._foreach_add_(table.unbind(), _table(torch.device("cpu"), half, divisor).tolist())
    return table


def _fake(t: Tensor, frequencies: Tensor) -> Tensor:
    return frequencies.new_empty(t.shape[0], 2 * frequencies.shape[0])


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    return _backward_op(dy, *ctx.saved_tensors), None


def _backward_fake(dy: Tensor, t: Tensor, frequencies: Tensor) -> Tensor:
    return t.new_empty(t.shape)


_triton = TritonOp("timestep_embedding(Tensor t, Tensor frequencies) -> Tensor", _fake, save=_save, backward=_backward)
_op = Op(_select, _triton, _with_frequencies, torch=_torch)
_backward_op = TritonOp("timestep_embedding_backward(Tensor dy, Tensor t, Tensor frequencies) -> Tensor", _backward_fake)
