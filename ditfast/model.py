"""The fast DiT: the reference's parameters, run through ``blocks`` on fused ops."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from . import blocks, cpu, ops
from .argument_checks import as_guidance_scale, check_device, check_dtype, check_integer, check_tensor
from .conditioning import LabelEmbedder, TimestepEmbedder
from .config import DiTConfig, check_config
from .dtypes import INT8
from .layers import Block, FinalLayer, PatchEmbed, adaln_vectors, call_block, embed, run_checkpointed
from .ops import cpu_chain
from .ops.classifier_free_guidance import torch_classifier_free_guidance
from .plain import PLAIN_TYPES
from .pretrained import PretrainedMixin
from .reading import KeptReading, Reading

EXAMPLE_TIMESTEPS = (50, 500, 950)


class DiT(PretrainedMixin):
    """Drop-in for ``ditfast.reference.DiT``: the same parameter names and shapes, initialisation and calls; faster.

    Runs in fp32, bf16 and fp16; a model in float64 is the reference's job. In training mode labels are dropped with
    ``config.class_dropout_prob``.
    """

    int8 = False  # products of blocks on the CPU engine; ``quantize`` switches it on

    def __init__(self, config: DiTConfig):
        check_config(config)
        super().__init__()
        self.config = config
        self._reading = KeptReading()
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = TimestepEmbedder(config)
        self.y_embedder = LabelEmbedder(config)
        positions = sincos_positions(config).to(torch.get_default_device(), torch.get_default_dtype())  # as all weights
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self._initialize()

    def forward(self, x: Tensor, t: Tensor | float, y: Tensor) -> Tensor:
        """Return the noise that x holds, and with ``learn_sigma`` the interpolation between the variances.

        Args:
            x: [B, C, H, W] noised latents, of the model's dtype.
            t: [B] timesteps, may be fractional; a number, a scalar tensor or [1] is that of all samples.
            y: [B] integer labels; ``config.null_class`` for none. With a replaced ``y_embedder``, its input.

        Returns:
            [B, C', H, W] of the model's dtype; C' is 2C with ``learn_sigma``, else C.

        Raises:
            ValueError: a shape, dtype or label; the message names the argument.
        """
        t = self._check(x, t, y)
        t_embedding, y_embedding = self.t_embedder(t), self.y_embedder(y)  # 2 x [B, D]
        c = context = t_embedding + y_embedding  # [B, D]
        reading = self._read()
        if not self.config.modulation_vectors or None in reading.layers[:-1]:  # adaLN's own blocks read none
            context = torch.stack([t_embedding, y_embedding], dim=1)  # [B, 2, D]
        del t_embedding, y_embedding  # no longer needed, for the whole forward
        return self._denoise(x, reading, reading.vectors(c), c, context)  # [B, C', H, W]

    def modulation_vectors(self, t: Tensor | float, y: Tensor) -> Tensor:
        """Return what adaLN makes of t and y, [B, V]: each block's vectors and the final norm's, side by side; not in int8.

        Args:
            t: [B] timesteps; a number, a scalar tensor or [1] is that of all labels.
            y: [B] labels.

        Raises:
            ValueError: a shape, dtype, device or label; the message names the argument.
        """
        _check_local("y", y)
        check_tensor("y", y, "[B]")
        if not y.dim():
            raise ValueError("y: got shape (), expected [B] labels")
        check_device("y", y, self.pos_embed, "the model")
        t = _broadcast(t, y, "y")  # [B]
        c = self.t_embedder(t) + self.y_embedder(y)  # [B, D]
        return torch.cat(adaln_vectors([*self.blocks, self.final_layer], c), dim=1)

    def forward_modulated(self, x: Tensor, vectors: Tensor) -> Tensor:
        """``forward`` for timesteps and labels whose ``modulation_vectors`` are known (adaLN and adaLN-Zero).

        Args:
            x: [B, C, H, W] noised latents, of the model's dtype.
            vectors: [B, V], or [2B, V] where both halves denoise the same x, which is embedded once.

        Returns:
            [B or 2B, C', H, W].

        Raises:
            ValueError: x or the vectors' shape or dtype, or a block or final layer that wants to be called with more than
                its vectors; the message names it.
        """
        self._check_latents(x)
        reading = self._read()
        if None in reading.layers:
            name = "final_layer" if reading.layers[-1] is None else f"blocks.{reading.layers.index(None)}"
            raise ValueError(f"{name}: got a layer that was hooked, wrapped or replaced; call model(x, t, y), which calls it")
        B, V = x.shape[0], sum(sizes := [linear.out_features for linear in self.adaln_linears()])
        check_tensor("vectors", vectors, "[B, V]")
        if vectors.dim() != 2 or vectors.shape[0] not in (B, 2 * B) or vectors.shape[1] != V:
            raise ValueError(f"vectors: got shape {tuple(vectors.shape)}, expected [{B} or {2 * B}, {V}] for a batch of {B}")
        check_device("vectors", vectors, x)
        return self._denoise(x, reading, vectors.split(sizes, dim=1), vectors, vectors, vectors.shape[0] != B)

    def _read(self) -> Reading:
        return self._reading.of(self.blocks, self.final_layer, self.int8, bool(self.config.modulation_vectors))

    def _denoise(
        self,
        x: Tensor,
        reading: Reading,
        vectors: Sequence[Tensor | None],
        c: Tensor,
        context: Tensor,
        twice: bool = False,
    ) -> Tensor:
        """Return the image [N, C', H, W] of latents [B, C, H, W]; N is B, or 2B if both halves denoise the same x.

        Layers that are read take their ``vectors``; others are called with c and the context [B, 2, D].
        """
        checkpoint = self.checkpoint_activations and torch.is_grad_enabled()
        final = reading.layers[-1]

        def segments() -> list[blocks.Segment]:
            return [
                partial(call_block, block, c, context, checkpoint)
                if transforms is None
                else cast(Block, block).chain(of_block, context, transforms)
                for block, transforms, of_block in zip(self.blocks, reading.transforms, vectors[:-1], strict=True)
            ]

        def norm() -> blocks.Norm | None:
            return None if final is None else cast(FinalLayer, final).norm(vectors[-1])

        u = None
        if reading.is_kept_on_cpu and cpu_chain.takes(x):
            u = reading.run_on_cpu(self._tokens(x, context, twice), vectors, segments, norm)  # [N, T, D], T + 2 in context
        if u is None:
            run = run_checkpointed if checkpoint else blocks.run
            u = blocks.run_through(self._tokens(x, context, twice), segments(), norm(), run)  # the tokens are nobody else's
        u = u[:, : self.config.num_tokens]  # [N, T, D]
        if final is not None:
            return cast(FinalLayer, final).image(u, self.config.grid, self.config.patch_size)  # [N, C', H, W]
        return ops.unpatchify(self.final_layer(u, c).contiguous(), self.config.grid, self.config.patch_size)  # [N, C', H, W]

    def _tokens(self, x: Tensor, context: Tensor, twice: bool) -> Tensor:
        tokens = embed(self.x_embedder, x, self.pos_embed)  # [B, T, D]
        if self.config.conditioning == "in_context":
            return torch.cat([tokens, context], dim=1)  # [B, T+2, D]
        return tokens.repeat(2, 1, 1) if twice else tokens  # [N, T, D]

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
        cpu_chain.check_int8("dtype", self.parameters())
        transforms = self._read().transforms
        for i, (block, of_block) in enumerate(zip(self.blocks, transforms, strict=True)):
            if of_block is None or not blocks.are_read(cast(Block, block).chain(None, self.pos_embed, of_block)):
                raise ValueError(f"dtype: got 'int8', but block {i}, or a linear in it, was hooked, wrapped or replaced")
        modes = [(module, module.training) for module in self.modules()]
        try:
            switch = partial(setattr, self, "int8")
            print(cpu.measure(self.eval().forward, self._examples(), list(self.parameters()), switch))
        except BaseException:
            self.int8 = False
            raise
        finally:
            for module, training in modes:
                module.training = training
        return self

    def _examples(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """One sample each, at a few timesteps."""
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(len(EXAMPLE_TIMESTEPS), device="cpu") % self.config.num_classes
        x = torch.randn(len(labels), 1, *self.config.input_shape, generator=generator, device="cpu").to(self.pos_embed.dtype)
        t = torch.tensor(EXAMPLE_TIMESTEPS, device="cpu")
        return [(x[i], t[i : i + 1], labels[i : i + 1]) for i in range(len(labels))]

    def forward_with_cfg(
        self,
        x: Tensor,
        t: Tensor | float,
        y: Tensor,
        cfg_scale: float | Sequence[float] | Tensor,
        guidance_channels: int | None = None,
    ) -> Tensor:
        """Classifier-free guidance (Ho & Salimans 2022): ``unconditional + cfg_scale * (conditional - unconditional)``.

        Args:
            x: [2B, C, H, W]; both halves denoise the same images, so only the first is read.
            t: [2B] timesteps, or one number for all.
            y: [2B] labels, the second half ``config.null_class``.
            cfg_scale: 1 is the conditional model alone. One number, or a list or tensor of B, one for each image.
            guidance_channels: how many of the first channels are guided; the flavour's unless given (official: 3).

        Returns:
            [2B, C', H, W]: the guided channels twice, the others of either half.

        Raises:
            ValueError: a shape, or another number of scales; the message names the argument.
        """
        if not self.config.has_null_class:
            raise ValueError("class_dropout_prob: got 0, so this model has no null class to guide away from")
        self._check_latents(x)
        if x.shape[0] % 2:
            raise ValueError(f"x: got a batch of {x.shape[0]}, expected an even one: conditional, then unconditional")
        channels = self.config.guidance_channels if guidance_channels is None else guidance_channels
        check_integer("guidance_channels", channels, 0, self.config.in_channels)
        half = x[: x.shape[0] // 2]  # [B, C, H, W]
        scale = as_guidance_scale(cfg_scale, len(half), x)  # a number, or [B, 1, 1, 1]
        out = self(torch.cat([half, half]), t, y)  # [2B, C', H, W]
        if isinstance(scale, Tensor):
            return torch_classifier_free_guidance(out, scale, channels)  # [2B, C', H, W]
        return ops.classifier_free_guidance(out, scale, channels)  # [2B, C', H, W]

    def adaln_linears(self) -> list[nn.Linear]:
        """Each block's, and the final layer's last."""
        return [module.adaLN_modulation[1] for module in (*self.blocks, self.final_layer)]

    def _check_latents(self, x: Tensor) -> None:
        check_tensor("x", x, "[B, C, H, W]")
        _check_local("x", x)
        _check_local("pos_embed", self.pos_embed, "gathered weights: call model(x, t, y), not its forward, for FSDP's hooks")
        if x.dim() != 4 or tuple(x.shape[1:]) != self.config.input_shape:
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected [B, {', '.join(map(str, self.config.input_shape))}]")
        check_dtype("x", x)
        dtype = self.pos_embed.dtype
        if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"x: got {x.dtype}, expected the model's {dtype}")
        check_device("x", x, self.pos_embed, "the model")

    def _check(self, x: Tensor, t: Tensor | float, y: Tensor) -> Tensor:
        """Return t as [B]; checks x, t and the number of labels, the rest of which is left to ``y_embedder``."""
        self._check_latents(x)
        _check_local("y", y)
        if isinstance(y, Tensor):
            if y.shape[:1] != x.shape[:1]:
                raise ValueError(f"y: got shape {tuple(y.shape)}, expected [{x.shape[0]}], one for each sample of x")
            check_device("y", y, x)
        return _broadcast(t, x, "x")

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


def _check_local(name: str, value: object, expected: str = "a tensor of this process: call its full_tensor") -> None:
    """Raise if a value is a DTensor, which torch's operators do not mix with other tensors."""
    if type(value) not in PLAIN_TYPES and hasattr(value, "placements"):
        raise TypeError(f"{name}: got a DTensor, expected {expected}")


def _broadcast(t: object, like: Tensor, of: str) -> Tensor:
    """Return timesteps [B], or one for all, as one for each row of another tensor, on its device: [B]."""
    _check_local("t", t)
    if isinstance(t, (int, float, np.number)) and not isinstance(t, bool):
        dtype = torch.int64 if isinstance(t, (int, np.integer)) else torch.float32
        return torch.full(like.shape[:1], t, dtype=dtype, device=like.device)  # type: ignore[arg-type] # [B]
    check_tensor("t", t, "[B], or a number")
    t = cast(Tensor, t)
    if t.shape == like.shape[:1]:
        check_device("t", t, like, of)
        return t
    if t.dim() > 1 or t.numel() != 1:
        raise ValueError(
            f"t: got shape {tuple(t.shape)}, expected [{like.shape[0]}], one for each sample of {of}, or one number for all"
        )
    return t.to(like.device).reshape(1).expand(like.shape[0])  # [B]


DiT.__init__.__annotations__["config"] = DiTConfig  # the class, not its name: huggingface_hub's mixin reads it


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
