"""A config from the names and shapes of an official state dict, and from the values of its positions."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..config import HEADS_OF_WIDTH, DiTConfig
from ..model import sincos_positions
from .arguments import Heads
from .errors import CheckpointError

POSITIONS_TOLERANCE = 2.0**-7  # above the rounding of bf16, far below the distance to another grid's positions
_WIDTHS = r"(t_embedder\.mlp\.[02]|blocks\.\d+\.(attn\.proj|mlp\.fc2))\.bias"
_MLP_WIDTHS = r"blocks\.\d+\.mlp\.fc1\.bias"
_ADALN_ROWS = r"blocks\.\d+\.adaLN_modulation\.1\.bias"


def outline(names: Mapping[str, object]) -> DiTConfig:
    """A config of the depth and the design that the names tell, its sizes as small as can be."""
    indices = {int(found[1]) for name in names if (found := re.match(r"blocks\.(\d{1,4})\.", name))}
    # A block may be missing; a lone high number is a stray name, not a depth.
    depth = min(max(indices, default=0) + 1, 2 * len(indices) or 1)
    return DiTConfig(depth=depth, hidden_size=4, num_heads=1, conditioning=_design_by_name(names))


def infer_config(state: Mapping[str, Tensor], heads: Sequence[Heads] = ()) -> DiTConfig:
    """Return the config of an official state dict.

    The label table's last row is taken for the null class, and without ``heads``, the numbers that saved arguments tell, the
    number of heads for the paper's at that width.

    Raises:
        CheckpointError: the shapes contradict each other, or leave something open that only ``config=`` can tell.
    """
    try:
        return _config(state, heads)
    except (ValueError, ZeroDivisionError) as error:
        raise CheckpointError(str(error)) from error


def grid_of(positions: Tensor) -> tuple[int, int] | None:
    """The grid whose sine-cosine positions these [1, T, D] are, up to the rounding of bf16; None if they are no grid's."""
    _, tokens, width = positions.shape
    heights = [h for h in range(1, tokens + 1) if tokens % h == 0]
    for h in sorted(heights, key=lambda h: abs(math.log(h * h / tokens))):
        grid = (h, tokens // h)
        exact = sincos_positions(DiTConfig(hidden_size=width, num_heads=1, patch_size=1, input_size=grid))
        if (positions.cpu().float() - exact.cpu()).abs().max() < POSITIONS_TOLERANCE:
            return grid
    return None


def _config(state: Mapping[str, Tensor], stated_heads: Sequence[Heads]) -> DiTConfig:
    hidden_size = _most_common_length(state, _WIDTHS)
    _, channels, patch, _ = _shape(state, "x_embedder.proj.weight", "[D, C, p, p]")
    rows, _ = _shape(state, "y_embedder.embedding_table.weight", "[classes + 1, D]")
    out_features, _ = _shape(state, "final_layer.linear.weight", "[p*p*C', D]")
    height, width = _grid(state)
    mlp_width = _most_common_length(state, _MLP_WIDTHS)
    ratio = mlp_width / hidden_size  # or the next number, which ``DiTConfig`` truncates to exactly this width
    fields: dict[str, Any] = {
        "depth": outline(state).depth,
        "hidden_size": hidden_size,
        "patch_size": patch,
        "input_size": (height * patch, width * patch),
        "in_channels": channels,
        "num_classes": rows - 1,
        "learn_sigma": _learns_sigma(out_features, channels, patch),
        "mlp_ratio": ratio if int(hidden_size * ratio) == mlp_width else math.nextafter(ratio, math.inf),
        "conditioning": _design(state, hidden_size),
    }
    heads = HEADS_OF_WIDTH.get(hidden_size) if not stated_heads else stated_heads[0]
    unknown = []
    if why := _why_no_heads(hidden_size, stated_heads):
        unknown.append(f"num_heads: {why}")
    if fields["conditioning"] == "adaln":
        unknown.append(
            "conditioning: unknown, as 4 adaLN vectors a block may be the paper's shifts and scales, or scales and gates "
            "without shifts, which ditfast does not compute; for the former"
        )
    if unknown:
        call = ", ".join(f"{name}={value!r}" for name, value in fields.items())
        raise CheckpointError(f"{'; '.join(unknown)}; give config=DiTConfig(num_heads={'...' if why else heads}, {call})")
    return DiTConfig(num_heads=heads, **fields)  # type: ignore[arg-type]  # no heads are a reason above


def _why_no_heads(width: int, stated: Sequence[Heads]) -> str:
    """Return why the number of heads is unknown; empty if it is known."""
    if len(stated) > 1:
        return f"the saved arguments say {' and '.join(map(str, stated))}"
    for heads in stated:
        if isinstance(heads, str):
            return f"the saved arguments say {heads}, expected a whole number that divides the width {width}"
        if heads < 1 or width % heads:
            return f"the saved arguments say {heads}, which does not divide the width {width}"
    if stated or width in HEADS_OF_WIDTH:
        return ""
    known = ", ".join(map(str, HEADS_OF_WIDTH))
    return f"unknown, as no shape tells it and the width {width} is none of the paper's ({known})"


def _shape(state: Mapping[str, Tensor], name: str, expected: str) -> tuple[int, ...]:
    if name not in state:
        raise CheckpointError(f"missing {name}")
    shape = tuple(state[name].shape)
    if len(shape) != expected.count(",") + 1:
        raise CheckpointError(f"{name}: got shape {shape}, expected {expected}")
    return shape


def _most_common_length(state: Mapping[str, Tensor], pattern: str) -> int:
    """By vote, so that a single misshapen tensor is reported as one."""
    lengths = Counter(value.numel() for name, value in state.items() if re.fullmatch(pattern, name))
    if not lengths:
        raise CheckpointError(f"missing every {pattern}")
    return lengths.most_common(1)[0][0]


def _grid(state: Mapping[str, Tensor]) -> tuple[int, int]:
    _, tokens, _ = _shape(state, "pos_embed", "[1, T, D]")
    side = math.isqrt(tokens)
    grid = grid_of(state["pos_embed"]) or ((side, side) if side * side == tokens else None)
    if grid is None:
        raise CheckpointError(
            f"input_size: unknown, as pos_embed holds {tokens} positions, which are neither a square grid "
            "nor the sine-cosine positions of any other; give config="
        )
    return grid


def _learns_sigma(out_features: int, channels: int, patch: int) -> bool:
    plain = patch * patch * channels
    if out_features not in (plain, 2 * plain):
        raise CheckpointError(
            f"final_layer.linear.weight: got {out_features} rows, expected {plain}, or {2 * plain} with learned variances, "
            f"for {channels} channels in patches of {patch} x {patch}"
        )
    return out_features == 2 * plain


def _design_by_name(names: Mapping[str, object]) -> str:
    if any(re.fullmatch(_ADALN_ROWS, name) for name in names):
        return "adaln_zero"
    return "cross_attention" if any(".cross_attn." in name for name in names) else "in_context"


def _design(state: Mapping[str, Tensor], width: int) -> str:
    design = _design_by_name(state)
    if design != "adaln_zero":
        return design
    rows = _most_common_length(state, _ADALN_ROWS)
    if rows not in (4 * width, 6 * width):
        raise CheckpointError(f"adaLN_modulation: got {rows} rows a block, expected 6 or 4 times the width {width}")
    return "adaln_zero" if rows == 6 * width else "adaln"
