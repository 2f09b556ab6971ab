"""DiT in plain PyTorch, read like the paper: the oracle the fast model is judged by.

Source: Peebles & Xie 2022, "Scalable Diffusion Models with Transformers", section 3.2; parameter names of the official
checkpoints. Shapes: B images, C channels, H by W latent pixels, p patch side, T tokens, D width, N heads, d head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.nn import functional as F

from .argument_checks import as_guidance_scale
from .config import FIRST_NORM_EPS, TIMESTEP_FEATURES, DiTConfig, check_config


class TimestepEmbedder(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        D = config.hidden_size
        self.divisor = config.arithmetic.timestep_frequency_divisor
        self.mlp = nn.Sequential(nn.Linear(TIMESTEP_FEATURES, D), nn.SiLU(), nn.Linear(D, D))

    def forward(self, t: Tensor) -> Tensor:
        angles = t.float()[:, None] * frequencies(t, self.divisor)  # [B, 128]
        features = torch.cat([angles.cos(), angles.sin()], dim=1)  # [B, 256]
        return self.mlp(features.to(next(self.parameters()).dtype))  # [B, D]


def frequencies(t: Tensor, divisor: int) -> Tensor:
    """Return the frequencies [128] on t's device: fp32 in every model dtype, and the CPU's, whose bits no device changes."""
    if not torch.compiler.is_dynamo_compiling():
        if is_fake(t):
            return torch.tensor(frequency_table(CPU, divisor).tolist(), device=t.device)
        if t.is_cuda and (t.device, divisor) not in _tables and torch.cuda.is_current_stream_capturing():
            table = torch.zeros(TIMESTEP_FEATURES // 2, dtype=torch.float32, device=t.device)
            torch._foreach_add_(table.unbind(), frequency_table(CPU, divisor).tolist())  # a graph captures no copy
            return table
    return frequency_table(t.device, divisor)


def frequency_table(device: torch.device, divisor: int) -> Tensor:
    """Return exp(-log(10000) k / divisor) for k = 0..127, computed once; a constant to torch.compile."""

    def compute() -> Tensor:
        index = torch.arange(TIMESTEP_FEATURES // 2, dtype=torch.float32, device=CPU)
        return torch.exp(-math.log(10000) * index / divisor).to(device)

    if (device, divisor) not in _tables:
        with ThreadPoolExecutor(1) as pool:  # modes such as inference are a thread's: a tensor that stays has none
            _tables.setdefault((device, divisor), pool.submit(compute).result())
    return _tables[device, divisor]


CPU = torch.device("cpu")
_tables: dict[tuple[torch.device, int], Tensor] = {}
vars(frequency_table)["_dynamo_marked_constant"] = True


class LabelEmbedder(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.null_class = config.null_class
        self.dropout_prob = config.class_dropout_prob
        self.embedding_table = nn.Embedding(config.label_rows, config.hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        if self.training and self.dropout_prob > 0:
            dropped = torch.rand(y.shape, device=y.device) < self.dropout_prob  # [B]
            y = torch.where(dropped, self.null_class, y)  # [B]
        return self.embedding_table(y)  # [B, D]


class PatchEmbed(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, config.patch_size, config.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)  # [B, D, H/p, W/p]
        return x.flatten(2).transpose(1, 2)  # [B, T, D]


class Attention(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B, T, 3, N, d]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x [B, N, T, d]
        x = F.scaled_dot_product_attention(q, k, v)  # [B, N, T, d]
        return self.proj(x.transpose(1, 2).flatten(2))  # [B, T, D]


class CrossAttention(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.q = nn.Linear(config.hidden_size, config.hidden_size)
        self.kv = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, N, T, d]
        kv = self.kv(context).unflatten(-1, (2, self.num_heads, -1))  # [B, 2, 2, N, d]
        k, v = kv.permute(2, 0, 3, 1, 4)  # 2 x [B, N, 2, d]
        x = F.scaled_dot_product_attention(q, k, v)  # [B, N, T, d]
        return self.proj(x.transpose(1, 2).flatten(2))  # [B, T, D]


class Mlp(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.mlp_hidden_size)
        self.fc2 = nn.Linear(config.mlp_hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc1(x), approximate="tanh")  # [B, T, 4D]
        return self.fc2(x)  # [B, T, D]


class Modulation(nn.Sequential):
    """The adaLN regression of shift, scale and gate vectors from the conditioning vector."""

    def __init__(self, config: DiTConfig, vectors: int):
        super().__init__(nn.SiLU(), nn.Linear(config.hidden_size, vectors * config.hidden_size))
        self.vectors = vectors

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        modulation = super().forward(c)  # [B, vectors * D]
        return modulation[:, None].chunk(self.vectors, dim=2)  # vectors x [B, 1, D]


def layer_norm(x: Tensor, eps: float = FIRST_NORM_EPS) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=eps)  # [B, T, D]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift  # [B, T, D]


class Block(nn.Module):
    """One transformer block; the four designs differ in how t and y get in."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.conditioning = config.conditioning
        self.mlp_norm_eps = config.arithmetic.mlp_norm_eps
        self.attn = Attention(config)
        if self.conditioning == "cross_attention":
            self.cross_attn = CrossAttention(config)
        self.mlp = Mlp(config)
        if config.modulation_vectors:
            self.adaLN_modulation = Modulation(config, config.modulation_vectors)

    def forward(self, x: Tensor, c: Tensor, context: Tensor) -> Tensor:
        """x [B, T, D], c [B, D] the sum of both embeddings, context [B, 2, D] the pair of them."""
        if self.conditioning == "adaln_zero":
            shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)  # 6 x [B, 1, D]
            x = x + gate1 * self.attn(modulate(layer_norm(x), shift1, scale1))  # [B, T, D]
            return x + gate2 * self.mlp(modulate(layer_norm(x, self.mlp_norm_eps), shift2, scale2))  # [B, T, D]
        if self.conditioning == "adaln":
            shift1, scale1, shift2, scale2 = self.adaLN_modulation(c)  # 4 x [B, 1, D]
            x = x + self.attn(modulate(layer_norm(x), shift1, scale1))  # [B, T, D]
            return x + self.mlp(modulate(layer_norm(x, self.mlp_norm_eps), shift2, scale2))  # [B, T, D]
        x = x + self.attn(layer_norm(x))  # [B, T, D]
        if self.conditioning == "cross_attention":
            x = x + self.cross_attn(layer_norm(x), context)  # [B, T, D]
        return x + self.mlp(layer_norm(x, self.mlp_norm_eps))  # [B, T, D]


class FinalLayer(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.linear = nn.Linear(config.hidden_size, config.patch_out_features)
        self.adaptive = config.modulation_vectors > 0
        if self.adaptive:
            self.adaLN_modulation = Modulation(config, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = layer_norm(x)  # [B, T, D]
        if self.adaptive:
            shift, scale = self.adaLN_modulation(c)  # 2 x [B, 1, D]
            x = modulate(x, shift, scale)  # [B, T, D]
        return self.linear(x)  # [B, T, p*p*C']


class DiT(nn.Module):
    """The reference model. Initialised as in the paper: adaLN-Zero blocks start as the identity, the output at zero.

    Works in float64, fp32, bf16 and fp16. In training mode labels are dropped with ``config.class_dropout_prob``.
    """

    def __init__(self, config: DiTConfig):
        check_config(config)
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = TimestepEmbedder(config)
        self.y_embedder = LabelEmbedder(config)
        positions = sincos_positions(config).to(torch.get_default_device(), torch.get_default_dtype())  # as all weights
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        initialize(self)

    def forward(self, x: Tensor, t: Tensor | float, y: Tensor) -> Tensor:
        """x [B, C, H, W] noised latents; t [B] timesteps, may be fractional, or one; y [B] labels, ``num_classes`` for none.

        Returns [B, C', H, W], C' = 2C with learn_sigma: the noise, then the interpolation between the variances.
        """
        if not isinstance(t, Tensor) or t.shape != x.shape[:1]:
            t = torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(x.shape[0])  # [B]
        x = self.x_embedder(x) + self.pos_embed  # [B, T, D]
        t_embedding, y_embedding = self.t_embedder(t), self.y_embedder(y)  # 2 x [B, D]
        c = t_embedding + y_embedding  # [B, D]
        context = torch.stack([t_embedding, y_embedding], dim=1)  # [B, 2, D]
        if self.config.conditioning == "in_context":
            x = torch.cat([x, context], dim=1)  # [B, T+2, D]
        for block in self.blocks:
            x = block(x, c, context)  # [B, T, D]
        x = x[:, : self.config.num_tokens]  # [B, T, D]
        return self.unpatchify(self.final_layer(x, c))  # [B, C', H, W]

    def forward_with_cfg(
        self,
        x: Tensor,
        t: Tensor | float,
        y: Tensor,
        cfg_scale: float | Sequence[float] | Tensor,
        guidance_channels: int | None = None,
    ) -> Tensor:
        """Classifier-free guidance: the first half of the batch is conditional, the second half unconditional.

        Both halves denoise the same images, so only the first half of x [2B, C, H, W] is read. ``cfg_scale`` is one number, or
        a list or tensor of B, one for each image; another number of them is a ValueError. Guidance acts on the first
        ``guidance_channels`` channels (default: the flavour's, three for official weights); the rest pass through.
        """
        channels = self.config.guidance_channels if guidance_channels is None else guidance_channels
        half = x[: x.shape[0] // 2]  # [B, C, H, W]
        scale = as_guidance_scale(cfg_scale, len(half), x)  # a number, or [B, 1, 1, 1]
        out = self(torch.cat([half, half]), t, y)  # [2B, C', H, W]
        conditional, unconditional = out[:, :channels].chunk(2)  # 2 x [B, channels, H, W]
        guided = (unconditional + scale * (conditional - unconditional)).to(out.dtype)  # [B, channels, H, W]
        return torch.cat([torch.cat([guided, guided]), out[:, channels:]], dim=1)  # [2B, C', H, W]

    def unpatchify(self, x: Tensor) -> Tensor:
        """[B, T, p*p*C'] -> [B, C', H, W]"""
        (h, w), p = self.config.grid, self.config.patch_size
        x = x.reshape(-1, h, w, p, p, self.config.out_channels)  # [B, h, w, p, p, C']
        x = x.permute(0, 5, 1, 3, 2, 4)  # [B, C', h, p, w, p]
        return x.reshape(-1, self.config.out_channels, h * p, w * p)  # [B, C', H, W]


def sincos_positions(config: DiTConfig) -> Tensor:
    """[1, T, D] fp32 on the CPU: half of D encodes the column of a patch, the other half its row; sines, then cosines."""
    h, w = config.grid
    quarter = config.hidden_size // 4
    with CPU:  # whose bits a model has that is built on any device
        frequencies = 10000 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)  # [D/4]
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")  # 2 x [h, w]
        angles = [axis.reshape(-1, 1) * frequencies for axis in (columns, rows)]  # 2 x [T, D/4]
        positions = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)[None].float()  # [1, T, D]
    return positions


def initialize(model: DiT) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    patches = model.x_embedder.proj
    nn.init.xavier_uniform_(patches.weight.view(len(patches.weight), -1))
    nn.init.zeros_(cast(Tensor, patches.bias))
    for name in ("y_embedder.embedding_table", "t_embedder.mlp.0", "t_embedder.mlp.2"):
        nn.init.normal_(model.get_parameter(f"{name}.weight"), std=0.02)
    zeroed = ["final_layer.linear"]
    if model.config.modulation_vectors:
        zeroed.append("final_layer.adaLN_modulation.1")
    if model.config.conditioning == "adaln_zero":
        zeroed += [f"blocks.{i}.adaLN_modulation.1" for i in range(model.config.depth)]
    for name in zeroed:
        for parameter in model.get_submodule(name).parameters():
            nn.init.zeros_(parameter)
