"""Schedulers of diffusers: a copy to step, as ``set_timesteps`` left the original."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..argument_checks import describe
from ..checkpoints.errors import one_line
from ..config import VELOCITY

PREDICTION_TYPES = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}  # diffusers' names
EXPECTED = "a diffusers scheduler whose timesteps are set"
_STEP_INPUTS = ("the model's output", "a time", "the latents")
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

# What schedulers remember of the steps they took, and what set_timesteps makes of it; lists keep their length, of Nones.
_HISTORY = {
    **dict.fromkeys(("counter", "cur_model_output", "lower_order_nums"), 0),
    **dict.fromkeys(("_init_size", "_step_index", "cur_sample", "dt", "last_noise", "last_sample")),
    **dict.fromkeys(("mid_point_sigma", "noise_sampler", "prev_derivative", "sample")),
}
_QUEUES = ("model_outputs", "timestep_list")  # as many entries as the solver's order
_LISTS = ("derivatives", "ets")


def check_scheduler(scheduler: Any, prediction: str) -> None:
    """Raise unless a scheduler's timesteps are set, and its step takes a model's output, a time and the latents alone.

    It has to say the same ``prediction`` as the model, and may say nothing where that is epsilon.

    Raises:
        TypeError: no scheduler.
        ValueError: one that cannot be stepped so, or reads another prediction, as all of diffusers do of a velocity.
    """
    step = getattr(scheduler, "step", None)
    if getattr(scheduler, "timesteps", None) is None or not callable(step):
        raise TypeError(f"scheduler: got {describe(scheduler)}, expected {EXPECTED}")
    required = [p.name for p in inspect.signature(step).parameters.values() if p.default is p.empty and p.kind not in _VARIADIC]
    timesteps = scheduler.timesteps
    are_set = isinstance(timesteps, (Tensor, np.ndarray)) and timesteps.ndim == 1 and len(timesteps) > 0
    if len(required) > len(_STEP_INPUTS) or not are_set:
        needs = f", whose step takes {', '.join(required)}" if len(required) > len(_STEP_INPUTS) else ""
        raise ValueError(
            f"scheduler: got {describe(scheduler)}{needs}, expected {EXPECTED}, which takes {', '.join(_STEP_INPUTS)}"
        )
    if _is_unset(scheduler):
        raise ValueError(f"scheduler: got {describe(scheduler)}, expected {EXPECTED}: call its set_timesteps")
    settings = getattr(scheduler, "config", None)
    if prediction == VELOCITY:
        if hasattr(settings, "num_train_timesteps"):  # diffusers' own; one of the caller's may well take times in [0, 1]
            why = "as the model predicts a velocity, at times from 0 (noise) to 1: solver='euler', 'heun' or 'sde'"
            raise ValueError(f"scheduler: got {describe(scheduler)}, expected none of diffusers', {why}")
        return
    came, expected = getattr(settings, "prediction_type", None), PREDICTION_TYPES[prediction]
    if came != expected and (prediction != "epsilon" or came in PREDICTION_TYPES.values()):
        hint = f"{type(scheduler).__name__}.from_config(scheduler.config, prediction_type={expected!r})"
        raise ValueError(f"scheduler: got prediction_type {came!r}, expected {expected!r}, as the model predicts: {hint}")


def unstepped(scheduler: Any, first: int = 0) -> Any:
    """Return a copy of a scheduler that has taken no step, to be stepped from its ``first`` timestep; the original stays.

    Raises:
        ValueError: a scheduler that steps from its first timestep only.
    """
    fresh = copy.copy(scheduler)
    own = vars(fresh)
    own.update({name: value for name, value in _HISTORY.items() if name in own})
    own.update({name: [None] * len(own[name]) for name in _QUEUES if name in own})
    own.update({name: [] for name in _LISTS if name in own})
    if own.get("_begin_index"):
        own["_begin_index"] = 0
    fresh = copy.deepcopy(fresh)  # without the history, whose tensors may belong to a graph and then cannot be copied
    if first and hasattr(fresh, "set_begin_index"):
        fresh.set_begin_index(first)
    elif first and own.keys() & {*_HISTORY, *_QUEUES, *_LISTS}:
        raise ValueError(f"start_time: got one, but {describe(scheduler)} has a history, and steps from its first time only")
    return fresh


def set_timesteps(scheduler: Any, num_steps: int) -> Any:
    """Return a copy of a scheduler whose timesteps are set; raise ValueError if that needs more than a number."""
    fresh = copy.deepcopy(scheduler)
    try:
        fresh.set_timesteps(num_steps)
    except Exception as error:  # each scheduler has its own
        reason = f"its set_timesteps({num_steps}) raised {type(error).__name__}: {one_line(str(error))}"
        raise ValueError(f"scheduler: got {describe(scheduler)}, but {reason}; call it, and leave num_steps out") from error
    return fresh


def step_scheduler(scheduler: Any, output: Tensor, t: Tensor, x: Tensor, options: Mapping[str, Any]) -> Tensor:
    """Return the latents after a step, fp32.

    Raises:
        ValueError: the scheduler takes other inputs than these, or returns something else than latents.
    """
    try:
        stepped = scheduler.step(output, t, x, **options).prev_sample.float()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # each scheduler has its own
        reason = f"{type(error).__name__}: {one_line(str(error))}"
        raise ValueError(f"scheduler: got {describe(scheduler)}, whose step raised {reason}") from error
    if stepped.shape != x.shape:
        got = f"{describe(scheduler)}, whose step returned shape {tuple(stepped.shape)}"
        raise ValueError(f"scheduler: got {got}, expected {tuple(x.shape)}")
    return stepped


def _is_unset(scheduler: Any) -> bool:
    """True if a scheduler still has the timesteps of training, which some begin with."""
    if getattr(scheduler, "custom_timesteps", False):
        return False
    if hasattr(scheduler, "num_inference_steps"):
        return scheduler.num_inference_steps is None
    return len(scheduler.timesteps) == getattr(getattr(scheduler, "config", None), "num_train_timesteps", None)
