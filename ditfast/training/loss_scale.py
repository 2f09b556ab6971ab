"""A scale that keeps fp16's small gradients from becoming zero."""

from __future__ import annotations

FIRST_SCALE = 2.0**16
PATIENCE = 2000  # finite steps before the scale doubles


class LossScale:
    """Halves at a step whose gradient is infinite, doubles after many that are not.

    torch's GradScaler decides rank by rank, from the parameters that a rank holds; of sharded gradients all ranks have to
    decide alike, and the trainer knows the norm of the whole gradient anyway.
    """

    def __init__(self, enabled: bool):
        self.enabled = enabled
        self.scale = FIRST_SCALE if enabled else 1.0
        self.finite_steps = 0

    def update(self, finite: bool) -> None:
        if not self.enabled:
            return
        self.finite_steps = self.finite_steps + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self.finite_steps == PATIENCE:
            self.scale, self.finite_steps = self.scale * 2, 0
