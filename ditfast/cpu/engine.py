"""When the CPU engine takes a chain of sublayers, and the call."""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..files import cache_folder
from ..ops.dispatch import autocast_dtype, forced
from . import library
from .packed import BYTE, FULL, HALF, Linears, PackedChains, PackedLinear

SELF_ATTENTION, CROSS_ATTENTION, MLP = range(3)  # kinds, as engine.cpp numbers them
FEW_ROWS = 16  # faster than torch up to there: weights of [28416, 384] and [149504, 1024], one thread of a Zen 3
PRODUCTS = {torch.float32: FULL, torch.bfloat16: HALF}


class Products(NamedTuple):
    """A sublayer's weights: what follows its norm, up to its gate."""

    kind: int
    first: Linears  # qkv, or q, k and v apart, or cross-attention's q; fc1
    second: Linears  # proj; fc2
    heads: int = 1
    context: Tensor | None = None  # of cross-attention: [B, S, D]
    context_linear: tuple[Tensor, Tensor] | None = None  # and its kv
    int8: bool = False


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
    free = forced().backend is None and forced().attention is None
    return free and device.type == "cpu" and dtype in PRODUCTS and found()[0] is not None


def takes(x: Tensor) -> bool:
    """Whether the engine runs sublayers of plain linears for x [B, T, D]: without gradients, on a CPU it was built for."""
    return (
        x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.numel() > 0
        and (autocast_dtype(x.device) or x.dtype) in PRODUCTS
        and not torch.jit.is_tracing()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and runs_on(x.device, x.dtype)
    )


class DoesNotFit(Exception):
    """A shape or dtype is not what the ops want, which say what is wrong."""


class Engine:
    """A library and the weights packed for it. Any number of threads may call ``run`` at once."""

    def __init__(self, functions: ctypes.CDLL):
        self._functions = functions
        self._chains = PackedChains(functions)

    def run(self, x: Tensor, steps: Sequence[Step], final: Final) -> tuple[Tensor, Tensor]:
        """x [B, T, D] through the steps, and that after the final norm: both of the dtype of x.

        The stream between the steps is fp32 whatever the dtype of x; products are of x's dtype or autocast's and accumulate
        in fp32, or of int8 if the first step says so.

        Raises:
            DoesNotFit: weights or vectors that are not for x.
            MemoryError: for the activations of a few samples.
        """
        product = BYTE if steps and steps[0].products.int8 else PRODUCTS[autocast_dtype(x.device) or x.dtype]
        x = x.contiguous()
        B, T, D = x.shape
        packed = self._packed(x, [step.products for step in steps], product)
        vectors = _Vectors(B, T, D)
        chain = (library.Sublayer * len(steps))()
        for i, (products, shift, scale, gate, eps) in enumerate(steps):
            sublayer = chain[i]
            sublayer.kind, sublayer.heads, sublayer.eps = products.kind, products.heads, eps
            sublayer.first, sublayer.second = packed[2 * i].structure, packed[2 * i + 1].structure
            sublayer.shift, sublayer.scale, sublayer.gate = vectors.of(shift), vectors.of(scale), vectors.of(gate)
            if products.context is not None and products.context_linear is not None:
                if not _context_fits(products.context, products.context_linear, B, D):
                    raise DoesNotFit
                keys_values = self._keys_values(products.context, products.context_linear, product)
                vectors.alive.append(keys_values)
                sublayer.context, sublayer.sources = keys_values.data_ptr(), keys_values.shape[1]
        norm = library.Norm(vectors.of(final.shift), vectors.of(final.scale), final.eps)
        x_out, u_out = torch.empty_like(x), torch.empty_like(x)
        pointers = x.data_ptr(), x_out.data_ptr(), u_out.data_ptr()
        sizes = x.dtype == torch.bfloat16, product, B, T, D, torch.get_num_threads()
        if self._functions.ditfast_run(chain, len(steps), ctypes.byref(norm), *pointers, *sizes):
            raise MemoryError(f"the CPU engine found no memory for {B} x {T} tokens of width {D}")
        return x_out, u_out

    def linear_of_few(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """x [M, K] through a weight [N, K], for M up to ``FEW_ROWS``: in the time that reading the weight takes."""
        (M, K), N = x.shape, len(weight)
        inputs, biases = x.float().contiguous(), bias.float().contiguous()
        y = torch.empty(M, N, dtype=torch.float32, device=x.device)
        pointers = inputs.data_ptr(), weight.data_ptr(), weight.dtype == torch.bfloat16, biases.data_ptr(), y.data_ptr()
        self._functions.ditfast_few_rows(*pointers, M, N, K, torch.get_num_threads())
        return y.to(x.dtype)

    def forget(self, weights: Iterable[Tensor]) -> None:
        """Drops what is packed of them."""
        self._chains.forget(weights)

    def _packed(self, x: Tensor, products: Sequence[Products], product: int) -> list[PackedLinear]:
        linears = [each for p in products for each in (p.first, p.second)]
        tensors = [tensor for together in linears for linear in together for tensor in linear]
        known = self._chains.find(tensors, product)
        if known is None:
            dtype = x.dtype if autocast_dtype(x.device) is None else None
            if not all(_fits(p, dtype) for p in products):
                raise DoesNotFit
            known = self._chains.pack(tensors, linears, product)
        width = x.shape[2]
        if any(packed.structure.inputs != width for packed in known[::2]):
            raise DoesNotFit
        return known

    def _keys_values(self, context: Tensor, linear: tuple[Tensor, Tensor], product: int) -> Tensor:
        """[B, S, 2 * D], as the engine's attention multiplies them."""
        half = product != FULL and self._functions.ditfast_attention_is_half()
        weight, bias = linear
        return F.linear(context.to(weight.dtype), weight, bias).to(torch.bfloat16 if half else torch.float32).contiguous()


def run(x: Tensor, steps: Sequence[Step], final: Final) -> tuple[Tensor, Tensor] | None:
    """``Engine.run`` of this machine's, where ``takes(x)``; None where something does not fit."""
    engine, _ = found()
    assert engine is not None
    try:
        return engine.run(x, steps, final)
    except DoesNotFit:
        return None


def linear_of_few(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor | None:
    """``F.linear`` of x [M, K] by this machine's engine; None where it does not take them."""
    fits = x.dim() == 2 and 0 < len(x) <= FEW_ROWS and weight.is_contiguous() and weight.shape == (len(bias), x.shape[1])
    if not fits or not takes(x) or not x.dtype == weight.dtype == bias.dtype or autocast_dtype(x.device) is not None:
        return None
    if not (_is_here(weight) and _is_here(bias)):
        return None
    engine, _ = found()
    assert engine is not None
    return engine.linear_of_few(x, weight, bias)


def _fits(products: Products, dtype: torch.dtype | None) -> bool:
    """Whether a sublayer's weights, of one dtype unless it is None, go together."""
    D = products.first[0][0].shape[1]
    outputs = sum(len(weight) for weight, _ in products.first)
    inputs = outputs if products.kind == MLP else D
    expected = {SELF_ATTENTION: 3 * D, CROSS_ATTENTION: D, MLP: outputs}[products.kind]
    linears = (*products.first, *products.second)
    return (
        outputs == expected
        and D % products.heads == 0
        and all(weight.shape[1] == D for weight, _ in products.first)
        and all(weight.shape == (D, inputs) for weight, _ in products.second)
        and all(bias.shape == weight.shape[:1] for weight, bias in linears)
        and all(tensor.dtype == dtype or dtype is None for linear in linears for tensor in linear)
        and all(_is_here(tensor) for linear in linears for tensor in linear)
    )


def _context_fits(context: Tensor, linear: tuple[Tensor, Tensor], B: int, D: int) -> bool:
    weight, bias = linear
    return weight.shape == (2 * D, D) and bias.shape == (2 * D,) and context.shape[::2] == (B, D)


def _is_here(tensor: Tensor) -> bool:
    """Whether it is a plain array in this machine's memory."""
    return tensor.device.type == "cpu" and tensor.layout == torch.strided


class _Vectors:
    """Structures for modulation vectors, and what only they point to."""

    def __init__(self, B: int, T: int, D: int):
        self._shapes = torch.Size((B, D)), torch.Size((B, T, D))
        self.alive: list[Tensor] = []

    def of(self, vector: Tensor | None) -> library.Vector:
        if vector is None:
            return library.Vector()
        shape = vector.shape
        if shape != self._shapes[0] and shape != self._shapes[1]:
            raise DoesNotFit
        *strides, inner = vector.stride()
        if inner != 1 or vector.dtype not in PRODUCTS:
            vector = vector.float().contiguous()
            self.alive.append(vector)
            *strides, _ = vector.stride()
        token_stride = strides[1] if len(strides) == 2 else 0
        return library.Vector(vector.data_ptr(), strides[0], token_stride, vector.dtype == torch.bfloat16)
