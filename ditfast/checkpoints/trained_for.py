"""Training objective and data of a model's weights: written beside them, read back, or known from the kind of checkpoint."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..argument_checks import describe
from ..config import PREDICTIONS, VELOCITY, DiTConfig
from .errors import CheckpointError

TRAINED_FOR_KEY = "trained_for"
SCHEDULES = {VELOCITY: ("linear", "gvp"), **dict.fromkeys(PREDICTIONS, ("linear", "cosine"))}


class LatentScale(NamedTuple):
    """Numbers that a VAE's latents were scaled by before training: (latents - shift_factor) * scaling_factor."""

    scaling_factor: float
    shift_factor: float = 0.0


@dataclass(frozen=True)
class TrainedFor:
    """Objective and data that weights were trained with.

    Attributes:
        prediction: ``epsilon``, ``x0`` or ``v`` of a Gaussian diffusion of 1,000 steps, or ``velocity`` of flow matching.
        schedule: the betas of a diffusion, ``linear`` or ``cosine``, or the path of a flow, ``linear`` or ``gvp``; another
            name is a schedule that ditfast's solvers do not have.
        learned_variance: True if the second half of the output's channels is a trained variance.
        loss: ``TrainSettings.loss``; None if unknown.
        image_size: height and width in pixels; None if unknown.
        latent_scale: of the VAE's latents; None for pixels, or if unknown.
        class_names: one for each class; None if unknown.
        step: number of training steps taken; None if unknown.
        stated: True if the checkpoint says all this; False if its kind of checkpoint usually is so.
    """

    prediction: str = "epsilon"
    schedule: str = "linear"
    learned_variance: bool = True
    loss: str | None = None
    image_size: tuple[int, int] | None = None
    latent_scale: LatentScale | None = None
    class_names: tuple[str, ...] | None = None
    step: int | None = None
    stated: bool = False

    @classmethod
    def of_config(cls, config: DiTConfig) -> TrainedFor:
        """Return what is usual for a model of this config that no file describes."""
        return cls(config.prediction, learned_variance=config.learn_sigma and config.prediction != VELOCITY)

    @property
    def is_flow(self) -> bool:
        return self.prediction == VELOCITY

    def fitted(self, config: DiTConfig, stored: DiTConfig | None = None) -> TrainedFor:
        """Return the record of weights that another config now describes, without what no longer holds.

        Args:
            config: says what the model predicts; of another prediction than the record's the objective is the usual one.
            stored: the weights' own, if their shapes were changed to those of ``config``.
        """
        objective = self if self.prediction == config.prediction else TrainedFor.of_config(config)
        image_size = self.image_size if stored is None or config.input_size == stored.input_size else None
        class_names = self.class_names if stored is None or config.num_classes == stored.num_classes else None
        return dataclasses.replace(objective, image_size=image_size, latent_scale=self.latent_scale, class_names=class_names)


def training_to_json(trained_for: TrainedFor) -> dict[str, Any]:
    """Return the fields as JSON and a plain pickle hold them."""
    fields = {name: value for name, value in vars(trained_for).items() if value is not None and name != "stated"}
    if trained_for.latent_scale is not None:
        fields["latent_scale"] = trained_for.latent_scale._asdict()
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def training_from_json(fields: Any) -> TrainedFor:
    """Return what a checkpoint states; fields of later versions are passed over.

    Raises:
        CheckpointError: a field has a value that it cannot have.
    """
    if not isinstance(fields, Mapping):
        raise _wrong("", fields, "a JSON object")
    known = {"prediction": "epsilon", "schedule": "linear", "learned_variance": False, **fields}
    prediction, schedule, variance = known["prediction"], known["schedule"], known["learned_variance"]
    if not isinstance(prediction, str) or prediction not in SCHEDULES:
        raise _wrong("prediction", prediction, f"one of {', '.join(SCHEDULES)}")
    if not isinstance(schedule, str) or not schedule.isprintable():
        raise _wrong("schedule", schedule, f"one of {', '.join(SCHEDULES[prediction])}")
    if not isinstance(variance, bool):
        raise _wrong("learned_variance", variance, "true or false")
    loss, step = fields.get("loss"), fields.get("step")
    if not isinstance(loss, (str, type(None))):
        raise _wrong("loss", loss, "a name")
    if step is not None and not _is_count(step, 0):
        raise _wrong("step", step, "a number of steps")
    readers = {"image_size": _image_size, "latent_scale": _latent_scale, "class_names": _class_names}
    data: dict[str, Any] = {name: read(fields[name]) for name, read in readers.items() if fields.get(name) is not None}
    return TrainedFor(prediction, schedule, variance, loss, step=step, stated=True, **data)


def _image_size(value: Any) -> tuple[int, int]:
    if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(_is_count(side, 1) for side in value):
        raise _wrong("image_size", value, "a height and a width")
    return value[0], value[1]


def _latent_scale(value: Any) -> LatentScale:
    numbers = [value.get(name, 0.0) for name in LatentScale._fields] if isinstance(value, Mapping) else []
    are_finite = all(isinstance(n, (int, float)) and not isinstance(n, bool) and math.isfinite(n) for n in numbers)
    if not numbers or not are_finite or not numbers[0]:
        raise _wrong("latent_scale", value, "finite numbers scaling_factor and shift_factor")
    return LatentScale(*map(float, numbers))


def _class_names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(name, str) for name in value):
        raise _wrong("class_names", value, "a list of names")
    return tuple(value)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _wrong(field: str, value: Any, expected: str) -> CheckpointError:
    name = f"{TRAINED_FOR_KEY}.{field}" if field else TRAINED_FOR_KEY
    return CheckpointError(f"{name}: got {describe(value)}, expected {expected}")
