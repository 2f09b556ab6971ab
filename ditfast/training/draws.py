"""What chance decides in a step.

Numbers are drawn for the whole batch, by generators keyed by the seed, the step and what they are for; a rank takes its rows.
So they do not depend on how many ranks there are, no state of a generator has to be saved, and a resumed run draws what an
uninterrupted one does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

PURPOSES = ("flips", "moments", "times", "noise", "labels")


class Draws:
    """Random numbers of one step, for its ``batch`` samples over all ranks; CPU and CUDA draw different ones."""

    def __init__(self, seed: int, step: int, batch: int, device: torch.device):
        self.key = (seed, step)
        self.batch = batch
        self.device = device

    def uniform(self, purpose: str) -> Tensor:
        """[batch] fp32 in [0, 1)."""
        return torch.rand(self.batch, generator=self._generator(purpose), device=self.device, dtype=torch.float32)

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """[batch, *shape] fp32."""
        return torch.randn(self.batch, *shape, generator=self._generator(purpose), device=self.device, dtype=torch.float32)

    def _generator(self, purpose: str) -> torch.Generator:
        key = [*self.key, PURPOSES.index(purpose)]
        seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
        return torch.Generator(self.device).manual_seed(int(seed) >> 1)
