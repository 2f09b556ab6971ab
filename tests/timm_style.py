"""DiT as its official code and the forks build it: the same module tree, under classes like timm's.

Written from the paper (Peebles & Xie 2022, section 3.2) and the names of the checkpoints; independent of the official code.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class PatchEmbed(nn.Module):
    def __init__(self, grid: tuple[int, int], patch_size: int, in_channels: int, D: int):
        super().__init__()
        self.grid_size = grid
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, D, patch_size, patch_size)
        self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))  # [B, T, D]


class TimestepEmbedder(nn.Module):
    def __init__(self, D: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))

    def forward(self, t: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(10000) / 128 * torch.arange(128, dtype=torch.float32, device=t.device))
        angles = t[:, None].float() * frequencies  # [B, 128]
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1).to(next(self.parameters()).dtype))  # [B, D]


class LabelEmbedder(nn.Module):
    def __init__(self, num_classes: int, D: int, dropout_prob: float = 0.1):
        super().__init__()
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), D)

    def forward(self, labels: Tensor, train: bool) -> Tensor:
        if train and self.dropout_prob > 0:
            labels = labels.masked_fill(torch.rand(len(labels), device=labels.device) < self.dropout_prob, self.num_classes)
        return self.embedding_table(labels)  # [B, D]


class Attention(nn.Module):
    def __init__(self, D: int, num_heads: int, dropout: float = 0.0, qk_norm: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (D // num_heads) ** -0.5
        self.qkv = nn.Linear(D, 3 * D)
        self.q_norm = nn.LayerNorm(D // num_heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(D // num_heads) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(dropout)
        self.proj = nn.Linear(D, D)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x [B, N, T, d]
        p = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, dropout_p=p, scale=self.scale)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))  # [B, T, D]


class Mlp(nn.Module):
    def __init__(self, D: int, dropout: float = 0.0, approximate: str = "tanh"):
        super().__init__()
        self.fc1 = nn.Linear(D, 4 * D)
        self.act = nn.GELU(approximate=approximate)
        self.drop1 = nn.Dropout(dropout)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(4 * D, D)
        self.drop2 = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))  # [B, T, D]


def adaptive(D: int, vectors: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(D, vectors * D))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]  # [B, T, D]


class Block(nn.Module):
    def __init__(
        self,
        D: int,
        num_heads: int,
        *,
        dropout: float = 0.0,
        approximate: str = "tanh",
        affine: bool = False,
        qk_norm: bool = False,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(D, elementwise_affine=affine, eps=1e-6)
        self.attn = Attention(D, num_heads, dropout, qk_norm)
        self.norm2 = nn.LayerNorm(D, elementwise_affine=affine, eps=1e-6)
        self.mlp = Mlp(D, dropout, approximate)
        self.adaLN_modulation = adaptive(D, 6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)  # 6 x [B, D]
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))  # [B, T, D]
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))  # [B, T, D]


class FinalLayer(nn.Module):
    def __init__(self, D: int, features: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(D, features)
        self.adaLN_modulation = adaptive(D, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)  # 2 x [B, D]
        return self.linear(modulate(self.norm_final(x), shift, scale))  # [B, T, p*p*C']


class DiT(nn.Module):
    def __init__(
        self,
        depth: int = 3,
        D: int = 64,
        num_heads: int = 4,
        grid: tuple[int, int] = (4, 4),
        patch_size: int = 2,
        channels: int = 4,
        num_classes: int = 10,
        **of_a_block: Any,
    ):
        super().__init__()
        self.out_channels = 2 * channels
        self.x_embedder = PatchEmbed(grid, patch_size, channels, D)
        self.t_embedder = TimestepEmbedder(D)
        self.y_embedder = LabelEmbedder(num_classes, D)
        self.pos_embed = nn.Parameter(torch.randn(1, grid[0] * grid[1], D), requires_grad=False)
        self.blocks = nn.ModuleList(Block(D, num_heads, **of_a_block) for _ in range(depth))
        self.final_layer = FinalLayer(D, patch_size**2 * self.out_channels)
        for linear in (self.final_layer.linear, *(module.adaLN_modulation[1] for module in (*self.blocks, self.final_layer))):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def embed(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.x_embedder(x) + self.pos_embed, self.t_embedder(t) + self.y_embedder(y, self.training)

    def unpatchify(self, x: Tensor) -> Tensor:
        (h, w), p = self.x_embedder.grid_size, self.x_embedder.patch_size
        x = x.reshape(-1, h, w, p, p, self.out_channels).permute(0, 5, 1, 3, 2, 4)  # [B, C', h, p, w, p]
        return x.reshape(-1, self.out_channels, h * p, w * p)  # [B, C', H, W]

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x, c = self.embed(x, t, y)  # [B, T, D], [B, D]
        for block in self.blocks:
            x = block(x, c)  # [B, T, D]
        return self.unpatchify(self.final_layer(x, c))  # [B, C', H, W]

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        half = x[: len(x) // 2]  # [B, C, H, W]
        out = self.forward(torch.cat([half, half]), t, y)  # not self(...): on the attribute that accelerate sets
        conditional, unconditional = out[:, :3].chunk(2)  # 2 x [B, 3, H, W]
        guided = unconditional + cfg_scale * (conditional - unconditional)  # [B, 3, H, W]
        return torch.cat([torch.cat([guided, guided]), out[:, 3:]], dim=1)  # [2B, C', H, W]


class SiT(DiT):
    """Cuts the variance off."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, t, y).chunk(2, dim=1)[0]  # [B, C, H, W]


class Repa(DiT):
    """As REPA does it: projectors look at the stream between two blocks, and are returned as well."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        D = self.pos_embed.shape[2]
        self.projectors = nn.ModuleList([nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, 24))])

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, c = self.embed(x, t, y)  # [B, T, D], [B, D]
        features = []
        for i, block in enumerate(self.blocks):
            x = block(x, c)  # [B, T, D]
            if i == 0:
                features = [projector(x) for projector in self.projectors]  # [B, T, 24]
        return self.unpatchify(self.final_layer(x, c)), features


class FastDiT(DiT):
    """As fast-DiT does it: every block is recomputed in the backward."""

    def __init__(self, use_reentrant: bool, **settings: Any):
        super().__init__(**settings)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x, c = self.embed(x, t, y)  # [B, T, D], [B, D]
        for block in self.blocks:
            x = checkpoint(block, x, c, use_reentrant=self.use_reentrant)  # [B, T, D]
        return self.unpatchify(self.final_layer(x, c))  # [B, C', H, W]
