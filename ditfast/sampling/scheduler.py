"""Schedulers of diffusers: a copy to step, as ``set_timesteps`` left the original."""

from __future__ import annotations

import copy
from typing import Any

# What schedulers remember of the steps they took, and what set_timesteps makes of it; lists keep their length, of Nones.
_HISTORY = {
    "_init_size": None,
    "_step_index": None,
    "counter": 0,
    "cur_model_output": 0,
    "cur_sample": None,
    "dt": None,
    "last_noise": None,
    "last_sample": None,
    "lower_order_nums": 0,
    "mid_point_sigma": None,
    "noise_sampler": None,
    "prev_derivative": None,
    "sample": None,
}
_QUEUES = ("model_outputs", "timestep_list")  # as many entries as the solver's order
_LISTS = ("derivatives", "ets")


def unstepped(scheduler: Any) -> Any:
    """Return a copy of a scheduler that has taken no step of its timesteps; the original stays as it is."""
    fresh = copy.copy(scheduler)
    own = vars(fresh)
    own.update({name: value for name, value in _HISTORY.items() if name in own})
    own.update({name: [None] * len(own[name]) for name in _QUEUES if name in own})
    own.update({name: [] for name in _LISTS if name in own})
    if own.get("_begin_index"):
        own["_begin_index"] = 0
    return copy.deepcopy(fresh)  # without the history, whose tensors may belong to a graph and then cannot be copied
