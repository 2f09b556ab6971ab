"""Weights for fine-tuning: a fresh label table for other classes, positions for another latent size."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..argument_checks import check_choice, describe
from ..config import PREDICTIONS, VELOCITY, DiTConfig
from .check import POSITIONS
from .errors import CheckpointError
from .infer import grid_of
from .layouts import positions_like

CHANGEABLE = ("num_classes", "input_size", "class_dropout_prob", "flavour", "prediction")
LABELS = "y_embedder.embedding_table.weight"
LABELS_STD = 0.02  # of a new model's table
_FIELDS = [field.name for field in dataclasses.fields(DiTConfig)]


def check_overrides(overrides: Mapping[str, object]) -> None:
    """Raise TypeError for a name that is no field of a config, and ValueError for a prediction that there is not."""
    for name, value in overrides.items():
        if name not in _FIELDS:
            raise TypeError(
                f"{name}: got {describe(value)}, but load_checkpoint has no such argument, "
                f"expected weights, config, device, dtype, prefix, variant, or one of {', '.join(CHANGEABLE)}"
            )
    if "prediction" in overrides:
        check_choice("prediction", overrides["prediction"], (*PREDICTIONS, VELOCITY))


def overridden(config: DiTConfig, overrides: Mapping[str, Any]) -> DiTConfig:
    """Return the config with some fields replaced.

    Raises:
        CheckpointError: a field would give the weights another meaning or shape.
        ValueError: a value is out of range.
    """
    for name, value in overrides.items():
        stored = getattr(config, name)
        if name not in CHANGEABLE and value != stored:
            raise CheckpointError(
                f"{name}: got {describe(value)}, but the weights are of {stored!r}, which no argument changes, "
                f"expected only {', '.join(CHANGEABLE)} to be others"
            )
    return dataclasses.replace(config, **overrides)


def adapted(state: Mapping[str, Tensor], old: DiTConfig, new: DiTConfig) -> tuple[dict[str, Tensor], list[str]]:
    """Return an official state dict of a changed config, and what is new in it, in words.

    A fresh label table is drawn from torch's global generator as a new model's is; the row for no class, which stands for the
    same in both, is kept. Sine-cosine positions are computed anew, others interpolated bicubically.
    """
    table, table_changes = _label_table(state[LABELS], old, new)
    positions, position_changes = _positions(state[POSITIONS], old, new)
    return {**state, LABELS: table, POSITIONS: positions}, [*table_changes, *position_changes]


def _label_table(table: Tensor, old: DiTConfig, new: DiTConfig) -> tuple[Tensor, list[str]]:
    has_fresh_classes = new.num_classes != old.num_classes
    had_null, has_null = old.has_null_class, new.has_null_class
    if not has_fresh_classes and had_null == has_null:
        return table, []
    classes = _fresh_rows(new.num_classes, table) if has_fresh_classes else table[: old.num_classes]
    null = table[old.num_classes :] if had_null else _fresh_rows(1, table)
    null_row = ("the row for no class kept" if had_null else "a fresh row for no class") if has_null else "no row for no class"
    first = f"a fresh label table of {new.num_classes} classes, not {old.num_classes}" if has_fresh_classes else "labels"
    return torch.cat([classes, null]) if has_null else classes, [f"{first}, {null_row}"]


def _fresh_rows(count: int, like: Tensor) -> Tensor:
    return torch.empty(count, like.shape[1], device=like.device).normal_(std=LABELS_STD).to(like.dtype)


def _positions(positions: Tensor, old: DiTConfig, new: DiTConfig) -> tuple[Tensor, list[str]]:
    if old.grid == new.grid:
        return positions, []
    sizes = f"for a grid of {new.grid[0]} x {new.grid[1]}, not {old.grid[0]} x {old.grid[1]}"
    if grid_of(positions) == old.grid:
        return positions_like(positions, new), [f"sine-cosine positions {sizes}"]
    learned = positions.float().unflatten(1, old.grid).permute(0, 3, 1, 2)  # [1, D, h, w]
    resized = F.interpolate(learned, size=new.grid, mode="bicubic", align_corners=False)
    return resized.flatten(2).transpose(1, 2).to(positions.dtype), [f"interpolated positions {sizes}"]
