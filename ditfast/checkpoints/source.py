"""What a loaded model says about itself: which weights, from where, and whose arithmetic they follow."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ..config import FLAVOURS, DiTConfig
from .trained_for import TrainedFor

if TYPE_CHECKING:
    from ..model import DiT

PIPELINE_NULL_CLASS = 1000


class CheckpointSource(NamedTuple):
    """Where ``load_checkpoint`` found a model's weights.

    Attributes:
        path: the file or folder; None for a state dict.
        layout: ``official`` or ``diffusers``.
        weights: ``ema``, ``model`` or, where the checkpoint holds one set without a name, ``unnamed``.
        flavour: whose arithmetic the model follows, in words.
        trained_for: objective and data of the training: what solvers, images and labels depend on.
    """

    path: str | None
    layout: str
    weights: str
    flavour: str
    trained_for: TrainedFor = TrainedFor()

    def __str__(self) -> str:
        place = "a state dict" if self.path is None else self.path
        return f"{self.weights} weights, {self.layout} layout, from {place}; {self.flavour}"


def training_of(source: CheckpointSource | None, config: DiTConfig) -> TrainedFor:
    """Return what a model was trained for: as its source has it, with what is usual where its config says otherwise."""
    return TrainedFor.of_config(config) if source is None else source.trained_for.fitted(config)


def stated_training_of(model: DiT) -> TrainedFor | None:
    """Return what a model's file is to say about its training; None where nobody knows more than the config says."""
    trained_for = training_of(model.source, model.config)
    return trained_for if trained_for.stated or trained_for != TrainedFor.of_config(model.config) else None


def describe_flavour(config: DiTConfig) -> str:
    name = config.flavour if isinstance(config.flavour, str) else "own"
    divisor, eps, _ = config.arithmetic
    null_class = f"null class {config.null_class}" if config.has_null_class else "no null class"
    prediction = "" if config.prediction == "epsilon" else f", predicts {config.prediction}"
    return (
        f"{name} flavour: timestep frequencies over {divisor}, second norm eps {eps:g}, "
        f"guidance on {config.guidance_channels} channels, {null_class}{prediction}"
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
    found = [f"{what} {value:g}, not {our_value:g}" for what, value, our_value in points if value != our_value]
    return ", ".join(found if config.prediction == "epsilon" else [*found, f"prediction epsilon, not {config.prediction}"])
