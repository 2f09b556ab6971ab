"""Every op as a function of tensors, with an oracle and the shapes of its operands."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import oracles
import torch
from torch import Tensor

from ditfast import ops

BF16, FP32 = torch.bfloat16, torch.float32


class Sizes(NamedTuple):
    B: int = 2
    side: int = 2  # of the grid of tokens
    heads: int = 2
    D: int = 32


class Case(NamedTuple):
    """An op as a function of tensors, the same in eager PyTorch in a dtype, and the shapes of the tensors."""

    op: Callable[..., Any]
    exact: Callable[..., Any]
    shapes: dict[str, tuple[int, ...]]
    inner: int = 1  # last dimensions that have to be contiguous
    dtype: torch.dtype = BF16
    differentiable: bool = True


P, C = 2, 4


def cases(sizes: Sizes = Sizes()) -> dict[str, Case]:  # noqa: B008
    B, side, H, D = sizes
    T, grid, features, head = side * side, (side, side), P * P * C, 16
    x, vector, image = (B, T, D), (B, D), (B, C, P * side, P * side)
    linear = {"x": x, "weight": (D, D), "bias": (D,)}
    last = {"weight": (features, D), "bias": (features,)}
    ends: dict[str, Any] = {"grid": grid, "patch_size": P}

    def joint(x: Tensor, h: Tensor, *vectors: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        stored = oracles.gated_residual(x, h, vectors[0], dtype)
        return stored, oracles.layer_norm_modulate(stored, *vectors[1:], dtype)

    def update(x: Tensor, output: Tensor, noise: Tensor, update: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        x, output, noise, update, scale = (tensor.to(dtype) for tensor in (x, output, noise, update, scale))
        conditional, other = output.chunk(2)
        guided = other + scale.view(-1, 1, 1, 1) * (conditional - other)
        predicted = torch.cat([guided[:, :3], conditional[:, 3:]], dim=1)
        x0 = (update[0] * x + update[1] * predicted).clamp(-1, 1)
        return update[2] * x0 + update[3] * x + (0.5 * update[4]).exp() * noise

    def grouped(x: Tensor, *parts: Tensor, one: Callable[..., Tensor] | None = None, **dtype: Any) -> Tensor:
        weights, biases = parts[::2], parts[1::2]
        if one is None:
            return torch.cat(ops.grouped_linear(x, weights, biases), dim=1)
        return torch.cat([one(x, *pair, **dtype) for pair in zip(weights, biases, strict=True)], dim=1)

    def features_of(t: Tensor, dtype: torch.dtype) -> Tensor:
        angles = t.to(dtype)[:, None] * torch.exp(-torch.arange(8) * (torch.tensor(1e4).log() / 8)).to(dtype)
        return torch.cat([angles.cos(), angles.sin()], dim=1)

    return {
        "attention": Case(ops.attention, oracles.attention, {"qkv": (B, T, 3, H, head)}, inner=3),
        "cross_attention": Case(
            ops.cross_attention, oracles.cross_attention, {"q": (B, T, H, head), "kv": (B, 3, 2, H, head)}, inner=2
        ),
        "layer_norm_modulate": Case(
            ops.layer_norm_modulate, oracles.layer_norm_modulate, {"x": x, "shift": vector, "scale": x}
        ),
        "gated_residual": Case(ops.gated_residual, oracles.gated_residual, {"x": x, "h": x, "gate": vector}),
        "gated_residual_layer_norm_modulate": Case(
            ops.gated_residual_layer_norm_modulate, joint, {"x": x, "h": x, "gate": x, "shift": vector, "scale": vector}
        ),
        "linear": Case(ops.linear, oracles.linear, linear),
        "grouped_linear": Case(
            grouped,
            partial(grouped, one=oracles.linear),
            {"x": vector, "weights.0": (48, D), "biases.0": (48,), "weights.1": (24, D), "biases.1": (24,)},
        ),
        "linear_gelu": Case(ops.linear_gelu, oracles.linear_gelu, linear),
        "linear_gated_residual": Case(
            ops.linear_gated_residual, oracles.linear_gated_residual, {**linear, "residual": x, "gate": vector}
        ),
        "mlp": Case(
            ops.mlp,
            oracles.mlp,
            {"x": x, "fc1_weight": (48, D), "fc1_bias": (48,), "fc2_weight": (D, 48), "fc2_bias": (D,)},
        ),
        "patch_embed": Case(
            partial(ops.patch_embed, patch_size=P),
            oracles.patch_embed,
            {"latents": image, "weight": (D, C, P, P), "bias": (D,), "pos_embed": (1, T, D)},
        ),
        "unpatchify": Case(
            partial(ops.unpatchify, **ends),
            lambda x, dtype: oracles.unpatchify(x.to(dtype), grid, P),
            {"x": (B, T, features)},
        ),
        "linear_unpatchify": Case(
            partial(ops.linear_unpatchify, **ends), partial(oracles.linear_unpatchify, **ends), {"u": x, **last}
        ),
        "final_layer": Case(
            partial(ops.final_layer, **ends),
            partial(oracles.final_layer, **ends),
            {"x": x, "shift": vector, "scale": vector, **last},
        ),
        "classifier_free_guidance": Case(
            partial(ops.classifier_free_guidance, scale=4.0, channels=3),
            partial(oracles.classifier_free_guidance, scale=4.0, channels=3),
            {"out": (2 * B, *image[1:])},
        ),
        "denoise_update": Case(
            partial(ops.denoise_update, guided_channels=3, clip=True),
            update,
            {"x": image, "output": (2 * B, *image[1:]), "noise": image, "update": (6,), "scale": (B,)},
            dtype=FP32,
            differentiable=False,
        ),
        "timestep_embedding": Case(partial(ops.timestep_embedding, dim=16), features_of, {"t": (B,)}, dtype=FP32),
    }


OPS = tuple(cases())


def outputs_of(call: Callable[..., Any], *operands: Tensor, **options: Any) -> list[Tensor]:
    found = call(*operands, **options)
    return list(found) if isinstance(found, tuple) else [found]
