"""From a file, a folder or a state dict to a fast model, or to one error."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..argument_checks import check_choice, check_type
from ..config import DiTConfig
from ..model import DiT
from .check import checked, weights_dtype
from .configs import check_agreement, from_diffusers_config, from_metadata
from .errors import CheckpointError
from .files import Stored, read
from .layouts import layout_of, to_official
from .source import CheckpointSource, describe_flavour
from .wrappers import WEIGHTS, choose_weights, strip_prefixes

logger = logging.getLogger("ditfast")


def load_checkpoint(
    path_or_state_dict: str | os.PathLike[str] | Mapping[str, object],
    *,
    weights: str = "auto",
    config: DiTConfig | None = None,
) -> DiT:
    """A fast DiT from existing weights, in eval mode, on the CPU, in the dtype that they are stored in.

    Reads the official layout (also SiT's) and diffusers', with the prefixes that DistributedDataParallel and torch.compile
    put in. What the model follows is in ``model.source``, and is logged. Positions kept in fp32 beside weights in half
    precision are rounded to the weights' dtype.

    Args:
        path_or_state_dict: a file written by ``torch.save`` or safetensors; the folder of a diffusers model, or of a pipeline
            with one; or a state dict, which stays as it is.
        weights: ``ema`` or ``model`` of a training checkpoint; ``auto`` takes the EMA if there is one.
        config: what the weights are of, where they do not tell: the heads of widths that the paper has not, the latent size
            of a diffusers state dict without its config.json, a label table without a row for no class (by itself the last
            row is taken for that). They are checked against it; its flavour is the model's.

    Raises:
        CheckpointError: a file that cannot be read, is damaged, holds code or no DiT, lacks tensors or what is asked of it.
        ValueError: ``weights`` is none of these.
        TypeError: an argument of the wrong kind; the message names it.
    """
    check_type("path_or_state_dict", path_or_state_dict, (str, os.PathLike, Mapping), "a path or a state dict")
    check_choice("weights", weights, WEIGHTS)
    check_type("config", config, (DiTConfig, type(None)), "a ditfast.DiTConfig or None")
    path = None if isinstance(path_or_state_dict, Mapping) else os.fspath(path_or_state_dict)
    try:
        stored = Stored(path_or_state_dict, {}, None) if path is None else read(Path(path))
        chosen, content = choose_weights(stored.content, weights)
        state = strip_prefixes(content)
        layout = layout_of(state)
        tensors, config = checked(state, layout, _known_config(stored, layout, config))
        model = _build(tensors if layout == "official" else to_official(tensors, config), config)
    except CheckpointError as error:
        raise CheckpointError(f"{'state dict' if path is None else path}: {error}") from error
    model.source = CheckpointSource(path, layout, chosen, describe_flavour(config))
    logger.info("%s", model.source)
    return model


def _known_config(stored: Stored, layout: str, given: DiTConfig | None) -> DiTConfig | None:
    """The one given, else the one that the checkpoint states; None leaves it to the shapes."""
    stated = from_metadata(stored.metadata) if layout == "official" else None
    if layout == "diffusers" and stored.config_file is not None and stored.config_file.is_file():
        stated = from_diffusers_config(stored.config_file)
    if given is not None and stated is not None:
        check_agreement(given, stated)
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


def _build(state: Mapping[str, Tensor], config: DiTConfig) -> DiT:
    """Without initialising what is about to be replaced, in memory of its own: a file may be overwritten, a dict is lent."""
    with torch.device("meta"):
        model = DiT(config)
    dtype = weights_dtype(state)
    owned = {
        name: value.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format) for name, value in state.items()
    }
    model.load_state_dict(owned, assign=True)
    return model.eval()
