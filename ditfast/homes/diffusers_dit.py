"""diffusers' DiTTransformer2DModel, alone or in a DiTPipeline. Its blocks each hold an embedder of timesteps and labels.

The embedders stay diffusers' own, so both sides of a comparison have the frequencies that diffusers computes on the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import blocks
from ..argument_checks import DTYPES
from .caches import Modulations
from .calls import unused
from .home import SEVERAL_CONDITIONS, VECTORS, WITH_GRADIENTS, BlockHome, Declined, Foreign, Home, Swap, require
from .structure import check_children, check_features, check_idle, check_layer_norm, convolution_in, has_children

PROCESSORS = ("AttnProcessor", "AttnProcessor2_0")


class DiffusersBlock(BlockHome):
    """``BasicTransformerBlock`` with ``norm_type="ada_norm_zero"``"""

    name = "ada_norm_zero block"

    def looks_like(self, module: Foreign) -> bool:
        return has_children(module, "norm1", "attn1", "ff") and getattr(module, "norm_type", None) == "ada_norm_zero"

    def check(self, block: Foreign) -> None:
        check_children(block, {"norm1", "attn1", "norm3", "ff"}, "the block")
        require(has_children(block.norm1, "emb", "silu", "linear", "norm"), "norm1 is no AdaLayerNormZero with an embedder")
        require(type(block.norm1.silu) is nn.SiLU, "norm1.silu is no SiLU")
        check_layer_norm(block.norm1.norm, "norm1.norm")
        check_layer_norm(block.norm3, "norm3")
        hidden_size = block.norm1.norm.normalized_shape[0]
        check_features(block.norm1.linear, VECTORS * hidden_size, "norm1.linear")
        attn, mlp = block.attn1, block.ff.net
        for part in ("norm_q", "norm_k", "spatial_norm", "group_norm", "norm_cross"):
            require(getattr(attn, part, None) is None, f"attn1.{part} is there, expected none")
        only_attends = not attn.residual_connection and attn.rescale_output_factor == 1
        require(only_attends, "attn1 adds its input or rescales its output")
        require(math.isclose(attn.scale, (attn.inner_dim // attn.heads) ** -0.5), f"attn1.scale is {attn.scale}")
        require(attn.inner_dim == attn.inner_kv_dim, "attn1 has fewer heads of keys than of queries")
        check_idle(attn.to_out, "1")
        check_children(attn, {"to_q", "to_k", "to_v", "to_out"}, "attn1")
        require(not block.only_cross_attention, "attn1 attends to something else")
        require(len(mlp) == 3, f"ff.net has {len(mlp)} layers, expected 3")
        tanh = has_children(mlp[0], "proj") and getattr(mlp[0], "approximate", None) == "tanh"
        require(tanh and type(mlp[0]).__name__ == "GELU", "ff is no MLP with GELU(approximate='tanh')")
        check_idle(mlp, "1")
        require(self.as_found(block), "attn1 has a processor of its own, or ff is chunked")

    def as_found(self, block: Foreign) -> bool:
        processor = type(block.attn1.processor)
        known = processor.__name__ in PROCESSORS and processor.__module__ == "diffusers.models.attention_processor"
        return known and block._chunk_size is None

    def called(self, block: Foreign) -> Sequence[nn.Module]:
        attn, first, last = block.attn1, block.ff.net[0], block.ff.net[2]
        return block.norm1.linear, attn.to_q, attn.to_k, attn.to_v, attn.to_out[0], first.proj, last

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
        *unknown: Any,
        **unknown_too: Any,
    ) -> Any:
        others = (attention_mask, encoder_hidden_states, encoder_attention_mask, cross_attention_kwargs or None, *unknown)
        extra = unused(swap, others, unknown_too)
        if extra:
            return Declined(extra)
        if timestep is None or class_labels is None or hidden_states.dim() != 3 or hidden_states.dtype not in DTYPES:
            return Declined("its inputs are not [B, T, D] in fp32, fp16 or bf16, timesteps and labels")
        if _has_several(timestep, class_labels, len(hidden_states)):
            return Declined(SEVERAL_CONDITIONS)
        c = swap.module.norm1.emb(timestep, class_labels, hidden_dtype=hidden_states.dtype)  # [B, D]
        x = swap.cast(hidden_states)
        modulation = swap.modulation(F.silu(swap.cast(c).expand(x.shape[0], -1)))
        return blocks.run_through(x, [swap.sublayers(modulation)]).to(hidden_states.dtype)

    def modulation_linear(self, block: Foreign) -> nn.Module:
        return block.norm1.linear

    def chain(self, swap: Swap, modulation: blocks.Modulation) -> list[blocks.Sublayer]:
        block, attn, mlp = swap.module, swap.module.attn1, swap.module.ff.net
        qkv = blocks.SeparateQKV(*(swap.view(linear) for linear in (attn.to_q, attn.to_k, attn.to_v)))
        return blocks.sublayers(
            modulation,
            blocks.SelfAttention(attn.heads, qkv, swap.view(attn.to_out[0]), swap.options.engine, swap.options.int8),
            blocks.Mlp(swap.view(mlp[0].proj), swap.view(mlp[2]), swap.options.int8),
            attn_norm_eps=block.norm1.norm.eps,
            mlp_norm_eps=block.norm3.eps,
        )

    def example(self, block: Foreign, generator: torch.Generator) -> tuple[Any, ...]:
        x = torch.randn(2, 16, block.norm1.norm.normalized_shape[0], generator=generator)
        return x, None, None, None, torch.tensor([10, 900]), None, torch.tensor([0, 1])

    def heads(self, block: Foreign) -> tuple[int, int]:
        return block.attn1.heads, block.norm1.norm.normalized_shape[0] // block.attn1.heads


class DiffusersModel(Home):
    """``DiTTransformer2DModel``"""

    name = "DiTTransformer2DModel"

    def looks_like(self, module: Foreign) -> bool:
        return has_children(module, "pos_embed", "transformer_blocks", "norm_out", "proj_out_1", "proj_out_2")

    def check(self, model: Foreign) -> None:
        check_layer_norm(model.norm_out, "norm_out")
        require(all(has_children(block, "norm1") for block in model.transformer_blocks), "a block has no norm1")
        check_features(model.proj_out_1, 2 * model.norm_out.normalized_shape[0], "proj_out_1")

    def called(self, model: Foreign) -> Sequence[nn.Module]:
        others = [child for name, child in model.named_children() if name not in ("transformer_blocks", "norm_out")]
        return [*others, *model.transformer_blocks]

    def forward(
        self,
        swap: Swap,
        hidden_states: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        *unknown: Any,
        **unknown_too: Any,
    ) -> Any:
        # With gradients the model's own forward runs, over swapped blocks: it may checkpoint them. In training each copy of
        # the label embedder drops labels of its own.
        model = swap.module
        if torch.is_grad_enabled():
            return Declined(WITH_GRADIENTS)
        extra = unused(swap, (cross_attention_kwargs or None, *unknown), unknown_too)
        if model.training:
            return Declined("in training mode its blocks run one by one: each drops labels of its own")
        if extra or timestep is None or class_labels is None:
            return Declined(extra or "it was called without timesteps or labels")
        if _has_several(timestep, class_labels, len(hidden_states)):
            return Declined(SEVERAL_CONDITIONS)
        grid = hidden_states.shape[2] // model.patch_size, hidden_states.shape[3] // model.patch_size
        fused = [swap.fusible(block, grid[0] * grid[1]) for block in model.transformer_blocks]
        if grid[0] != grid[1] or hidden_states.dtype not in DTYPES:
            return Declined("its image is not square, or not in fp32, fp16 or bf16")
        if fused[0] is None:  # it embeds for the model
            return Declined(
                "its first block is hooked (as by FSDP), left or unchecked at this length: the blocks run one by one"
            )
        x = model.pos_embed(hidden_states)  # [B, T, D]
        per_block, final = self._modulations(swap, fused, x, timestep, class_labels)
        given: dict[str, Any] = {
            "attention_mask": None,
            "encoder_hidden_states": None,
            "encoder_attention_mask": None,
            "timestep": timestep,
            "cross_attention_kwargs": cross_attention_kwargs,
            "class_labels": class_labels,
        }
        segments: list[blocks.Segment] = [
            partial(swap.call, block, **given) if inner is None else inner.chain(modulation)
            for block, inner, modulation in zip(model.transformer_blocks, fused, per_block, strict=True)
        ]
        u = blocks.run_through(swap.cast(x), segments, final)  # [B, T, D]
        out = swap.image(model.proj_out_2, u, grid, model.patch_size, hidden_states)  # [B, C', H, W]
        if not return_dict:
            return (out,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=out)

    def _modulations(
        self, swap: Swap, fused: Sequence[Swap | None], x: Tensor, timestep: Tensor, labels: Tensor
    ) -> Modulations:
        model = swap.module
        ready = [inner for inner in fused if inner is not None]
        embedders = [inner.module.norm1.emb for inner in ready]
        agree = swap.caches.agree([inner.replaced_parameters() for inner in ready])  # only the embedder has any
        embeddings = [
            embedder(timestep, labels, hidden_dtype=x.dtype).expand(x.shape[0], -1)  # [B, D]
            for embedder in embedders[: 1 if agree else None]
        ]

        def compute() -> Modulations:
            first, *others = (F.silu(swap.cast(c)) for c in embeddings)  # [B, D] each
            vectors, per_block = swap.modulations(model.proj_out_1, fused if agree else fused[:1], first)  # [B, 2 * D]
            shift, scale = vectors.chunk(2, dim=1)  # 2 x [B, D]
            for inner in fused[len(per_block) :]:
                per_block.append(None if inner is None else inner.modulation(others.pop(0)))
            return per_block, blocks.Norm(shift, scale, model.norm_out.eps)

        linears = [model.proj_out_1, *(inner.module.norm1.linear for inner in ready)]
        return swap.cached_modulations(embeddings, linears, compute)

    def example(self, model: Foreign, generator: torch.Generator) -> tuple[Tensor, ...]:
        proj = convolution_in(model.pos_embed.proj)
        x = torch.randn(2, proj.in_channels, model.height, model.width, generator=generator)
        return x, torch.tensor([10, 900]), torch.tensor([0, 1])


def _has_several(timestep: Tensor, labels: Tensor, B: int) -> bool:
    return any(condition.dim() and len(condition) not in (1, B) for condition in (timestep, labels))
