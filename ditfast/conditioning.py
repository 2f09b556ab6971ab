"""From timesteps and labels to the vectors that modulate every block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import cpu
from .config import TIMESTEP_FEATURES, DiTConfig
from .ops.cpu_products import in_fp32, torch_linear
from .ops.dispatch import computes_now, needs_gradient
from .ops.timestep_embedding import timestep_embedding
from .plain import plain_weights

WIDENED_AT_ONCE = 2**20  # elements, of a weight too large to have a second copy of: 4 MiB in fp32 stay in the cache


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
    """Label table; in training mode labels turn into the null class with the config's probability."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.null_class = config.null_class
        self.dropout_prob = config.class_dropout_prob
        self.embedding_table = nn.Embedding(config.label_rows, config.hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        if self.training and self.dropout_prob > 0:
            y = y.masked_fill(torch.rand(y.shape, device=y.device) < self.dropout_prob, self.null_class)  # [B]
        return self.embedding_table(y)  # [B, D]


def pack_linears(linears: Sequence[nn.Linear]) -> None:
    """Moves the weights of linears over one input into one storage, in order, so that ``packed_linear`` is one GEMM.

    The parameters stay the objects they were; only their memory moves. Memory in use afterwards is unchanged. Other kinds of
    parameters, of which ranks hold parts (DTensor), stay where they are.
    """
    for name in ("weight", "bias"):
        parts = [getattr(linear, name) for linear in linears]
        if any(type(part) is not nn.Parameter for part in parts):
            continue
        if parts[0].is_meta or len({(part.dtype, part.device) for part in parts}) > 1 or _joined(parts) is not None:
            continue
        whole = torch.cat([part.detach() for part in parts])
        for part, place in zip(parts, whole.split([len(part) for part in parts]), strict=True):
            part.data = place


def packed_linear(x: Tensor, linears: Sequence[nn.Linear], int8: bool = False) -> list[Tensor]:
    """``[linear(x) for linear in linears]``, as one GEMM where the weights lie in one storage (see ``pack_linears``).

    Whether they do is read off the parameters at each call: nothing is cached, so nothing can be stale. Calls that need
    gradients, and compiled graphs, go through the linears one by one. With ``int8`` the CPU engine, where it takes them,
    multiplies with weights that are rounded to it, and kept until they change.
    """
    found = [plain_weights(linear) for linear in linears]
    plain = [both for both in found if both is not None]
    if len(plain) == len(linears) and computes_now():
        weights, biases = zip(*plain, strict=True)
        if not needs_gradient(x, *weights, *biases):
            sizes = [bias.shape[0] for bias in biases]
            rounded = cpu.int8_weights_linear(x, tuple(plain)) if int8 else None
            if rounded is not None:
                return list(rounded.split(sizes, dim=-1))
            weight, bias = _joined(weights), _joined(biases)
            if weight is not None and bias is not None:
                return list(wide_linear(x, weight, bias).split(sizes, dim=-1))
    return [linear(x) if both is None else torch_linear(x, *both) for linear, both in zip(linears, found, strict=True)]


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor, int8: bool = False) -> Tensor:
    """``F.linear`` of few rows with a very tall weight; with ``int8`` as ``packed_linear`` has it."""
    found = cpu.int8_weights_linear(x, ((weight, bias),)) if int8 else cpu.linear_of_few(x, weight, bias)
    if found is not None:
        return found
    if in_fp32(x) and not needs_gradient(x, weight, bias):
        rows = max(1, WIDENED_AT_ONCE // weight.shape[1])
        parts = zip(weight.split(rows), bias.split(rows), strict=True)
        return torch.cat([torch_linear(x, *part) for part in parts], dim=-1)
    if x.device.type == "cpu" and x.dtype == torch.float32 and computes_now() and 1 < len(x) <= 8:
        # MKL repacks its second operand: with the weight first, a few rows take a third to two thirds of the time.
        return torch.addmm(bias[:, None], weight, x.T).T.contiguous()
    return torch_linear(x, weight, bias)


def _joined(parts: Sequence[Tensor]) -> Tensor | None:
    """The parts as one tensor without a copy, if they lie one behind the other in the first one's storage."""
    first = parts[0]
    address = first.data_ptr()
    for part in parts:
        if (
            type(part) is not nn.Parameter
            or part.dtype != first.dtype
            or not part.is_contiguous()
            or part.data_ptr() != address
        ):
            return None
        address += part.nbytes
    storage = first.untyped_storage()
    if address > storage.data_ptr() + storage.nbytes():
        return None
    return first.detach().as_strided((sum(part.shape[0] for part in parts), *first.shape[1:]), first.stride())
