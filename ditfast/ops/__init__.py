"""The fused functions: Triton kernels and plain torch behind one name each. One op, one file, as in kernels/:

its public function and checks, its torch version (which CPU tensors take, and calls that need gradients), its registration.
"""

from .attention import attention
from .gated_residual import gated_residual
from .gated_residual_layer_norm_modulate import gated_residual_layer_norm_modulate
from .layer_norm_modulate import layer_norm_modulate
from .linear_gelu import linear_gelu

__all__ = ["attention", "gated_residual", "gated_residual_layer_norm_modulate", "layer_norm_modulate", "linear_gelu"]
