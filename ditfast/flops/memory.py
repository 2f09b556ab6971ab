"""Memory of a forward, and of training on each device, from shapes alone.

Counted is what the ops keep on CUDA (the Triton row kernels and attention, the library's products), as
``tests/test_memory.py`` counts it on the real code. On a CPU the plain torch versions keep more.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..argument_checks import check_choice, check_integer, check_type
from ..config import TIMESTEP_FEATURES, DiTConfig, check_config
from .counts import modulation_vectors, multiplied_weights, parameters

PLANS = ("none", "keep", "checkpoint")
FP32 = 4  # bytes
MOMENTS = 2  # of AdamW
GROUPS_IN_FLIGHT = 2  # of a sharded model: one computes while the next is gathered


class TrainingBytes(NamedTuple):
    """On each device; gradients and activations in full, though without accumulation one grows as the other shrinks."""

    weights: int
    gradients: int
    moments: int
    averages: int
    copies: int  # of the weights, in autocast's dtype, that the backward needs
    activations: int
    whole: int  # weights and gradients of a sharded model, of the blocks that are whole at a time

    @property
    def total(self) -> int:
        """Without the workspaces of libraries and what the allocator cannot use."""
        return sum(self)

    def least_peak(self, *, accumulates: bool) -> int:
        """Return what a step surely holds at once: without accumulation, gradients take the place of activations."""
        passing = self.gradients + self.activations if accumulates else max(self.gradients, self.activations)
        return self.weights + self.moments + self.averages + passing


def activation_bytes(config: DiTConfig, batch: int, dtype: torch.dtype, plan: str) -> int:
    """Bytes that a forward of ``ditfast.DiT`` leaves for its backward; without gradients, the most that it holds at once.

    Inputs, weights and copies of weights are not among them.

    Args:
        config: of the model.
        batch: images, on this device.
        dtype: of products. With gradients autocast's (or fp32), beside an fp32 model; without gradients the model's own.
        plan: ``"keep"`` everything; ``"checkpoint"``: what ``checkpoint_activations`` keeps of blocks; ``"none"``: inference.

    Raises:
        ValueError: there is no such plan.
    """
    check_work(config, batch, dtype, plan)
    sizes = _Sizes(config, batch, dtype.itemsize)
    if plan == "none":
        return sizes.inference()
    block = sizes.products() + (sizes.between() if plan == "keep" else sizes.block_inputs())
    return sizes.ends(plan) + config.depth * block


def training_bytes(
    config: DiTConfig,
    batch: int,
    dtype: torch.dtype,
    plan: str,
    *,
    shards: int = 1,
    averages: int = 1,
) -> TrainingBytes:
    """Memory of ``ditfast train`` on each device.

    Args:
        config: of the model.
        batch: images in one forward, on each device.
        dtype: of products: autocast's, or fp32.
        plan: ``"keep"`` or ``"checkpoint"`` activations.
        shards: devices that share the state, by FSDP2. Under DDP each holds all of it: 1.
        averages: of the weights.

    Raises:
        ValueError: the plan is none of these.
    """
    check_work(config, batch, dtype, plan)
    check_choice("plan", plan, PLANS[1:])
    check_integer("shards", shards, 1)
    check_integer("averages", averages, 0)
    trained = FP32 * parameters(config, positions=False)
    weights = FP32 * parameters(config)
    return TrainingBytes(
        weights=weights // shards,
        gradients=trained // shards,
        moments=MOMENTS * trained // shards,
        averages=averages * trained // shards,
        copies=_copies(config, dtype.itemsize, plan),
        activations=activation_bytes(config, batch, dtype, plan),
        whole=0 if shards == 1 else _whole_at_a_time(config),
    )


def sampling_bytes(config: DiTConfig, batch: int, dtype: torch.dtype, device_type: str) -> int:
    """Return bytes of the tensors that a forward of ``ditfast.DiT`` without gradients surely holds at once.

    Args:
        config: of the model.
        batch: rows of the forward; under guidance two an image.
        dtype: of the model.
        device_type: on a CPU the engine takes a few samples at a time, and only its input and its two outputs are whole.
    """
    check_work(config, batch, dtype, "none")
    sizes = _Sizes(config, batch, dtype.itemsize)
    return sizes.itemsize * (3 * sizes.stream if device_type == "cpu" else 6 * sizes.stream + sizes.hidden)


def check_work(config: object, batch: int, dtype: object, plan: str) -> None:
    """Raise unless the arguments name a forward, or a step of training; the message names the argument."""
    check_config(config)
    check_integer("batch", batch, 0)
    check_type("dtype", dtype, torch.dtype, "a torch.dtype, such as torch.bfloat16")
    check_choice("plan", plan, PLANS)


def _copies(config: DiTConfig, itemsize: int, plan: str) -> int:
    """Recomputed blocks cast their weights again. The timesteps' first product needs no gradient of its input."""
    if itemsize == FP32:
        return 0
    block, others = multiplied_weights(config)
    kept = others - TIMESTEP_FEATURES * config.hidden_size
    return itemsize * (kept + (config.depth * block if plan == "keep" else 0))


def _whole_at_a_time(config: DiTConfig) -> int:
    """Weights and gradients of the groups in flight, and the weights in no group, which stay whole."""
    D = config.hidden_size
    block, _ = multiplied_weights(config)
    adaln = config.modulation_vectors * D * D
    root = parameters(config) - config.depth * (block + adaln)
    return FP32 * (root + GROUPS_IN_FLIGHT * 2 * (block + adaln))


class _Sizes:
    """Bytes of the tensors of a forward. With gradients the residual stream is fp32 beside products of any dtype."""

    def __init__(self, config: DiTConfig, batch: int, itemsize: int):
        self.config, self.itemsize = config, itemsize
        self.casts = itemsize != FP32
        self.modulated = config.modulation_vectors > 0
        self.attends_twice = config.conditioning == "cross_attention"
        self.sublayers = 3 if self.attends_twice else 2
        self.latents = batch * math.prod(config.input_shape)  # values
        self.features = batch * TIMESTEP_FEATURES
        self.vector = batch * config.hidden_size
        rows = batch * (config.num_tokens + (2 if config.conditioning == "in_context" else 0))
        self.final = batch * config.num_tokens * config.hidden_size
        self.stream = rows * config.hidden_size
        self.hidden = rows * config.mlp_hidden_size
        self.statistics = rows * 3 * FP32  # bytes: each row's mean, in two parts, and deviation
        self.log_sums = rows * config.num_heads * FP32  # bytes: of each row of an attention

    def products(self) -> int:
        """What a block keeps either way: outputs of qkv, attention and fc1, and its vectors."""
        values = 4 * self.stream + self.hidden + self.config.modulation_vectors * self.vector
        if self.modulated and self.casts:
            values += self.vector  # each adaLN linear casts its input for itself
        if self.attends_twice:
            values += 2 * self.stream + 4 * self.vector  # q and the output; k and v of two tokens
        return values * self.itemsize + (2 if self.attends_twice else 1) * self.log_sums

    def between(self) -> int:
        """What lies between a block's products: inputs, statistics and outputs of norms, output of GELU, gated branches."""
        values = self.sublayers * self.stream + self.hidden
        if self.config.conditioning == "adaln_zero":
            values += self.sublayers * self.stream
        if self.attends_twice and self.casts:
            values += 2 * self.vector  # the context
        return values * self.itemsize + self.sublayers * (self.stream * FP32 + self.statistics)

    def block_inputs(self) -> int:
        """What a block is computed again from: the stream and its norm, and the branches, which end in products."""
        return 2 * self.stream * FP32 + self.sublayers * self.stream * self.itemsize

    def ends(self, plan: str) -> int:
        """Before the first block and behind the last."""
        values = self.features + 2 * self.vector  # of the timestep's MLP
        values += self.latents + self.final if self.casts else self.stream  # the last product's input, casts of both ends'
        fp32 = self.stream if plan == "keep" else 0  # the last norm's input
        if self.modulated:
            values += 3 * self.vector  # the last norm's shift and scale, what they are made of
            fp32 += self.vector  # and what that is made of
        if self.attends_twice and (plan == "checkpoint" or not self.casts):
            fp32 += 2 * self.vector  # the context
        return values * self.itemsize + fp32 * FP32 + self.statistics

    def inference(self) -> int:
        """In a block's MLP: the stream and its norm, those the block began with and the branch before, hidden layer, output."""
        conditioning = 1 if self.modulated else 3  # their sum; without adaLN the context of both too
        vectors = (modulation_vectors(self.config) + conditioning) * self.vector
        attention = (2 if self.attends_twice else 1) * self.stream
        return (6 * self.stream + max(self.hidden, attention) + vectors) * self.itemsize
