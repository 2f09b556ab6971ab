"""Exponential moving averages of the weights.

In the first steps they forget faster, so that a short run's average is not made of the weights that it began with: after 1,000
steps at 0.999, 37% of it would be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class Averages:
    """One average for each decay, which starts from the trained parameters and is sharded as they are.

    It keeps ``decay`` of itself at each step, in the end; after n steps (1 + n) / (10 + n) at most.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decays: Sequence[float]):
        self._parameters = _local(parameters)
        self.by_decay = {decay: {name: value.detach().clone() for name, value in parameters.items()} for decay in decays}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Behind step 0, 1, ..."""
        for decay, average in self.by_decay.items():
            kept = min(decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(_local(average), self._parameters, 1 - kept)


def _local(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """This rank's part of each, which shares its memory."""
    return [(value.to_local() if isinstance(value, DTensor) else value).detach() for value in tensors.values()]
