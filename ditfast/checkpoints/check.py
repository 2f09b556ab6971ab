"""Everything that can be wrong with a state dict, found before anything is built, and told at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn

from ..argument_checks import DTYPES
from ..config import DiTConfig
from .arguments import Heads
from .errors import CheckpointError, listed
from .infer import grid_of, infer_config, outline
from .layouts import expected_shapes

POSITIONS = "pos_embed"


def checked(
    state: Mapping[str, object], layout: str, config: DiTConfig | None, heads: Sequence[Heads] = ()
) -> tuple[dict[str, Tensor], DiTConfig]:
    """Return the state dict, found to be a whole one of that layout and config, and the config.

    Without a config it is read off the state dict; ``heads`` are then the numbers of heads that saved arguments tell.

    Raises:
        CheckpointError: tensors are missing, unexpected, misshapen, not finite, of several dtypes, or positions are another
            grid's; all of them on one line.
    """
    tensors = {name: value for name, value in state.items() if is_plain_tensor(value)}
    why_unknown = ""
    if config is None:
        try:
            config = infer_config(tensors, heads)
        except CheckpointError as error:
            why_unknown = str(error)
    expected = expected_shapes(config or outline(state), layout)
    faults = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "no dense tensor": [name for name in expected if name in state and name not in tensors],
        "misshapen": [] if config is None else _misshapen(tensors, expected),
        "not finite": not_finite(tensors),
        "of another dtype": _wrong_dtypes(tensors),
    }
    told = [f"{fault} {listed(names)}" for fault, names in faults.items() if names]
    if not told and config is not None and POSITIONS in tensors:
        grid = grid_of(tensors[POSITIONS])
        if grid not in (None, config.grid):
            expected_grid = f"expected {config.grid} for input_size={config.input_size}"
            told = [f"{POSITIONS}: got the positions of a grid of {grid}, {expected_grid}"]
    if told or config is None:
        raise CheckpointError("; ".join(told) or why_unknown)
    return tensors, config


def is_plain_tensor(value: object) -> TypeGuard[Tensor]:
    """Dense, with memory behind every value: a file can claim any shape for a few bytes."""
    return (
        isinstance(value, Tensor)
        and type(value) in (Tensor, nn.Parameter)
        and value.layout == torch.strided
        and not value.is_meta
        and value.untyped_storage().nbytes() >= value.nbytes
    )


def weights_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of most of the tensors, of which there are many: one of half precision may keep its positions in fp32."""
    return Counter(value.dtype for value in tensors.values()).most_common(1)[0][0]


def _misshapen(tensors: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> list[str]:
    return [
        f"{name} (got {list(tensors[name].shape)}, expected {list(shape)})"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    return [
        f"{name} ({int((~value.isfinite()).sum())} of {value.numel()} values)"
        for name, value in tensors.items()
        if value.dtype in DTYPES
        and value.numel()
        # Without a mask as large as the tensor: a NaN is both its least and its largest value.
        and not all(extreme.isfinite() for extreme in value.detach().aminmax())
    ]


def _wrong_dtypes(tensors: Mapping[str, Tensor]) -> list[str]:
    if not tensors:
        return []
    common = weights_dtype(tensors)
    expected = common if common in DTYPES else "float32, float16 or bfloat16"
    return [
        f"{name} (got {value.dtype}, expected {expected})"
        for name, value in tensors.items()
        if value.dtype not in DTYPES or (value.dtype != common and name != POSITIONS)
    ]
