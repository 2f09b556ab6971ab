"""Checks of what a sampler is given: each error names the argument, what came and what was expected."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..argument_checks import LARGEST_SEED, as_float, as_int, as_list, check_type, describe
from ..config import DiTConfig
from ..diffusion.solvers import Step
from ..ops.checks import DTYPES

_A_SOLVERS = "those of a solver, such as ditfast.diffusion.steps(process, 'ddpm')"
_A_SCHEDULER = "a diffusers scheduler whose timesteps are set"


def check_model(model: Any) -> None:
    """Raise unless a model is a ``ditfast.DiT`` or passes its attributes on, as torch.compile's does."""
    if not isinstance(getattr(model, "config", None), DiTConfig) or not hasattr(model, "forward_modulated"):
        came, hint = describe(model), ""
        if isinstance(model, nn.Module):  # perhaps of the same name
            came = f"a {type(model).__module__}.{type(model).__name__}"
            hint = "; ditfast.load_checkpoint(model.state_dict()) makes one of a DiT's weights"
        raise TypeError(f"model: got {came}, expected a ditfast.DiT{hint}")
    weights = model.pos_embed  # which has the dtype and device of all
    if weights.dtype not in DTYPES or weights.is_meta:
        got = f"weights of {weights.dtype} on {weights.device}"
        raise ValueError(f"model: got {got}, expected float32, float16 or bfloat16 on a device with memory: call model.to")


def check_steps(steps: Any) -> None:
    if not as_list("steps", steps, _A_SOLVERS):
        raise ValueError(f"steps: got none, expected {_A_SOLVERS}")
    for step in steps:
        check_type("steps", step, Step, _A_SOLVERS)


def check_scheduler(scheduler: Any) -> None:
    if getattr(scheduler, "timesteps", None) is None or not callable(getattr(scheduler, "step", None)):
        raise TypeError(f"scheduler: got {describe(scheduler)}, expected {_A_SCHEDULER}")
    if getattr(scheduler, "num_inference_steps", "") is None and not getattr(scheduler, "custom_timesteps", False):
        raise ValueError(f"scheduler: got {describe(scheduler)}, expected {_A_SCHEDULER}: call its set_timesteps")


def as_interval(interval: Any) -> tuple[float, float]:
    """Return the ends of a guidance interval, which may be infinite."""
    expected = "a pair of times, the lower first"
    ends = as_list("cfg_interval", interval, expected)
    if len(ends) != 2:
        raise ValueError(f"cfg_interval: got {describe(interval)}, expected {expected}")
    low, high = (end if end in (-math.inf, math.inf) else as_float("cfg_interval", end) for end in ends)
    if low > high:
        raise ValueError(f"cfg_interval: got {describe(interval)}, expected {expected}")
    return low, high


def as_labels(labels: Any, rows: int, device: torch.device) -> Tensor:
    """Return labels [B] as int64 on a device; any integers will do, in a list, an array or a tensor."""
    expected = f"[B] integers 0..{rows - 1}"
    found = [as_int("labels", label, 0) for label in as_list("labels", labels, expected)]
    if found and max(found) >= rows:
        raise ValueError(f"labels: got {min(found)}..{max(found)}, expected 0..{rows - 1}")
    return torch.tensor(found, dtype=torch.int64, device=device)


def as_images(images: Any, count: int) -> list[int]:
    """Return the numbers of images, 0, 1, ... for None."""
    if images is None:
        return list(range(count))
    found = [as_int("images", image, 0, LARGEST_SEED) for image in as_list("images", images, "[B] integers 0..2^64-1")]
    if len(found) != count:
        raise ValueError(f"images: got {len(found)} numbers, expected {count}, one for each label")
    return found


def as_scales(cfg_scale: Any, count: int, device: torch.device) -> Tensor | None:
    """Return guidance scales [B] as fp32 on a device; None where nothing is guided."""
    values = cfg_scale.tolist() if isinstance(cfg_scale, (Tensor, np.ndarray)) else cfg_scale
    if not isinstance(values, (list, tuple)):
        found = [as_float("cfg_scale", values)] * count
    elif len(values) == count:
        found = [as_float("cfg_scale", value) for value in values]
    else:
        raise ValueError(f"cfg_scale: got {describe(values)}, expected a finite number, or one for each of the {count} labels")
    scales = torch.tensor(found, dtype=torch.float32, device=device)
    return None if bool((scales == 1).all()) else scales
