"""The launchers of ``ditfast.kernels`` by the names of the registered ops."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .backends import has_triton
from .plan import forget_plans


@functools.cache
def launchers() -> dict[str, Callable[..., Any]]:
    """Return all launchers; triton is imported at the first call."""
    if TYPE_CHECKING:
        import kernels  # as mypy finds them
    else:
        kernels = triton_kernels()
    return {
        "attention": kernels.attention,
        "attention_backward": kernels.attention_backward,
        "classifier_free_guidance": kernels.classifier_free_guidance,
        "classifier_free_guidance_backward": kernels.classifier_free_guidance_backward,
        "cross_attention": kernels.cross_attention,
        "cross_attention_backward": kernels.cross_attention_backward,
        "denoise_update": kernels.denoise_update,
        "final_layer": kernels.final_layer,
        "gated_residual": kernels.gated_residual,
        "gated_residual_layer_norm_modulate": kernels.gated_residual_layer_norm_modulate,
        "grouped_linear": kernels.grouped_linear,
        "joint_backward": kernels.joint_backward,
        "layer_norm_modulate": kernels.layer_norm_modulate,
        "linear": kernels.linear,
        "linear_backward": kernels.linear_backward,
        "linear_gated_residual": kernels.linear_gated_residual,
        "linear_gelu": kernels.linear_gelu,
        "linear_gelu_backward": kernels.linear_gelu_backward,
        "linear_unpatchify": kernels.linear_unpatchify,
        "linear_unpatchify_backward": kernels.linear_unpatchify_backward,
        "mlp": kernels.mlp,
        "mlp_backward": kernels.mlp_backward,
        "patch_embed": kernels.patch_embed,
        "patch_embed_backward": kernels.patch_embed_backward,
        "timestep_embedding": kernels.timestep_embedding,
        "timestep_embedding_backward": kernels.timestep_embedding_backward,
        "unpatchify": kernels.unpatchify,
        "unpatchify_backward": kernels.unpatchify_backward,
    }


@functools.cache
def triton_kernels() -> ModuleType:
    """Return ``ditfast.kernels``, imported at the first launch: triton is slow to import, and absent on macOS and Windows."""
    if not has_triton():
        raise RuntimeError("backend 'triton' needs the package triton, which is not installed: pip install triton (Linux)")
    import ditfast.kernels

    ditfast.kernels.tiles.on_change.append(forget_plans)
    return ditfast.kernels
