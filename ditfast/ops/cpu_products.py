"""Linear layers and attention in plain torch: in fp32 where the CPU has no products of the tensors' dtype.

Without oneDNN's products of a dtype torch takes plain loops. Their time over that of widened operands, on two cores of a Zen 3
(AVX2), torch 2.13, bf16: M rows through [3072, 768] forward 0.4, 2.2, 4.3 and 7.7 at M = 1, 16, 64 and 2048, input's gradient
12, 69, 135 and 210, weight's 4, 5, 7 and 10; attention of 16, 64 and 256 tokens forward 0.7 to 1.0, with gradients 1.2, 2.4
and 6. In fp16 likewise, the weight's gradient 5 to 37 and attention forward 1.1 to 2.0.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dispatch.library import define_op
from ..torch_modes import autocast_dtype, is_transformed, under_autocast

# Fewer are dot products with the weight's rows, which are read once: torch's loop keeps up with the memory, and widening
# would write them too. Measured as above: even at 6.
FEWEST_WIDENED_ROWS = 6
OPS_WITH_PRODUCTS = (  # beside attention
    "cross_attention",
    "final_layer",
    "linear",
    "linear_gated_residual",
    "linear_gelu",
    "linear_unpatchify",
    "mlp",
    "patch_embed",
)


def slow_dtypes() -> frozenset[torch.dtype]:
    """What x86 torch multiplies without oneDNN on this CPU; elsewhere nothing was measured, and nothing is widened."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return frozenset()
    fast = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return frozenset(dtype for dtype, supported in fast.items() if not supported)


# Looked up once, at import: a graph that torch.compile traces cannot ask.
SLOW_DTYPES = slow_dtypes()


def in_fp32(x: Tensor) -> bool:
    """Whether a product of x, or of what autocast makes of it, is one of fp32 operands instead."""
    if not SLOW_DTYPES or x.device.type != "cpu" or (autocast_dtype(x.device) or x.dtype) not in SLOW_DTYPES:
        return False
    return not is_transformed()


def torch_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``F.linear``, under autocast too."""
    return linear_for(x)(x, weight, bias)


def linear_for(x: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The ``torch_linear`` of tensors like x."""
    return _widened_linear if in_fp32(x) else F.linear


def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of heads [B, T, H, d], keys and values [B, S, H, d]; [B, T, H*d], contiguous."""
    return attention_for(q)(q, k, v)


def attention_for(x: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The ``torch_attention`` of tensors like x."""
    return _widened_attention if in_fp32(x) else _sdpa


def _widened_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _linear_op(*under_autocast(x, weight, bias))


def _widened_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _attention_op(q, k, v)[0].flatten(2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # [B, H, T, d]
    return out.transpose(1, 2).flatten(2).contiguous()


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        if weight.stride(-1) == 1 and x.numel() < FEWEST_WIDENED_ROWS * x.shape[-1]:
            return F.linear(x, weight, bias).contiguous()
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype).contiguous()


def linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _linear_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)


def _linear_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    for_x, for_weight, for_bias = ctx.needs_input_grad
    rows = dy.flatten(0, -2)  # [M, N]
    dx = _linear_op(dy, weight.t(), None) if for_x else None
    dweight = _linear_op(rows.t(), x.flatten(0, -2).t(), None) if for_weight else None
    return dx, dweight, rows.sum(0) if for_bias else None


_linear_op = define_op(
    "linear_in_fp32(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    linear_fake,
    save=_linear_save,
    backward=_linear_backward,
    run=_linear,
)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = _attention_fake(q, k, v)  # [B, T, H, d], [B, T, H]
    if q.numel():  # torch's kernel divides by sizes
        exact, sums = _flash(*_heads_in_fp32(q, k, v))
        out.copy_(exact.transpose(1, 2))
        lse.copy_(sums.transpose(1, 2))
    return out, lse


def _heads_in_fp32(*tensors: Tensor) -> list[Tensor]:
    """[B, H, T or S, d]"""
    return [heads.transpose(1, 2).float() for heads in tensors]


def _attention_fake(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


def save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*(tensor for tensor in inputs if isinstance(tensor, Tensor)), out, lse)


def _attention_backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    q, k, v, out, lse = ctx.saved_tensors
    if not q.numel():
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    widened = _heads_in_fp32(dout, q, k, v, out)
    found = _flash_backward(*widened, lse.transpose(1, 2), 0.0, False)
    return tuple(gradient.transpose(1, 2).to(q.dtype) for gradient in found)


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_attention_op = define_op(
    "attention_in_fp32(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)",
    _attention_fake,
    save=save_attention,
    backward=_attention_backward,
    run=_attention,
)
