"""Hooks on accelerated models fire as they did, and see what they saw; probing fires none, and leaves no trace."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import timm_style
import torch
from foreign import DITS, KINDS, official, official_inputs, run
from support import error
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import ditfast

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:For backward hooks to be called"),
]

PARTS = {
    "official": (
        *("", "x_embedder", "x_embedder.proj", "t_embedder", "t_embedder.mlp.0", "y_embedder", "blocks.1", "blocks.2"),
        *("blocks.1.norm1", "blocks.1.norm2", "blocks.1.attn", "blocks.1.attn.qkv", "blocks.1.attn.q_norm"),
        *("blocks.1.attn.proj", "blocks.1.mlp", "blocks.1.mlp.fc1", "blocks.1.mlp.act", "blocks.1.mlp.fc2"),
        *("blocks.1.adaLN_modulation", "blocks.1.adaLN_modulation.0", "blocks.1.adaLN_modulation.1", "final_layer"),
        *("final_layer.norm_final", "final_layer.adaLN_modulation.1", "final_layer.linear"),
    ),
    "diffusers": (
        *("", "pos_embed", "pos_embed.proj", "transformer_blocks.0", "transformer_blocks.2", "transformer_blocks.1.norm1"),
        *("transformer_blocks.0.norm1.emb", "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1"),
        *("transformer_blocks.1.norm1.linear", "transformer_blocks.1.norm3", "transformer_blocks.1.attn1"),
        *("transformer_blocks.1.attn1.to_q", "transformer_blocks.1.attn1.to_out.0", "transformer_blocks.1.attn1.to_out.1"),
        *("transformer_blocks.1.ff", "transformer_blocks.1.ff.net.0", "transformer_blocks.1.ff.net.0.proj"),
        *("transformer_blocks.1.ff.net.2", "norm_out", "proj_out_1", "proj_out_2"),
    ),
    "PixArt": tuple(f"transformer_blocks.1{part}" for part in ("", ".norm1", ".norm2", ".attn1", ".attn2.to_q", ".ff")),
    "SD3": tuple(f"transformer_blocks.1.{part}" for part in ("norm1", "norm1.linear", "norm2_context", "attn", "ff_context")),
}


Seen = list[tuple[str, list[Tensor]]]  # what fired, on what tensors


def flat(*given: Any) -> list[Tensor]:
    """The tensors in arguments or outputs, as they are now."""
    found: list[Tensor] = []
    for value in given:
        if isinstance(value, Tensor):
            found.append(value.detach().clone())
        elif isinstance(value, dict):
            found += flat(*(value[key] for key in sorted(value)))
        elif isinstance(value, (tuple, list)):
            found += flat(*value)
    return found


def listen(part: nn.Module, kind: str, seen: Seen) -> Any:
    """Registers one hook."""
    if kind == "forward":

        def note(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            seen.append((f"forward {sorted(kwargs)}", flat(args, kwargs, out)))

        return part.register_forward_hook(note, with_kwargs=True)
    if kind == "pre":
        return part.register_forward_pre_hook(lambda _, *given: seen.append(("pre", flat(*given))), with_kwargs=True)
    if kind == "backward":
        return part.register_full_backward_hook(lambda _, *given: seen.append(("backward", flat(*given))))
    return part.register_full_backward_pre_hook(lambda _, *given: seen.append(("pre backward", flat(*given))))


def step(model: nn.Module, inputs: dict[str, Any], gradients: bool) -> None:
    (latents, x), *others = inputs.items()
    with torch.set_grad_enabled(gradients):
        outputs = run(model, {latents: x.detach().requires_grad_(gradients), **dict(others)})
        if gradients:
            outputs[0].square().sum().backward()


def assert_same(found: Seen, expected: Seen, name: str) -> None:
    found, expected = (sorted(seen, key=lambda one: one[0]) for seen in (found, expected))
    assert [what for what, _ in found] == [what for what, _ in expected], name
    for (what, tensors), (_, others) in zip(found, expected, strict=True):
        assert len(tensors) == len(others), f"{name}, {what}"
        for one, other in zip(tensors, others, strict=True):
            assert one.shape == other.shape
            assert one.dtype == other.dtype
            assert not other.is_floating_point() or error(one, other) <= 1e-5, f"{name}, {what}"


@pytest.mark.parametrize("hook", ["forward", "pre", "backward", "pre backward"])
@pytest.mark.parametrize("kind", PARTS)
def test_hooks_fire_as_often_and_see_the_same(kind: str, hook: str) -> None:
    """One at a time, so that none fires because another has the part called."""
    model, inputs = KINDS[kind].build(), KINDS[kind].example(torch.float32)
    swapped = ditfast.accelerate(copy.deepcopy(model))
    for name in PARTS[kind]:
        both: list[Seen] = [[], []]
        for one, seen in zip((swapped, model), both, strict=True):
            handle = listen(one.get_submodule(name), hook, seen)
            step(one, inputs, gradients="backward" in hook)
            handle.remove()
        assert both[1] or "backward" in hook, f"nothing calls {name}"  # backward hooks need tensors in and out
        assert_same(*both, name)


@pytest.mark.parametrize("kind", PARTS)
def test_the_probe_fires_no_hooks(kind: str) -> None:
    model, inputs = KINDS[kind].build(), KINDS[kind].example(torch.float32)
    swapped, both = copy.deepcopy(model), [[], []]
    for one, seen in zip((swapped, model), both, strict=True):
        for name in PARTS[kind]:
            for hook in ("forward", "pre", "backward", "pre backward"):
                listen(one.get_submodule(name), hook, seen)
    assert ditfast.accelerate(swapped) is swapped
    assert not any(row.reason for row in ditfast.acceleration_report(swapped).rows)
    assert both == [[], []], "the probe fired a hook"
    step(swapped, inputs, gradients=True)
    step(model, inputs, gradients=True)
    assert sorted(what for what, _ in both[0]) == sorted(what for what, _ in both[1])


@pytest.mark.parametrize("kind", DITS)
def test_global_hooks_see_every_module(kind: str) -> None:
    model, inputs, seen = KINDS[kind].build(), KINDS[kind].example(torch.float32), []
    ditfast.accelerate(model)
    with torch.no_grad():
        run(model, inputs)
        handle = register_module_forward_hook(lambda module, args, out: seen.append(type(module).__name__))
        try:
            run(model, inputs)
            found = seen[:]
            seen.clear()
            run(ditfast.restore(model), inputs)
        finally:
            handle.remove()
    assert found == seen


def test_hooks_that_change_what_they_see() -> None:
    model, inputs = official(), official_inputs()
    ditfast.accelerate(model)
    for name in ("blocks.2", "blocks.0.attn", "blocks.1.mlp.fc1", "final_layer.adaLN_modulation", "x_embedder.proj"):
        with torch.no_grad():
            plain = run(model, inputs)[0]
            with_hook = model.get_submodule(name).register_forward_hook(lambda _, args, out: out.flip(1))
            found = run(model, inputs)[0]
            expected = run(ditfast.restore(model), inputs)[0]
            with_hook.remove()
        assert error(found, expected) <= 1e-5, name
        assert error(plain, expected) > 1e-4, name
        ditfast.accelerate(model)


@pytest.mark.parametrize("kind", [*DITS, "PixArt", "SD3"])
def test_the_probe_leaves_no_trace(kind: str) -> None:
    model = KINDS[kind].build()
    list(model.modules())[5].train()
    run(model, KINDS[kind].example(torch.float32))[0].sum().backward()
    list(model.parameters())[3].requires_grad_(False)
    fired: list[str] = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: fired.append("forward"))
        module.register_forward_pre_hook(lambda *_: fired.append("pre"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda *_: fired.append("gradient"))

    def everything() -> list[Any]:
        values = {key: value.clone() for key, value in model.state_dict().items()}
        grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
        flags = [(name, module.training) for name, module in model.named_modules()]
        return [torch.get_rng_state(), random.getstate(), flags, values, grads, [p.requires_grad for p in model.parameters()]]

    before = everything()
    ditfast.accelerate(model, strict=False)
    after = everything()
    assert not fired
    assert torch.equal(before[0], after[0])
    assert before[1:3] == after[1:3]
    for one, other in zip(before[3:5], after[3:5], strict=True):
        assert all(value is other[key] or torch.equal(value, other[key]) for key, value in one.items())
    assert before[5] == after[5]
    assert not ditfast.acceleration_report(model).rows[0].reason


def test_the_probe_is_not_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By autocast, a default device or dtype, or inference mode."""
    under_autocast = []
    plain = timm_style.modulate
    monkeypatch.setattr(
        timm_style, "modulate", lambda *args: (under_autocast.append(torch.is_autocast_enabled("cpu")), plain(*args))[1]
    )
    ways: list[Callable[[], Any]] = [
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.device("meta"),
        torch.inference_mode,
        torch.enable_grad,
    ]
    for way in ways:
        model = official()
        with way():
            ditfast.accelerate(model)
        assert all(row.swapped for row in ditfast.acceleration_report(model).rows)
    assert under_autocast
    assert not any(under_autocast)
    torch.set_default_dtype(torch.float64)
    try:
        assert all(row.swapped for row in ditfast.acceleration_report(ditfast.accelerate(official().float())).rows)
    finally:
        torch.set_default_dtype(torch.float32)
