"""A DiT as a live model of diffusers' class."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from ..model import DiT
from .configs import to_diffusers_config
from .errors import CheckpointError
from .layouts import positions_like, to_diffusers
from .save import check_expressible, checked_state
from .source import differences


def diffusers_model(model: DiT) -> Any:
    """Return a ``DiTTransformer2DModel`` of a copy of a model's weights, in its dtype, on its device and in its mode.

    Raises:
        CheckpointError: diffusers' class cannot hold the model, for the reasons of ``save_checkpoint``.
        ImportError: diffusers is not installed.
    """
    try:
        from diffusers import DiTTransformer2DModel
    except ImportError as error:
        raise ImportError(f"to_diffusers: got {error}, expected diffusers: pip install diffusers") from error
    try:
        state = checked_state(model)
        check_expressible(state, model.config)
    except CheckpointError as error:
        raise CheckpointError(f"to_diffusers: {error}") from error
    differing = differences(model.config, "diffusers")
    if differing:
        warnings.warn(f"diffusers computes this model otherwise: {differing}", stacklevel=3)
    if model.config.prediction != "epsilon":
        warnings.warn(
            f"diffusers' config.json has no word for a prediction of {model.config.prediction}: a pipeline that is saved and "
            f"loaded again means epsilon; load its weights with prediction={model.config.prediction!r}",
            stacklevel=3,
        )
    settings = {key: value for key, value in to_diffusers_config(model.config).items() if not key.startswith("_")}
    with torch.device("meta"):  # no numbers are drawn for what is about to be replaced
        theirs: Any = DiTTransformer2DModel(**settings)
    copies = {name: value.to(model.pos_embed.device, copy=True) for name, value in to_diffusers(state).items()}
    theirs.load_state_dict(copies, assign=True)
    positions = positions_like(state["pos_embed"], model.config).to(model.pos_embed.device)
    theirs.pos_embed.register_buffer("pos_embed", positions, persistent=False)
    return theirs.train(model.training)
