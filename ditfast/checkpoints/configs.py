"""A config as it is written beside weights: in a safetensors file's metadata, and in diffusers' config.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import FLAVOURS, DiTConfig
from .errors import CheckpointError, one_line
from .files import read_json

METADATA_KEY = "config"
PRIVATE_KEY = "_ditfast"  # diffusers passes over keys that begin with an underscore
SAVED_BY_DIFFUSERS = "_diffusers_version"
_FIELDS = {field.name for field in dataclasses.fields(DiTConfig)}
_FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "norm_type": "ada_norm_zero",
}
_NUMBERS = {  # with the values that diffusers' class takes for those a file leaves out
    "attention_head_dim": 72,
    "in_channels": 4,
    "num_attention_heads": 16,
    "num_embeds_ada_norm": 1000,
    "num_layers": 28,
    "patch_size": 2,
    "sample_size": 32,
}
_TOLD_BY_NO_SHAPE = ("input_size", "num_heads")


def to_metadata(config: DiTConfig) -> dict[str, str]:
    """One entry: of several, safetensors writes now one first, now another, and files of the same weights would differ."""
    return {METADATA_KEY: json.dumps(dataclasses.asdict(config))}


def from_metadata(metadata: Mapping[str, str]) -> DiTConfig | None:
    """The config in a safetensors file's metadata; None if there is none of ours.

    Raises:
        CheckpointError: it is ours, and wrong.
    """
    try:
        fields = json.loads(metadata.get(METADATA_KEY, "null"))
    except (ValueError, RecursionError):
        return None
    return _parsed(fields) if isinstance(fields, dict) and "depth" in fields and fields.keys() <= _FIELDS else None


def to_diffusers_config(config: DiTConfig) -> dict[str, Any]:
    """diffusers' config.json, which holds ours too, for what diffusers has no word for."""
    return {
        "_class_name": "DiTTransformer2DModel",
        PRIVATE_KEY: dataclasses.asdict(config),
        **_FIXED,
        "attention_head_dim": config.head_dim,
        "dropout": 0.0,
        "in_channels": config.in_channels,
        "norm_eps": config.arithmetic.mlp_norm_eps,
        "norm_num_groups": 32,
        "num_attention_heads": config.num_heads,
        "num_embeds_ada_norm": config.num_classes,
        "num_layers": config.depth,
        "out_channels": config.out_channels,
        "patch_size": config.patch_size,
        "sample_size": config.input_size,
        "upcast_attention": False,
    }


def from_diffusers_config(file: Path) -> DiTConfig:
    """What a diffusers model's config.json says; its flavour is diffusers' with that file's ``norm_eps``.

    A file that ``save_checkpoint`` wrote gives back the model's own flavour, until diffusers saves the model again.

    Raises:
        CheckpointError: it is another architecture's, or contradicts itself.
    """
    written = read_json(file)
    try:
        if PRIVATE_KEY not in written or SAVED_BY_DIFFUSERS in written:
            return _from_public(written)
        config = _parsed(written[PRIVATE_KEY])
        for key, value in to_diffusers_config(config).items():
            if not key.startswith("_") and written.get(key, value) != value:
                raise CheckpointError(f"{key}: got {written[key]!r}, but {PRIVATE_KEY} says {value!r}")
    except CheckpointError as error:
        raise CheckpointError(f"{file.name}: {error}") from error
    return config


def check_agreement(given: DiTConfig, stated: DiTConfig) -> None:
    """Whether ``config=`` says what a file states; shapes are checked by themselves, the flavour is the caller's to choose.

    Raises:
        CheckpointError: it is not; the message names every difference.
    """
    differing = [
        f"{name} {getattr(given, name)!r} where the checkpoint says {getattr(stated, name)!r}"
        for name in _TOLD_BY_NO_SHAPE
        if getattr(given, name) != getattr(stated, name)
    ]
    if differing:
        raise CheckpointError(f"config: got {', '.join(differing)}")


def _from_public(written: Mapping[str, Any]) -> DiTConfig:
    for key, expected in _FIXED.items():
        if written.get(key, expected) != expected:
            raise CheckpointError(f"{key}: got {written[key]!r}, expected {expected!r}")
    number = {key: written.get(key, default) for key, default in _NUMBERS.items()}
    for key, value in number.items():
        if not isinstance(value, int):
            raise CheckpointError(f"{key}: got {value!r}, expected a positive integer")
    channels = number["in_channels"]
    out_channels = channels if written.get("out_channels") is None else written["out_channels"]
    if out_channels not in (channels, 2 * channels):
        raise CheckpointError(f"out_channels: got {out_channels!r}, expected in_channels={channels} or twice as many")
    flavour = FLAVOURS["diffusers"]
    return _parsed(
        {
            "depth": number["num_layers"],
            "hidden_size": number["num_attention_heads"] * number["attention_head_dim"],
            "num_heads": number["num_attention_heads"],
            "patch_size": number["patch_size"],
            "input_size": number["sample_size"],
            "in_channels": channels,
            "num_classes": number["num_embeds_ada_norm"],
            "learn_sigma": out_channels != channels,
            "flavour": flavour._replace(mlp_norm_eps=written.get("norm_eps", flavour.mlp_norm_eps)),
        }
    )


def _parsed(fields: Any) -> DiTConfig:
    try:
        return DiTConfig(**fields)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{METADATA_KEY}: {one_line(str(error))}") from error
