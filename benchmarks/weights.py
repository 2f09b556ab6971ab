"""Random weights for the benches, drawn on the device that they are for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from ditfast import DiTConfig, reference

Model = TypeVar("Model", bound=nn.Module)


@functools.lru_cache(maxsize=1)  # of one model at a time, for which every rival asks
@torch.inference_mode(False)  # OpenVINO converts a model outside of that mode
def random_weights(config: DiTConfig, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Return non-zero weights in the official layout, the same for the same arguments.

    The paper's zeros would leave most of a block without work; matrices have a standard deviation of 0.5 / sqrt(fan-in).
    """
    generator = torch.Generator(device).manual_seed(0)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in reference.DiT(config).named_parameters() if p.requires_grad}
    weights = {"pos_embed": reference.sincos_positions(config).to(device, dtype)}
    for name, shape in shapes.items():
        std = 0.5 * shape[1:].numel() ** -0.5 if len(shape) > 1 else 0.02
        weights[name] = (torch.randn(shape, generator=generator, device=device) * std).to(dtype)
    return weights


def load(
    kind: Callable[[DiTConfig], Model],
    config: DiTConfig,
    weights: Mapping[str, Tensor],
    device: torch.device,
    *,
    copy: bool = False,
) -> Model:
    """Return a model with these weights (official layout), its own copy of them if ``copy``, without drawing initial ones."""
    with torch.device("meta"):
        model = kind(config)
    own = {name: weight.to(device, copy=True) if copy else weight.to(device) for name, weight in weights.items()}
    model.load_state_dict(own, assign=True)
    return model.to(device)  # a reference's buffers, if it has some
