"""The number of heads that a training script's saved arguments tell, as no shape of the weights does."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from .pickles import Inert

_KEYS = ("args", "cfg", "config", "hparams", "hyper_parameters", "model_args", "model_config", "model_kwargs")
# Of the parts of nested arguments that are the model's; others may be a VAE's or an encoder's, with heads of its own.
_PARTS = (
    *_KEYS,
    "arch",
    "backbone",
    "denoiser",
    "dit",
    "init_args",
    "kwargs",
    "model",
    "net",
    "network",
    "params",
    "transformer",
)
_HEADS = ("heads", "n_heads", "num_attention_heads", "num_heads")
_DEEPEST = 6


def heads_in_arguments(content: object) -> list[int]:
    """Return the numbers of heads that the arguments in a checkpoint tell, of those that are nested the least deep.

    Args:
        content: of a file; its arguments are a dict, an ``argparse.Namespace`` or an OmegaConf config, perhaps nested.
    """
    level = [content[key] for key in _KEYS if key in content] if isinstance(content, Mapping) else []
    for _ in range(_DEEPEST):
        dicts = [values for values in map(_as_dict, level) if isinstance(values, Mapping)]
        heads = [_as_dict(values.get(name)) for values in dicts for name in _HEADS]
        if found := sorted({number for number in heads if type(number) is int}):
            return found
        level = [values[key] for values in dicts for key in _PARTS if key in values]
    return []


def _as_dict(value: object) -> object:
    """Return a namespace, or a config or node of OmegaConf, as its plain values; others as they are."""
    if isinstance(value, argparse.Namespace):
        return vars(value)
    if isinstance(value, Inert) and isinstance(value.state, Mapping):
        return value.state.get("_content", value.state.get("_val", value.state))
    return value
