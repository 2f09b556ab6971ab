"""What an op is asked to do, as far as its speed depends on it: what predictions are made for, and tuning remembers."""

from __future__ import annotations

from typing import NamedTuple

import torch

# What ``Problem.sizes`` holds, by op. D: width; T, S: tokens of a sample; H: heads; d: head dim; N, K: outputs and inputs of a
# linear; pixels: values of one image.
SIZES = {
    "layer_norm_modulate": ("T", "D"),
    "gated_residual": ("T", "D"),
    "gated_residual_layer_norm_modulate": ("T", "D"),
    "linear": ("N", "K"),
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
GROWING = ("T", "S", "pixels")
LARGEST_POWER = 40


class Problem(NamedTuple):
    op: str
    dtype: torch.dtype
    rows: int  # of the op's [rows, ...] input: B * T tokens; B timesteps or images of the last three ops
    sizes: tuple[int, ...]  # as SIZES names them
    training: bool = False  # forward and backward

    def bucket(self) -> Problem:
        """What stands for this problem in a choice: all that grows with the batch or the image is the next power of two."""
        names = SIZES[self.op]
        sizes = (_power(size) if name in GROWING else size for name, size in zip(names, self.sizes, strict=True))
        return Problem(self.op, self.dtype, _power(self.rows), tuple(sizes), self.training)


def _power(size: int) -> int:
    """By comparisons, so that a compiled graph of any batch size is traced again for another bucket only."""
    low, high = 0, LARGEST_POWER
    while low < high:
        middle = (low + high) // 2
        if size <= 1 << middle:
            high = middle
        else:
            low = middle + 1
    return 1 << low
