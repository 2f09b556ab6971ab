"""Random small forks of DiT: what public forks change, under the module tree of the official code."""

from __future__ import annotations

import math
import random
from typing import Any

import timm_style
import torch
from support import randomize
from torch import Tensor, nn
from torch.nn import functional as F

CHANGES = (
    *("none", "positions as argument", "None as argument", "routing", "window", "attention dropout", "stochastic depth"),
    *("scale", "registers", "eps", "activation", "label probability", "rotary", "exact GELU", "soft cap", "first image"),
    *("rare stochastic depth", "kept attention", "no label", "argument's default", "halved stream", "written input"),
    *("fractional timesteps", "one image", "rare noise", "kept condition", "detached condition"),
)


class Attention(timm_style.Attention):
    """``Attention`` with what no module or attribute shows to ``check``: a window, dropout, another scale."""

    change = "none"

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x [B, N, T, d]
        T, d = q.shape[-2:]
        if self.change == "rotary":
            positions = torch.arange(T)[:, None] * 0.5 ** torch.arange(d // 2)  # [T, d/2]
        if positions is not None:
            q, k = rotate(q, positions), rotate(k, positions)
        places = torch.arange(T)
        mask = (places[:, None] - places).abs() <= 3 if self.change == "window" else None
        p = 0.3 if self.change == "attention dropout" and self.training else 0.0
        scale = self.scale * {"scale": 2, "logarithmic scale": math.log(T) / math.log(16)}.get(self.change, 1)
        if self.change == "soft cap":
            x = (50 * torch.tanh(scale / 50 * q @ k.mT)).softmax(-1) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, scale=scale)
        if self.change == "kept attention":
            self.attention = x.detach()
        return self.proj(x.transpose(1, 2).flatten(2))  # [B, T, D]


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * positions.cos() - b * positions.sin(), a * positions.sin() + b * positions.cos()], dim=-1)


class Block(timm_style.Block):
    change = "none"

    def __init__(self, D: int, num_heads: int):
        super().__init__(D, num_heads)
        self.attn = Attention(D, num_heads)

    def forward(self, x: Tensor, c: Tensor, positions: Tensor | None = None, strength: float = 1.0) -> Tensor:
        if self.change == "first image":
            c = c[:1].expand(len(x), -1)  # [B, D]
        if self.change == "detached condition":
            c = c.detach()
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)  # 6 x [B, D]
        eps, received = 1e-5 if self.change == "eps" else 1e-6, x
        u = timm_style.modulate(F.layer_norm(x, x.shape[-1:], eps=eps), shift1, scale1)
        x = x + gate1[:, None] * self.kept(self.attn(u, positions))  # [B, T, D]
        u = timm_style.modulate(F.layer_norm(x, x.shape[-1:], eps=eps), shift2, scale2)
        h = self.mlp.fc1(u)
        h = F.relu(h) if self.change == "activation" else F.gelu(h, approximate=self.approximate)
        x = x + strength * gate2[:, None] * self.kept(self.mlp.fc2(h))  # [B, T, D]
        return received.copy_(x) if self.change == "written input" and not torch.is_grad_enabled() else x

    @property
    def approximate(self) -> str:
        return "none" if self.change == "exact GELU" else "tanh"

    def kept(self, h: Tensor) -> Tensor:
        p = {"stochastic depth": 0.3, "rare stochastic depth": 1e-6}.get(self.change, 0.0) * self.training
        return h * (torch.rand(len(h), 1, 1) >= p) / (1 - p) if p else h


class Labels(timm_style.LabelEmbedder):
    """Label embedder that takes the probability itself where others take a flag."""

    def forward(self, labels: Tensor, probability: float) -> Tensor:
        if probability > 0:
            labels = labels.masked_fill(torch.rand(len(labels)) < probability, self.num_classes)
        return self.embedding_table(labels)  # [B, D]


class Fork(timm_style.DiT):
    def __init__(self, change: str, changed: set[int], grid: tuple[int, int], depth: int):
        super().__init__(depth=depth, D=32, num_heads=2, grid=grid)
        self.blocks = nn.ModuleList(Block(32, 2) for _ in range(depth))
        self.change = change
        for index in changed:
            self.blocks[index].change = self.blocks[index].attn.change = change
        if change == "label probability":
            self.y_embedder = Labels(10, 32)
        self.registers = nn.Parameter(torch.randn(1, 2, 32))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x) + self.pos_embed  # [B, T, D]
        probability = 0.1 * self.training if self.change == "label probability" else self.training
        label = self.y_embedder(y, probability)  # [B, D]
        if self.change == "fractional timesteps" and t.is_floating_point():
            t = 1000 * t
        if self.change == "one image" and len(x) == 1:
            label = 0 * label
        if self.change == "no label":
            label = label * (y < 10)[:, None]
        c = self.t_embedder(t) + label  # [B, D]
        if self.change == "registers":
            x = torch.cat([x, self.registers.expand(len(x), -1, -1)], dim=1)  # [B, T + 2, D]
        if self.change == "kept condition":
            self.condition = c.detach()
        if self.change == "rare noise" and self.training and torch.rand(()) < 1e-6:
            x = x + torch.randn_like(x)  # [B, T, D]
        extra: dict[str, Any] = {}
        if self.change == "positions as argument":
            extra["positions"] = torch.arange(x.shape[1])[:, None] * 0.5 ** torch.arange(8)  # [T, d/2]
        if self.change == "None as argument":
            extra["positions"] = None
        if self.change == "argument's default":
            extra["strength"] = 1.0
        for index, block in enumerate(self.blocks):
            if self.change == "halved stream" and index == 1:
                x = 0.5 * x  # [B, T, D]
            if self.change == "routing" and self.training and index == 1:
                x = torch.cat([block(x[:, ::2], c), x[:, 1::2]], dim=1)  # [B, T, D]
            else:
                x = block(x, c, **extra)  # [B, T, D]
        return self.unpatchify(self.final_layer(x[:, : self.pos_embed.shape[1]], c))  # [B, C', H, W]


def random_fork(seed: int) -> tuple[Fork, dict[str, Tensor]]:
    """Return a fork whose change comes from the seed, in evaluation mode, and its inputs."""
    rng = random.Random(seed)
    depth = rng.choice((2, 3, 5))
    changed = set(rng.sample(range(depth), rng.randint(1, depth)))
    grid = rng.choice(((4, 4), (2, 6), (3, 5)))
    torch.manual_seed(seed)
    model = randomize(Fork(CHANGES[seed % len(CHANGES)], changed, grid, depth).eval())
    x = torch.randn(2, 4, 2 * grid[0], 2 * grid[1])
    return model, {"x": x, "t": torch.rand(2) * 999, "y": torch.randint(11, (2,))}
