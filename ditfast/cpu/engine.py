"""The compiled engine: the call, over weights packed for it."""

from __future__ import annotations

import ctypes
import functools
import struct
import warnings
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..files import cache_folder
from ..torch_modes import autocast_dtype
from . import library
from .chain import Context, DoesNotFit, Final, Products, Step, check_context, check_vector, check_weights, dtype_of_weights
from .packed import BYTE, BYTE_ROWS, FULL, PRODUCTS, Linears, PackedChains, PackedLinear, Watch


class Fields(NamedTuple):
    """A chain as the library takes it, and what its addresses are of."""

    product: int
    chain: bytes
    norm: bytes
    alive: list[Tensor]  # that nobody else holds
    weights: list[Tensor]
    packed: list[PackedLinear]


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
        fields = self.fields(x, steps, final)
        return self.call(x, fields.product, fields.chain, fields.norm)

    def fields(self, x: Tensor, steps: Sequence[Step], final: Final) -> Fields:
        """Return what ``call`` takes for x [B, T, D], the steps and the norm behind them; raises ``DoesNotFit``."""
        product = BYTE if steps and steps[0].products.int8 else PRODUCTS[autocast_dtype(x.device) or x.dtype]
        B, T, D = x.shape
        dtype = dtype_of_weights(x)
        products = [step.products for step in steps]
        weights = [tensor for p in products for together in (p.first, p.second) for linear in together for tensor in linear]
        packed = self._packed(products, weights, product, D, dtype)
        vectors = _Vectors(B, T, D)
        chain = b""
        for (products_of_step, shift, scale, gate, eps), first, second in zip(steps, packed[::2], packed[1::2], strict=True):
            kind, _, _, heads, attended, _ = products_of_step
            context, sources = 0, 0
            if attended is not None:
                check_context(attended, B, D, dtype)
                keys_values = self._keys_values(attended, product)
                vectors.alive.append(keys_values)
                context, sources = keys_values.data_ptr(), keys_values.shape[1]
            linears = *first.fields, *second.fields
            modulation = *vectors.of(shift), *vectors.of(scale), *vectors.of(gate)
            chain += library.SUBLAYER.pack(kind, *linears, *modulation, eps, heads, context, sources)
        norm = library.NORM.pack(*vectors.of(final.shift), *vectors.of(final.scale), final.eps)
        return Fields(product, chain, norm, vectors.alive, weights, packed)

    def call(self, x: Tensor, product: int, chain: bytes, norm: bytes) -> tuple[Tensor, Tensor]:
        """Run x [B, T, D] through a chain of ``library.SUBLAYER``; both results are of its dtype."""
        x = x.contiguous()
        B, T, D = x.shape
        x_out, u_out = torch.empty_like(x), torch.empty_like(x)
        pointers = x.data_ptr(), x_out.data_ptr(), u_out.data_ptr()
        sizes = x.dtype == torch.bfloat16, product, B, T, D, torch.get_num_threads()
        if self._functions.ditfast_run(chain, len(chain) // library.SUBLAYER.size, norm, *pointers, *sizes):
            raise MemoryError(f"the CPU engine found no memory for {B} x {T} tokens of width {D}")
        return x_out, u_out

    def packed(self, weights: Sequence[Tensor], product: int) -> list[PackedLinear] | None:
        """Return what is packed of weights and biases; None if they have changed since."""
        return self._chains.find(weights, product)

    def grouped_linear(self, x: Tensor, linears: Linears) -> Tensor:
        """Return [M, N of all linears], x [M, K] through weights [N, K] that are read where they lie, each once."""
        fields = [field for weight, bias in linears for field in (weight.data_ptr(), bias.data_ptr(), 0, len(weight))]
        return self._few_rows(PRODUCTS[x.dtype], x, fields)

    def int8_weights_linear(self, x: Tensor, linears: Linears) -> Tensor:
        """Return ``grouped_linear`` with weights rounded to int8, which are a quarter to read; x stays as it is."""
        tensors = [tensor for linear in linears for tensor in linear]
        (packed,) = self._chains.find(tensors, BYTE_ROWS) or self._chains.pack(tensors, [linears], BYTE_ROWS)
        weight, bias, scale, _, outputs, _ = packed.fields
        return self._few_rows(BYTE, x, [weight, bias, scale, outputs])

    def _few_rows(self, product: int, x: Tensor, fields: Sequence[int]) -> Tensor:
        """Multiply by linears, whose fields follow each other as ``library.FEW_ROWS_LINEAR`` has them."""
        M, K = x.shape
        outputs, count = sum(fields[3::4]), len(fields) // 4
        rows, y = x.float().contiguous(), torch.empty(M, outputs, dtype=torch.float32, device=x.device)
        linears = struct.pack(library.FEW_ROWS_LINEAR * count, *fields)
        self._functions.ditfast_few_rows(product, rows.data_ptr(), linears, count, y.data_ptr(), M, K, torch.get_num_threads())
        return y.to(x.dtype)

    def watch(self, tensors: Sequence[Tensor]) -> Watch:
        """Return what tells whether tensors in this machine's memory were written to since."""
        return Watch(self._functions, tensors)

    def forget(self, weights: Iterable[Tensor]) -> None:
        """Drops what is packed of them."""
        self._chains.forget(weights)

    def _packed(
        self, products: Sequence[Products], weights: Sequence[Tensor], product: int, width: int, dtype: torch.dtype | None
    ) -> list[PackedLinear]:
        known = self.packed(weights, product)
        if known is None:
            for sublayer in products:
                check_weights(sublayer, dtype)
            known = self._chains.pack(weights, [each for p in products for each in (p.first, p.second)], product)
        if any(packed.inputs != width for packed in known[::2]):
            raise DoesNotFit
        return known

    def _keys_values(self, context: Context, product: int) -> Tensor:
        """[B, S, 2 * D], as the engine's attention multiplies them."""
        half = product != FULL and self._functions.ditfast_attention_is_half()
        tokens, weight, bias = context
        return F.linear(tokens.to(weight.dtype), weight, bias).to(torch.bfloat16 if half else torch.float32).contiguous()


class _Vectors:
    """Fields of a ``library.VECTOR`` for modulation vectors, and what only they point to."""

    def __init__(self, B: int, T: int, D: int):
        self._shapes = torch.Size((B, D)), torch.Size((B, T, D))
        self.alive: list[Tensor] = []

    def of(self, vector: Tensor | None) -> tuple[int, int, int, bool]:
        if vector is None:
            return 0, 0, 0, False
        check_vector(vector, self._shapes)
        strides = vector.stride()
        if strides[-1] != 1 or vector.dtype not in PRODUCTS:
            vector = vector.float().contiguous()
            self.alive.append(vector)
            strides = vector.stride()
        return vector.data_ptr(), strides[0], strides[1] if len(strides) == 3 else 0, vector.dtype == torch.bfloat16


@functools.cache
def found() -> tuple[Engine | None, str]:
    """Return this machine's engine, built at the first call; or None, and why, with a warning if the user could help."""
    try:
        options = library.options_for(library.cpu_features())
        return Engine(library.load(library.build(options, cache_folder("cpu")))), ""
    except library.Unavailable as error:
        if isinstance(error, library.NotBuilt):
            warnings.warn(f"{error}; without it blocks run on torch's kernels, slower", stacklevel=2)
        return None, str(error)
