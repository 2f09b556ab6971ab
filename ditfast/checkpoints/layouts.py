"""Two names for every parameter: the official layout and diffusers' ``DiTTransformer2DModel``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from ..config import DiTConfig
from ..model import DiT, sincos_positions
from .errors import CheckpointError, listed

LAYOUTS = ("official", "diffusers")

_SIGNS = {
    "official": ("x_embedder.proj.weight", "blocks.0.attn.qkv.weight", "final_layer.linear.weight"),
    "diffusers": (
        "pos_embed.proj.weight",
        "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight",
        "proj_out_2.weight",
    ),
}
_ENDS = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
_EMBEDDERS = {
    "t_embedder.mlp.0.weight": "timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "timestep_embedder.linear_2.bias",
    "y_embedder.embedding_table.weight": "class_embedder.embedding_table.weight",
}
_KINDS = ("weight", "bias")


def find_layout(state: Mapping[str, object]) -> tuple[str, str]:
    """Return the layout and the prefix of its names, such as ``model.``, which may be empty.

    Both are told by names that only a DiT has; most of them, so that one may be missing and be reported as such.

    Raises:
        CheckpointError: it is no DiT, or several; the message says what was looked for and what is there.
    """
    found = []
    for layout, signs in _SIGNS.items():
        prefixes = Counter(name.removesuffix(sign) for sign in signs for name in state if f".{name}".endswith(f".{sign}"))
        found += [(layout, prefix) for prefix, count in prefixes.items() if 2 * count > len(signs)]
    if len(found) == 1:
        return found[0]
    if found:
        prefixes_found = " and ".join(repr(prefix) for _, prefix in found)
        raise CheckpointError(f"got several models, under {prefixes_found}, expected one: give its prefix=")
    looked_for = " or ".join(f"{', '.join(signs)} ({layout})" for layout, signs in _SIGNS.items())
    raise CheckpointError(f"this is no DiT: looked for {looked_for}, found {listed(list(state)) or 'nothing'}")


def expected_shapes(config: DiTConfig, layout: str) -> dict[str, torch.Size]:
    """Every name in the layout's state dict of such a model, and its shape."""
    with torch.device("meta"):
        state = DiT(config).state_dict()
    if layout == "diffusers":
        state = to_diffusers(state)
    return {name: value.shape for name, value in state.items()}


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """From the official layout, adaLN-Zero only. Positions, which diffusers recomputes, are left out."""
    renamed = {f"{theirs}.{kind}": state[f"{ours}.{kind}"] for ours, theirs in _ENDS.items() for kind in _KINDS}
    for i in range(_depth(state, "blocks")):
        block, their_block = f"blocks.{i}", f"transformer_blocks.{i}"
        for ours, theirs in _EMBEDDERS.items():
            renamed[f"{their_block}.norm1.emb.{theirs}"] = state[ours].clone()
        for kind in _KINDS:
            for part, values in zip("qkv", state[f"{block}.attn.qkv.{kind}"].chunk(3), strict=True):
                renamed[f"{their_block}.attn1.to_{part}.{kind}"] = values
            for ours, theirs in _BLOCK.items():
                renamed[f"{their_block}.{theirs}.{kind}"] = state[f"{block}.{ours}.{kind}"]
    return renamed


def to_official(state: Mapping[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
    """From diffusers' layout, its blocks' copies of the embedders collapsed into one, positions recomputed.

    Raises:
        CheckpointError: the copies differ; the message says which, in which blocks and by how much.
    """
    depth = _depth(state, "transformer_blocks")
    _check_copies(state, depth)
    renamed = {f"{ours}.{kind}": state[f"{theirs}.{kind}"] for ours, theirs in _ENDS.items() for kind in _KINDS}
    for ours, theirs in _EMBEDDERS.items():
        renamed[ours] = state[f"transformer_blocks.0.norm1.emb.{theirs}"]
    for i in range(depth):
        block, their_block = f"blocks.{i}", f"transformer_blocks.{i}"
        for kind in _KINDS:
            renamed[f"{block}.attn.qkv.{kind}"] = torch.cat([state[f"{their_block}.attn1.to_{part}.{kind}"] for part in "qkv"])
            for ours, theirs in _BLOCK.items():
                renamed[f"{block}.{ours}.{kind}"] = state[f"{their_block}.{theirs}.{kind}"]
    renamed["pos_embed"] = positions_like(renamed["final_layer.linear.weight"], config)
    return renamed


def positions_like(tensor: Tensor, config: DiTConfig) -> Tensor:
    """The sine-cosine positions [1, T, D] of a model on the CPU, rounded to the tensor's dtype."""
    return sincos_positions(config).to("cpu", tensor.dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Stricter than ``torch.equal``, for which 0 is -0."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def largest_difference(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


def _check_copies(state: Mapping[str, Tensor], depth: int) -> None:
    differing = []
    for theirs in _EMBEDDERS.values():
        first = state[f"transformer_blocks.0.norm1.emb.{theirs}"]
        for i in range(1, depth):
            name = f"transformer_blocks.{i}.norm1.emb.{theirs}"
            if not same_bits(state[name], first):
                differing.append(f"{name} (by up to {largest_difference(state[name], first):.3g})")
    if differing:
        raise CheckpointError(
            f"{len(differing)} of {(depth - 1) * len(_EMBEDDERS)} copies of the embedders differ from block 0's, "
            f"expected the same bits in every block: {listed(differing)}"
        )


def _depth(state: Mapping[str, object], blocks: str) -> int:
    return 1 + max(int(found[1]) for name in state if (found := re.match(rf"{blocks}\.(\d+)\.", name)))
