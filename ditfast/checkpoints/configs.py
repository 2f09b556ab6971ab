"""A config as it is written beside weights: in safetensors metadata, a key of a ``.pt``, our config.json and diffusers'."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from torch import Tensor

from ..config import FLAVOURS, DiTConfig
from .errors import CheckpointError, one_line
from .files import OFFICIAL_FILE, Stored, read_json
from .trained_for import TRAINED_FOR_KEY, TrainedFor, training_from_json, training_to_json

CONFIG_KEY = "config"
WEIGHTS_KEY = "ema"  # where the official code looks for weights first
PRIVATE_KEY = "_ditfast"  # diffusers passes over keys that begin with an underscore
PRIVATE_TRAINED_FOR_KEY = f"{PRIVATE_KEY}_{TRAINED_FOR_KEY}"
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
_TOLD_BY_NO_SHAPE = ("input_size", "num_heads", "prediction")


def to_metadata(config: DiTConfig, trained_for: TrainedFor | None = None) -> dict[str, str]:
    """Return the metadata of a safetensors file; accelerate and transformers read no file that does not say its format."""
    metadata = {CONFIG_KEY: json.dumps(to_json(config)), "format": "pt"}
    return metadata if trained_for is None else {**metadata, TRAINED_FOR_KEY: json.dumps(training_to_json(trained_for))}


def to_content(state: Mapping[str, Tensor], config: DiTConfig, trained_for: TrainedFor | None = None) -> dict[str, object]:
    """Return what a ``.pt`` file holds: the weights, and the rest in plain values, which every reader of torch loads."""
    content: dict[str, object] = {WEIGHTS_KEY: dict(state), CONFIG_KEY: to_json(config)}
    return content if trained_for is None else {**content, TRAINED_FOR_KEY: training_to_json(trained_for)}


def to_json(config: DiTConfig) -> dict[str, Any]:
    """Return a config's fields as JSON holds them, also those that are tuples."""
    return json.loads(json.dumps(config.as_dict()))


def is_own_content(content: object) -> TypeGuard[Mapping[str, Any]]:
    """True if a file holds what ``to_content`` returned, whose one set of weights is an EMA's or not."""
    keys = content.keys() - {TRAINED_FOR_KEY} if isinstance(content, Mapping) else ()
    return keys == {WEIGHTS_KEY, CONFIG_KEY} and _is_own(content[CONFIG_KEY])  # type: ignore[index]  # a mapping


def stated_config(stored: Stored, layout: str, prediction: str | None = None) -> DiTConfig | None:
    """Return the config that a checkpoint states; None if it states none, or another program's.

    ``prediction`` is what the weights predict if the config does not say; None for epsilon.

    Raises:
        CheckpointError: the config is ours, or diffusers', and wrong.
    """
    beside = stored.config_file
    if layout == "diffusers":
        return _from_metadata(stored.metadata, prediction) if beside is None else _from_config_file(beside, layout, prediction)
    config = _from_metadata(stored.metadata, prediction)
    if config is None and isinstance(stored.content, Mapping) and _is_own(fields := stored.content.get(CONFIG_KEY)):
        config = _parsed(fields, prediction)
    if config is None and beside is not None and stored.file is not None and stored.file.name == OFFICIAL_FILE:
        config = _from_config_file(beside, layout, prediction)
    return config


def stated_training(stored: Stored, layout: str) -> TrainedFor | None:
    """Return what a checkpoint of ours states about its training, if that is right; None if it states nothing."""
    if layout == "diffusers" and stored.config_file is not None:
        written = read_json(stored.config_file)
        fields = None if SAVED_BY_DIFFUSERS in written else written.get(PRIVATE_TRAINED_FOR_KEY)
    elif TRAINED_FOR_KEY in stored.metadata:
        fields = _parsed_json(stored.metadata[TRAINED_FOR_KEY])
    else:
        content = stored.content if isinstance(stored.content, Mapping) else {}
        fields = content.get(TRAINED_FOR_KEY) if _is_own(content.get(CONFIG_KEY)) else None
    return None if fields is None else training_from_json(fields)


def _from_metadata(metadata: Mapping[str, str], prediction: str | None) -> DiTConfig | None:
    """Return the config in a safetensors file's metadata; None if there is none of ours."""
    fields = _parsed_json(metadata.get(CONFIG_KEY, "null"))
    is_part_of_ours = isinstance(fields, dict) and "depth" in fields and fields.keys() <= _FIELDS
    return _parsed(fields, prediction) if is_part_of_ours or _is_own(fields) else None


def _parsed_json(text: str) -> Any:
    """Return a JSON text's value; None for one that is damaged."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def to_diffusers_config(config: DiTConfig, trained_for: TrainedFor | None = None) -> dict[str, Any]:
    """diffusers' config.json, which holds ours too, for what diffusers has no word for."""
    return {
        "_class_name": "DiTTransformer2DModel",
        PRIVATE_KEY: config.as_dict(),
        **({} if trained_for is None else {PRIVATE_TRAINED_FOR_KEY: training_to_json(trained_for)}),
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


def _from_config_file(file: Path, layout: str, prediction: str | None) -> DiTConfig | None:
    """Return what a model's config.json says; None if it is another program's. diffusers' flavour has the file's ``norm_eps``.

    A diffusers file that ``save_checkpoint`` wrote gives back the model's own flavour, until diffusers saves the model again.
    """
    written = read_json(file)
    try:
        if layout == "official":
            return _parsed(written, prediction) if _is_own(written) else None
        if PRIVATE_KEY not in written or SAVED_BY_DIFFUSERS in written:
            return _from_public(written, prediction)
        config = _parsed(written[PRIVATE_KEY], prediction)
        for key, value in to_diffusers_config(config).items():
            if not key.startswith("_") and written.get(key, value) != value:
                raise CheckpointError(f"{key}: got {written[key]!r}, but {PRIVATE_KEY} says {value!r}")
    except CheckpointError as error:
        raise CheckpointError(f"{file.name}: {error}") from error
    return config


def check_agreement(given: DiTConfig, stated: DiTConfig) -> None:
    """Raise CheckpointError, which names every difference, unless ``config=`` says what a file states.

    Shapes are checked by themselves, and the flavour is the caller's to choose.
    """
    differing = [
        f"{name} {getattr(given, name)!r} where the checkpoint says {getattr(stated, name)!r}"
        for name in _TOLD_BY_NO_SHAPE
        if getattr(given, name) != getattr(stated, name)
    ]
    if differing:
        raise CheckpointError(f"config: got {', '.join(differing)}")


def _is_own(fields: object) -> bool:
    """True if fields are a DiTConfig's; other programs share its other names."""
    return isinstance(fields, Mapping) and "flavour" in fields


def _from_public(written: Mapping[str, Any], prediction: str | None) -> DiTConfig:
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
        },
        prediction,
    )


def _parsed(fields: Any, prediction: str | None) -> DiTConfig:
    try:
        return DiTConfig(**(fields if prediction is None else {"prediction": prediction, **fields}))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{CONFIG_KEY}: {one_line(str(error))}") from error
