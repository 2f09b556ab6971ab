"""From timesteps and labels to the vectors that modulate every block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import blocks, ops
from .argument_checks import check_tensor
from .config import TIMESTEP_FEATURES, DiTConfig
from .cpu import Linears
from .ops import cpu_chain
from .ops.cpu_products import torch_linear
from .ops.timestep_embedding import timestep_embedding
from .torch_modes import computes_now


class Linear(nn.Linear):
    """``nn.Linear``; in fp32 where the CPU has no products of its dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return torch_linear(x, self.weight, self.bias)


class TimestepEmbedder(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.frequency_divisor = config.arithmetic.timestep_frequency_divisor
        width = config.hidden_size
        self.mlp = nn.Sequential(Linear(TIMESTEP_FEATURES, width), nn.SiLU(), Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        features = timestep_embedding(t, frequency_divisor=self.frequency_divisor)  # [B, 256]
        return self.mlp(features.to(next(self.parameters()).dtype))  # [B, D]


class LabelEmbedder(nn.Module):
    """Label table; in training mode labels turn into the null class with the config's probability.

    ``forward`` takes labels [B], int64 or int32.
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.null_class = config.null_class
        self.dropout_prob = config.class_dropout_prob
        self.embedding_table = nn.Embedding(config.label_rows, config.hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        self._check(y)
        if self.training and self.dropout_prob > 0:
            y = y.masked_fill(torch.rand(y.shape, device=y.device) < self.dropout_prob, self.null_class)  # [B]
        return self.embedding_table(y)  # [B, D]

    def _check(self, y: Tensor) -> None:
        check_tensor("y", y, "[B]")
        if y.dim() != 1:
            raise ValueError(f"y: got shape {tuple(y.shape)}, expected [B] labels")
        if y.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"y: got {y.dtype}, expected integer labels, int64 or int32")
        rows = getattr(self.embedding_table, "num_embeddings", None)  # of its own: it may have been replaced
        if rows is None or type(y) is not Tensor or y.device.type != "cpu" or not computes_now():  # looking would cost a sync
            return
        if y.numel():
            lowest, highest = (int(label) for label in y.aminmax())
            if lowest < 0 or highest >= rows:
                raise ValueError(f"y: got labels {lowest}..{highest}, expected 0..{rows - 1}")


def project(x: Tensor, projections: Sequence[blocks.Projection], int8: bool = False) -> list[Tensor]:
    """Return x [B, K] through each projection: in one call if all are weights, one after the other if one must be called.

    With ``int8`` the CPU engine multiplies by weights that are rounded to it, and kept until they change.

    A model's modulations read 902 MB of weights in fp32, 451 MB in bf16, at DiT-XL/2 (28 linears of [6912, 1152] and one of
    [2304, 1152]), and none are copied. Timed once, on one thread of a CPU that other processes used too, in turns with one
    product over the same weights in one storage; medians, one storage and now, in ms: fp32 501 and 463 (B=1), 585 and 542
    (B=8); bf16 161 and 171, 287 and 302. Runs there differed by as much. Nothing was timed on a GPU.
    """
    linears = tuple(projection for projection in projections if isinstance(projection, blocks.Linear))
    if len(linears) == len(projections):
        return _together(x, linears, int8)
    return [
        _together(x, (projection,), int8)[0] if isinstance(projection, blocks.Linear) else projection(x)
        for projection in projections
    ]


def _together(x: Tensor, linears: Linears, int8: bool) -> list[Tensor]:
    outputs = cpu_chain.int8_weights_linear(x, linears) if int8 else cpu_chain.grouped_linear(x, linears)  # [B, N of all]
    if outputs is not None:
        return list(outputs.split([len(bias) for _, bias in linears], dim=1))
    weights, biases = zip(*linears, strict=True)
    return ops.grouped_linear(x, weights, biases)
