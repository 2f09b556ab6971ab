"""From a file, a folder or a state dict to a fast model, or to one error."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..argument_checks import check_choice, check_type
from ..config import DiTConfig
from ..model import DiT
from .arguments import Heads, heads_in_arguments
from .check import POSITIONS, checked, is_plain_tensor, weights_dtype
from .configs import check_agreement, from_diffusers_config, from_metadata
from .errors import CheckpointError, listed
from .files import Stored, read
from .layouts import find_layout, to_official
from .source import CheckpointSource, describe_flavour
from .wrappers import WEIGHTS, choose_weights, leave_out, strip_prefix, strip_wrappers

logger = logging.getLogger("ditfast")


def load_checkpoint(
    path_or_state_dict: str | os.PathLike[str] | Mapping[str, object],
    *,
    weights: str = "auto",
    config: DiTConfig | None = None,
    variant: str | None = None,
) -> DiT:
    """Return a fast DiT from existing weights, in eval mode, on the CPU, in the dtype that they are stored in.

    Reads the official layout (also SiT's) and diffusers', with the prefixes that wrappers of modules put in, and under a common
    prefix such as ``model.``. What the model follows is in ``model.source``, and is logged. Weights in float64 are rounded to
    float32, and heads that only training needs (of REPA and SRA) are left out, both with a warning. Positions kept in a wider
    dtype than the weights are rounded to theirs.

    Args:
        path_or_state_dict: a file written by ``torch.save`` or safetensors; the folder of a diffusers model, or of a pipeline
            with one; or a state dict, which stays as it is.
        weights: ``ema`` or ``model`` of a training checkpoint; ``auto`` takes the EMA if there is one.
        config: what the weights are of, where they do not tell: the heads, where neither the arguments that a training script
            saved tell them nor the width is one of the paper's (384 means 6 heads, 768 means 12, 1024 and 1152 mean 16); the
            design of 4 adaLN vectors a block; the latent size of a diffusers state dict without its config.json; a label table
            without a row for no class (by itself the last row is taken for that). They are checked against it; its flavour is
            the model's.
        variant: of a diffusers folder's weights, such as ``fp16``; None for those without a variant's name.

    Raises:
        CheckpointError: a file that cannot be read, is damaged, holds code or no DiT, lacks tensors or what is asked of it.
        ValueError: ``weights`` is none of these, or ``variant`` no name.
        TypeError: an argument of the wrong kind; the message names it.
    """
    check_type("path_or_state_dict", path_or_state_dict, (str, os.PathLike, Mapping), "a path or a state dict")
    check_choice("weights", weights, WEIGHTS)
    check_type("config", config, (DiTConfig, type(None)), "a ditfast.DiTConfig or None")
    if variant is not None and not (isinstance(variant, str) and re.fullmatch(r"[\w-]+", variant)):
        raise ValueError(f"variant: got {variant!r}, expected a name such as 'fp16', or None")
    path = None if isinstance(path_or_state_dict, Mapping) else os.fspath(path_or_state_dict)
    place = "state dict" if path is None else path
    try:
        if variant is not None and (path is None or not Path(path).is_dir()):
            raise CheckpointError(f"variant: got {variant!r}, expected a diffusers folder, which has variants")
        stored = Stored(path_or_state_dict, {}, None) if path is None else read(Path(path), variant)
        chosen, content = choose_weights(stored.content, weights)
        state = strip_wrappers(content)
        layout, prefix = find_layout(state)
        state, left_out = leave_out(strip_prefix(state, prefix))
        if left_out:
            warnings.warn(f"{place}: left out, as they are no weights of a DiT: {listed(left_out)}", stacklevel=2)
        state, rounded = _rounded(state)
        if rounded:
            warnings.warn(f"{place}: its float64 weights are rounded to float32", stacklevel=2)
        heads = _stated_heads(stored, state) if layout == "official" else []
        known = _known_config(stored, layout, config, heads)
        tensors, config = checked(state, layout, known, heads)
        model = _build(tensors if layout == "official" else to_official(tensors, config), config)
    except CheckpointError as error:
        raise CheckpointError(f"{place}: {error}") from error
    model.source = CheckpointSource(path, layout, chosen, describe_flavour(config))
    logger.info("%s", model.source)
    return model


def _known_config(stored: Stored, layout: str, given: DiTConfig | None, heads: Sequence[Heads]) -> DiTConfig | None:
    """Return the one given, else the one that the checkpoint states; None leaves it to the shapes."""
    stated = from_metadata(stored.metadata) if layout == "official" else None
    if layout == "diffusers" and stored.config_file is not None and stored.config_file.is_file():
        stated = from_diffusers_config(stored.config_file)
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


def _stated_heads(stored: Stored, state: Mapping[str, object]) -> list[Heads]:
    weight = state.get("final_layer.linear.weight")
    width = weight.shape[-1] if isinstance(weight, Tensor) and weight.dim() == 2 else 0
    return heads_in_arguments(stored.content, stored.metadata, width)


def _rounded(state: Mapping[str, object]) -> tuple[dict[str, object], bool]:
    """Return the state dict with weights in float64 rounded to fp32, and whether they were; positions, NumPy's, always are."""
    tensors = {name: value for name, value in state.items() if is_plain_tensor(value)}
    doubles = {name for name, value in tensors.items() if value.dtype == torch.float64}
    everything = bool(tensors) and weights_dtype(tensors) == torch.float64
    narrow = doubles if everything else doubles & {POSITIONS}
    return {name: tensors[name].float() if name in narrow else value for name, value in state.items()}, everything


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
