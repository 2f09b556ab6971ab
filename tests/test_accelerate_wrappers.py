"""Accelerated models inside what people wrap around models: functional calls, autocast, threads, DDP, FSDP."""

from __future__ import annotations

import copy
import inspect
import socket
import threading
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import ranks_of_models
import timm_style
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from foreign import (
    DITS,
    KINDS,
    assert_same_outputs,
    diffusers_dit,
    gradients,
    in_dtype,
    in_float64,
    joined,
    official,
    official_inputs,
    run,
)
from support import error
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn.attention import SDPBackend, sdpa_kernel

import ditfast

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated"),
]


@pytest.mark.parametrize("kind", DITS)
def test_functional_call(kind: str) -> None:
    model, inputs = KINDS[kind].build(), KINDS[kind].example(torch.float32)
    others = {name: 1.1 * parameter.detach() for name, parameter in model.named_parameters()}
    for options in ({}, {"dtype": torch.bfloat16, "cache_modulation": True}):
        with torch.no_grad():
            before = run(model, inputs)[0]
            expected = torch.func.functional_call(model, others, kwargs=inputs)
            ditfast.accelerate(model, **options)
            found = torch.func.functional_call(model, others, kwargs=inputs)
            bar = 3e-2 if options else 1e-5
            assert error(getattr(found, "sample", found), getattr(expected, "sample", expected)) <= bar
            assert error(run(model, inputs)[0], before) <= bar
        ditfast.restore(model)


def test_gradients_of_functional_calls() -> None:
    model, inputs = official(), official_inputs()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}

    def loss(parameters: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out = torch.func.functional_call(model, parameters, kwargs={"x": x[None], "t": t[None], "y": y[None]})
        return out.square().sum()

    of_samples = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))
    expected = of_samples(parameters, *inputs.values())
    ditfast.accelerate(model)
    found = of_samples(parameters, *inputs.values())
    assert error(joined(found), joined(expected)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str, dtype: torch.dtype) -> None:
    model, inputs = KINDS[kind].build(), KINDS[kind].example(torch.float32)
    with torch.no_grad():
        exact = run(in_float64(model), in_dtype(inputs, torch.float64))
    for with_gradients in (False, True):
        with torch.set_grad_enabled(with_gradients), torch.autocast("cpu", dtype):
            eager = run(model, inputs)
            with ditfast.accelerated(model):
                found = run(model, inputs)
        assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in eager]
        assert_same_outputs([tensor.to(dtype) for tensor in found], exact, [tensor.to(dtype) for tensor in eager])


def channels_last(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(memory_format=torch.channels_last) if value.dim() == 4 else value for name, value in inputs.items()}


def one_condition(inputs: dict[str, Any]) -> dict[str, Any]:
    """For the whole batch, to be broadcast."""
    shared = ("t", "y", "timestep", "class_labels", "pooled_projections")
    return {name: value[:1] if name in shared else value for name, value in inputs.items()}


def nothing(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value[:0] for name, value in inputs.items()}


FORMS = [*((kind, change) for kind in (*DITS, "SD3") for change in (channels_last, one_condition)), ("official", nothing)]


@pytest.mark.parametrize(("kind", "change"), FORMS)
def test_inputs_of_other_forms(kind: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    model, inputs = KINDS[kind].build(), change(KINDS[kind].example(torch.float32))
    if change is channels_last:
        model.to(memory_format=torch.channels_last)
    expected = run(model, inputs)[0]
    ditfast.accelerate(model)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            found = run(model, inputs)[0]
        assert found.shape == expected.shape
        assert error(found, expected) <= 1e-5
    blocks = getattr(model, "blocks", None) or model.transformer_blocks
    blocks[1].register_forward_hook(lambda *_: None)
    with torch.no_grad():
        assert error(run(model, inputs)[0], expected) <= 1e-5


@pytest.mark.parametrize("kind", DITS)
def test_exported_inspected_and_differentiated_forwards(kind: str) -> None:
    model, inputs = KINDS[kind].build(), KINDS[kind].example(torch.float32)
    signature = inspect.signature(model.forward)
    with torch.no_grad():
        expected = run(model, inputs)[0]
        ditfast.accelerate(model)
        assert inspect.signature(model.forward) == signature
        exported = torch.export.export(model, (), inputs).module()
        assert error(run(exported, inputs)[0], expected) <= 1e-5
    ditfast.restore(model)
    latents, x = next(iter(inputs.items()))

    def tangent() -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(lambda x: run(model, {**inputs, latents: x})[0], (x,), (torch.ones_like(x),))[1]

    expected = tangent()
    ditfast.accelerate(model)
    assert error(tangent(), expected) <= 1e-5


@pytest.mark.parametrize("kind", DITS)
def test_forward_bound_to_its_module(kind: str) -> None:
    """Accelerate's unwrap_model binds what it finds in ``forward`` to the model, whose copies then share it."""
    model, inputs = KINDS[kind].build(), KINDS[kind].example(torch.float32)
    with torch.no_grad():
        expected = run(model, inputs)[0]
        ditfast.accelerate(model)
        for module in (model, *(getattr(model, "blocks", None) or model.transformer_blocks)):
            module.forward = MethodType(module.forward, module)
        copied = copy.deepcopy(model)
        assert error(run(model, inputs)[0], expected) <= 1e-5
        for parameter in model.parameters():
            parameter.zero_()
        assert error(run(copied, inputs)[0], expected) <= 1e-5
        for row in ditfast.acceleration_report(copied).rows:
            assert row.swapped, row
            assert (row.fast_calls, row.original_calls) == (1, 0)
        assert torch.equal(run(ditfast.restore(copied), inputs)[0], expected)
        assert all("forward" not in vars(module) for module in copied.modules())
        assert error(run(ditfast.accelerate(copied), inputs)[0], expected) <= 1e-5


def test_a_block_used_twice() -> None:
    model, inputs = official(), official_inputs()
    model.blocks[2] = model.blocks[0]
    with torch.no_grad():
        expected = run(model, inputs)[0]
        assert error(run(ditfast.accelerate(model), inputs)[0], expected) <= 1e-5


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [*DITS, "PixArt", "SD3"])
def test_streams_under_autocast_have_the_same_dtype(kind: str, stream: torch.dtype) -> None:
    model = KINDS[kind].build()
    block = (getattr(model, "blocks", None) or model.transformer_blocks)[0]
    x, context, c = torch.randn(2, 16, 64).to(stream), torch.randn(2, 6, 64).to(stream), torch.randn(2, 64).bfloat16()
    labels = {"timestep": torch.tensor([1, 2]), "class_labels": torch.tensor([3, 4])}
    inputs: dict[str, Any] = {
        "official": {"x": x, "c": c},
        "diffusers": {"hidden_states": x, **labels},
        "PixArt": {"hidden_states": x, "encoder_hidden_states": context, "timestep": c.repeat(1, 6)},
        "SD3": {"hidden_states": x, "encoder_hidden_states": context, "temb": c},
    }[kind]
    for with_gradients in (False, True):
        with torch.set_grad_enabled(with_gradients), torch.autocast("cpu", torch.bfloat16):
            expected = run(block, inputs)
            with ditfast.accelerated(block):
                found = run(block, inputs)
        assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in expected]
        assert all(error(one, other) <= 2e-2 for one, other in zip(found, expected, strict=True))


def test_a_model_that_checkpoints_its_blocks_still_does(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    plain = timm_style.checkpoint
    monkeypatch.setattr(timm_style, "checkpoint", lambda *args, **kwargs: (calls.append(1), plain(*args, **kwargs))[1])
    model = ditfast.accelerate(KINDS["fast-DiT"].build())
    calls.clear()
    run(model, official_inputs())
    assert len(calls) == 3
    with torch.no_grad():
        run(model, official_inputs())
    assert len(calls) == 3, "which without gradients has no use"


def test_inference_mode_between_others() -> None:
    model, inputs = official(), official_inputs()
    before = run(model, inputs)[0]
    ditfast.accelerate(model, cache_modulation=True, dtype=torch.bfloat16)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            assert error(run(model, inputs)[0], before) <= 3e-2
    run(model, inputs)[0].sum().backward()


def test_activation_checkpointing_after_accelerate() -> None:
    model, inputs = official(), official_inputs()
    upstream = [torch.randn(2, 8, 8, 8)]
    expected = joined(gradients(model, inputs, upstream))
    ditfast.accelerate(model)
    block = type(model.blocks[0])
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, block))
    assert error(joined(gradients(model, inputs, upstream)), expected) <= 1e-5
    with torch.no_grad():
        found = run(model, inputs)[0]
        assert error(found, run(ditfast.restore(model), inputs)[0]) <= 1e-5


@pytest.mark.parametrize("both", [False, True], ids=["one of two", "both"])
def test_threads_never_touch_each_other(both: bool) -> None:
    models = [official(), official(), diffusers_dit()]
    calls = [official_inputs(), official_inputs(), KINDS["diffusers"].example(torch.float32)]
    ditfast.accelerate(models[0], dtype=torch.bfloat16, cache_modulation=True)
    if both:
        ditfast.accelerate(models[1])
        ditfast.accelerate(models[2], cache_modulation=True)
    with torch.no_grad():
        expected = [run(model, inputs)[0] for model, inputs in zip(models, calls, strict=True)]
    wrong: list[str] = []

    def work(index: int) -> None:
        torch.set_num_threads(1)
        for round_ in range(10):
            with torch.no_grad():
                if not torch.equal(models[index](**calls[index], **more[index])[0], expected[index][0]):
                    wrong.append(f"{index} in round {round_}")

    more: list[dict[str, Any]] = [{}, {}, {"return_dict": False}]
    expected[2] = expected[2][None]
    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1, 2, 0, 1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_accelerate_and_restore_while_another_thread_runs_another_model() -> None:
    ours, theirs, inputs = official(), official(), official_inputs()
    with torch.no_grad():
        expected = run(theirs, inputs)[0]
    stop, wrong = threading.Event(), []

    def work() -> None:
        with torch.no_grad():
            while not stop.is_set():
                wrong.append(not torch.equal(theirs(**inputs), expected))

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(5):
        ditfast.accelerate(ours, attention="sdpa")
        ditfast.restore(ours)
    stop.set()
    thread.join()
    assert wrong
    assert not any(wrong)
    assert not any(row.swapped for row in ditfast.acceleration_report(theirs).rows)


# ------------------------------------------------------------------------------------------------ several processes
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("kind", DITS)
def test_two_processes_of_ddp_and_fsdp(kind: str) -> None:
    if kind == "diffusers":
        pytest.importorskip("diffusers")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(ranks_of_models.work, args=(port, kind), nprocs=2, join=True)
