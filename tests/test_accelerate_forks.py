"""Forks of known models: what is built otherwise is left alone with the reason, other inputs and names are theirs."""

from __future__ import annotations

from typing import Any

import pytest
import timm_style
import torch
from foreign import KINDS, diffusers_dit, official, official_inputs, pixart, run, sd3, state_of
from support import error, randomize
from torch import Tensor, nn

import ditfast

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated"),
]

LEFT = {
    "dropout": (lambda: official(dropout=0.1), "attn_drop is Dropout"),
    "erf GELU": (lambda: official(approximate="none"), r"mlp.act is GELU\(approximate='none'\)"),
    "affine norms": (lambda: official(affine=True), "norm1 has a weight"),
    "norms of q and k": (lambda: official(qk_norm=True), "q_norm is LayerNorm"),
    "float64": (lambda: official().double(), "float64"),
    "meta": (lambda: official().to("meta"), "meta"),
    "diffusers, dropout": (lambda: diffusers_dit(dropout=0.1), "Dropout"),
    "diffusers, erf GELU": (lambda: diffusers_dit(activation_fn="gelu"), "GELU"),
    "diffusers, GEGLU": (lambda: diffusers_dit(activation_fn="geglu"), "GELU"),
    "diffusers, affine norms": (lambda: diffusers_dit(norm_elementwise_affine=True), "norm3 has a weight"),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone_with_the_reason(name: str) -> None:
    build, reason = LEFT[name]
    model = build()
    state = state_of(model)
    with pytest.raises(ValueError, match=reason):
        ditfast.accelerate(model)
    assert state_of(model) == state
    ditfast.accelerate(model, strict=False)
    rows = ditfast.acceleration_report(model).rows
    assert rows
    assert not any(row.swapped or row.engine for row in rows)
    assert all(row.reason for row in rows)
    assert state_of(ditfast.restore(model)) == state


def spoil_scale(block: nn.Module) -> None:
    block.attn.scale *= 2


def spoil_child(block: nn.Module) -> None:
    block.layer_scale = nn.Linear(64, 64)


def spoil_forward(block: nn.Module) -> None:
    plain = block.forward
    block.forward = lambda x, c: 2 * plain(x, c)


def spoil_attention(block: nn.Module) -> None:
    plain = block.attn.forward
    block.attn.forward = lambda x: 2 * plain(x)


def spoil_norm(block: nn.Module) -> None:
    block.norm2 = nn.RMSNorm(64, elementwise_affine=False)


def spoil_heads(block: nn.Module) -> None:
    block.attn.num_heads = 2  # with the scale of four


def spoil_adaptive(block: nn.Module) -> None:
    block.adaLN_modulation = nn.Sequential(nn.GELU(), block.adaLN_modulation[1])


SPOILED = {
    spoil_scale: "attn.scale is 0.5",
    spoil_child: "also has layer_scale",
    spoil_forward: "forward was replaced",
    spoil_attention: "forward of a part of it was replaced",
    spoil_norm: "norm2 is a RMSNorm",
    spoil_heads: "attn.scale is 0.25",
    spoil_adaptive: "adaLN_modulation is not SiLU",
}


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__)
def test_one_block_built_otherwise(spoil) -> None:
    model, inputs = official(), official_inputs()
    spoil(model.blocks[0])
    with torch.no_grad():
        before = run(model, inputs)[0]
        ditfast.accelerate(model)
        rows = {row.module: row for row in ditfast.acceleration_report(model).rows}
        assert SPOILED[spoil] in rows["blocks.0"].reason
        assert [name for name, row in rows.items() if row.swapped] == ["(model)", "blocks.1", "blocks.2"]
        assert error(run(model, inputs)[0], before) <= 1e-5
        assert torch.equal(run(ditfast.restore(model), inputs)[0], before)


def test_functions_that_blocks_hold_are_looked_at() -> None:
    class Held(timm_style.Block):
        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return self.before(super().forward(x, c))

    def kept(x: Tensor) -> Tensor:
        return x

    def halved(x: Tensor) -> Tensor:
        return x / 2

    model = official()
    for index, function in enumerate((kept, kept, halved)):
        model.blocks[index].__class__ = Held
        model.blocks[index].before = function
    rows = ditfast.acceleration_report(ditfast.accelerate(model)).rows
    assert [row.swapped for row in rows] == [True, True, True, False]


def test_identities_do_no_harm() -> None:
    """As timm's blocks have them where drop path and layer scale are off."""
    model, inputs = official(), official_inputs()
    for block in model.blocks:
        block.drop_path1, block.ls1 = nn.Identity(), nn.Identity()
    before = run(model, inputs)[0]
    assert all(row.swapped for row in ditfast.acceleration_report(ditfast.accelerate(model)).rows)
    assert error(run(model, inputs)[0], before) <= 1e-5


# ------------------------------------------------------------------------------------------------ built otherwise altogether
SHALLOW = {
    "official": lambda: official(depth=1),
    "diffusers": lambda: diffusers_dit(num_layers=1),
    "PixArt": lambda: pixart(num_layers=1),
    "SD3": lambda: sd3(num_layers=2),
}


@pytest.mark.parametrize("spoil", ["removed", "an identity", "of another width"])
@pytest.mark.parametrize("kind", SHALLOW)
def test_whatever_is_missing_accelerate_says_so_and_no_more(kind: str, spoil: str) -> None:
    """Every part in turn: the model's outputs, or its error, are what they were."""
    model, inputs = SHALLOW[kind](), KINDS[kind].example(torch.float32)

    def outcome() -> Any:
        try:
            with torch.no_grad():
                return run(model, inputs)[0]
        except Exception as error:
            return type(error)

    inside = "transformer_blocks" if kind in ("PixArt", "SD3") else ""  # of these, nothing else is looked at
    for name in [name for name, _ in model.named_modules() if name.startswith(inside) and name != ""]:
        parent, _, child = name.rpartition(".")
        parts = model.get_submodule(parent)._modules
        kept = dict(parts)
        if spoil == "removed":
            del parts[child]
        else:
            parts[child] = nn.Identity() if spoil == "an identity" else nn.Linear(48, 48)
        ditfast.restore(model)
        expected = outcome()
        ditfast.accelerate(model, strict=False)
        assert str(ditfast.acceleration_report(model))
        found = outcome()
        assert isinstance(found, Tensor) == isinstance(expected, Tensor), f"{name}: {found} instead of {expected}"
        assert not isinstance(found, Tensor) or error(found, expected) <= 1e-5, name
        parts.clear()
        parts.update(kept)


def test_scripted_modules() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.GELU()))
    assert ditfast.accelerate(scripted, strict=False) is scripted
    assert ditfast.acceleration_report(scripted).rows == ()
    ditfast.restore(scripted)


class AnySize(timm_style.DiT):
    """Crops its positions to the image, and takes labels in a column."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens = self.x_embedder(x)  # [B, T, D]
        c = self.t_embedder(t) + self.y_embedder(y, self.training).flatten(1)  # [B, D]
        u = tokens + self.pos_embed[:, : tokens.shape[1]]  # [B, T, D]
        for block in self.blocks:
            u = block(u, c)  # [B, T, D]
        kept, self.x_embedder.grid_size = self.x_embedder.grid_size, (x.shape[2] // 2, x.shape[3] // 2)
        out = self.unpatchify(self.final_layer(u, c))  # [B, C', H, W]
        self.x_embedder.grid_size = kept
        return out


@pytest.mark.parametrize("sides", [(8, 8), (4, 8), (4, 16)])
@pytest.mark.parametrize("labels", [(2,), (2, 1)])
def test_what_a_fork_makes_of_other_inputs_is_its_own(sides: tuple[int, int], labels: tuple[int, ...]) -> None:
    model = ditfast.accelerate(official(AnySize))
    assert all(row.swapped for row in ditfast.acceleration_report(model).rows)
    inputs = {"x": torch.randn(2, 4, *sides), "t": torch.rand(2) * 999, "y": torch.ones(labels).long()}
    with torch.no_grad():
        found = run(model, inputs)[0]
        assert found.shape[2:] == sides
        assert error(found, run(ditfast.restore(model), inputs)[0]) <= 1e-5


class OtherNames(timm_style.DiT):
    """The same, but for what its forward calls its arguments."""

    def forward(self, latents: Tensor, sigma: Tensor, label: Tensor, features: bool = False) -> Tensor | list[Tensor]:
        found = []
        x, c = self.embed(latents, sigma, label)  # [B, T, D], [B, D]
        for block in self.blocks:
            x = block(x, c=c)  # [B, T, D]
            found.append(x)
        return found if features else self.unpatchify(self.final_layer(x, c))


def test_a_fork_with_names_and_arguments_of_its_own() -> None:
    model, (x, t, y) = official(OtherNames), official_inputs().values()
    with torch.no_grad():
        expected, features = model(x, t, y), model(latents=x, sigma=t, label=y, features=True)
        ditfast.accelerate(model)
        assert all(row.swapped for row in ditfast.acceleration_report(model).rows)
        assert error(model(x, t, y), expected) <= 1e-5
        assert error(model(latents=x, sigma=t, label=y), expected) <= 1e-5
        for one, other in zip(model(x, t, y, features=True), features, strict=True):
            assert error(one, other) <= 1e-5
        with pytest.raises(TypeError):
            ditfast.accelerate(official())(t=t, y=y)


class Lenient(timm_style.DiT):
    """Takes a number for all timesteps, and drops the pixels beyond the last patch."""

    def forward(self, x: Tensor, t: Tensor | float, y: Tensor) -> Tensor:
        t = torch.full((len(x),), t) if isinstance(t, float) else t  # [B]
        x, c = self.embed(x, t, y)  # [B, T, D], [B, D]
        for block in self.blocks:
            x = block(x, c)  # [B, T, D]
        return self.unpatchify(self.final_layer(x, c))


@pytest.mark.parametrize(
    "change", [{"t": 3.0}, {"x": torch.ones(2, 4, 9, 9)}, {"x": torch.ones(2, 4, 8, 9)}], ids=["number", "9x9", "8x9"]
)
def test_inputs_that_only_a_fork_takes(change: dict[str, Any]) -> None:
    model, inputs = official(Lenient), {**official_inputs(), **change}
    with torch.no_grad():
        expected = run(model, inputs)[0]
        assert error(run(ditfast.accelerate(model), inputs)[0], expected) <= 1e-5
        run(model, official_inputs())
    row = next(row for row in ditfast.acceleration_report(model).rows if row.module == "(model)")
    assert (row.fast_calls, row.original_calls) == (1, 1), row


class Counting(timm_style.TimestepEmbedder):
    """Keeps what it was called with in a buffer that it makes at its first call."""

    def forward(self, t: Tensor) -> Tensor:
        if not hasattr(self, "latest"):
            self.register_buffer("latest", torch.zeros(1))
        return super().forward(t)


def test_a_buffer_made_in_the_first_forward() -> None:
    model = official()
    model.t_embedder.__class__ = Counting
    rows = ditfast.acceleration_report(ditfast.accelerate(model)).rows
    assert all(row.swapped for row in rows), rows


class PairBlock(timm_style.Block):
    """Takes a condition, or a pair of them."""

    def forward(self, x: Tensor, c: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        return super().forward(x, c[0] + c[1] if isinstance(c, tuple) else c)


def test_a_pair_of_conditions() -> None:
    block = randomize(PairBlock(64, 4))
    x, c = torch.randn(2, 16, 64), torch.randn(2, 64)
    with torch.no_grad():
        expected = block(x, (c, c))
        ditfast.accelerate(block)(x, c)
        assert torch.equal(block(x, (c, c)), expected)
