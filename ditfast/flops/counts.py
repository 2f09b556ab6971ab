"""Size of a model, from its config alone."""

from __future__ import annotations

from ..argument_checks import as_bool
from ..config import TIMESTEP_FEATURES, DiTConfig, check_config


def parameters(config: DiTConfig, *, positions: bool = True) -> int:
    """Values in the state dict; ``positions=False`` leaves out the fixed position table, as the paper's counts do."""
    check_config(config)
    positions = as_bool("positions", positions)
    D = config.hidden_size
    block, others = multiplied_weights(config)
    block += 5 * D + config.mlp_hidden_size  # biases of qkv, proj, fc1 and fc2
    block += 4 * D if config.conditioning == "cross_attention" else 0  # of q, kv and proj
    others += modulation_vectors(config) * D + D + config.patch_out_features + 2 * D  # of adaLN, both ends, the timestep's MLP
    tables = config.label_rows + (config.num_tokens if positions else 0)
    return config.depth * block + others + tables * D


def multiplied_weights(config: DiTConfig) -> tuple[int, int]:
    """Values of the weights that products read, without biases: a block's, adaLN's left out, and all that are in no block."""
    D = config.hidden_size
    block = 4 * D * D + 2 * D * config.mlp_hidden_size + (4 * D * D if config.conditioning == "cross_attention" else 0)
    ends = D * (config.in_channels * config.patch_size**2 + config.patch_out_features)
    return block, modulation_vectors(config) * D * D + ends + TIMESTEP_FEATURES * D + D * D


def modulation_vectors(config: DiTConfig) -> int:
    """Return how many vectors of adaLN a forward makes, the final layer's two among them."""
    return config.depth * config.modulation_vectors + (2 if config.modulation_vectors else 0)
