"""The Triton kernels, installed as ``ditfast.kernels``: one op, one file. On torch and triton, inspect on ditfast.terminal."""

if __name__ == "kernels":  # not ditfast.kernels: imported from the clone's root
    import sys

    from .name_clash import step_aside

    step_aside(sys.modules[__name__])
else:
    from .attention import attention, cross_attention
    from .attention_backward import attention_backward, cross_attention_backward
    from .classifier_free_guidance import classifier_free_guidance, classifier_free_guidance_backward
    from .denoise_update import denoise_update
    from .final_layer import final_layer
    from .gated_residual import gated_residual
    from .gated_residual_layer_norm_modulate import gated_residual_layer_norm_modulate
    from .grouped_linear import address_table, grouped_linear
    from .joint_backward import joint_backward
    from .launch import check_launchable, current_device, target
    from .layer_norm_modulate import layer_norm_modulate
    from .linear import linear
    from .linear_backward import linear_backward
    from .linear_gated_residual import linear_gated_residual
    from .linear_gelu import linear_gelu, linear_gelu_backward, mlp, mlp_backward
    from .linear_unpatchify import linear_unpatchify, linear_unpatchify_backward
    from .patch_embed import patch_embed, patch_embed_backward
    from .timestep_embedding import timestep_embedding, timestep_embedding_backward
    from .unpatchify import unpatchify, unpatchify_backward

    __all__ = [
        "address_table",
        "attention",
        "attention_backward",
        "check_launchable",
        "classifier_free_guidance",
        "classifier_free_guidance_backward",
        "cross_attention",
        "cross_attention_backward",
        "current_device",
        "denoise_update",
        "final_layer",
        "gated_residual",
        "gated_residual_layer_norm_modulate",
        "grouped_linear",
        "joint_backward",
        "layer_norm_modulate",
        "linear",
        "linear_backward",
        "linear_gated_residual",
        "linear_gelu",
        "linear_gelu_backward",
        "linear_unpatchify",
        "linear_unpatchify_backward",
        "mlp",
        "mlp_backward",
        "patch_embed",
        "patch_embed_backward",
        "target",
        "timestep_embedding",
        "timestep_embedding_backward",
        "unpatchify",
        "unpatchify_backward",
    ]
