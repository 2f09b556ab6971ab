"""Other adaLN families of diffusers, op by op: their norms with modulation and their gated residuals, not their attention.

PixArt's blocks (adaLN-single, Chen et al. 2023) and Stable Diffusion 3's joint blocks (Esser et al. 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import blocks, ops
from ..argument_checks import DTYPES
from .calls import unused
from .home import SEVERAL_CONDITIONS, Declined, Foreign, Home, ModelInputs, Swap, require
from .structure import check_features, check_layer_norm, has_children


class PixArtBlock(Home):
    """``BasicTransformerBlock`` with ``norm_type="ada_norm_single"``"""

    name = "adaLN-single block"

    def looks_like(self, module: Foreign) -> bool:
        return has_children(module, "norm1", "attn1", "ff") and getattr(module, "norm_type", None) == "ada_norm_single"

    def check(self, block: Foreign) -> None:
        check_layer_norm(block.norm1, "norm1")
        check_layer_norm(block.norm2, "norm2")
        require(block.pos_embed is None and not hasattr(block, "fuser"), "the block has positions or a fuser of its own")
        require(self.as_found(block), "ff is chunked")

    def as_found(self, block: Foreign) -> bool:
        return block._chunk_size is None

    def called(self, block: Foreign) -> Sequence[nn.Module]:
        return [child for name, child in block.named_children() if name not in ("norm1", "norm2")]

    def forward(
        self,
        swap: Swap,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
        *unknown: Any,
        **unknown_too: Any,
    ) -> Any:
        extra = unused(swap, (cross_attention_kwargs or None, class_labels, added_cond_kwargs, *unknown), unknown_too)
        if extra or timestep is None or hidden_states.dim() != 3 or hidden_states.dtype not in DTYPES:
            return Declined(extra or "its inputs are not [B, T, D] in fp32, fp16 or bf16, and timesteps")
        block = swap.module
        vectors = block.scale_shift_table[None] + timestep.reshape(hidden_states.shape[0], 6, -1)  # [B, 6, D]
        # Under autocast the vectors are fp32, and make the stream fp32. PixArt's first one has another layout.
        x = hidden_states.to(torch.promote_types(hidden_states.dtype, vectors.dtype)).contiguous()  # [B, T, D]
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = vectors.unbind(1)  # 6 x [B, D]
        u = ops.layer_norm_modulate(x, shift, scale, block.norm1.eps)  # [B, T, D]
        context = encoder_hidden_states if block.only_cross_attention else None
        h = block.attn1(u, encoder_hidden_states=context, attention_mask=attention_mask)  # [B, T, D]
        if block.attn2 is not None:
            x = ops.gated_residual(x, h, gate)  # [B, T, D]
            h = block.attn2(x, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask)
            gate = None
        x, u = ops.gated_residual_layer_norm_modulate(x, h, gate, mlp_shift, mlp_scale, block.norm2.eps)  # 2 x [B, T, D]
        return ops.gated_residual(x, block.ff(u), mlp_gate)  # [B, T, D]

    def example(self, block: Foreign, generator: torch.Generator) -> tuple[Any, ...]:
        width = block.norm1.normalized_shape[0]
        x, timestep = torch.randn(2, 16, width, generator=generator), torch.randn(2, 6 * width, generator=generator)
        context = torch.randn(2, 8, block.cross_attention_dim or width, generator=generator)
        return x, None, context, None, timestep


class JointBlock(Home):
    """``JointTransformerBlock``: two streams, one attention"""

    name = "joint block"

    def looks_like(self, module: Foreign) -> bool:
        return has_children(module, "norm1", "norm1_context", "attn", "norm2", "ff") and hasattr(module, "context_pre_only")

    def check(self, block: Foreign) -> None:
        require(not block.use_dual_attention, "the block has two attentions")
        for name in ("norm1", "norm1_context"):
            norm = getattr(block, name)
            require(has_children(norm, "silu", "linear", "norm"), f"{name} is no adaptive LayerNorm")
            check_layer_norm(norm.norm, f"{name}.norm")
            last = block.context_pre_only and name == "norm1_context"
            check_features(norm.linear, (2 if last else 6) * norm.norm.normalized_shape[0], f"{name}.linear")
        check_layer_norm(block.norm2, "norm2")
        if not block.context_pre_only:
            check_layer_norm(block.norm2_context, "norm2_context")
        require(self.as_found(block), "ff is chunked")

    def as_found(self, block: Foreign) -> bool:
        return block._chunk_size is None

    def called(self, block: Foreign) -> Sequence[nn.Module]:
        children = [block.attn, block.ff, block.norm1.linear, block.norm1_context.linear]
        return children if block.context_pre_only else [*children, block.ff_context]

    def forward(
        self,
        swap: Swap,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        temb: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        *unknown: Any,
        **unknown_too: Any,
    ) -> Any:
        extra = unused(swap, unknown, unknown_too)
        if extra or encoder_hidden_states is None or temb is None or hidden_states.dtype not in DTYPES:
            return Declined(extra or "its inputs are not two streams in fp32, fp16 or bf16, and a condition")
        if len(temb) not in (1, len(hidden_states)):
            return Declined(SEVERAL_CONDITIONS)
        block, x, context = swap.module, hidden_states.contiguous(), encoder_hidden_states.contiguous()
        activated = F.silu(temb)  # [B, D]
        of_x = _six(block.norm1.linear, activated, x.shape[0])
        u = ops.layer_norm_modulate(x, of_x.attn_shift, of_x.attn_scale, block.norm1.norm.eps)  # [B, T, D]
        if block.context_pre_only:
            vectors = block.norm1_context.linear(activated.to(context.dtype))  # [B, 2 * D]
            scale, shift = vectors.expand(x.shape[0], -1).chunk(2, dim=1)  # 2 x [B, D]
        else:
            of_context = _six(block.norm1_context.linear, activated, x.shape[0])
            shift, scale = of_context.attn_shift, of_context.attn_scale
        v = ops.layer_norm_modulate(context, shift, scale, block.norm1_context.norm.eps)  # [B, S, D]
        h, g = block.attn(hidden_states=u, encoder_hidden_states=v, **(joint_attention_kwargs or {}))
        x = _rest(x, h, of_x, block.norm2, block.ff)  # [B, T, D]
        if block.context_pre_only:
            return None, x
        return _rest(context, g, of_context, block.norm2_context, block.ff_context), x  # [B, S, D], [B, T, D]

    def example(self, block: Foreign, generator: torch.Generator) -> tuple[Tensor, ...]:
        width = block.norm2.normalized_shape[0]
        return tuple(torch.randn(*shape, generator=generator) for shape in ((2, 16, width), (2, 8, width), (2, width)))

    def stand_in(self, block: Foreign, streams: list[Tensor]) -> Any:
        return None if block.context_pre_only else streams[1], streams[0]


class PixArtInputs(ModelInputs):
    """``PixArtTransformer2DModel``"""

    def looks_like(self, module: Foreign) -> bool:
        return type(module).__name__ == "PixArtTransformer2DModel"

    def example(self, model: Foreign, generator: torch.Generator) -> tuple[Any, ...]:
        config = model.config
        x = torch.randn(2, config.in_channels, config.sample_size, config.sample_size, generator=generator)
        context = torch.randn(2, 8, config.caption_channels, generator=generator)
        conditions: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if model.use_additional_conditions:
            conditions = {"resolution": torch.full((2, 2), 512.0), "aspect_ratio": torch.ones(2, 1)}
        return x, context, torch.tensor([10, 900]), conditions


class SD3Inputs(ModelInputs):
    """``SD3Transformer2DModel``"""

    def looks_like(self, module: Foreign) -> bool:
        return type(module).__name__ == "SD3Transformer2DModel"

    def example(self, model: Foreign, generator: torch.Generator) -> tuple[Any, ...]:
        config = model.config
        x = torch.randn(2, config.in_channels, config.sample_size, config.sample_size, generator=generator)
        context = torch.randn(2, 8, config.joint_attention_dim, generator=generator)
        return x, context, torch.randn(2, config.pooled_projection_dim, generator=generator), torch.tensor([10, 900])


def _six(linear: Foreign, activated: Tensor, B: int) -> blocks.Modulation:
    return blocks.Modulation(*linear(activated).expand(B, -1).chunk(6, dim=1))  # 6 x [B, D]


def _rest(x: Tensor, h: Tensor, vectors: blocks.Modulation, norm: Foreign, mlp: Foreign) -> Tensor:
    """Behind the attention: both of its stream's residuals, and the MLP between them."""
    shift, scale = vectors.mlp_shift, vectors.mlp_scale
    x, u = ops.gated_residual_layer_norm_modulate(x, h, vectors.attn_gate, shift, scale, norm.eps)  # 2 x [B, T, D]
    return ops.gated_residual(x, mlp(u), vectors.mlp_gate)  # [B, T, D]
