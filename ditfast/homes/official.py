"""The official DiT and what kept its module tree: SiT, REPA, fast-DiT; and any model of timm-style blocks with adaLN-Zero.

Names of parameters: those of the official checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import blocks, ops
from ..argument_checks import DTYPES
from ..plain import is_plain
from .caches import Modulations
from .calls import is_tensor, unused
from .home import (
    OF_OTHER_DTYPES,
    SEVERAL_CONDITIONS,
    VECTORS,
    WITH_GRADIENTS,
    BlockHome,
    Declined,
    Foreign,
    Home,
    Swap,
    require,
)
from .structure import (
    check_adaptive,
    check_children,
    check_features,
    check_idle,
    check_layer_norm,
    convolution_in,
    has_children,
)


class OfficialBlock(BlockHome):
    """``forward(x [B, T, D], c [B, D])``"""

    name = "adaLN-Zero block"

    def looks_like(self, module: Foreign) -> bool:
        return has_children(module, "attn", "mlp", "adaLN_modulation")

    def check(self, block: Foreign) -> None:
        attn, mlp = block.attn, block.mlp
        check_children(block, {"norm1", "norm2", "attn", "mlp", "adaLN_modulation"}, "the block")
        require(has_children(block, "norm1", "norm2"), "the block has no norm1 and norm2")
        check_layer_norm(block.norm1, "norm1")
        check_layer_norm(block.norm2, "norm2")
        require(has_children(attn, "qkv", "proj"), "attn has no qkv and proj")
        check_children(attn, {"qkv", "proj", "q_norm", "k_norm", "norm", "attn_drop", "proj_drop"}, "attn")
        check_idle(attn, "q_norm", "k_norm", "norm", "attn_drop", "proj_drop")
        hidden_size = block.norm1.normalized_shape[0]
        require(isinstance(getattr(attn, "num_heads", None), int), "attn has no num_heads")
        check_features(attn.qkv, 3 * hidden_size, "attn.qkv")
        scale = (hidden_size / attn.num_heads) ** -0.5
        require(math.isclose(getattr(attn, "scale", scale), scale), f"attn.scale is {getattr(attn, 'scale', scale)}")
        require(has_children(mlp, "fc1", "fc2"), "mlp has no fc1 and fc2")
        check_children(mlp, {"fc1", "act", "drop", "drop1", "norm", "fc2", "drop2"}, "mlp")
        check_idle(mlp, "drop", "drop1", "norm", "drop2")
        require(has_children(mlp, "act"), "mlp has no act")
        tanh = isinstance(mlp.act, nn.GELU) and mlp.act.approximate == "tanh"
        require(tanh, f"mlp.act is {mlp.act}, expected GELU(approximate='tanh')")
        check_adaptive(block.adaLN_modulation, VECTORS, hidden_size, "adaLN_modulation")

    def called(self, block: Foreign) -> Sequence[nn.Module]:
        return block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2, block.adaLN_modulation[1]

    def forward(self, swap: Swap, x: Tensor | None = None, c: Tensor | None = None, *unknown: Any, **unknown_too: Any) -> Any:
        extra = unused(swap, unknown, unknown_too)
        if extra:
            return Declined(extra)
        if not (is_tensor(x, 3) and is_tensor(c, 2) and x.dtype in DTYPES):
            return Declined("its inputs are not [B, T, D] and [B, D] in fp32, fp16 or bf16")
        if not swap.takes(swap.module.attn.qkv, x, c):
            return Declined(OF_OTHER_DTYPES)
        if c.shape[0] not in (1, x.shape[0]):
            return Declined(SEVERAL_CONDITIONS)
        modulation = swap.modulation(F.silu(swap.cast(c).expand(x.shape[0], -1)))
        return blocks.run_through(swap.cast(x), [swap.sublayers(modulation)]).to(x.dtype)

    def modulation_linear(self, block: Foreign) -> nn.Module:
        return block.adaLN_modulation[1]

    def chain(self, swap: Swap, modulation: blocks.Modulation) -> list[blocks.Sublayer]:
        block = swap.module
        attn, mlp, options = block.attn, block.mlp, swap.options
        return blocks.sublayers(
            modulation,
            blocks.SelfAttention(attn.num_heads, swap.view(attn.qkv), swap.view(attn.proj), options.engine, options.int8),
            blocks.Mlp(swap.view(mlp.fc1), swap.view(mlp.fc2), options.int8),
            attn_norm_eps=block.norm1.eps,
            mlp_norm_eps=block.norm2.eps,
        )

    def example(self, block: Foreign, generator: torch.Generator) -> tuple[Tensor, ...]:
        hidden_size = block.norm1.normalized_shape[0]
        return torch.randn(2, 16, hidden_size, generator=generator), torch.randn(2, hidden_size, generator=generator)

    def heads(self, block: Foreign) -> tuple[int, int]:
        return block.attn.num_heads, block.norm1.normalized_shape[0] // block.attn.num_heads


class OfficialModel(Home):
    """``forward(x [B, C, H, W], t [B], y [B])``"""

    def __init__(self, name: str, returns_variance: bool):
        self.name = name
        self.returns_variance = returns_variance  # SiT cuts it off

    def looks_like(self, module: Foreign) -> bool:
        return has_children(module, "x_embedder", "t_embedder", "y_embedder", "blocks", "final_layer")

    def check(self, model: Foreign) -> None:
        final = model.final_layer
        positions: Foreign = getattr(model, "pos_embed", None)
        require(isinstance(positions, Tensor) and positions.dim() == 3, "pos_embed is no [1, T, D] tensor")
        require(_convolution(model) is not None, "x_embedder.proj is no convolution")
        check_children(model.x_embedder, {"proj", "norm"}, "x_embedder")
        check_idle(model.x_embedder, "norm")
        require(has_children(final, "norm_final", "linear", "adaLN_modulation"), "final_layer is built otherwise")
        check_children(final, {"norm_final", "linear", "adaLN_modulation"}, "final_layer")
        check_layer_norm(final.norm_final, "final_layer.norm_final")
        check_adaptive(final.adaLN_modulation, 2, positions.shape[2], "final_layer.adaLN_modulation")

    def called(self, model: Foreign) -> Sequence[nn.Module]:
        ours = ("x_embedder", "final_layer", "blocks")
        others = [child for name, child in model.named_children() if name not in ours]
        return [*others, *model.blocks, model.x_embedder.proj, model.final_layer.linear, model.final_layer.adaLN_modulation[1]]

    def forward(
        self,
        swap: Swap,
        x: Tensor | None = None,
        t: Tensor | None = None,
        y: Tensor | None = None,
        *unknown: Any,
        **unknown_too: Any,
    ) -> Any:
        # With gradients the model's own forward runs, over swapped blocks: it may checkpoint them, or keep what they return.
        if torch.is_grad_enabled():
            return Declined(WITH_GRADIENTS)
        extra = unused(swap, unknown, unknown_too)
        if extra:
            return Declined(extra)
        model, grid = swap.module, _grid(swap.module)
        patch_size = _convolution(model).kernel_size[0]
        size = grid[0] * patch_size, grid[1] * patch_size
        # Forks may have a use for other inputs.
        if not (is_tensor(x, 4) and is_tensor(t, 1) and is_tensor(y, 1) and x.shape[2:] == size and x.dtype in DTYPES):
            return Declined("its inputs are not [B, C, H, W], [B] and [B] of the model's size")
        if not swap.takes(model.x_embedder.proj, x):
            return Declined(OF_OTHER_DTYPES)
        if t.shape[0] not in (1, x.shape[0]) or y.shape[0] not in (1, x.shape[0]):
            return Declined(SEVERAL_CONDITIONS)
        stream = self._embed(swap, swap.cast(x), patch_size)  # [B, T, D]
        c = (model.t_embedder(t) + model.y_embedder(y, model.training)).to(stream.dtype)  # [B, D]
        fused = [swap.fusible(block, stream.shape[1]) for block in model.blocks]
        per_block, final = self._modulations(swap, fused, c.expand(x.shape[0], -1))
        segments: list[blocks.Segment] = [
            partial(_call, swap, block, c) if inner is None else inner.chain(modulation)
            for block, inner, modulation in zip(model.blocks, fused, per_block, strict=True)
        ]
        u = blocks.run_through(stream, segments, final)  # [B, T, D]
        out = swap.image(model.final_layer.linear, u, grid, patch_size, x)  # [B, C', H, W]
        return out if self.returns_variance else out.chunk(2, dim=1)[0]

    def _embed(self, swap: Swap, x: Tensor, patch_size: int) -> Tensor:
        proj, positions = swap.module.x_embedder.proj, swap.stored(swap.module.pos_embed)
        if is_plain(proj):
            weight = swap.stored(proj.weight).contiguous()  # they may be channels-last
            return ops.patch_embed(x.contiguous(), weight, swap.stored(proj.bias), positions, patch_size)  # [B, T, D]
        return swap.call(proj, x).flatten(2).transpose(1, 2).contiguous() + positions  # [B, T, D]

    def _modulations(self, swap: Swap, fused: Sequence[Swap | None], c: Tensor) -> Modulations:
        model = swap.module
        final_linear = model.final_layer.adaLN_modulation[1]

        def compute() -> Modulations:
            vectors, per_block = swap.modulations(final_linear, fused, F.silu(c))  # [B, 2 * D]
            shift, scale = vectors.chunk(2, dim=1)  # 2 x [B, D]
            return per_block, blocks.Norm(shift, scale, model.final_layer.norm_final.eps)

        linears = [final_linear, *(inner.module.adaLN_modulation[1] for inner in fused if inner is not None)]
        return swap.cached_modulations([c], linears, compute)

    def example(self, model: Foreign, generator: torch.Generator) -> tuple[Tensor, ...]:
        proj, (h, w) = _convolution(model), _grid(model)
        patch_size = proj.kernel_size[0]
        x = torch.randn(2, proj.in_channels, h * patch_size, w * patch_size, generator=generator)
        table = getattr(model.y_embedder, "embedding_table", None)
        last = table.num_embeddings - 1 if isinstance(table, nn.Embedding) else 0  # where labels are dropped: no label
        return x, torch.tensor([10, 900]), torch.tensor([0, last])

    def other_example(self, example: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return one image with a time in [0, 1], as SiT has it."""
        x, _, y = example
        return x[:1], torch.tensor([0.3], device=x.device), y[:1]


def _convolution(model: Foreign) -> Foreign:
    return convolution_in(getattr(model.x_embedder, "proj", None))


def _grid(model: Foreign) -> tuple[int, int]:
    """Of patches, (rows, columns)."""
    tokens = model.pos_embed.shape[1]
    side = math.isqrt(tokens)
    h, w = getattr(model.x_embedder, "grid_size", None) or (side, tokens // side)
    return h, w


def _call(swap: Swap, block: nn.Module, c: Tensor, x: Tensor) -> Tensor:
    return swap.call(block, x, c)
