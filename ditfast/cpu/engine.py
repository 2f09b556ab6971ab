"""When the CPU engine takes a chain of sublayers, and the call."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.dispatch import autocast_dtype, forced
from . import library
from .packed import BYTE, FULL, HALF, Linears, PackedChains

SELF_ATTENTION, CROSS_ATTENTION, MLP = range(3)  # kinds, as engine.cpp numbers them
PRODUCTS = {torch.float32: FULL, torch.bfloat16: HALF}


class Products(NamedTuple):
    """A sublayer's weights: what follows its norm, up to its gate."""

    kind: int
    first: Linears  # qkv, or q, k and v apart, or cross-attention's q; fc1
    second: Linears  # proj; fc2
    heads: int = 1
    context: Tensor | None = None  # of cross-attention: [B, S, D]
    context_linear: tuple[Tensor, Tensor] | None = None  # and its kv


class Step(NamedTuple):
    products: Products
    shift: Tensor | None
    scale: Tensor | None
    gate: Tensor | None
    eps: float


class Final(NamedTuple):
    """The norm behind a chain."""

    shift: Tensor | None
    scale: Tensor | None
    eps: float


@functools.cache
def found() -> tuple[Engine | None, str]:
    """This machine's engine, built at the first call; or None, and why."""
    try:
        options = library.options_for(library.cpu_features())
        return Engine(library.load(library.build(options, library.cache_folder()))), ""
    except library.Unavailable as error:
        return None, str(error)


def takes(x: Tensor) -> bool:
    """Whether the engine runs sublayers of plain linears for x [B, T, D]: without gradients, on a CPU it was built for."""
    return (
        x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.numel() > 0
        and (autocast_dtype(x.device) or x.dtype) in PRODUCTS
        and x.dtype in PRODUCTS
        and forced().backend is None
        and forced().attention is None
        and not torch.jit.is_tracing()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and found()[0] is not None
    )


def fits(x: Tensor, step: Step) -> bool:
    """Whether all shapes and dtypes are as the ops want them, which say what is wrong where they are not."""
    B, T, D = x.shape
    dtype = autocast_dtype(x.device) or x.dtype
    first, second = step.products.first, step.products.second
    outputs = sum(len(weight) for weight, _ in first)
    inputs = outputs if step.products.kind == MLP else D
    expected = {SELF_ATTENTION: 3 * D, CROSS_ATTENTION: D, MLP: outputs}[step.products.kind]
    weights = [weight for weight, _ in (*first, *second)]
    return (
        outputs == expected
        and all(weight.shape[1] == D for weight, _ in first)
        and all(weight.shape == (D, inputs) for weight, _ in second)
        and D % step.products.heads == 0
        and all(weight.dtype == x.dtype or dtype != x.dtype for weight in weights)
        and all(len(bias) == len(weight) for weight, bias in (*first, *second))
        and all(v is None or v.shape in ((B, D), (B, T, D)) for v in (step.shift, step.scale, step.gate))
    )


class Engine:
    """A library and the weights packed for it. Any number of threads may call ``run`` at once."""

    def __init__(self, functions: ctypes.CDLL):
        self._functions = functions
        self._chains = PackedChains(functions)

    def run(self, x: Tensor, steps: Sequence[Step], final: Final) -> tuple[Tensor, Tensor]:
        """x [B, T, D] through the steps, and that after the final norm: both of the dtype of x.

        The stream between the steps is fp32 whatever the dtype of x; products are of x's dtype or autocast's, and accumulate
        in fp32.

        Raises:
            MemoryError: for the activations of a few samples.
        """
        product = PRODUCTS[autocast_dtype(x.device) or x.dtype]
        x = x.contiguous()
        B, T, D = x.shape
        linears = [each for step in steps for each in (step.products.first, step.products.second)]
        packed = self._chains.of(linears, product)
        chain = (library.Sublayer * len(steps))()
        alive: list[Tensor] = []  # what only the structures point to
        for i, (sublayer, step) in enumerate(zip(chain, steps, strict=True)):
            sublayer.kind, sublayer.heads, sublayer.eps = step.products.kind, step.products.heads, step.eps
            sublayer.first, sublayer.second = packed[2 * i].structure, packed[2 * i + 1].structure
            sublayer.shift, sublayer.scale, sublayer.gate = (_vector(v, alive) for v in (step.shift, step.scale, step.gate))
            if step.products.context is not None and step.products.context_linear is not None:
                keys_values = self._keys_values(step.products.context, step.products.context_linear, product)
                alive.append(keys_values)
                sublayer.context, sublayer.sources = keys_values.data_ptr(), keys_values.shape[1]
        norm = library.Norm(_vector(final.shift, alive), _vector(final.scale, alive), final.eps)
        x_out, u_out = torch.empty_like(x), torch.empty_like(x)
        pointers = x.data_ptr(), x_out.data_ptr(), u_out.data_ptr()
        sizes = x.dtype == torch.bfloat16, product, B, T, D, torch.get_num_threads()
        if self._functions.ditfast_run(chain, len(steps), ctypes.byref(norm), *pointers, *sizes):
            raise MemoryError(f"the CPU engine found no memory for {B} x {T} tokens of width {D}")
        return x_out, u_out

    def _keys_values(self, context: Tensor, linear: tuple[Tensor, Tensor], product: int) -> Tensor:
        """[B, S, 2 * D], as the engine's attention multiplies them."""
        half = product == BYTE or (product == HALF and self._functions.ditfast_attention_is_half())
        weight, bias = linear
        return F.linear(context.to(weight.dtype), weight, bias).to(torch.bfloat16 if half else torch.float32).contiguous()


def run(x: Tensor, steps: Sequence[Step], final: Final) -> tuple[Tensor, Tensor]:
    """``Engine.run`` of this machine's, where ``takes(x)``."""
    engine, _ = found()
    assert engine is not None
    return engine.run(x, steps, final)


def _vector(vector: Tensor | None, alive: list[Tensor]) -> library.Vector:
    if vector is None:
        return library.Vector()
    if vector.dtype not in PRODUCTS or vector.stride(-1) != 1:
        vector = vector.float().contiguous()
        alive.append(vector)
    token_stride = vector.stride(1) if vector.dim() == 3 else 0
    return library.Vector(vector.data_ptr(), vector.stride(0), token_stride, vector.dtype == torch.bfloat16)
