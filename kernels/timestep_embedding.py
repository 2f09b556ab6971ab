"""Sinusoidal features of timesteps: outer product, cosine, sine and their concatenation in one kernel.

``tl.cos`` and ``tl.sin`` would do, but for the local memory that libdevice's reduction of huge angles takes (the array is in
every kernel that triton 3.6 builds, though no timestep gets there), and for reducing each angle twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

COLUMNS = 128  # of a program: all frequencies of the paper's 256 features


@triton.jit
def cos_and_sin(angle):
    """Of fp32 angles up to 10^8, to 1.2 times 2^-24: reduced to an eighth turn in float64, then Cephes' polynomials."""
    exact = angle.to(tl.float64)
    quarters = tl.floor(exact * 0.6366197723675814 + 0.5)
    x = (exact - quarters * 1.5707963267948966).to(tl.float32)
    z = x * x
    cos = 1.0 + z * (-0.5 + z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5)))
    sin = x + x * z * (-1.6666654611e-1 + z * (8.3321608736e-3 + z * -1.9515295891e-4))
    turn = quarters.to(tl.int64)
    odd = (turn & 1) != 0
    cos, sin = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return tl.where(((turn + 1) & 2) != 0, -cos, cos), tl.where((turn & 2) != 0, -sin, sin)


@triton.jit
def timestep_embedding_kernel(t_ptr, t_stride, frequency_ptr, y_ptr, half, blocks, BLOCK: tl.constexpr):
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    k = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    angle = tl.load(t_ptr + sample * t_stride).to(tl.float32) * tl.load(frequency_ptr + k, mask=k < half, other=0.0)
    y = y_ptr + sample * 2 * half + k
    cos, sin = cos_and_sin(angle)
    tl.store(y, cos, mask=k < half)
    tl.store(y + half, sin, mask=k < half)


@triton.jit
def timestep_embedding_backward_kernel(dy_ptr, t_ptr, t_stride, frequency_ptr, dt_ptr, half, BLOCK: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    t = tl.load(t_ptr + sample * t_stride).to(tl.float32)
    dt = tl.zeros([BLOCK], tl.float32)
    for start in range(0, half, BLOCK):
        k = start + tl.arange(0, BLOCK)
        frequency = tl.load(frequency_ptr + k, mask=k < half, other=0.0)
        dy = dy_ptr + sample * 2 * half + k
        dcos = tl.load(dy, mask=k < half, other=0.0)
        dsin = tl.load(dy + half, mask=k < half, other=0.0)
        cos, sin = cos_and_sin(t * frequency)
        dt += frequency * (dsin * cos - dcos * sin)
    tl.store(dt_ptr + sample, tl.sum(dt, 0).to(dt_ptr.dtype.element_ty))


def timestep_embedding(t: Tensor, frequencies: Tensor) -> Tensor:
    """t [B] of any dtype, frequencies [dim/2] fp32. Returns fp32 [B, dim], cosines first."""
    half = len(frequencies)
    y = torch.empty(len(t), 2 * half, dtype=torch.float32, device=t.device)
    blocks = triton.cdiv(half, COLUMNS)
    launch(
        timestep_embedding_kernel,
        len(t) * blocks,
        t_ptr=t,
        t_stride=t.stride(0),
        frequency_ptr=frequencies,
        y_ptr=y,
        half=half,
        blocks=blocks,
        BLOCK=COLUMNS,
        num_warps=4,
    )
    return y


def timestep_embedding_backward(dy: Tensor, t: Tensor, frequencies: Tensor) -> Tensor:
    """dy fp32 [B, dim]. Returns [B], of the dtype of t."""
    dt = torch.empty(t.shape, dtype=t.dtype, device=t.device)
    launch(
        timestep_embedding_backward_kernel,
        len(t),
        dy_ptr=dy.contiguous(),
        t_ptr=t,
        t_stride=t.stride(0),
        frequency_ptr=frequencies,
        dt_ptr=dt,
        half=len(frequencies),
        BLOCK=COLUMNS,
        num_warps=4,
    )
    return dt
