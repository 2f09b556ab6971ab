"""What a loaded model says about itself: which weights, from where, and whose arithmetic they follow."""

from __future__ import annotations

from typing import NamedTuple

from ..config import FLAVOURS, DiTConfig

PIPELINE_NULL_CLASS = 1000


class CheckpointSource(NamedTuple):
    """Where ``load_checkpoint`` found a model's weights.

    Attributes:
        path: the file or folder; None for a state dict.
        layout: ``official`` or ``diffusers``.
        weights: ``ema``, ``model`` or, where the checkpoint holds one set without a name, ``unnamed``.
        flavour: whose arithmetic the model follows, in words.
    """

    path: str | None
    layout: str
    weights: str
    flavour: str

    def __str__(self) -> str:
        place = "a state dict" if self.path is None else self.path
        return f"{self.weights} weights, {self.layout} layout, from {place}; {self.flavour}"


def describe_flavour(config: DiTConfig) -> str:
    name = config.flavour if isinstance(config.flavour, str) else "own"
    divisor, eps, _ = config.arithmetic
    null_class = f"null class {config.null_class}" if config.class_dropout_prob else "no null class"
    return (
        f"{name} flavour: timestep frequencies over {divisor}, second norm eps {eps:g}, "
        f"guidance on {config.guidance_channels} channels, {null_class}"
    )


def differences(config: DiTConfig, layout: str) -> str:
    """What the code that a layout belongs to computes otherwise than a model of this config; empty if nothing.

    The second norm's epsilon is no difference in diffusers: its config.json says it.
    """
    ours, theirs = config.arithmetic, FLAVOURS[layout]
    all_channels = config.in_channels
    guided = all_channels if theirs.guidance_channels is None else min(theirs.guidance_channels, all_channels)
    points: list[tuple[str, float, float]] = [
        ("timestep frequencies over", theirs.timestep_frequency_divisor, ours.timestep_frequency_divisor),
        ("guided channels", guided, config.guidance_channels),
    ]
    if layout == "official":
        points.append(("second norm eps", theirs.mlp_norm_eps, ours.mlp_norm_eps))
    else:
        points.append(("null class", PIPELINE_NULL_CLASS, config.null_class))
    return ", ".join(f"{what} {value:g}, not {our_value:g}" for what, value, our_value in points if value != our_value)
