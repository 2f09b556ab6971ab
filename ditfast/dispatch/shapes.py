"""Shapes of op calls, as far as their speed depends on them: the keys of backend selection and of the tuning cache."""

from __future__ import annotations

from typing import NamedTuple

import torch

# The names of ``OpShape.sizes``, by op. D: width; T, S: tokens of a sample; H: heads; d: head dim; N, K: outputs and inputs of
# a linear, or of several linears together; pixels: values of one image.
SIZES = {
    "layer_norm_modulate": ("T", "D"),
    "gated_residual": ("T", "D"),
    "gated_residual_layer_norm_modulate": ("T", "D"),
    "linear": ("N", "K"),
    "grouped_linear": ("linears", "N", "K"),
    "linear_gelu": ("N", "K"),
    "linear_gated_residual": ("N", "K"),
    "mlp": ("hidden", "N", "K"),
    "attention": ("T", "H", "d"),
    "cross_attention": ("T", "S", "H", "d"),
    "patch_embed": ("N", "K"),
    "final_layer": ("N", "K"),
    "linear_unpatchify": ("N", "K"),
    "unpatchify": ("N",),
    "timestep_embedding": ("features",),
    "classifier_free_guidance": ("pixels",),
    "denoise_update": ("pixels",),
}
GROUPED_ROWS = 16  # the most that the kernel of grouped_linear holds in one tile, so that each weight is read once
GROWING = ("T", "S", "pixels")
LARGEST_POWER = 40


class OpShape(NamedTuple):
    """An op and the sizes of its tensors."""

    op: str
    dtype: torch.dtype
    rows: int  # of the op's [rows, ...] input: B * T tokens; B timesteps or images of the last three ops
    sizes: tuple[int, ...]  # as SIZES names them
    training: bool = False  # forward and backward

    def bucket(self) -> OpShape:
        """Round batch- and image-dependent sizes up to powers of two; this is the key of the tuning cache.

        Raises:
            ValueError: there is no such op, or it has other sizes.
        """
        names = size_names(self.op)
        if len(names) != len(self.sizes):
            raise ValueError(f"sizes: got {self.sizes} of {self.op}, expected {', '.join(names)}")
        sizes = (_power(size) if name in GROWING else size for name, size in zip(names, self.sizes, strict=True))
        return OpShape(self.op, self.dtype, _power(self.rows), tuple(sizes), self.training)


def size_names(op: str) -> tuple[str, ...]:
    """Return what the sizes of an op's shape are called.

    Raises:
        ValueError: there is no such op.
    """
    if op not in SIZES:
        raise ValueError(f"op: got {op!r}, expected one of {', '.join(SIZES)}; a new op is added to ditfast/dispatch/shapes.py")
    return SIZES[op]


def _power(size: int) -> int:
    """Return the next power of two, by comparisons: a compiled graph is traced again for another bucket only."""
    low, high = 0, LARGEST_POWER
    while low < high:
        middle = (low + high) // 2
        if size <= 1 << middle:
            high = middle
        else:
            low = middle + 1
    return 1 << low
