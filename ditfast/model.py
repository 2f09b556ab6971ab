"""The fast DiT: the reference's parameters, run through ``blocks`` on fused ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import blocks, cpu, ops
from .activation_checkpointing import checkpointed
from .argument_checks import check_integer, check_number, check_tensor, wrong_type
from .blocks import view
from .conditioning import LabelEmbedder, TimestepEmbedder, pack_linears, packed_linear
from .config import DiTConfig
from .dtypes import INT8
from .ops.checks import check_dtype
from .ops.dispatch import computes_now
from .plain import is_plain, is_silent

EXAMPLE_TIMESTEPS = (50, 500, 950)
ADALN_ORDER = ("attn_shift", "attn_scale", "mlp_shift", "mlp_scale")


class PatchEmbed(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, config.patch_size, config.patch_size)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        if is_plain(self.proj):
            return ops.patch_embed(x, self.proj.weight, cast(Tensor, self.proj.bias), positions, self.patch_size)  # [B, T, D]
        return self.proj(x).flatten(2).transpose(1, 2).contiguous() + positions  # [B, T, D]


class Attention(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)


class CrossAttention(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.q = nn.Linear(config.hidden_size, config.hidden_size)
        self.kv = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def views(self) -> blocks.CrossAttention:
        return blocks.CrossAttention(view(self.q), view(self.kv), view(self.proj))


class Mlp(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.mlp_hidden_size)
        self.fc2 = nn.Linear(config.mlp_hidden_size, config.hidden_size)


class Block(nn.Module):
    """One block; of its plain linears ``blocks`` reads the weights, those with hooks or another forward are called."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.mlp_norm_eps = config.arithmetic.mlp_norm_eps
        self.attn = Attention(config)
        self.cross_attn = CrossAttention(config) if config.conditioning == "cross_attention" else None
        self.mlp = Mlp(config)
        if config.modulation_vectors:
            self.adaLN_modulation = _modulation(config, config.modulation_vectors)

    def forward(
        self, x: Tensor, u: Tensor, modulation: blocks.Modulation, following: blocks.Norm, context: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The stream x and u, its norm, both [B, T, D]: behind this block u is the norm ``following`` it."""
        return blocks.run(x, u, blocks.sublayers(self.views(), modulation, context), following)  # 2 x [B, T, D]

    def views(self, int8: bool = False) -> blocks.Block:
        attn, mlp, cross_attn = self.attn, self.mlp, self.cross_attn
        return blocks.Block(
            num_heads=self.num_heads,
            mlp_norm_eps=self.mlp_norm_eps,
            qkv=view(attn.qkv),
            proj=view(attn.proj),
            fc1=view(mlp.fc1),
            fc2=view(mlp.fc2),
            cross=None if cross_attn is None else cross_attn.views(),
            int8=int8,
        )


class FinalLayer(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.linear = nn.Linear(config.hidden_size, config.patch_out_features)
        if config.modulation_vectors:
            self.adaLN_modulation = _modulation(config, 2)

    def forward(self, u: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
        """What follows the final norm, which is the end of ``blocks.run``."""
        if is_plain(self.linear):
            return ops.linear_unpatchify(u, self.linear.weight, self.linear.bias, grid, patch_size)  # [B, C', H, W]
        return ops.unpatchify(self.linear(u), grid, patch_size)  # [B, C', H, W]


class DiT(nn.Module):
    """Drop-in for ``ditfast.reference.DiT``: the same parameter names and shapes, initialisation and calls; faster.

    Runs in fp32, bf16 and fp16; a model in float64 is the reference's job. In training mode labels are dropped with
    ``config.class_dropout_prob``.
    """

    source: object = None  # a CheckpointSource, of a model that ``load_checkpoint`` made
    int8 = False  # products of blocks on the CPU engine; ``quantize`` switches it on
    checkpoint_activations = False  # of blocks, in a forward whose gradients are wanted: less memory, a little more time

    def __init__(self, config: DiTConfig):
        if not isinstance(config, DiTConfig):
            hint = f"; DiTConfig.from_name({config!r}) makes one" if isinstance(config, str) else ""
            raise wrong_type("config", config, f"a ditfast.DiTConfig{hint}")
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = TimestepEmbedder(config)
        self.y_embedder = LabelEmbedder(config)
        positions = sincos_positions(config).to(torch.get_default_device(), torch.get_default_dtype())  # as all weights
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self._initialize()
        self.pack()
        self.register_load_state_dict_post_hook(_pack_after_loading)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The noise that x holds, and with ``learn_sigma`` the interpolation between the variances.

        Args:
            x: [B, C, H, W] noised latents, of the model's dtype.
            t: [B] timesteps, may be fractional.
            y: [B] integer labels; ``config.null_class`` for none.

        Returns:
            [B, C', H, W] of the model's dtype; C' is 2C with ``learn_sigma``, else C.

        Raises:
            ValueError: a shape, dtype or label; the message names the argument.
        """
        self._check(x, t, y)
        t_embedding, y_embedding = self.t_embedder(t), self.y_embedder(y)  # 2 x [B, D]
        vectors = self._vectors(t_embedding + y_embedding, self.int8)  # depth + 1 x [B, up to 6 * D]
        context = torch.stack([t_embedding, y_embedding], dim=1)  # [B, 2, D]
        return self._denoise(self.x_embedder(x, self.pos_embed), vectors, context)  # [B, C', H, W]

    def modulation_vectors(self, t: Tensor, y: Tensor) -> Tensor:
        """[B, V]: what adaLN makes of t [B] and y [B], every block's vectors and the final norm's side by side; not in int8."""
        check_tensor("t", t, "[B]")
        check_tensor("y", y, "[B]")
        vectors = self._vectors(self.t_embedder(t) + self.y_embedder(y))
        return torch.cat(list(vectors), dim=1)

    def forward_modulated(self, x: Tensor, vectors: Tensor) -> Tensor:
        """``forward`` for timesteps and labels whose ``modulation_vectors`` are known (adaLN and adaLN-Zero).

        Args:
            x: [B, C, H, W] noised latents, of the model's dtype.
            vectors: [B, V], or [2B, V] where both halves denoise the same x, which is embedded once.

        Returns:
            [B or 2B, C', H, W].

        Raises:
            ValueError: x or the vectors' shape or dtype; the message names the argument.
        """
        self._check_latents(x)
        B, V = x.shape[0], sum(sizes := [linear.out_features for linear in self.adaln_linears()])
        check_tensor("vectors", vectors, "[B, V]")
        if vectors.dim() != 2 or vectors.shape[0] not in (B, 2 * B) or vectors.shape[1] != V:
            raise ValueError(f"vectors: got shape {tuple(vectors.shape)}, expected [{B} or {2 * B}, {V}] for a batch of {B}")
        tokens = self.x_embedder(x, self.pos_embed)  # [B, T, D]
        if vectors.shape[0] != B:
            tokens = tokens.repeat(2, 1, 1)  # [2B, T, D]
        return self._denoise(tokens, vectors.split(sizes, dim=1), tokens)  # [B or 2B, C', H, W]

    def _denoise(self, x: Tensor, vectors: Sequence[Tensor], context: Tensor) -> Tensor:
        """From tokens [B, T, D]; the context [B, 2, D] is that of the designs without adaLN."""
        modulations, final = self._modulations(vectors)  # depth x up to 6 x [B, D], 2 x [B, D]
        if self.config.conditioning == "in_context":
            x = torch.cat([x, context], dim=1)  # [B, T+2, D]
        if cpu.takes(x) and all(map(_is_silent_block, self.blocks)):
            pairs = zip(self.blocks, modulations, strict=True)
            chain = [s for block, vectors in pairs for s in blocks.sublayers(self._views(block), vectors, context)]
            u = blocks.run_through(x, [chain], final)  # [B, T, D]
        else:  # one by one, as modules that are called
            first, *others = [blocks.Norm(modulation.attn_shift, modulation.attn_scale) for modulation in modulations]
            u = ops.layer_norm_modulate(x, *first)  # [B, T, D]
            checkpoints = self.checkpoint_activations and torch.is_grad_enabled()
            for block, modulation, following in zip(self.blocks, modulations, [*others, final], strict=True):
                # What is ours draws nothing; hooks and replaced linears, such as LoRA's with dropout, may.
                run = checkpointed(block, draws=not self._is_read(block)) if checkpoints else block
                x, u = run(x, u, modulation, following, context)  # 2 x [B, T, D]
        u = u[:, : self.config.num_tokens]  # [B, T, D]
        return self.final_layer(u, self.config.grid, self.config.patch_size)  # [B, C', H, W]

    def _views(self, block: nn.Module) -> blocks.Block:
        return cast(Block, block).views(self.int8)

    def quantize(self, dtype: str | None = INT8) -> DiT:
        """Has the CPU engine multiply the blocks' linears in int8, and prints what that gains and costs on a few random inputs.

        Activations are rounded to 255 steps between their least and largest value, token by token; weights to 254 between
        plus and minus their largest, output by output (down to half as many where the CPU has no VNNI); sums are exact. Of
        the conditioning's linears the weights are rounded, and what they multiply is not. The parameters stay as they are,
        and so does every forward with gradients, compiled, or on a GPU.

        Args:
            dtype: ``"int8"``; None for the parameters' own again.

        Returns:
            The model.

        Raises:
            ValueError: another dtype, weights that are not fp32 or bf16 on a CPU, a block or linear that somebody hooked,
                wrapped or replaced, or no CPU engine here, and why.
        """
        if dtype not in (INT8, None):
            raise ValueError(f"dtype: got {dtype!r}, expected 'int8' or None")
        if dtype is None:
            if self.int8:
                self.int8 = False
                cpu.forget(self.parameters())
            return self
        cpu.check("dtype", self.parameters())
        called = [i for i, block in enumerate(self.blocks) if not self._is_read(block)]
        if called:
            raise ValueError(f"dtype: got 'int8', but block {called[0]}, or a linear in it, was hooked, wrapped or replaced")
        modes = [(module, module.training) for module in self.modules()]
        try:
            print(cpu.measure(self.eval().forward, self._examples(), list(self.parameters()), self._switch_int8))
        except BaseException:
            self.int8 = False
            raise
        finally:
            for module, training in modes:
                module.training = training
        return self

    def _is_read(self, block: nn.Module) -> bool:
        """Whether nobody wants a block or its linears to be called."""
        return _is_silent_block(block) and blocks.are_read(
            blocks.sublayers(self._views(block), blocks.Modulation(), self.pos_embed)
        )

    def _switch_int8(self, on: bool) -> None:
        self.int8 = on

    def _examples(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """One sample each, at a few timesteps."""
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(len(EXAMPLE_TIMESTEPS), device="cpu") % self.config.num_classes
        x = torch.randn(len(labels), 1, *self.config.input_shape, generator=generator, device="cpu").to(self.pos_embed.dtype)
        t = torch.tensor(EXAMPLE_TIMESTEPS, device="cpu")
        return [(x[i], t[i : i + 1], labels[i : i + 1]) for i in range(len(labels))]

    def forward_with_cfg(
        self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, guidance_channels: int | None = None
    ) -> Tensor:
        """Classifier-free guidance (Ho & Salimans 2022): ``unconditional + cfg_scale * (conditional - unconditional)``.

        Args:
            x: [2B, C, H, W]; both halves denoise the same images, so only the first is read.
            t: [2B] timesteps.
            y: [2B] labels, the second half ``config.null_class``.
            cfg_scale: 1 is the conditional model alone.
            guidance_channels: how many of the first channels are guided; the flavour's unless given (official: 3).

        Returns:
            [2B, C', H, W]: the guided channels twice, the others of either half.
        """
        if not self.config.class_dropout_prob:
            raise ValueError("class_dropout_prob: got 0, so this model has no null class to guide away from")
        self._check_latents(x)
        check_number("cfg_scale", cfg_scale)
        if x.shape[0] % 2:
            raise ValueError(f"x: got a batch of {x.shape[0]}, expected an even one: conditional, then unconditional")
        channels = self.config.guidance_channels if guidance_channels is None else guidance_channels
        check_integer("guidance_channels", channels, 0, self.config.in_channels)
        half = x[: x.shape[0] // 2]  # [B, C, H, W]
        out = self(torch.cat([half, half]), t, y)  # [2B, C', H, W]
        return ops.classifier_free_guidance(out, cfg_scale, channels)  # [2B, C', H, W]

    def _vectors(self, c: Tensor, int8: bool = False) -> Sequence[Tensor]:
        """Each adaLN linear's output for the conditioning vector [B, D], in one GEMM; none in designs without."""
        return packed_linear(F.silu(c), self.adaln_linears(), int8) if self.config.modulation_vectors else []

    def _modulations(self, vectors: Sequence[Tensor]) -> tuple[list[blocks.Modulation], blocks.Norm]:
        if not vectors:
            return [blocks.Modulation()] * self.config.depth, blocks.Norm()
        order = ADALN_ORDER if self.config.conditioning == "adaln" else blocks.Modulation._fields
        *per_block, final = vectors
        named = [dict(zip(order, block.chunk(len(order), dim=1), strict=True)) for block in per_block]
        shift, scale = final.chunk(2, dim=1)
        return [blocks.Modulation(**vectors) for vectors in named], blocks.Norm(shift, scale)

    def adaln_linears(self) -> list[nn.Linear]:
        """Each block's, and the final layer's last."""
        return [module.adaLN_modulation[1] for module in (*self.blocks, self.final_layer)]

    def pack(self) -> None:
        if self.config.modulation_vectors:
            pack_linears(self.adaln_linears())

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> DiT:
        """Called by ``to``, ``half``, ``cuda`` and the like, which give every parameter a storage of its own."""
        super()._apply(fn, recurse)
        self.pack()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by deepcopy and unpickling, which do the same."""
        super().__setstate__(state)
        self.pack()

    def _check_latents(self, x: Tensor) -> None:
        check_tensor("x", x, "[B, C, H, W]")
        if x.dim() != 4 or tuple(x.shape[1:]) != self.config.input_shape:
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected [B, {', '.join(map(str, self.config.input_shape))}]")
        check_dtype("x", x)
        dtype = self.pos_embed.dtype
        if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"x: got {x.dtype}, expected the model's {dtype}")

    def _check(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        self._check_latents(x)
        for name, value in (("t", t), ("y", y)):
            check_tensor(name, value, "[B]")
            if value.shape != x.shape[:1]:
                raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected [{x.shape[0]}], one for each sample of x")
        if y.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"y: got {y.dtype}, expected integer labels, int64 or int32")
        if type(y) is Tensor and y.device.type == "cpu" and computes_now() and y.numel():  # elsewhere looking would cost a sync
            lowest, highest = (int(label) for label in y.aminmax())
            if lowest < 0 or highest >= self.config.label_rows:
                raise ValueError(f"y: got labels {lowest}..{highest}, expected 0..{self.config.label_rows - 1}")

    def _initialize(self) -> None:
        """As in the paper: Xavier linears; adaLN-Zero blocks start as the identity, the output at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.config.hidden_size, -1))
        if self.x_embedder.proj.bias is not None:
            nn.init.zeros_(self.x_embedder.proj.bias)
        for name in ("y_embedder.embedding_table", "t_embedder.mlp.0", "t_embedder.mlp.2"):
            nn.init.normal_(self.get_parameter(f"{name}.weight"), std=0.02)
        zeroed = [self.final_layer.linear]
        if self.config.modulation_vectors:
            zeroed += self.adaln_linears() if self.config.conditioning == "adaln_zero" else self.adaln_linears()[-1:]
        for linear in zeroed:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)


def sincos_positions(config: DiTConfig) -> Tensor:
    """[1, T, D] fp32 on the CPU: sines and cosines of each patch's column in the first half of D, of its row in the second."""
    h, w = config.grid
    quarter = config.hidden_size // 4
    with torch.device("cpu"):  # whose sines a model has that is built on any device
        frequencies = 10000 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)  # [D/4]
        column, row = torch.arange(w).repeat(h), torch.arange(h).repeat_interleave(w)  # 2 x [T]
        angles = torch.stack([column, row], dim=1)[:, :, None] * frequencies  # [T, 2, D/4]
        positions = torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[None].float()  # [1, T, D]
    return positions


def _is_silent_block(module: nn.Module) -> bool:
    """Whether a module is ours, and nobody would notice that it is not called."""
    return type(module).forward is Block.forward and is_silent(module)


def _modulation(config: DiTConfig, vectors: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(config.hidden_size, vectors * config.hidden_size))


def _pack_after_loading(model: nn.Module, incompatible_keys: object) -> None:
    """Loading with ``assign=True`` gives every parameter a storage of its own."""
    cast(DiT, model).pack()
