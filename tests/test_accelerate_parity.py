"""The parity check sees what forks change; what it passes has the original's outputs and gradients in both modes."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import timm_style
import torch
from foreign import DITS, KINDS, gradients, joined, official, official_inputs, run, sd3
from forks import CHANGES, Fork, random_fork
from support import error, randomize
from torch import Tensor, nn

import ditfast
from ditfast.homes import Swap

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = len(CHANGES)  # seeds of the default tier: every change once


def swapped(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(vars(module).get("forward"), Swap)]


def rows_of(model: nn.Module) -> dict[str, Any]:
    return {row.module: row for row in ditfast.acceleration_report(model).rows}


@pytest.mark.parametrize("seed", [pytest.param(i, marks=[] if i < QUICK else pytest.mark.full) for i in range(200)])
def test_random_forks_compute_what_they_did(seed: int) -> None:
    print(f"seed {seed}: {CHANGES[seed % len(CHANGES)]}")
    plain, inputs = random_fork(seed)
    fast = ditfast.accelerate(copy.deepcopy(plain), strict=False)
    for training in (False, True):
        plain.train(training)
        fast.train(training)
        with torch.no_grad():
            before = run(plain, inputs, seed)
            assert error(run(fast, inputs, seed)[0], before[0]) <= 1e-5
        upstream = [torch.randn_like(before[0])]
        expected = joined(gradients(plain, inputs, upstream, seed))
        assert error(joined(gradients(fast, inputs, upstream, seed)), expected) <= 1e-5
    assert all(row.swapped or row.reason for row in ditfast.acceleration_report(fast).rows)


@pytest.mark.parametrize("change", CHANGES)
def test_the_check_leaves_only_what_a_fork_changes(change: str) -> None:
    model = randomize(Fork(change, {1}, (4, 4), 3).eval())
    ditfast.accelerate(model, strict=False)
    names = swapped(model)
    every = ["", "blocks.0", "blocks.1", "blocks.2"]
    expected = {
        **dict.fromkeys(("none", "None as argument"), every),
        "positions as argument": [],
        "argument's default": [],
        **dict.fromkeys(("registers", "routing", "label probability", "no label", "halved stream"), every[1:]),
        **dict.fromkeys(("fractional timesteps", "one image", "rare noise", "kept condition"), every[1:]),
    }
    assert names == expected.get(change, ["", "blocks.0", "blocks.2"])


class Blocks(nn.Module):
    """Blocks of a model whose arguments nobody knows."""

    def __init__(self, change: str = "none", depth: int = 2):
        super().__init__()
        self.blocks = randomize(Fork(change, set(range(depth)), (4, 4), depth)).blocks

    def forward(self, x: Tensor, c: Tensor, **extra: Tensor | None) -> Tensor:
        for block in self.blocks:
            x = block(x, c, **extra)
        return x


def test_a_model_of_unknown_arguments_is_checked_at_its_first_call() -> None:
    model = ditfast.accelerate(Blocks().eval())
    assert {(row.swapped, row.reason) for row in rows_of(model).values()} == {(False, "checked at the first call")}
    x, c = torch.randn(2, 32, 32), torch.randn(2, 32)
    with torch.no_grad():
        found = model(x, c)
        assert {(row.fast_calls, row.original_calls) for row in rows_of(model).values()} == {(1, 0)}
        assert all(row.swapped for row in rows_of(model).values())
        assert error(found, ditfast.restore(model)(x, c)) <= 1e-5


def assert_agrees_at(lengths: Sequence[int], model: nn.Module) -> None:
    """Hold accelerated blocks to their classes' own forwards, at one sequence length after the other."""
    c = torch.randn(2, 32)
    with torch.no_grad():
        for T in lengths:
            x = torch.randn(2, T, 32)
            found = model(x, c)
            for block in model.blocks:
                x = type(block).forward(block, x, c)
            assert error(found, x) <= 1e-5


def test_a_window_wider_than_the_first_call_is_seen_at_a_longer_one() -> None:
    model = ditfast.accelerate(Blocks().eval())
    for block in model.blocks:
        block.attn.change = "window"
    assert_agrees_at((3, 16, 3), model)
    assert {row.fast_calls for row in rows_of(model).values()} == {2}


def test_a_scale_that_depends_on_the_length_is_seen_at_a_shorter_call() -> None:
    model = ditfast.accelerate(Blocks("logarithmic scale").eval())
    assert_agrees_at((16, 4, 16), model)
    assert {row.fast_calls for row in rows_of(model).values()} == {2}


def test_an_extra_argument_keeps_the_original_unless_it_is_none() -> None:
    model = ditfast.accelerate(Blocks().eval())
    x, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    positions = torch.arange(16)[:, None] * 0.5 ** torch.arange(8)
    with torch.no_grad():
        model(x, c, positions=None)
        found = model(x, c, positions=positions)
        row = rows_of(model)["blocks.0"]
        assert (row.fast_calls, row.original_calls) == (1, 1)
        assert "positions" in row.reason
        assert torch.equal(found, ditfast.restore(model)(x, c, positions=positions))


@pytest.mark.parametrize("change", ["attention dropout", "stochastic depth"])
def test_what_only_training_shows_is_left_at_the_first_call(change: str) -> None:
    model = ditfast.accelerate(Blocks(change).eval(), strict=False).train()
    x, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    assert len({model(x, c).double().sum().item() for _ in range(4)}) == 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_first_call_may_be_checkpointed(reentrant: bool) -> None:
    model = Blocks().train()
    x, c = torch.randn(2, 16, 32, requires_grad=True), torch.randn(2, 32)

    def gradient() -> Tensor:
        out = x
        for block in model.blocks:
            out = torch.utils.checkpoint.checkpoint(block, out, c, use_reentrant=reentrant)
        return torch.autograd.grad(out.square().sum(), x)[0] if not reentrant else backward(out)

    def backward(out: Tensor) -> Tensor:
        x.grad = None
        out.square().sum().backward()
        return x.grad.clone()

    expected = gradient()
    ditfast.accelerate(model)
    assert error(gradient(), expected) <= 1e-5
    assert all(row.swapped for row in rows_of(model).values())


def test_the_first_call_under_compile_and_transforms_runs_the_original() -> None:
    model = ditfast.accelerate(Blocks().eval())
    x, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        found = compiled(x, c)
        torch.func.vmap(lambda x: model(x[None], c[:1]))(x)
        assert not any(row.swapped for row in rows_of(model).values())
        assert error(found, model(x, c)) <= 1e-5
        assert all(row.swapped for row in rows_of(model).values())


class Counted(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def test_buffers_and_generators_stay_where_they_were() -> None:
    model = official()
    model.x_embedder.norm = Counted(64)
    model.blocks[1].norm1 = Counted(64)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[2]  # noqa: NPY002
    buffers = {name: (buffer.clone(), buffer._version) for name, buffer in model.named_buffers()}
    ditfast.accelerate(model.train(), strict=False)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[2])  # noqa: NPY002
    assert all(torch.equal(b, buffers[n][0]) and b._version == buffers[n][1] for n, b in model.named_buffers())


class Joint(nn.Module):
    """A model that reads its blocks and never calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = sd3().transformer_blocks

    def forward(self, x: Tensor) -> Tensor:
        for block in self.inner:
            x = x + block.ff(block.norm2(x))
        return x


def test_blocks_that_nobody_calls_are_not_swapped() -> None:
    model = ditfast.accelerate(Joint())
    with torch.no_grad():
        model(torch.randn(2, 16, 64))
    assert {(row.swapped, row.reason) for row in rows_of(model).values()} == {(False, "checked at the first call")}


def test_a_model_that_only_ran_its_own_forward_is_not_swapped() -> None:
    model = ditfast.accelerate(official())
    run(model, official_inputs())
    rows = rows_of(model)
    assert not rows["(model)"].swapped
    assert rows["(model)"].original_calls == 1
    assert "with gradients" in rows["(model)"].reason
    assert rows["blocks.0"].swapped


def test_a_block_called_otherwise_than_those_built_alike_is_checked_on_that() -> None:
    model = randomize(Fork("routing", set(), (4, 4), 5).eval())
    for block in model.blocks:
        block.attn.change = "logarithmic scale"
    ditfast.accelerate(model)
    assert "blocks.0" in swapped(model)
    assert "blocks.1" not in swapped(model)


def test_blocks_that_differ_on_the_example_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="came out different"):
        ditfast.accelerate(Blocks("scale"))


def test_copies_count_their_own_calls() -> None:
    model = ditfast.accelerate(official())
    with torch.no_grad():
        run(model, official_inputs())
    assert {(row.fast_calls, row.original_calls) for row in rows_of(copy.deepcopy(model)).values()} == {(0, 0)}
    assert {row.fast_calls for row in rows_of(model).values()} == {1}


class Deep(timm_style.Block):
    """Block with a setting deeper inside its attributes than comparisons look."""

    settings = ((((1.0,),),),)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.settings[0][0][0][0] * super().forward(x, c)


def test_the_last_of_blocks_that_look_alike_is_checked_itself() -> None:
    model = Blocks(depth=4).eval()
    model.blocks = nn.ModuleList(Deep(32, 2) for _ in range(4))
    for block, factor in zip(model.blocks, (1.0, 1.0, 1.0, 2.0), strict=True):
        block.settings = ((((factor,),),),)
    with torch.no_grad():
        ditfast.accelerate(model)(torch.randn(2, 16, 32), torch.randn(2, 32))
    assert [row.swapped for row in rows_of(model).values()] == [True, True, True, False]


def test_blocks_built_otherwise_have_verdicts_of_their_own() -> None:
    model = ditfast.accelerate(Blocks(depth=5).eval())
    model.blocks[3].attn.change = "window"
    x, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    with torch.no_grad():
        found = model(x, c)
        assert [row.swapped for row in rows_of(model).values()] == [True, True, True, False, True]
        assert error(found, ditfast.restore(model)(x, c)) <= 1e-5


def test_a_model_without_known_blocks_says_so() -> None:
    model = official()
    model.blocks = nn.ModuleList([nn.Bilinear(64, 64, 64)])
    ditfast.accelerate(model, strict=False)
    assert rows_of(model)["(model)"].reason == "no block inside was recognized"


@pytest.mark.parametrize("kind", ["official", "SiT", "diffusers", "SD3"])
def test_one_image_with_several_timesteps(kind: str) -> None:
    model, inputs = KINDS[kind].build(), KINDS[kind].example(torch.float32)
    latents = next(iter(inputs))
    inputs[latents] = inputs[latents][:1]
    with torch.no_grad():
        expected = run(model, inputs)[0]
        assert error(run(ditfast.accelerate(model), inputs)[0], expected) <= 1e-5
    assert error(run(model, inputs)[0], expected) <= 1e-5


class AdaptedConv(nn.Module):
    """As peft's LoRA wraps a convolution whose name ends in ``proj``: it is called, and has no attributes of the base."""

    def __init__(self, base: nn.Conv2d):
        super().__init__()
        self.base_layer = base
        self.down = nn.Conv2d(base.in_channels, 2, base.kernel_size, base.stride, bias=False)
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", DITS)
def test_an_adapter_around_the_patches_convolution(kind: str, when: str) -> None:
    model, inputs = KINDS[kind].build(), KINDS[kind].example(torch.float32)
    if when == "after":
        ditfast.accelerate(model)
    embedder = model.x_embedder if kind == "official" else model.pos_embed
    embedder.proj = randomize(AdaptedConv(embedder.proj))
    if when == "before":
        ditfast.accelerate(model)
    with torch.no_grad():
        found = run(model, inputs)[0]
        assert rows_of(model)["(model)"].fast_calls == 1
        assert error(found, run(ditfast.restore(model), inputs)[0]) <= 1e-5


def test_an_adapter_around_the_convolution_of_a_fast_dit() -> None:
    config = ditfast.DiTConfig(depth=1, hidden_size=64, num_heads=2, input_size=8, num_classes=10)
    model = randomize(ditfast.DiT(config).eval())
    adapter = AdaptedConv(model.x_embedder.proj)
    nn.init.zeros_(adapter.up.weight)
    inputs = official_inputs()
    with torch.no_grad():
        expected = model(**inputs)
        model.x_embedder.proj = adapter
        assert error(model(**inputs), expected) <= 1e-5
