"""The weights that a run exports, a plain DiT of the averages of what was trained, and what they were trained for."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .. import reference
from ..checkpoints.errors import listed
from ..checkpoints.source import CheckpointSource, training_of
from ..checkpoints.trained_for import LatentScale, TrainedFor
from ..config import VELOCITY, DiTConfig
from ..model import DiT
from .data import Data
from .errors import RunError
from .settings import TrainSettings

_HINTS = {  # by a part of a parameter's name
    "parametrizations.": "torch.nn.utils.parametrize.remove_parametrizations makes plain weights of them",
    "lora_": "peft's merge_and_unload makes plain layers of them; adapters alone are trained by a loop of your own",
    "base_model.": "peft's merge_and_unload makes plain layers of them; adapters alone are trained by a loop of your own",
    "_orig_mod.": "give the model itself, and TrainSettings(compile=True)",
    "module.": "give the model that it wraps, model.module",
    "weight_g": "torch.nn.utils.remove_weight_norm makes plain weights of them",
    "weight_orig": "torch.nn.utils.prune.remove or remove_spectral_norm makes plain weights of them",
}
_USUAL_HINT = "remove what a DiT does not have, or train in a loop of your own"


def check_exportable(model: nn.Module, config: DiTConfig) -> None:
    """Raise unless a model has the parameters, buffers and layers of the DiT that is exported, and some to train.

    Raises:
        RunError: some are missing, of another shape or dtype, or more than a DiT has, all are frozen, or a layer is replaced.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RunError("model: got one whose parameters are all frozen, expected some with requires_grad=True")
    with torch.device("meta"):
        plain = (reference.DiT if isinstance(model, reference.DiT) else DiT)(config)
    state, expected = model.state_dict(), plain.state_dict()
    if unknown := [name for name in state if name not in expected]:
        hint = next((hint for part, hint in _HINTS.items() if any(part in name for name in unknown)), _USUAL_HINT)
        raise RunError(f"model: got {listed(unknown)}, which the exported DiT has no place for: {hint}")
    if missing := [name for name in expected if name not in state]:
        raise RunError(f"model: got one without {listed(missing)}, expected a DiT of its config")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            came = f"{name} of shape {tuple(tensor.shape)}"
            raise RunError(f"model: got {came}, expected {tuple(expected[name].shape)}, as its config says")
        if tensor.dtype != torch.float32:
            raise RunError(f"model: got {name} of {tensor.dtype}, expected float32 weights: model.float(); dtype= has autocast")
        if tensor.is_meta:
            raise RunError(f"model: got {name} on the meta device, expected weights: model.to_empty and initialize them")
    if isinstance(model, (DiT, reference.DiT)):
        _check_layers(model, plain)


def predicting(model: nn.Module, settings: TrainSettings) -> DiTConfig:
    """Return the model's config with the prediction that it is trained for; a warning says where its checkpoint's is another.

    Raises:
        RunError: a new model of another prediction than the velocity is to be trained as a flow.
    """
    config: DiTConfig = model.config  # type: ignore[assignment]
    source = source_of(model)
    if settings.loss == "flow":
        if source is None and config.prediction not in ("epsilon", VELOCITY):
            raise RunError(f"model: got one that predicts {config.prediction}, but loss 'flow' trains a velocity")
        wanted = VELOCITY
    elif settings.prediction is None and config.prediction == VELOCITY:
        wanted = "epsilon"
    else:
        wanted = settings.prediction or config.prediction
    if source is not None and (changes := _changes(source, config, wanted, settings)):
        warnings.warn(f"{changes} from here on", stacklevel=3)
    return dataclasses.replace(config, prediction=wanted)


def source_of(model: nn.Module) -> CheckpointSource | None:
    """Return where a model's weights came from; None for a new one, and for modules of others."""
    source = getattr(model, "source", None)
    return source if isinstance(source, CheckpointSource) else None


def _changes(source: CheckpointSource, config: DiTConfig, wanted: str, settings: TrainSettings) -> str:
    """Return in words how a loaded model's training changes; nothing where it goes on as it was."""
    if wanted != config.prediction:
        flow = " (loss 'flow')"
        was, now = (f"{name}{flow if name == VELOCITY else ''}" for name in (config.prediction, wanted))
        return f"prediction: the checkpoint's weights predict {was}, and are trained to predict {now}"
    was = training_of(source, config).schedule
    now = schedule_of(settings)
    name = "path" if wanted == VELOCITY else "betas"
    return "" if was == now else f"{name}: the checkpoint's weights follow {was!r}, and are trained to follow {now!r}"


def schedule_of(settings: TrainSettings) -> str:
    """Return the path of flow matching, or the betas of a diffusion."""
    return settings.path if settings.loss == "flow" else "linear"


def trained_for(
    config: DiTConfig, settings: TrainSettings, data: Data, source: CheckpointSource | None, step: int
) -> TrainedFor:
    """Return what a run's weights are trained for; what its data does not tell is that of the checkpoint it began with."""
    before = TrainedFor() if source is None else source.trained_for
    size = getattr(data, "image_size", None)
    names = getattr(data, "class_names", None)
    scale = getattr(data, "latent_scale", None)
    return TrainedFor(
        prediction=config.prediction,
        schedule=schedule_of(settings),
        learned_variance=settings.loss == "hybrid" and config.learn_sigma,
        loss=settings.loss,
        image_size=before.image_size if size is None else (size, size),
        latent_scale=before.latent_scale if scale is None else LatentScale(**scale),
        class_names=tuple(names) if names is not None and len(names) == config.num_classes else before.class_names,
        step=step,
        stated=True,
    )


def exported_state(model: nn.Module, average: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the average of each parameter that is trained, tied ones under every name, and the rest as it is."""
    state = model.state_dict()  # first: FSDP puts the sharded parameters back for it
    first_names = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        state[name] = average.get(first_names[id(parameter)], state[name])
    return state


def _check_layers(model: nn.Module, plain: nn.Module) -> None:
    layers = dict(model.named_modules(remove_duplicate=False))
    for name, layer in plain.named_modules():
        if not isinstance(layers.get(name), type(layer)):
            came = f"a {type(layers[name]).__name__}" if name in layers else "nothing"
            expected = f"a {type(layer).__name__}, as the exported DiT has"
            raise RunError(f"model: got {came} as {name}, expected {expected}: put it back, or train in a loop of your own")
