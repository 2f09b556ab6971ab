"""The fused functions: Triton kernels and plain torch behind one name each. One op, one file, as in kernels/:

its public function and checks, its torch version (which CPU tensors take), its registration with its gradient.
"""

from .attention import attention
from .classifier_free_guidance import classifier_free_guidance
from .cross_attention import cross_attention
from .denoise_update import denoise_update
from .final_layer import final_layer
from .gated_residual import gated_residual
from .gated_residual_layer_norm_modulate import gated_residual_layer_norm_modulate
from .grouped_linear import grouped_linear
from .layer_norm_modulate import layer_norm_modulate
from .linear import linear
from .linear_gated_residual import linear_gated_residual
from .linear_gelu import linear_gelu
from .linear_unpatchify import linear_unpatchify
from .mlp import mlp
from .patch_embed import patch_embed
from .timestep_embedding import timestep_embedding
from .unpatchify import unpatchify

__all__ = [
    "attention",
    "classifier_free_guidance",
    "cross_attention",
    "denoise_update",
    "final_layer",
    "gated_residual",
    "gated_residual_layer_norm_modulate",
    "grouped_linear",
    "layer_norm_modulate",
    "linear",
    "linear_gated_residual",
    "linear_gelu",
    "linear_unpatchify",
    "mlp",
    "patch_embed",
    "timestep_embedding",
    "unpatchify",
]
