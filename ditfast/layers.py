"""The layers of the fast DiT: the reference's names, shapes and calls, run by ``blocks`` on fused ops.

A layer that is called, because of a hook, a wrapper or FSDP2, computes what the reference's does. Those that nobody wants to be
called are read instead, and fused with each other: ``is_read`` tells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import blocks, ops
from .activation_checkpointing import checkpointed
from .blocks import view
from .conditioning import project
from .config import DiTConfig
from .plain import is_plain, is_silent

MODULATION_FIELDS = {4: ("attn_shift", "attn_scale", "mlp_shift", "mlp_scale"), 6: blocks.Modulation._fields}

T = TypeVar("T", bound=nn.Module)


def is_read(module: nn.Module, kind: type[T]) -> bool:
    """Return True if a module is one of ours, and nobody would notice that it is not called."""
    return type(module).forward is kind.forward and is_silent(module)


class PatchEmbed(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, config.patch_size, config.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, T, D], without positions."""
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()  # [B, T, D]


def embed(embedder: nn.Module, x: Tensor, positions: Tensor) -> Tensor:
    """Return the tokens [B, T, D] of x [B, C, H, W] with their positions [1, T, D]."""
    if is_read(embedder, PatchEmbed):
        patches = cast(PatchEmbed, embedder)
        if is_plain(patches.proj):
            weight, bias = patches.proj.weight, cast(Tensor, patches.proj.bias)
            return ops.patch_embed(x, weight, bias, positions, patches.patch_size)  # [B, T, D]
    return embedder(x).contiguous() + positions  # [B, T, D]


class Attention(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.transform()(x)  # [B, T, D]

    def transform(self, int8: bool = False) -> blocks.SelfAttention:
        return blocks.SelfAttention(self.num_heads, view(self.qkv), view(self.proj), int8=int8)


class CrossAttention(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.q = nn.Linear(config.hidden_size, config.hidden_size)
        self.kv = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.transform()(context)(x)  # [B, T, D]

    def transform(self, int8: bool = False) -> Callable[[Tensor], blocks.CrossAttention]:
        """Return what takes the context [B, 2, D]."""
        weights = view(self.q), view(self.kv), view(self.proj)
        return lambda context: blocks.CrossAttention(self.num_heads, *weights, context, int8)


class Mlp(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.mlp_hidden_size)
        self.fc2 = nn.Linear(config.mlp_hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.transform()(x)  # [B, T, D]

    def transform(self, int8: bool = False) -> blocks.Mlp:
        return blocks.Mlp(view(self.fc1), view(self.fc2), int8)


class Modulation(nn.Sequential):
    """The adaLN regression of shift, scale and gate vectors from the conditioning vector."""

    def __init__(self, config: DiTConfig, vectors: int):
        super().__init__(nn.SiLU(), nn.Linear(config.hidden_size, vectors * config.hidden_size))
        self.vectors = vectors

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        modulation = super().forward(c)  # [B, vectors * D]
        return modulation[:, None].chunk(self.vectors, dim=2)  # vectors x [B, 1, D]


def adaln_vectors(layers: Sequence[nn.Module], c: Tensor, int8: bool = False) -> list[Tensor]:
    """Return what each layer's ``adaLN_modulation`` makes of c [B, D]: [B, n * D] each, n vectors side by side.

    That is one product where nobody wants one of the modules to be called; in int8 the CPU engine's, with rounded weights.
    """
    projections = adaln_projections(layers)
    if projections is not None:
        return project(F.silu(c), projections, int8)
    return [_side_by_side(cast(nn.Module, layer.adaLN_modulation)(c)) for layer in layers]


def adaln_projections(layers: Sequence[nn.Module]) -> list[blocks.Projection] | None:
    """Return the linear of each layer's ``adaLN_modulation``; None if there is none, or where a module wants to be called."""
    modules = [cast(nn.Module, layer.adaLN_modulation) for layer in layers]
    if not modules or not all(map(is_silu_and_linear, modules)):
        return None
    return [view(cast(nn.Linear, linear)) for _, linear in (module._modules.values() for module in modules)]


def is_silu_and_linear(module: nn.Module) -> bool:
    """Return True if a module is SiLU and a linear, and nobody would notice that only the linear is read or called."""
    if len(module._modules) != 2:
        return False
    activation, linear = module._modules.values()
    ours = is_read(module, Modulation) or (is_read(module, nn.Sequential) and isinstance(linear, nn.Linear))
    return ours and type(activation) is nn.SiLU and is_silent(activation)


def _side_by_side(vectors: Tensor | Sequence[Tensor]) -> Tensor:
    """Return vectors, each [B, D] or [B, 1, D] unless somebody's module has joined them, as [B, n * D]."""
    return (vectors if isinstance(vectors, Tensor) else torch.cat(list(vectors), dim=-1)).flatten(1)


class Transforms(NamedTuple):
    """A block's sublayers without their norms and gates: by weights, or modules that want to be called."""

    attn: blocks.SelfAttention | blocks.Called
    cross_attn: Callable[[Tensor], blocks.CrossAttention | blocks.Called] | None  # what takes the context [B, 2, D]
    mlp: blocks.Mlp | blocks.Called


class Block(nn.Module):
    """One block; of its plain linears ``blocks`` reads the weights, those with hooks or another forward are called."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.mlp_norm_eps = config.arithmetic.mlp_norm_eps
        self.vectors = config.modulation_vectors
        self.attn = Attention(config)
        self.cross_attn = CrossAttention(config) if config.conditioning == "cross_attention" else None
        self.mlp = Mlp(config)
        if config.modulation_vectors:
            self.adaLN_modulation = Modulation(config, config.modulation_vectors)

    def forward(self, x: Tensor, c: Tensor, context: Tensor) -> Tensor:
        """Return x [B, T, D] behind the block; c [B, D] is the sum of both embeddings, context [B, 2, D] the pair of them."""
        vectors = adaln_vectors([self], c)[0] if self.vectors else None
        return blocks.run_through(x, [self.chain(vectors, context, self.transforms())])  # [B, T, D]

    def transforms(self, int8: bool = False) -> Transforms:
        attn, mlp, cross = self.attn, self.mlp, self.cross_attn
        attend: Callable[[Tensor], blocks.CrossAttention | blocks.Called] | None = None
        if cross is not None:
            is_called = not is_read(cross, CrossAttention)
            attend = (lambda context: blocks.Called(cross, (context,))) if is_called else cross.transform(int8)
        return Transforms(
            attn.transform(int8) if is_read(attn, Attention) else blocks.Called(attn),
            attend,
            mlp.transform(int8) if is_read(mlp, Mlp) else blocks.Called(mlp),
        )

    def chain(self, vectors: Tensor | None, context: Tensor, transforms: Transforms) -> list[blocks.Sublayer]:
        """Return the block as sublayers, modulated by vectors [B, n * D]; ``transforms`` are its own, perhaps kept."""
        modulation = blocks.Modulation()
        if vectors is not None:
            fields = MODULATION_FIELDS[self.vectors]
            modulation = blocks.Modulation(**dict(zip(fields, vectors.chunk(self.vectors, dim=1), strict=True)))
        attn, cross, mlp = transforms
        return blocks.sublayers(
            modulation, attn, mlp, None if cross is None else cross(context), mlp_norm_eps=self.mlp_norm_eps
        )


class FinalLayer(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.linear = nn.Linear(config.hidden_size, config.patch_out_features)
        if config.modulation_vectors:
            self.adaLN_modulation = Modulation(config, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Return the patches [B, T, p*p*C'] of tokens x [B, T, D], modulated by what adaLN makes of c [B, D]."""
        vectors = adaln_vectors([self], c)[0] if "adaLN_modulation" in self._modules else None
        u = ops.layer_norm_modulate(x, *self.norm(vectors))  # [B, T, D]
        return blocks.project(u, view(self.linear))  # [B, T, p*p*C']

    def norm(self, vectors: Tensor | None) -> blocks.Norm:
        shift, scale = (None, None) if vectors is None else vectors.chunk(2, dim=1)  # 2 x [B, D]
        return blocks.Norm(shift, scale)

    def image(self, u: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
        """Return the image [B, C', H, W] of tokens behind the norm."""
        if is_plain(self.linear):
            return ops.linear_unpatchify(u, self.linear.weight, self.linear.bias, grid, patch_size)  # [B, C', H, W]
        return ops.unpatchify(self.linear(u), grid, patch_size)  # [B, C', H, W]


def call_block(block: nn.Module, c: Tensor, context: Tensor, checkpoint: bool, x: Tensor) -> Tensor:
    """Call a block as the reference calls its own; hooks and others' modules may draw random numbers."""
    run = checkpointed(block, draws=True) if checkpoint else block
    return run(x, c, context).to(x.dtype)  # [B, T, D]


def run_checkpointed(
    x: Tensor, x_norm: Tensor, chain: Sequence[blocks.Sublayer], next_norm: blocks.Norm | None
) -> tuple[Tensor, Tensor | None]:
    """Run a block with ``blocks.run``, checkpointed; what is ours draws nothing, replaced linears, such as LoRA's, may."""
    return checkpointed(blocks.run, draws=not blocks.are_read(chain))(x, x_norm, chain, next_norm)
