"""What a model asks of the ops: found by running it on tensors without data."""

from __future__ import annotations

from collections import Counter

import torch

from ..config import DiTConfig
from ..model import DiT
from ..ops.dispatch import watching
from ..problem import Problem


def problems(config: DiTConfig, batch: int, dtype: torch.dtype, training: bool = False) -> Counter[Problem]:
    """Those of a forward, or of a step of training under autocast to ``dtype``, and how often each comes."""
    found: Counter[Problem] = Counter()
    inference = not training
    with torch.device("meta"):
        model = DiT(config).train(training)
        x, t, y = torch.empty(batch, *config.input_shape), torch.empty(batch), torch.empty(batch, dtype=torch.long)
    if inference:
        model, x = model.to(dtype), x.to(dtype)
    autocast = torch.autocast("cpu", dtype, enabled=training and dtype != torch.float32)
    with watching(lambda problem: found.update([problem])), torch.inference_mode(inference), autocast:
        model(x, t, y)
    return found
