"""Exponential moving averages of the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class Averages:
    """One average for each decay, sharded as the parameters are.

    Args:
        parameters: trained ones by name; what the averages start from.
        decays: an average keeps that part of itself at each step.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decays: Sequence[float]):
        self._parameters = _local(parameters)
        self.by_decay = {decay: {name: value.detach().clone() for name, value in parameters.items()} for decay in decays}

    @torch.no_grad()
    def update(self) -> None:
        for decay, average in self.by_decay.items():
            torch._foreach_lerp_(_local(average), self._parameters, 1 - decay)


def _local(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """This rank's part of each, which shares its memory."""
    return [(value.to_local() if isinstance(value, DTensor) else value).detach() for value in tensors.values()]
