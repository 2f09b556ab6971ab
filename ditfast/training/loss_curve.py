"""The loss over the noise levels: which timesteps are learnt, and which are not yet."""

from __future__ import annotations

import torch
from torch import Tensor

BUCKETS = 10


class LossCurve:
    """Means of the losses since the curve was last taken, a bucket for each tenth of the timesteps up to ``last_time``."""

    def __init__(self, last_time: float):
        self.last_time = last_time
        self.sums = torch.zeros(BUCKETS, dtype=torch.float64, device="cpu")
        self.counts = torch.zeros(BUCKETS, dtype=torch.float64, device="cpu")

    def add(self, t: Tensor, loss: Tensor) -> None:
        """Timesteps and losses [B]; those that are infinite or NaN are left out."""
        t, loss = t.double().cpu(), loss.double().cpu()
        bucket = (t * (BUCKETS / self.last_time)).long().clamp(0, BUCKETS - 1)
        finite = loss.isfinite()
        self.sums.index_add_(0, bucket[finite], loss[finite])
        self.counts.index_add_(0, bucket[finite], torch.ones_like(loss[finite]))

    def take(self) -> list[float | None]:
        """The mean of each bucket, None of an empty one; starts anew."""
        sums, counts = self.sums.tolist(), self.counts.tolist()
        means = [total / count if count else None for total, count in zip(sums, counts, strict=True)]
        self.sums.zero_()
        self.counts.zero_()
        return means

    def state(self) -> dict[str, Tensor]:
        """Tensors that change in place."""
        return {"sums": self.sums, "counts": self.counts}
