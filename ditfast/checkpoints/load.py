"""From a file, a folder or a state dict to a fast model, or to one error."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..argument_checks import check_choice, check_type, describe
from ..config import DiTConfig
from ..devices import as_device
from ..dtypes import as_dtype
from ..model import DiT
from ..pretrained import PretrainedMixin
from .adapt import adapted, check_overrides, overridden
from .arguments import Heads, heads_in_arguments
from .check import POSITIONS, checked, is_plain_tensor, not_finite, weights_dtype
from .configs import WEIGHTS_KEY, check_agreement, is_own_content, stated_config, stated_training
from .errors import CheckpointError, listed
from .files import Stored, read
from .kinds import usual_training
from .layouts import find_layout, to_official
from .source import CheckpointSource, describe_flavour
from .trained_for import TrainedFor
from .wrappers import WEIGHTS, choose_weights, leave_out, strip_prefix, strip_wrappers, under_prefix

logger = logging.getLogger("ditfast")
M = TypeVar("M", bound=PretrainedMixin)


def load_checkpoint(
    path_or_state_dict: str | os.PathLike[str] | Mapping[str, object],
    *,
    weights: str = "auto",
    config: DiTConfig | None = None,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | str | None = None,
    prefix: str | None = None,
    variant: str | None = None,
    **overrides: Any,
) -> DiT:
    """Return a fast DiT from existing weights, in eval mode.

    Reads the official layout (also SiT's) and diffusers', with the prefixes that wrappers of modules put in, and under a common
    prefix such as ``model.``. What the model follows is in ``model.source``, and is logged. Weights in float64 are rounded to
    float32, and heads that only training needs (of REPA and SRA) are left out, both with a warning. Positions kept in a wider
    dtype than the weights are rounded to theirs.

    Args:
        path_or_state_dict: a file written by ``torch.save`` or safetensors; a folder of ``save_pretrained``, of a diffusers
            model, or of a pipeline with one; a training run's folder or one of its checkpoints, of which ``auto`` takes the
            EMA; or a state dict, which stays as it is.
        weights: ``ema`` or ``model`` of a training checkpoint; ``auto`` takes the EMA if there is one.
        config: what the weights are of, where they do not tell: the heads, where neither the arguments that a training script
            saved tell them nor the width is one of the paper's (384 means 6 heads, 768 means 12, 1024 and 1152 mean 16); the
            design of 4 adaLN vectors a block; the latent size of a diffusers state dict without its config.json; a label table
            without a row for no class (by itself the last row is taken for that). They are checked against it; its flavour is
            the model's, and so is its prediction where the checkpoint states none.
        device: of the model; None for the CPU.
        dtype: of the model, or its name (``"bf16"``); None for the one that the weights are stored in.
        prefix: of the names to take out of a larger state dict (``"model.dit."``); None finds the one that there is.
        variant: of a diffusers folder's weights, such as ``fp16``; None for those without a variant's name.
        overrides: for fine-tuning, ``num_classes`` (a fresh label table, which keeps the row for no class), ``input_size``
            (sine-cosine positions are computed anew, others interpolated), ``class_dropout_prob``, ``flavour`` and
            ``prediction`` (of a checkpoint that states none). What is fresh is said in a warning. Other fields of the config
            may only say what the weights are, such as ``num_heads``.

    Raises:
        CheckpointError: a file that cannot be read, is damaged, holds code or no DiT, lacks tensors or what is asked of it.
        ValueError: ``weights`` is none of these, ``variant`` no name, or a device or dtype that there is not.
        TypeError: an argument of the wrong kind; the message names it.
    """
    check_type("path_or_state_dict", path_or_state_dict, (str, os.PathLike, Mapping), "a path or a state dict")
    check_choice("weights", weights, WEIGHTS)
    check_type("config", config, (DiTConfig, type(None)), "a ditfast.DiTConfig or None")
    if variant is not None and not (isinstance(variant, str) and re.fullmatch(r"[\w-]+", variant)):
        raise ValueError(f"variant: got {variant!r}, expected a name such as 'fp16', or None")
    check_type("prefix", prefix, (str, type(None)), "the beginning of names, or None")
    check_overrides(overrides)
    to_device = torch.device("cpu") if device is None else as_device("device", device)
    to_dtype = None if dtype is None else as_dtype("dtype", dtype)
    path = None if isinstance(path_or_state_dict, Mapping) else os.fspath(path_or_state_dict)
    place = "state dict" if path is None else path
    try:
        if variant is not None and (path is None or not Path(path).is_dir()):
            raise CheckpointError(f"variant: got {variant!r}, expected a diffusers folder, which has variants")
        stored = Stored(path_or_state_dict, {}, None) if path is None else read(Path(path), variant, weights)
        content = stored.content
        if weights == "auto" and is_own_content(content):
            content = content[WEIGHTS_KEY]
        chosen, named = choose_weights(content, weights)
        state = strip_wrappers(named)
        if prefix is not None:
            state = under_prefix(state, prefix)
        layout, common_prefix = find_layout(state)
        state, left_out = leave_out(strip_prefix(state, common_prefix))
        if left_out:
            warnings.warn(f"{place}: left out, as they are no weights of a DiT: {listed(left_out)}", stacklevel=2)
        state, rounded = _rounded(state)
        if rounded:
            warnings.warn(f"{place}: its float64 weights are rounded to float32", stacklevel=2)
        asked = overrides.get("num_heads") if config is None else None
        heads = _stated_heads(stored, state, asked) if layout == "official" else []
        training = stated_training(stored, layout) or usual_training(stored, layout, path)
        known = _known_config(stored, layout, config, heads, overrides.get("prediction"), training)
        tensors, config = checked(state, layout, known, heads)
        if known is None and training is not None:
            config = dataclasses.replace(config, prediction=training.prediction)
        official = tensors if layout == "official" else to_official(tensors, config)
        config, stored_config = overridden(config, overrides), config
        official, changes = adapted(official, stored_config, config)
        if changes:
            warnings.warn(f"{place}: {'; '.join(changes)}", stacklevel=2)
        model = _build(official, config, to_device, to_dtype or weights_dtype(official))
    except CheckpointError as error:
        raise CheckpointError(f"{place}: {error}") from error
    path = path if stored.place is None else str(stored.place)
    trained_for = TrainedFor.of_config(config) if training is None else training.fitted(config, stored_config)
    model.source = CheckpointSource(path, layout, chosen, describe_flavour(config), trained_for)
    logger.info("%s", model.source)
    return model


def as_subclass(model: DiT, cls: type[M]) -> M:
    """Return the model as one of a subclass, whose own parameters stay as its ``__init__`` left them, with a warning."""
    if isinstance(model, cls):
        return model
    with torch.device("cpu"):
        other = cls(model.config)
    fresh, _ = other.load_state_dict(model.state_dict(), strict=False, assign=True)
    if fresh:
        warnings.warn(f"{cls.__name__}: not in the checkpoint, so fresh: {listed(fresh)}", stacklevel=3)
    other.source = model.source
    return other.to(model.device, model.dtype).eval()


def _known_config(
    stored: Stored,
    layout: str,
    given: DiTConfig | None,
    heads: Sequence[Heads],
    prediction: str | None,
    training: TrainedFor | None,
) -> DiTConfig | None:
    """Return the one given, else the one that the checkpoint states; None leaves it to the shapes.

    ``prediction`` is the caller's; ``training`` is the checkpoint's own record, or that of its kind.
    """
    recorded = None if training is None else training.prediction
    if training is not None and training.stated:
        if given is not None and prediction is not None:
            given = dataclasses.replace(given, prediction=prediction)
    else:
        if given is not None and given.prediction != "epsilon":
            recorded = given.prediction
        recorded = prediction or recorded
        if given is not None:
            given = dataclasses.replace(given, prediction=recorded or given.prediction)
    stated = stated_config(stored, layout, recorded)
    if stated is not None and prediction not in (None, stated.prediction):
        raise CheckpointError(f"prediction: got {prediction!r}, but the checkpoint says {stated.prediction!r}")
    if given is not None and stated is not None:
        check_agreement(given, stated)
    elif given is not None and heads and given.num_heads not in heads and all(isinstance(told, int) for told in heads):
        told = " or ".join(map(str, heads))
        raise CheckpointError(f"config: got num_heads {given.num_heads} where the checkpoint says {told}")
    known = given or stated
    if known is None and layout == "diffusers":
        raise CheckpointError(
            "input_size: unknown, as diffusers' layout stores no positions; keep its config.json beside it, or give config="
        )
    if known is not None and layout == "diffusers" and known.conditioning != "adaln_zero":
        raise CheckpointError(
            f"config: got conditioning {known.conditioning!r}, expected 'adaln_zero', as in diffusers' layout"
        )
    return known


def _stated_heads(stored: Stored, state: Mapping[str, object], asked: object) -> list[Heads]:
    """Return what the checkpoint tells, else what the caller does."""
    weight = state.get("final_layer.linear.weight")
    width = weight.shape[-1] if isinstance(weight, Tensor) and weight.dim() == 2 else 0
    heads = heads_in_arguments(stored.content, stored.metadata, width)
    if heads or asked is None:
        return heads
    if not isinstance(asked, int) or isinstance(asked, bool) or asked < 1 or width % asked:
        raise CheckpointError(f"num_heads: got {describe(asked)}, expected a divisor of the width {width}")
    return [asked]


def _rounded(state: Mapping[str, object]) -> tuple[dict[str, object], bool]:
    """Return the state dict with weights in float64 rounded to fp32, and whether they were; positions, NumPy's, always are."""
    tensors = {name: value for name, value in state.items() if is_plain_tensor(value)}
    doubles = {name for name, value in tensors.items() if value.dtype == torch.float64}
    everything = bool(tensors) and weights_dtype(tensors) == torch.float64
    narrow = doubles if everything else doubles & {POSITIONS}
    return {name: tensors[name].float() if name in narrow else value for name, value in state.items()}, everything


def _build(state: Mapping[str, Tensor], config: DiTConfig, device: torch.device, dtype: torch.dtype) -> DiT:
    """Without initialising what is about to be replaced, in memory of its own: a file may be overwritten, a dict is lent."""
    with torch.device("meta"):
        model = DiT(config)
    options: dict[str, Any] = {"copy": True, "memory_format": torch.contiguous_format}
    owned = {name: value.detach().to(device, dtype, **options) for name, value in state.items()}
    if dtype != weights_dtype(state) and (overflown := not_finite(owned)):
        raise CheckpointError(f"dtype: got {dtype}, which cannot hold {listed(overflown)}")
    model.load_state_dict(owned, assign=True)
    return model.eval()
