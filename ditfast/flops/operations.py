"""A forward, and a step of training, as a list of operations: what each multiplies, and the bytes it has to move.

Every operation reads its inputs from memory and writes its outputs there, once. ``fused`` is the data flow of ``ditfast.DiT``;
otherwise that of eager PyTorch with a fused attention, where norm, scale, shift, gate, residual and GELU are passes of their
own. Left out: launches, what ranks exchange, the loss, reading of data.

The paper's "Gflops" are multiply-adds (MACs) of one forward for one image, attention's two products included; a MAC is two
floating-point operations. Norms, activations and other elementwise work are left out of both, as the paper does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..argument_checks import as_bool, check_integer
from ..config import TIMESTEP_FEATURES, DiTConfig
from .counts import modulation_vectors, multiplied_weights, parameters
from .memory import FP32, check_work

ADAMW_PASSES = 7  # over fp32 values: weight, gradient and two moments read, weight and moments written
AVERAGE_PASSES = 3
NORM_PASSES = 1  # of the gradient
ATTENTION_BACKWARD = 2.5  # times its forward's products: five of them, since the scores are computed again


class Op(NamedTuple):
    """What ``times`` equal operations do, each."""

    name: str
    times: int
    macs: int = 0  # multiply-adds
    moved: int = 0  # bytes
    back_macs: int = 0  # of its backward
    back_moved: int = 0
    again: bool = False  # activation checkpointing computes it a second time


def operations(
    config: DiTConfig, batch: int, dtype: torch.dtype, plan: str = "none", *, fused: bool = True, averages: int = 1
) -> list[Op]:
    """Of a forward, or of a step of training.

    Args:
        config: of the model.
        batch: images, on this device.
        dtype: of products: in training autocast's, over an fp32 model; else the model's own.
        plan: ``"none"``: a forward alone; ``"keep"`` and ``"checkpoint"``: a step that keeps activations, or some of them.
        fused: ditfast's passes over memory, else eager PyTorch's.
        averages: of the weights, that a step updates.

    Raises:
        ValueError: there is no such plan.
    """
    check_work(config, batch, dtype, plan)
    fused = as_bool("fused", fused)
    check_integer("averages", averages, 0)
    flow = _Flow(config, batch, dtype.itemsize, training=plan != "none", fused=fused)
    found = [*flow.conditioning(), *flow.first(), *flow.blocks(), *flow.last()]
    return [*found, *flow.weights(averages)] if flow.training else found


def macs(config: DiTConfig) -> int:
    """Multiply-adds of one forward for one image: 1e9 of them are one of the paper's "Gflops" (tables 1 and 4)."""
    return sum(op.times * op.macs for op in operations(config, 1, torch.float32))


def flops(config: DiTConfig) -> int:
    """Floating-point operations of one forward for one image: 2 x ``macs``."""
    return 2 * macs(config)


class _Flow:
    def __init__(self, config: DiTConfig, batch: int, product: int, training: bool, fused: bool):
        self.config, self.batch, self.training, self.fused = config, batch, training, fused
        self.product = product  # bytes of a value that products read and write
        self.residual = FP32 if training else product  # bytes of a value of the residual stream and its norms
        self.casts = self.product != self.residual
        self.tokens = config.num_tokens + (2 if config.conditioning == "in_context" else 0)
        self.stream = batch * self.tokens * config.hidden_size  # values
        self.sublayers = 3 if config.conditioning == "cross_attention" else 2

    def conditioning(self) -> list[Op]:
        D, vectors = self.config.hidden_size, modulation_vectors(self.config)
        found = [self._linear_of_inputs("timestep's features", 1, TIMESTEP_FEATURES, D), self._linear("timestep", 1, 1, D, D)]
        return [*found, self._linear("adaLN", 1, 1, D, vectors * D)] if vectors else found

    def first(self) -> list[Op]:
        values = self.config.in_channels * self.config.patch_size**2
        found = [self._linear_of_inputs("patch_embed", self.config.num_tokens, values, self.config.hidden_size)]
        if not self.fused:
            found.append(Op("positions", 1, moved=2 * self.stream * self.residual))
        return [*found, *self._norm(1)]

    def blocks(self) -> list[Op]:
        depth, D, tokens, config = self.config.depth, self.config.hidden_size, self.tokens, self.config
        found = [
            self._linear("qkv", depth, tokens, D, 3 * D),
            self._attention("attention", self.tokens),
            *self._copy(),
            self._linear("proj", depth, tokens, D, D),
            self._linear("fc1", depth, tokens, D, config.mlp_hidden_size),
            *self._gelu(),
            self._linear("fc2", depth, tokens, config.mlp_hidden_size, D),
            *self._joints(depth * self.sublayers),
        ]
        if config.conditioning == "cross_attention":
            found += [
                self._linear("cross q", depth, tokens, D, D),
                self._linear("cross kv", depth, 2, D, 2 * D),
                self._attention("cross-attention", 2),
                self._linear("cross proj", depth, tokens, D, D),
            ]
        return found

    def last(self) -> list[Op]:
        config = self.config
        return [self._linear("linear_unpatchify", 1, config.num_tokens, config.hidden_size, config.patch_out_features)]

    def weights(self, averages: int) -> list[Op]:
        """What a step does to weights and gradients, whatever the batch."""
        values = FP32 * parameters(self.config, positions=False)
        found = [
            Op("gradient norm", 1, moved=NORM_PASSES * values),
            Op("AdamW", 1, moved=ADAMW_PASSES * values),
            Op("averages", averages, moved=AVERAGE_PASSES * values),
        ]
        if self.casts:
            block, others = multiplied_weights(self.config)
            block, others = (values * (FP32 + self.product) for values in (block, others))
            found.append(Op("casts of blocks' weights", self.config.depth, moved=block, back_moved=block, again=True))
            found.append(Op("casts of other weights", 1, moved=others, back_moved=others))
        return found

    def _linear(self, name: str, times: int, rows: int, inputs: int, outputs: int) -> Op:
        """Of ``rows`` rows an image; each of its two gradients is a product of the same size."""
        rows *= self.batch
        macs = rows * inputs * outputs
        moved = (rows * inputs + rows * outputs + inputs * outputs) * self.product
        return Op(name, times, macs, moved, 2 * macs, 2 * moved)

    def _linear_of_inputs(self, name: str, rows: int, inputs: int, outputs: int) -> Op:
        """Whose input needs no gradient."""
        op = self._linear(name, 1, rows, inputs, outputs)
        return op._replace(back_macs=op.macs, back_moved=op.moved)

    def _attention(self, name: str, keys: int) -> Op:
        """The backward reads what the forward read and wrote, and the output's gradient, and writes the inputs'."""
        inputs = self.stream + 2 * self.batch * keys * self.config.hidden_size
        macs, values = 2 * self.stream * keys, inputs + self.stream
        moved = values * self.product
        return Op(name, self.config.depth, macs, moved, int(ATTENTION_BACKWARD * macs), 2 * moved)

    def _copy(self) -> list[Op]:
        """Of the heads, into the order of the next product."""
        moved = 2 * self.stream * self.product
        return [] if self.fused else [Op("attention's copy", self.config.depth, moved=moved, back_moved=moved, again=True)]

    def _gelu(self) -> list[Op]:
        """A pass of its own in training, where the backward needs its input."""
        if self.fused and not self.training:
            return []
        hidden = self.batch * self.tokens * self.config.mlp_hidden_size * self.product
        return [Op("GELU", self.config.depth, moved=2 * hidden, back_moved=3 * hidden, again=True)]

    def _joints(self, times: int) -> list[Op]:
        """From a branch to the next product's input."""
        if not self.fused:
            return [*self._residual(times), *self._norm(times)]
        branch, values = self.stream * self.product, self.stream * self.residual
        if self.config.conditioning == "adaln_zero":
            moved, back = 3 * values + branch + self._vectors(3), 4 * values + 2 * branch
        else:
            moved, back = 3 * values + branch + self._vectors(2), 4 * values + (values + branch if self.casts else 0)
        return [Op("gated_residual_layer_norm_modulate", times, 0, moved, 0, back, again=True), *self._cast(times)]

    def _norm(self, times: int) -> list[Op]:
        """In eager PyTorch norm, scale and shift are three passes; the scale's backward makes a product and sums it."""
        values = self.stream * self.residual
        if self.fused:
            moved = 2 * values + self._vectors(2)
            return [Op("layer_norm_modulate", times, moved=moved, back_moved=3 * values), *self._cast(times)]
        found = [Op("norm", times, moved=2 * values, back_moved=3 * values, again=True)]
        if self.config.modulation_vectors:
            moved = 2 * values + self._vectors(1)
            found.append(Op("scale", times, moved=moved, back_moved=6 * values, again=True))
            found.append(Op("shift", times, moved=moved, back_moved=values, again=True))
        return [*found, *self._cast(times)]

    def _residual(self, times: int) -> list[Op]:
        """Eager PyTorch's; the stream's two gradients are added in a pass of their own."""
        branch, values = self.stream * self.product, self.stream * self.residual
        found = []
        if self.config.conditioning == "adaln_zero":
            found.append(Op("gate", times, moved=2 * branch, back_moved=6 * branch, again=True))
        cast = values + branch if self.casts else 0
        return [*found, Op("residual", times, moved=2 * values + branch, back_moved=3 * values + cast, again=True)]

    def _cast(self, times: int) -> list[Op]:
        """Autocast's, between an fp32 norm and the product behind it."""
        moved = self.stream * (self.residual + self.product)
        return [Op("cast", times, moved=moved, back_moved=moved, again=True)] if self.casts else []

    def _vectors(self, count: int) -> int:
        return count * self.batch * self.config.hidden_size * self.product if self.config.modulation_vectors else 0
