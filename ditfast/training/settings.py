"""What decides a run's weights, and what does not."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from ..argument_checks import LARGEST_SEED, as_bool, as_float, as_int, as_list, check_choice
from ..config import PREDICTIONS
from ..diffusion.flow import PATHS
from ..dtypes import DTYPES

LOSSES = ("hybrid", "mse", "flow")
TIMESTEPS = ("uniform", "importance")
LARGEST_INT = 2**63 - 1  # that a tensor holds
SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True)
class TrainSettings:
    """The recipe; the defaults are the paper's (Peebles & Xie 2022, section 4).

    Args:
        steps: of the optimizer.
        batch: images in a step, over all ranks.
        accumulate: parts into which each rank cuts its share of a step's batch, one forward and backward each.
        seed: 0..2^64-1, of the order of the data and of everything drawn.
        loss: ``"hybrid"``, squared error and variational bound (Nichol & Dhariwal 2021); ``"mse"``, squared error only;
            ``"flow"``, the velocity's squared error (SiT).
        path: of flow matching, ``"linear"`` or ``"gvp"``.
        timesteps: ``"uniform"``, or ``"importance"``: in proportion to the root mean square of their latest losses.
        rate: AdamW's learning rate.
        schedule: of the rate: ``"constant"``, or ``"cosine"`` down to 0 at the last step.
        warm_up: steps in which the rate first rises linearly.
        weight_decay: AdamW's.
        max_norm: gradients of a larger norm are scaled down to it; None leaves them.
        dtype: ``"fp32"``; ``"bf16"`` or ``"fp16"``: autocast, over fp32 weights, fp16 with a loss scale.
        ema: decays of the averages of the weights; the first one's are sampled from and exported.
        flip: mirror every other image (digits and datasets of pairs never are).
        checkpoint_activations: keep the outputs of a block's products only, and compute the rest again in the backward.
        compile: the model with torch.compile.
        deterministic: on a GPU, only algorithms whose results are the same bits in every run, or an error where there is none;
            slower. On a CPU they always are.
        max_skipped: steps in a row whose loss or gradient may be infinite or NaN; such a step changes no weight.
        prediction: what the model learns to predict, and the exported file says: ``"epsilon"``, the noise, ``"x0"``, the
            clean image, or ``"v"`` (Salimans & Ho 2022); None for what the model's config says. Flow matching has its own.

    Raises:
        ValueError: a field is out of range; the message names it.
        TypeError: likewise, of the wrong kind.
    """

    steps: int
    batch: int = 256
    accumulate: int = 1
    seed: int = 0
    loss: str = "hybrid"
    path: str = "linear"
    timesteps: str = "uniform"
    rate: float = 1e-4
    schedule: str = "constant"
    warm_up: int = 0
    weight_decay: float = 0.0
    max_norm: float | None = None
    dtype: str = "fp32"
    ema: tuple[float, ...] = (0.9999,)
    flip: bool = True
    checkpoint_activations: bool = False
    compile: bool = False
    deterministic: bool = False
    max_skipped: int = 25
    prediction: str | None = None

    def __post_init__(self) -> None:
        given: dict[str, Any] = {}
        for field, least in (("steps", 1), ("batch", 1), ("accumulate", 1), ("warm_up", 0), ("max_skipped", 0)):
            given[field] = as_int(field, getattr(self, field), least, LARGEST_INT)
        given["seed"] = as_int("seed", self.seed, 0, LARGEST_SEED)
        choices = {"loss": LOSSES, "path": PATHS, "timesteps": TIMESTEPS, "schedule": SCHEDULES, "dtype": DTYPES}
        for field, allowed in choices.items():
            check_choice(field, getattr(self, field), allowed)
        if self.prediction is not None:
            check_choice("prediction", self.prediction, PREDICTIONS)
        for field in ("rate", "weight_decay"):
            given[field] = as_float(field, getattr(self, field), 0)
        if self.max_norm is not None:
            given["max_norm"] = as_float("max_norm", self.max_norm)
            if not given["max_norm"] > 0:
                raise ValueError(f"max_norm: got {self.max_norm!r}, expected a positive number, or None")
        given["ema"] = ema = tuple(as_float("ema", decay) for decay in as_list("ema", self.ema, "decays, such as [0.9999]"))
        if not ema or len(set(ema)) < len(ema) or not all(0 <= decay < 1 for decay in ema):
            raise ValueError(f"ema: got {ema}, expected one or more different decays, 0 <= decay < 1")
        for field in ("flip", "checkpoint_activations", "compile", "deterministic"):
            given[field] = as_bool(field, getattr(self, field))
        for field, value in given.items():
            object.__setattr__(self, field, value)
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate: got {self.accumulate}, expected a divisor of the batch {self.batch}")
        if self.timesteps == "importance" and self.loss == "flow":
            raise ValueError("timesteps: got 'importance', but flow matching's times are no steps; expected 'uniform'")
        if self.prediction is not None and self.loss == "flow":
            raise ValueError(f"prediction: got {self.prediction!r}, but flow matching predicts a velocity; expected None")

    def decisive(self, device_type: str) -> dict[str, Any]:
        """The fields that a resumed run on such a device has to share: with a constant rate it may go on for more steps."""
        fields = dataclasses.asdict(self)
        del fields["max_skipped"], fields["prediction"]  # the model's config says what it predicts
        if device_type == "cpu" or not self.deterministic:  # runs of earlier versions have no such field
            del fields["deterministic"]
        if self.schedule == "constant":
            del fields["steps"]
        return fields


@dataclass(frozen=True)
class RunOptions:
    """What a run does beside its steps; none of it changes a weight.

    Args:
        save_every: steps between checkpoints; there is one after the last step too.
        keep: how many of the latest checkpoints stay.
        sample_every: steps between grids of samples; 0 for none.
        evaluate_every: steps between evaluations; 0 for none.
        workers: processes that read data, beside each rank; 0 reads in the rank itself.
        max_bad_records: different records that may be unreadable; each is named, counted and replaced by its neighbour.

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    save_every: int = 5000
    keep: int = 2
    sample_every: int = 0
    evaluate_every: int = 0
    workers: int = 0
    max_bad_records: int = 100

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            least = 1 if field.name in ("save_every", "keep") else 0
            value = as_int(field.name, getattr(self, field.name), least, LARGEST_INT)
            object.__setattr__(self, field.name, value)


def learning_rate(settings: TrainSettings, step: int) -> float:
    """Of the step that comes after ``step`` steps."""
    rate = settings.rate
    if settings.schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    return rate * min(1.0, (step + 1) / settings.warm_up) if settings.warm_up else rate
