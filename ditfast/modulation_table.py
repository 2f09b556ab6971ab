"""All of a sampling run's modulation vectors, computed before its steps instead of in them.

adaLN's weights are a third of DiT-XL/2 and 0.2% of its multiply-adds: read in every step to make one row an image. Over a
schedule the rows depend on the pair of timestep and label only (not on their sum, so each pair has its own).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from .conditioning import LabelEmbedder, TimestepEmbedder
from .layers import Block, FinalLayer, is_read, is_silu_and_linear
from .model import DiT
from .plain import is_plain, is_silent

# Of a product that fills the table. Always the same: a row's bits then depend neither on the batch nor on a resume.
ROWS = 64
BUDGET_BYTES = 2**29


def can_tabulate(model: object) -> bool:
    """Return True if a table may replace a model's conditioning: its forward and what the table skips need no call.

    That is a DiT with adaLN whose forward, embedders, blocks and final layer are ours, without hooks, and whose adaLN linears
    are plain.
    """
    if not isinstance(model, DiT) or not model.config.modulation_vectors:
        return False
    kind, final = type(model), model.final_layer
    return (
        kind.forward is DiT.forward
        and kind.forward_modulated is DiT.forward_modulated
        and kind.modulation_vectors is DiT.modulation_vectors
        and type(model.t_embedder).forward is TimestepEmbedder.forward
        and type(model.y_embedder).forward is LabelEmbedder.forward
        and type(final).forward is FinalLayer.forward
        and all(is_read(block, Block) for block in model.blocks)
        and all(map(is_silent, (model, final, *model.t_embedder.modules(), *model.y_embedder.modules())))
        and all(is_silu_and_linear(layer.adaLN_modulation) for layer in (*model.blocks, final))
        and all(map(is_plain, model.adaln_linears()))
    )


class ModulationTable:
    """The vectors for each step of a run and each label of its batch, in windows of steps that fit a memory budget.

    Args:
        model: one that ``can_tabulate``, in eval mode.
        timesteps: what the model is told at each step.
        labels: [B] integers on the model's device; with guidance both halves'.
        budget_bytes: the most that the table may take, beside one step.

    Raises:
        ValueError: a model without adaLN.
    """

    def __init__(self, model: DiT, timesteps: Sequence[float], labels: Tensor, budget_bytes: int = BUDGET_BYTES):
        if not model.config.modulation_vectors:
            raise ValueError(f"model: got a DiT with {model.config.conditioning} conditioning, which has no modulation vectors")
        self.model = model
        self.timesteps = torch.tensor(timesteps, dtype=torch.float32, device=labels.device)
        self.labels, self._places = labels.unique(return_inverse=True)
        self._in_place = torch.equal(self._places, torch.arange(len(labels), device=labels.device))
        width = sum(linear.out_features for linear in model.adaln_linears())
        step_bytes = len(self.labels) * width * model.pos_embed.element_size()
        self.steps_per_window = max(1, min(len(timesteps), budget_bytes // max(1, step_bytes)))
        self._window = -1
        self._table = model.pos_embed.new_empty(0)

    def vectors(self, step: int) -> Tensor:
        """[B, V] for ``forward_modulated``; valid until another step is asked for."""
        window, row = divmod(step, self.steps_per_window)
        if window != self._window:
            self._table = self.model.pos_embed.new_empty(0)  # frees the last one first
            self._table = self._compute(window)  # [steps, labels, V]
            self._window = window
        return self._table[row] if self._in_place else self._table[row].index_select(0, self._places)

    def _compute(self, window: int) -> Tensor:
        steps = self.timesteps[window * self.steps_per_window :][: self.steps_per_window]
        t = steps.repeat_interleave(len(self.labels))
        y = self.labels.repeat(len(steps))
        parts = []
        for start in range(0, len(t), ROWS):
            rows = min(ROWS, len(t) - start)
            padded = [F.pad(values[start : start + ROWS], (0, ROWS - rows)) for values in (t, y)]
            parts.append(self._vectors(*padded)[:rows])
        return torch.cat(parts).unflatten(0, (len(steps), len(self.labels)))

    def _vectors(self, t: Tensor, y: Tensor) -> Tensor:
        linears = self.model.adaln_linears()
        if linears[0].weight.device == t.device:
            return self.model.modulation_vectors(t, y)
        activated = F.silu(self.model.t_embedder(t) + self.model.y_embedder(y))  # [ROWS, D]
        weights = ((linear.weight.to(t.device), linear.bias.to(t.device)) for linear in linears)
        return torch.cat([F.linear(activated, weight, bias) for weight, bias in weights], dim=1)


@contextmanager
def offloaded_conditioning(model: DiT) -> Iterator[None]:
    """Keeps adaLN's weights in the host's memory; ``ModulationTable`` then brings one layer at a time to the device."""
    device = model.pos_embed.device
    linears = model.adaln_linears()
    for linear in linears:
        linear.to("cpu")
    try:
        yield
    finally:
        for linear in linears:
            linear.to(device)
