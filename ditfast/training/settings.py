"""What decides a run's weights, and what does not."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from ..diffusion.flow import PATHS
from ..dtypes import DTYPES

LOSSES = ("hybrid", "mse", "flow")
TIMESTEPS = ("uniform", "importance")
SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True)
class TrainSettings:
    """The recipe; the defaults are the paper's (Peebles & Xie 2022, section 4).

    Args:
        steps: of the optimizer.
        batch: images in a step, over all ranks.
        accumulate: parts into which each rank cuts its share of a step's batch, one forward and backward each.
        seed: of the order of the data and of everything drawn.
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
        flip: mirror every other image (digits never are).
        checkpoint_activations: keep the outputs of a block's products only, and compute the rest again in the backward.
        compile: the model with torch.compile.
        deterministic: on a GPU, only algorithms whose results are the same bits in every run, or an error where there is none;
            slower. On a CPU they always are.
        max_skipped: steps in a row whose loss or gradient may be infinite or NaN; such a step changes no weight.

    Raises:
        ValueError: a field is out of range; the message names it.
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

    def __post_init__(self) -> None:
        for field, least in (("steps", 1), ("batch", 1), ("accumulate", 1), ("seed", 0), ("warm_up", 0), ("max_skipped", 0)):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{field}: got {value!r}, expected an integer, {least} or more")
        choices = {"loss": LOSSES, "path": PATHS, "timesteps": TIMESTEPS, "schedule": SCHEDULES, "dtype": DTYPES}
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}: got {getattr(self, field)!r}, expected one of {', '.join(allowed)}")
        for field in ("rate", "weight_decay"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{field}: got {value!r}, expected a finite number, 0 or more")
        if self.max_norm is not None and not self.max_norm > 0:
            raise ValueError(f"max_norm: got {self.max_norm!r}, expected a positive number, or None")
        object.__setattr__(self, "ema", tuple(self.ema))
        if not self.ema or len(set(self.ema)) < len(self.ema) or not all(0 <= decay < 1 for decay in self.ema):
            raise ValueError(f"ema: got {self.ema}, expected one or more different decays, 0 <= decay < 1")
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate: got {self.accumulate}, expected a divisor of the batch {self.batch}")
        if self.timesteps == "importance" and self.loss == "flow":
            raise ValueError("timesteps: got 'importance', but flow matching's times are no steps; expected 'uniform'")

    def decisive(self, device_type: str) -> dict[str, Any]:
        """The fields that a resumed run on such a device has to share: with a constant rate it may go on for more steps."""
        fields = dataclasses.asdict(self)
        del fields["max_skipped"]
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
            value, least = getattr(self, field.name), 1 if field.name in ("save_every", "keep") else 0
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{field.name}: got {value!r}, expected an integer, {least} or more")


def learning_rate(settings: TrainSettings, step: int) -> float:
    """Of the step that comes after ``step`` steps."""
    rate = settings.rate
    if settings.schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    return rate * min(1.0, (step + 1) / settings.warm_up) if settings.warm_up else rate
