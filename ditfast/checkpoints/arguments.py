"""Facts in a training script's saved arguments that no shape of the weights tells: the number of heads, SiT's path."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from typing import TypeAlias

from torch import Tensor

from ..argument_checks import describe
from .pickles import Inert

Heads: TypeAlias = int | str  # a number, or in words what cannot be read as one

# Of the parts of nested arguments that are the model's; others may be a VAE's or an encoder's, with heads of its own.
_PARTS = {
    *("args", "arguments", "cfg", "conf", "config", "configs", "hparams", "hyper_parameters", "init_args", "kwargs"),
    *("model_args", "model_cfg", "model_config", "model_kwargs", "model_params", "opt", "options", "params", "settings"),
    *("arch", "backbone", "denoiser", "dit", "model", "net", "network", "transformer"),
}
_HEADS = {"heads", "n_head", "n_heads", "nhead", "num_attention_heads", "num_attn_heads", "num_head", "num_heads"}
_HEAD_DIMS = {"attention_head_dim", "dim_head", "head_dim"}
_DEEPEST = 7


def heads_in_arguments(content: object, metadata: Mapping[str, str], width: int) -> list[Heads]:
    """Return the numbers of heads that the arguments in a checkpoint tell, of those that are nested the least deep.

    Arguments are beside the weights, or a dict, an ``argparse.Namespace``, an OmegaConf config or JSON, perhaps nested. The
    width of a head divides the model's ``width``.
    """
    for items in _levels(content, metadata):
        heads, dims = (
            {number for name, value in items if name in names and (number := _number(value)) is not None}
            for names in (_HEADS, _HEAD_DIMS)
        )
        heads = heads or {_heads_of(dim, width) for dim in dims}
        if heads:
            return sorted(heads, key=lambda number: (isinstance(number, str), number))
    return []


def flow_path_in_arguments(content: object, metadata: Mapping[str, str]) -> str | None:
    """Return the path of flow matching, ``linear`` or ``gvp``, that SiT's arguments in a checkpoint tell; None of others.

    REPA's, in lower case, are of a velocity from the image to the noise, which has no solver here.
    """
    for items in _levels(content, metadata):
        values = {name: value for name, value in items if isinstance(value, str)}
        if "path_type" in values:
            predicts_velocity = values.get("prediction", "velocity") == "velocity"
            return {"Linear": "linear", "GVP": "gvp"}.get(values["path_type"]) if predicts_velocity else None
    return None


def _levels(content: object, metadata: Mapping[str, str]) -> Iterator[list[tuple[str, object]]]:
    """Yield names and values of a checkpoint and its metadata, then of the arguments in them, and so on."""
    level: list[object] = [content, metadata]
    for _ in range(_DEEPEST):
        items = [item for values in map(_plain, level) if isinstance(values, Mapping) for item in _by_name(values)]
        yield items
        level = [value for name, value in items if name in _PARTS]


def _by_name(values: Mapping[object, object]) -> list[tuple[str, object]]:
    return [(name.lower().replace("-", "_"), value) for name, value in values.items() if isinstance(name, str)]


def _plain(value: object) -> object:
    """Return a namespace, JSON, or a config or node of OmegaConf, as its plain values; others as they are."""
    if isinstance(value, argparse.Namespace):
        return vars(value)
    if isinstance(value, Inert) and isinstance(value.state, Mapping):
        return value.state.get("_content", value.state.get("_val", value.state))
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _number(value: object) -> Heads | None:
    """Return a number, or in words what stands for one; None for what is something else."""
    value = _plain(value)
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta:
        value = value.item()
    if isinstance(value, Inert):
        return f"a {value.type_name}"
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return int(value) if int(value) == float(value) else describe(value)
    except (ValueError, OverflowError):  # an interpolation, or not finite
        return describe(value)


def _heads_of(dim: Heads, width: int) -> Heads:
    return width // dim if isinstance(dim, int) and dim > 0 and width % dim == 0 else f"heads of {dim} channels"
