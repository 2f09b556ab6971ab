"""Work and size of a model, from its config alone.

The paper's "Gflops" are multiply-adds (MACs) of one forward for one image, attention's two products included; a MAC is two
floating-point operations. Norms, activations and other elementwise work are left out of both, as the paper does.
"""

from __future__ import annotations

from ..argument_checks import as_bool
from ..config import TIMESTEP_FEATURES, DiTConfig, check_config


def macs(config: DiTConfig) -> int:
    """Multiply-adds of one forward for one image: 1e9 of them are one of the paper's "Gflops" (tables 1 and 4)."""
    check_config(config)
    T, D, patch = config.num_tokens, config.hidden_size, config.in_channels * config.patch_size**2
    ends = T * D * patch + T * D * config.patch_out_features
    conditioning = TIMESTEP_FEATURES * D + D * D + (2 * D * D if config.modulation_vectors else 0)
    return ends + conditioning + config.depth * _block_macs(config)


def _block_macs(config: DiTConfig) -> int:
    T, D = config.num_tokens, config.hidden_size
    rows = T + 2 if config.conditioning == "in_context" else T
    attention = 4 * D * D * rows + 2 * rows * rows * D
    mlp = 2 * D * config.mlp_hidden_size * rows
    cross = 2 * D * D * T + 2 * D * D * 2 + 2 * T * 2 * D if config.conditioning == "cross_attention" else 0
    return attention + mlp + cross + config.modulation_vectors * D * D


def flops(config: DiTConfig) -> int:
    """Floating-point operations of one forward for one image: 2 x ``macs``."""
    return 2 * macs(config)


def parameters(config: DiTConfig, *, positions: bool = True) -> int:
    """Values in the state dict; ``positions=False`` leaves out the fixed position table, as the paper's counts do."""
    check_config(config)
    positions = as_bool("positions", positions)
    D, patch = config.hidden_size, config.in_channels * config.patch_size**2
    modulation = _linear(D, 2 * D) if config.modulation_vectors else 0
    ends = _linear(patch, D) + _linear(D, config.patch_out_features) + modulation
    embedders = _linear(TIMESTEP_FEATURES, D) + _linear(D, D) + config.label_rows * D
    fixed = config.num_tokens * D if positions else 0
    return ends + embedders + fixed + config.depth * _block_parameters(config)


def _block_parameters(config: DiTConfig) -> int:
    D, hidden = config.hidden_size, config.mlp_hidden_size
    count = _linear(D, 3 * D) + _linear(D, D) + _linear(D, hidden) + _linear(hidden, D)
    if config.conditioning == "cross_attention":
        count += _linear(D, D) + _linear(D, 2 * D) + _linear(D, D)
    if config.modulation_vectors:
        count += _linear(D, config.modulation_vectors * D)
    return count


def multiplied_weights(config: DiTConfig) -> tuple[int, int]:
    """Values of the weights that products read, without biases: a block's, adaLN's left out, and all that are in no block."""
    D = config.hidden_size
    block = 4 * D * D + 2 * D * config.mlp_hidden_size + (4 * D * D if config.conditioning == "cross_attention" else 0)
    vectors = config.depth * config.modulation_vectors + (2 if config.modulation_vectors else 0)
    ends = D * (config.in_channels * config.patch_size**2 + config.patch_out_features)
    return block, vectors * D * D + ends + TIMESTEP_FEATURES * D + D * D


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs
