"""Calls of an op with a given shape, on random inputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..dispatch.shapes import OpShape

TOKENS = 256  # of an image, where the shape does not say
PATCH = 2


class Example(NamedTuple):
    """A call, and in training what its backward is given."""

    call: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]
    upstream: tuple[Tensor, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.inputs, *self.upstream))

    def run(self) -> tuple[Tensor, ...]:
        """The outputs, or for training outputs and gradients."""
        with torch.set_grad_enabled(bool(self.upstream)):
            outputs = _as_tuple(self.call(*self.inputs))
            if not self.upstream:
                return outputs
            leaves = [tensor for tensor in self.inputs if tensor.requires_grad]
            gradients = torch.autograd.grad(outputs, leaves, self.upstream)
        return *(output.detach() for output in outputs), *gradients


def example(shape: OpShape, device: torch.device, seed: int) -> Example:
    """Inputs whose outputs are of about unit size; those of one seed are always the same."""
    maker = _Maker(shape, device, seed)
    call, inputs = getattr(maker, shape.op)(*shape.sizes)
    if not shape.training:
        return Example(call, inputs)
    first = 1 if shape.op == "patch_embed" else 0  # images need no gradient
    for tensor in inputs[first:]:
        tensor.requires_grad_()
    with torch.no_grad():
        return Example(call, inputs, tuple(maker.like(output) for output in _as_tuple(call(*inputs))))


Call = tuple[Callable[..., Tensor | tuple[Tensor, ...]], tuple[Tensor, ...]]


class _Maker:
    """A method for each op, of the shape's sizes."""

    def __init__(self, shape: OpShape, device: torch.device, seed: int):
        self.rows, self.dtype, self.device = shape.rows, shape.dtype, device
        self.generator = torch.Generator(device).manual_seed(seed)

    def values(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(self.dtype)

    def like(self, tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=self.generator, device=self.device).to(tensor.dtype)

    def weight(self, N: int, K: int) -> Tensor:
        return self.values(N, K).mul_(K**-0.5)

    def stream(self, T: int, D: int) -> tuple[int, Tensor]:
        """The number of samples, and x [B, T, D]."""
        batch = max(1, self.rows // T)
        return batch, self.values(batch, T, D)

    def images(self) -> tuple[int, tuple[int, int]]:
        """Return how many samples, and the grid of each, together have the shape's rows."""
        if self.rows % TOKENS:
            return 1, (1, self.rows)
        return self.rows // TOKENS, (16, TOKENS // 16)

    def layer_norm_modulate(self, T: int, D: int) -> Call:
        batch, x = self.stream(T, D)
        return ops.layer_norm_modulate, (x, self.values(batch, D), self.values(batch, D))

    def gated_residual(self, T: int, D: int) -> Call:
        batch, x = self.stream(T, D)
        return ops.gated_residual, (x, self.like(x), self.values(batch, D))

    def gated_residual_layer_norm_modulate(self, T: int, D: int) -> Call:
        batch, x = self.stream(T, D)
        return ops.gated_residual_layer_norm_modulate, (x, self.like(x), *(self.values(batch, D) for _ in range(3)))

    def linear(self, N: int, K: int) -> Call:
        return ops.linear, (self.values(1, self.rows, K), self.weight(N, K), self.values(N))

    def grouped_linear(self, linears: int, N: int, K: int) -> Call:
        weights = self.weight(N, K).tensor_split(linears)
        biases = [self.values(len(weight)) for weight in weights]

        def call(x: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
            return tuple(ops.grouped_linear(x, parts[:linears], parts[linears:]))

        return call, (self.values(self.rows, K), *weights, *biases)

    def linear_gelu(self, N: int, K: int) -> Call:
        return ops.linear_gelu, self.linear(N, K)[1]

    def linear_gated_residual(self, N: int, K: int) -> Call:
        return ops.linear_gated_residual, (*self.linear(N, K)[1], self.values(1, self.rows, N), self.values(1, N))

    def mlp(self, hidden: int, N: int, K: int) -> Call:
        fc2 = self.weight(N, hidden), self.values(N)
        return ops.mlp, (*self.linear(hidden, K)[1], *fc2)

    def attention(self, T: int, H: int, d: int) -> Call:
        return ops.attention, (self.values(max(1, self.rows // T), T, 3, H, d),)

    def cross_attention(self, T: int, S: int, H: int, d: int) -> Call:
        batch = max(1, self.rows // T)
        return ops.cross_attention, (self.values(batch, T, H, d), self.values(batch, S, 2, H, d))

    def patch_embed(self, N: int, K: int) -> Call:
        p, channels = (PATCH, K // PATCH**2) if K % PATCH**2 == 0 else (1, K)
        batch, (h, w) = self.images()
        weight = self.weight(N, K).view(N, channels, p, p)
        inputs = self.values(batch, channels, h * p, w * p), weight, self.values(N), self.values(h * w, N)
        return partial(ops.patch_embed, patch_size=p), inputs

    def final_layer(self, N: int, K: int) -> Call:
        p, (batch, grid) = _patch(N), self.images()
        x, modulation = self.values(batch, grid[0] * grid[1], K), (self.values(batch, K), self.values(batch, K))
        inputs = x, *modulation, self.weight(N, K), self.values(N)
        return partial(ops.final_layer, grid=grid, patch_size=p), inputs

    def linear_unpatchify(self, N: int, K: int) -> Call:
        p, (batch, grid) = _patch(N), self.images()
        inputs = self.values(batch, grid[0] * grid[1], K), self.weight(N, K), self.values(N)
        return partial(ops.linear_unpatchify, grid=grid, patch_size=p), inputs

    def unpatchify(self, N: int) -> Call:
        p, (batch, grid) = _patch(N), self.images()
        return partial(ops.unpatchify, grid=grid, patch_size=p), (self.values(batch, grid[0] * grid[1], N),)

    def timestep_embedding(self, features: int) -> Call:
        t = torch.rand(self.rows, generator=self.generator, device=self.device) * 1000
        return partial(ops.timestep_embedding, dim=features), (t,)

    def classifier_free_guidance(self, pixels: int) -> Call:
        return partial(ops.classifier_free_guidance, scale=1.5, channels=1), (self.values(self.rows, 1, 1, pixels),)

    def denoise_update(self, pixels: int) -> Call:
        inputs = [self.values(self.rows, 1, 1, pixels) for _ in range(3)]
        return ops.denoise_update, (*inputs, torch.rand(6, generator=self.generator, device=self.device))


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _patch(features: int) -> int:
    return PATCH if features % PATCH**2 == 0 else 1
