"""The shapes of a model's op calls, found by running it on tensors without data."""

from __future__ import annotations

from collections import Counter

import torch

from ..config import DiTConfig
from ..dispatch.selection import record_calls
from ..dispatch.shapes import OpShape
from ..model import DiT


def model_shapes(config: DiTConfig, batch: int, dtype: torch.dtype, training: bool = False) -> Counter[OpShape]:
    """Return the shapes of a forward, or of a step of training under autocast to ``dtype``, and how often each comes."""
    shapes: Counter[OpShape] = Counter()
    inference = not training
    with torch.device("meta"):
        model = DiT(config).train(training)
        x, t, y = torch.empty(batch, *config.input_shape), torch.empty(batch), torch.empty(batch, dtype=torch.long)
    if inference:
        model, x = model.to(dtype), x.to(dtype)
    autocast = torch.autocast("cpu", dtype, enabled=training and dtype != torch.float32)
    with record_calls(lambda shape: shapes.update([shape])), torch.inference_mode(inference), autocast:
        model(x, t, y)
    return shapes
