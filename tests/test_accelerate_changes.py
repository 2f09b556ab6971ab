"""Adapters on accelerated models, parts replaced or changed before and after accelerate, and diffusers' own switches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm_style
import torch
from foreign import KINDS, diffusers_dit, diffusers_inputs, official, official_inputs, pixart, run, sd3
from support import error, randomize
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import ditfast

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated"),
]


# ------------------------------------------------------------------------------------------------ adapters
class Lora(nn.Module):
    """As adapters do: the linear they adapt is called by them."""

    def __init__(self, base: nn.Linear, rank: int = 4):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x)) if self.enabled else self.base(x)


ADAPTED = {
    "official": (
        *("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"),
        *("blocks.1.attn.qkv", "final_layer.linear", "final_layer.adaLN_modulation.1", "t_embedder.mlp.0"),
    ),
    "diffusers": (
        *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear", "proj_out_1", "proj_out_2"),
        *("transformer_blocks.1.attn1.to_v", "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1", "linear_2"),
    ),
}
CASES = [(kind, target) for kind, targets in ADAPTED.items() for target in targets]


def adapt(model: nn.Module, target: str, wrap: Callable[[nn.Module], nn.Module]) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and f".{name}".endswith(f".{target}"):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, wrap(module))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("kind", "target"), CASES, ids=lambda value: value)
def test_adapters(kind: str, target: str, when: str) -> None:
    model, inputs = KINDS[kind].build(), KINDS[kind].example(torch.float32)
    if when == "after":
        ditfast.accelerate(model)
    adapt(model, target, lambda linear: randomize(Lora(linear)).requires_grad_(True))
    if when == "before":
        ditfast.accelerate(model)
        assert all(row.swapped for row in ditfast.acceleration_report(model).rows)
    adapters = [module for module in model.modules() if isinstance(module, Lora)]
    assert adapters
    trained = [weight for adapter in adapters for weight in (adapter.down.weight, adapter.up.weight)]

    def step() -> list[Tensor]:
        out = run(model, inputs)[0]
        return [out.detach(), *torch.autograd.grad(out.square().sum(), trained)]

    with torch.no_grad():
        found = run(model, inputs)[0]
        for adapter in adapters:
            adapter.enabled = False
        disabled = run(model, inputs)[0]
        for adapter in adapters:
            adapter.enabled = True
    found_step = step()
    ditfast.restore(model)
    expected = step()
    assert error(found, expected[0]) <= 1e-5
    assert error(disabled, expected[0]) > 1e-4
    for one, other in zip(found_step, expected, strict=True):
        assert error(one, other) <= 1e-4


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, nn.utils.weight_norm, parametrizations.spectral_norm])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_parametrised_weights(norm: Callable[[nn.Module], nn.Module], when: str) -> None:
    model, inputs = official(), official_inputs()
    if when == "after":
        ditfast.accelerate(model)
    for name in ("blocks.0.attn.qkv", "blocks.1.mlp.fc1", "blocks.2.adaLN_modulation.1", "final_layer.linear"):
        norm(model.get_submodule(name))
    ditfast.accelerate(model)
    assert all(row.swapped for row in ditfast.acceleration_report(model).rows)
    oracle = ditfast.restore(copy.deepcopy(model)) if norm is not nn.utils.weight_norm else None
    for training in (False, True, True):
        found = run(model.train(training), inputs)[0]
        if oracle is None:
            assert error(found, run(ditfast.restore(model), inputs)[0]) <= 1e-5
            ditfast.accelerate(model)
        else:
            assert error(found, run(oracle.train(training), inputs)[0]) <= 1e-5
            for a, b in zip(model.buffers(), oracle.buffers(), strict=True):
                assert error(a, b) <= 1e-5, "the power iteration has to run as often"


# ------------------------------------------------------------------------------------------------ replaced and changed parts
def replace(name: str, build: Callable[[], nn.Module]) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, randomize(build()))

    return change


def drop(model: nn.Module) -> None:
    model.blocks[1].attn.proj_drop.p = 0.5


def skip(model: nn.Module) -> None:
    del model.blocks[1]


def offload(model: nn.Module) -> None:
    """As hooks of HF's accelerate do it, on the instance."""
    for part in (model, model.blocks[1], model.blocks[0].attn.qkv, model.blocks[2].norm1):
        plain = part.forward
        part.forward = lambda *args, plain=plain, **kwargs: 1.5 * plain(*args, **kwargs)


def new_eps(model: nn.Module) -> None:
    model.blocks[1].norm1.eps = 0.5


CHANGES = {
    "activation": replace("blocks.1.mlp.act", nn.ReLU),
    "norm": replace("blocks.1.norm2", lambda: nn.LayerNorm(64)),
    "attention": replace("blocks.1.attn", lambda: nn.Linear(64, 64)),
    "mlp": replace("blocks.2.mlp", lambda: nn.Linear(64, 64)),
    "linear without bias": replace("blocks.0.attn.qkv", lambda: nn.Linear(64, 192, bias=False)),
    "adaLN": replace("blocks.0.adaLN_modulation", lambda: nn.Linear(64, 384)),
    "block": replace("blocks.2", lambda: nn.Bilinear(64, 64, 64)),
    "embedder": replace("t_embedder", lambda: nn.Embedding(1000, 64)),
    "final norm": replace("final_layer.norm_final", nn.Identity),
    "patches": replace("x_embedder.proj", lambda: nn.Conv2d(4, 64, 2, 2, bias=False)),
    "dropout": drop,
    "skipped block": skip,
    "offloading": offload,
    "epsilon": new_eps,
}


class PerToken(nn.Module):
    def __init__(self, bilinear: nn.Bilinear):
        super().__init__()
        self.bilinear = bilinear

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.bilinear(x, c[:, None].expand_as(x).contiguous())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["", "in bf16"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_after_accelerate(change: str, dtype: torch.dtype | None) -> None:
    model, inputs = official(), official_inputs()
    if change == "embedder":
        inputs["t"] = inputs["t"].long()
    ditfast.accelerate(model, dtype=dtype)
    with torch.no_grad():
        run(model, inputs)
        CHANGES[change](model)
        if change == "block":
            model.blocks[2] = PerToken(model.blocks[2])
        model.train(change == "dropout")
        found = run(model, inputs)[0]
        expected = run(ditfast.restore(model), inputs)[0]
        assert error(found, expected) <= (1e-5 if dtype is None else 3e-2)
        assert run(model.eval(), inputs)[0].dtype == found.dtype


def test_a_wrapper_that_stays_behind_restore() -> None:
    """Somebody wraps the swapped forward; restore cannot take that away, but what it wraps is the original again."""
    model, inputs = official(), official_inputs()
    with torch.no_grad():
        before = run(model, inputs)[0]
        ditfast.accelerate(model)
        swapped = model.forward
        model.forward = lambda **kwargs: swapped(**kwargs)
        assert error(run(model, inputs)[0], before) <= 1e-5
        assert "wrapped or replaced" in ditfast.acceleration_report(model).rows[0].engine
        with ditfast.accelerated(model):
            assert "forward was replaced before" in ditfast.acceleration_report(model).rows[0].reason
        assert torch.equal(run(ditfast.restore(model), inputs)[0], before)
        model.forward = swapped  # as offloading is removed
        assert torch.equal(run(model, inputs)[0], before)
        ditfast.accelerate(model, dtype=torch.bfloat16)
        assert all(row.swapped for row in ditfast.acceleration_report(model).rows)
        assert vars(model)["forward"] is not swapped
        assert 1e-5 < error(run(model, inputs)[0], before) < 3e-2


# ------------------------------------------------------------------------------------------------ diffusers' own switches
class Doubled:
    """A processor of one's own."""

    def __init__(self) -> None:
        from diffusers.models.attention_processor import AttnProcessor2_0

        self.plain = AttnProcessor2_0()

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * self.plain(*args, **kwargs)


def fuse(model: nn.Module) -> None:
    from diffusers.models.attention_processor import FusedAttnProcessor2_0

    for block in model.transformer_blocks:
        block.attn1.fuse_projections()
        block.attn1.set_processor(FusedAttnProcessor2_0())


def older_processor(model: nn.Module) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    model.transformer_blocks[1].attn1.set_processor(AttnProcessor())


SWITCHES = {
    "processor": lambda model: model.transformer_blocks[1].attn1.set_processor(Doubled()),
    "older processor": older_processor,
    "fused projections": fuse,
    "chunked ff": lambda model: [block.set_chunk_feed_forward(8, 1) for block in model.transformer_blocks],
    "checkpointing": lambda model: model.enable_gradient_checkpointing(),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("switch", SWITCHES)
def test_switches_of_diffusers(switch: str, when: str) -> None:
    model, inputs = diffusers_dit(), diffusers_inputs()
    if when == "after":
        ditfast.accelerate(model)
        run(model, inputs)
    with torch.no_grad():
        SWITCHES[switch](model)
    model.train()
    ditfast.accelerate(model, strict=False) if when == "before" else None
    rows = ditfast.acceleration_report(model).rows
    idle = [row for row in rows if row.reason or "its own forward" in row.engine]
    expected_idle = {"fused projections": 3, "chunked ff": 3, "processor": 1}.get(switch, 0)
    assert len([row for row in idle if row.module != "(model)"]) == expected_idle
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> list[Tensor]:
        out = run(model, inputs)[0]
        gradient = torch.autograd.grad(out.square().sum(), trained, allow_unused=True)
        return [out, torch.cat([part.flatten() for part in gradient if part is not None])]

    def inference() -> Tensor:
        with torch.no_grad():
            return run(model.eval(), inputs)[0]

    found = [*step(), inference()]
    ditfast.restore(model)
    model.train()
    for one, other in zip(found, [*step(), inference()], strict=True):
        assert error(one, other) <= 1e-5
    if switch == "checkpointing":
        ditfast.accelerate(model.train())
        model.disable_gradient_checkpointing()
        assert all(error(one, other) <= 1e-5 for one, other in zip(step(), found[:-1], strict=True))


def test_chunked_pixart() -> None:
    model, inputs = pixart(), KINDS["PixArt"].example(torch.float32)
    ditfast.accelerate(model)
    model.transformer_blocks[0].set_chunk_feed_forward(8, 1)
    rows = ditfast.acceleration_report(model).rows
    assert ["its own forward" in row.engine for row in rows] == [True, False]
    found = run(model, inputs)[0]
    assert error(found, run(ditfast.restore(model), inputs)[0]) <= 1e-5


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


def test_a_block_that_attends_elsewhere() -> None:
    block = diffusers_dit().transformer_blocks[0]
    block.only_cross_attention = True
    with pytest.raises(ValueError, match="attends to something else"):
        ditfast.accelerate(block)
