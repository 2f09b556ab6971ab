"""Checks of grids and patch sizes, for the ops at the model's two ends."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..argument_checks import check_integer, wrong_type


def check_grid(x: Tensor, grid: tuple[int, int], features: int, patch_size: int) -> None:
    """Raise unless tokens x [B, T, ...] fill the grid, each with ``features`` values of a patch."""
    check_integer("patch_size", patch_size, 1)
    if not isinstance(grid, Sequence) or isinstance(grid, str):
        raise wrong_type("grid", grid, "(h, w)")
    for side in grid:
        check_integer("grid", side)
    if len(grid) != 2 or grid[0] * grid[1] != x.shape[1] or min(grid) < 0:
        raise ValueError(
            f"grid: got {tuple(grid)}, expected (h, w) with h * w = {x.shape[1]} tokens, for tokens {tuple(x.shape)}"
        )
    if features % patch_size**2:
        raise ValueError(f"patch_size: got {patch_size}, expected one whose square divides the {features} values of a token")
