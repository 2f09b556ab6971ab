"""Every op at a model's shapes: its arguments, and the bytes and operations that it cannot do without, counted from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ditfast import DiTConfig, ops

Shapes = dict[str, tuple[int, ...]]
OUTPUT = "output"
CLASSES_AND_TIME = 2  # tokens that cross-attention attends to
UPDATE = 6  # numbers of a solver's step


class Sizes(NamedTuple):
    """Of a model's tensors, by the letters of the ops' docstrings."""

    config: DiTConfig
    B: int

    @property
    def T(self) -> int:
        return self.config.num_tokens

    @property
    def D(self) -> int:
        return self.config.hidden_size

    @property
    def rows(self) -> int:
        return self.B * self.T

    @property
    def heads(self) -> tuple[int, int]:
        return self.config.num_heads, self.D // self.config.num_heads

    @property
    def image(self) -> tuple[int, ...]:
        return self.config.input_shape

    @property
    def prediction(self) -> tuple[int, ...]:
        """[2C, H, W]: noise and variance."""
        channels, *size = self.image
        return (2 * channels, *size)


@dataclass(frozen=True)
class Op:
    """``call(sizes, **tensors)``; a tensor has the case's dtype unless ``fp32`` names it."""

    call: Callable[..., Any]
    shapes: Callable[[Sizes], Shapes]
    macs: Callable[[Sizes], int] = lambda s: 0  # multiply-adds of the forward
    back_macs: float = 2.0  # times them
    kept: tuple[str, ...] = ()  # what the backward reads, named by arguments of that size, or ``OUTPUT``
    frozen: tuple[str, ...] = ()  # arguments that need no gradient
    fp32: tuple[str, ...] = ()
    differentiable: bool = True


def _tokens(s: Sizes, *features: int) -> tuple[int, ...]:
    return (s.B, s.T, *features)


def _linear(s: Sizes, inputs: int, outputs: int, x: str = "x") -> Shapes:
    return {x: _tokens(s, inputs), "weight": (outputs, inputs), "bias": (outputs,)}


def _grid(s: Sizes) -> dict[str, Any]:
    return {"grid": s.config.grid, "patch_size": s.config.patch_size}


def _mlp_shapes(s: Sizes) -> Shapes:
    hidden = s.config.mlp_hidden_size
    weights = {"fc1_weight": (hidden, s.D), "fc1_bias": (hidden,), "fc2_weight": (s.D, hidden), "fc2_bias": (s.D,)}
    return {"x": _tokens(s, s.D), **weights}


def _grouped_linear_shapes(s: Sizes) -> Shapes:
    """The adaLN linears of all blocks, for one row a sample."""
    depth, outputs = s.config.depth, 6 * s.D
    return {"x": (s.B, s.D), "weights": (depth, outputs, s.D), "biases": (depth, outputs)}


def _patch_embed_shapes(s: Sizes) -> Shapes:
    channels, patch = s.config.in_channels, s.config.patch_size
    weights = {"weight": (s.D, channels, patch, patch), "bias": (s.D,), "pos_embed": (1, s.T, s.D)}
    return {"latents": (s.B, *s.image), **weights}


def _denoise_update_shapes(s: Sizes) -> Shapes:
    state = (s.B, *s.image)
    return {"x": state, "output": (2 * s.B, *s.prediction), "noise": state, "update": (UPDATE,), "scale": (s.B,)}


OPS: dict[str, Op] = {
    "layer_norm_modulate": Op(
        lambda s, x, shift, scale: ops.layer_norm_modulate(x, shift, scale),
        lambda s: {"x": _tokens(s, s.D), "shift": (s.B, s.D), "scale": (s.B, s.D)},
        kept=("x", "scale"),
    ),
    "gated_residual": Op(
        lambda s, x, h, gate: ops.gated_residual(x, h, gate),
        lambda s: {"x": _tokens(s, s.D), "h": _tokens(s, s.D), "gate": (s.B, s.D)},
        kept=("h", "gate"),
    ),
    "gated_residual_layer_norm_modulate": Op(
        lambda s, x, h, gate, shift, scale: ops.gated_residual_layer_norm_modulate(x, h, gate, shift, scale),
        lambda s: {name: _tokens(s, s.D) for name in ("x", "h")} | {name: (s.B, s.D) for name in ("gate", "shift", "scale")},
        kept=("x", "h", "gate", "scale"),
    ),
    "linear": Op(
        lambda s, x, weight, bias: ops.linear(x, weight, bias),
        lambda s: _linear(s, s.D, 3 * s.D),
        lambda s: s.rows * s.D * 3 * s.D,
        kept=("x", "weight"),
    ),
    "grouped_linear": Op(
        lambda s, x, weights, biases: tuple(ops.grouped_linear(x, weights.unbind(), biases.unbind())),
        _grouped_linear_shapes,
        lambda s: s.B * s.config.depth * 6 * s.D * s.D,
        differentiable=False,
    ),
    "linear_gelu": Op(
        lambda s, x, weight, bias: ops.linear_gelu(x, weight, bias),
        lambda s: _linear(s, s.D, s.config.mlp_hidden_size),
        lambda s: s.rows * s.D * s.config.mlp_hidden_size,
        kept=("x", "weight", OUTPUT),
    ),
    "linear_gated_residual": Op(
        lambda s, x, weight, bias, residual, gate: ops.linear_gated_residual(x, weight, bias, residual, gate),
        lambda s: _linear(s, s.D, s.D) | {"residual": _tokens(s, s.D), "gate": (s.B, s.D)},
        lambda s: s.rows * s.D * s.D,
        kept=("x", "weight", "gate", OUTPUT),
    ),
    "mlp": Op(
        lambda s, x, fc1_weight, fc1_bias, fc2_weight, fc2_bias: ops.mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias),
        _mlp_shapes,
        lambda s: 2 * s.rows * s.D * s.config.mlp_hidden_size,
        kept=("x", "fc1_weight", "fc2_weight"),
    ),
    "attention": Op(
        lambda s, qkv: ops.attention(qkv),
        lambda s: {"qkv": _tokens(s, 3, *s.heads)},
        lambda s: 2 * s.rows * s.T * s.D,
        back_macs=2.5,  # five products for the forward's two: the scores are computed again
        kept=("qkv", OUTPUT),
    ),
    "cross_attention": Op(
        lambda s, q, kv: ops.cross_attention(q, kv),
        lambda s: {"q": _tokens(s, *s.heads), "kv": (s.B, CLASSES_AND_TIME, 2, *s.heads)},
        kept=("q", "kv", OUTPUT),
    ),
    "patch_embed": Op(
        lambda s, latents, weight, bias, pos_embed: ops.patch_embed(latents, weight, bias, pos_embed, s.config.patch_size),
        _patch_embed_shapes,
        kept=("latents",),
        frozen=("latents", "pos_embed"),
    ),
    "final_layer": Op(
        lambda s, x, shift, scale, weight, bias: ops.final_layer(x, shift, scale, weight, bias, **_grid(s)),
        lambda s: _linear(s, s.D, s.config.patch_out_features) | {"shift": (s.B, s.D), "scale": (s.B, s.D)},
        kept=("x", "scale", "weight"),
    ),
    "linear_unpatchify": Op(
        lambda s, u, weight, bias: ops.linear_unpatchify(u, weight, bias, **_grid(s)),
        lambda s: _linear(s, s.D, s.config.patch_out_features, "u"),
        kept=("u", "weight"),
    ),
    "unpatchify": Op(
        lambda s, x: ops.unpatchify(x, **_grid(s)),
        lambda s: {"x": _tokens(s, s.config.patch_out_features)},
    ),
    "timestep_embedding": Op(
        lambda s, t: ops.timestep_embedding(t), lambda s: {"t": (s.B,)}, fp32=("t",), differentiable=False
    ),
    "classifier_free_guidance": Op(
        lambda s, out: ops.classifier_free_guidance(out, 4.0, s.config.in_channels - 1),
        lambda s: {"out": (2 * s.B, *s.prediction)},
        differentiable=False,
    ),
    "denoise_update": Op(
        lambda s, x, output, noise, update, scale: ops.denoise_update(
            x, output, noise, update, scale, guided_channels=s.image[0]
        ),
        _denoise_update_shapes,
        fp32=("x", "noise", "update", "scale"),
        differentiable=False,
    ),
}


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    """Return an op's results."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


class Work(NamedTuple):
    """What a call has to do, however it is done."""

    moved: int  # bytes
    operations: int  # two a multiply-add; 0 where memory is all that counts


def arguments(op: str, sizes: Sizes, dtype: torch.dtype, device: torch.device, *, backward: bool) -> dict[str, Tensor]:
    """Random ones; leaves of a graph where the backward gives them a gradient. Products' weights keep their inputs' scale."""
    kind, generator = OPS[op], torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in kind.shapes(sizes).items():
        scale = math.prod(shape[1:]) ** -0.5 if name.endswith("weight") else 1.0
        tensor = (scale * torch.randn(shape, generator=generator)).to(device, torch.float32 if name in kind.fp32 else dtype)
        tensors[name] = tensor.requires_grad_(backward and name not in kind.frozen)
    return tensors


def work(op: str, tensors: dict[str, Tensor], outputs: tuple[Tensor, ...], sizes: Sizes, *, backward: bool) -> Work:
    """Each argument read once and each result written once; with the backward also its reads, and the gradients.

    The statistics that norms and attention keep are left out.
    """
    kind = OPS[op]
    results = sum(tensor.nbytes for tensor in outputs)
    moved = sum(tensor.nbytes for tensor in tensors.values()) + results
    macs = float(kind.macs(sizes))
    if backward:
        moved += results  # their gradients
        moved += sum(results if name == OUTPUT else tensors[name].nbytes for name in kind.kept)
        moved += sum(tensor.nbytes for name, tensor in tensors.items() if name not in kind.frozen)
        macs *= 1 + kind.back_macs
    return Work(moved, int(2 * macs))
