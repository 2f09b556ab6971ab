"""Copies of accelerated models, other dtypes, and what accelerated models keep between calls."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from foreign import DITS, KINDS, diffusers_dit, gradients, joined, official, official_inputs, run
from support import error, randomize
from torch import Tensor, nn

import ditfast
from ditfast.homes import caches, home

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True"),
]


def through(save: Callable[[Any, Any], None], load: Callable[[Any], Any]) -> Callable[[nn.Module], nn.Module]:
    def twin(model: nn.Module) -> nn.Module:
        buffer = io.BytesIO()
        save(model, buffer)
        buffer.seek(0)
        return load(buffer)

    return twin


TWINS = {
    "deepcopy": copy.deepcopy,
    "pickle": through(pickle.dump, pickle.load),
    "torch.save": through(torch.save, lambda buffer: torch.load(buffer, weights_only=False)),
}


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16, "cache_modulation": True}], ids=["", "options"])
@pytest.mark.parametrize("twin_of", TWINS)
@pytest.mark.parametrize("kind", [*DITS, "PixArt", "SD3"])
def test_copies_are_accelerated_and_independent(kind: str, twin_of: str, options: dict[str, Any]) -> None:
    model, inputs = KINDS[kind].build(), KINDS[kind].example(torch.float32)
    ditfast.accelerate(model, **options)
    with torch.no_grad():
        before = run(model, inputs)[0]
        twin = TWINS[twin_of](model)
        rows = ditfast.acceleration_report(model).rows
        assert ditfast.acceleration_report(twin).rows == tuple(row._replace(fast_calls=0) for row in rows)
        ours, theirs = ({id(m) for m in one.modules()} for one in (model, twin))
        swaps = [vars(module)["forward"] for module in twin.modules() if "forward" in vars(module)]
        assert all(id(swap.module) in theirs - ours for swap in swaps)
        assert all(id(part) in theirs - ours for swap in swaps for place in swap.replaced for part in (place[0], place[2]))
        assert torch.equal(run(twin, inputs)[0], before)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    run(twin, inputs)[0].square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        assert torch.equal(run(model, inputs)[0], before)
        assert error(run(twin, inputs)[0], before) > 1e-4
        randomize(model)
        after = run(twin, inputs)[0]
        ditfast.restore(model)
        assert torch.equal(run(twin, inputs)[0], after)
        assert error(run(ditfast.restore(twin), inputs)[0], after) <= (3e-2 if options else 1e-5)


def test_nothing_keeps_a_model_alive() -> None:
    model = ditfast.accelerate(official(), dtype=torch.bfloat16, cache_modulation=True)
    with torch.no_grad():
        run(model, official_inputs())
    parameter = weakref.ref(model.blocks[0].attn.qkv.weight)
    del model
    gc.collect()
    assert parameter() is None


# ------------------------------------------------------------------------------------------------ dtypes
@pytest.mark.parametrize("kind", DITS)
def test_the_models_own_dtype_may_change(kind: str) -> None:
    model, inputs = KINDS[kind].build(), KINDS[kind].example(torch.float32)
    ditfast.accelerate(model)
    for dtype in (torch.bfloat16, torch.float32, torch.float64, torch.float16, torch.float32):
        model.to(dtype)
        given = {name: value.to(dtype) if name in ("x", "hidden_states") else value for name, value in inputs.items()}
        with torch.no_grad():
            found = run(model, given)[0]
            expected = run(ditfast.restore(model), given)[0]
        ditfast.accelerate(model, strict=False) if dtype != torch.float64 else None
        assert found.dtype == expected.dtype == dtype
        assert error(found, expected) <= {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(dtype, 1e-5)


def test_float64_after_accelerate() -> None:
    model, inputs = ditfast.accelerate(official()), official_inputs()
    model.double()
    inputs["x"] = inputs["x"].double()
    for with_gradients in (False, True):
        with torch.set_grad_enabled(with_gradients):
            assert run(model, inputs)[0].dtype == torch.float64


def test_float64_blocks_of_diffusers_after_accelerate() -> None:
    for block in (diffusers_dit().transformer_blocks[0], KINDS["PixArt"].build().transformer_blocks[0]):
        ditfast.accelerate(block).double()
        vectors = torch.randn(2, 384).double() if block.norm_type == "ada_norm_single" else torch.tensor([1, 2])
        x = torch.randn(2, 16, 64).double()
        assert block(x, None, x, timestep=vectors, class_labels=torch.tensor([0, 1])).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [*DITS, "diffusers, copies differ", "SiT", "fast-DiT, reentrant"])
def test_computing_in_another_dtype(kind: str, dtype: torch.dtype) -> None:
    """As accurate as a model in that dtype, without gradients; with them, and in training, as it was."""
    model, inputs = KINDS[kind].build(), KINDS[kind].example(torch.float32)
    (latents, x), *others = inputs.items()
    low = copy.deepcopy(model).to(dtype)
    upstream = [torch.randn(2, 4 if kind == "SiT" else 8, 8, 8)]
    with torch.no_grad():
        exact = run(copy.deepcopy(model).double(), {latents: x.double(), **dict(others)})[0]
        bar = 1.1 * error(run(low, {latents: x.to(dtype), **dict(others)})[0], exact) + torch.finfo(dtype).eps
    expected, gradient = run(model, inputs)[0], joined(gradients(model, inputs, upstream))
    parameters = {name: parameter.clone() for name, parameter in model.named_parameters()}
    ditfast.accelerate(model, dtype=dtype)
    with torch.no_grad():
        found = run(model, inputs)[0]
        assert found.dtype == torch.float32
        assert 1e-5 < error(found, exact) <= bar
    assert error(run(model, inputs)[0], expected) <= 1e-5
    assert error(joined(gradients(model, inputs, upstream)), gradient) <= 1e-5
    in_training, gradient = run(model.train(), inputs)[0], joined(gradients(model, inputs, upstream))
    ditfast.restore(model)
    assert error(in_training, run(model, inputs)[0]) <= 1e-5
    assert error(joined(gradients(model, inputs, upstream)), gradient) <= 1e-5
    assert all(torch.equal(parameter, parameters[name]) for name, parameter in model.named_parameters())


def test_blocks_compute_in_another_dtype_by_themselves() -> None:
    block = official().blocks[0]
    x, c = torch.randn(2, 16, 64), torch.randn(2, 64)
    with torch.no_grad():
        expected = block(x, c)
        found = ditfast.accelerate(block, dtype=torch.bfloat16)(x, c)
    assert found.dtype == torch.float32
    assert 1e-5 < error(found, expected) < 3e-2
    with_gradients = block(x, c)  # of its parameters alone
    assert error(with_gradients, expected) <= 1e-5
    with_gradients.sum().backward()
    assert block.attn.qkv.weight.grad is not None


# ------------------------------------------------------------------------------------------------ caches
def change_in_place(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.mul_(1.1)


def change_by_loading(model: nn.Module) -> None:
    model.load_state_dict({key: 1.1 * value for key, value in model.state_dict().items()})


def change_by_assigning(model: nn.Module) -> None:
    model.load_state_dict({key: 1.1 * value for key, value in model.state_dict().items()}, assign=True)


def change_by_optimizer(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    optimizer.zero_grad()


def change_as_ema_does(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.lerp_(torch.full_like(parameter, 0.05), 0.5)


def change_one_adaln(model: nn.Module) -> None:
    list(model.children())[-1].weight.mul_(2) if hasattr(model, "proj_out_2") else model.blocks[1].adaLN_modulation[
        1
    ].bias.add_(1)


def change_through_data(model: nn.Module) -> None:
    """Not seen by itself, but training is."""
    for parameter in model.parameters():
        parameter.data.mul_(1.1)
    with torch.enable_grad():
        example = KINDS["diffusers" if hasattr(model, "proj_out_2") else "official"].example(torch.float32)
        run(model, example)


CHANGES = [
    *(change_in_place, change_by_loading, change_by_assigning, change_by_optimizer, change_as_ema_does),
    *(change_one_adaln, change_through_data),
]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("kind", DITS)
def test_nothing_stale(kind: str, change: Callable[[nn.Module], None], mode: Callable[[], Any]) -> None:
    model, inputs = KINDS[kind].build(), KINDS[kind].example(torch.float32)
    ditfast.accelerate(model, dtype=torch.bfloat16, cache_modulation=True)
    with mode():
        before = [run(model, inputs)[0] for _ in range(2)]
    assert torch.equal(*before)
    with torch.no_grad():
        change(model)
    with mode():
        found = run(model, inputs)[0]
        fresh = run(ditfast.accelerate(copy.deepcopy(model), dtype=torch.bfloat16), inputs)[0]
    assert not torch.equal(found, before[0])
    assert torch.equal(found, fresh)


def test_copies_of_weights_are_made_once_and_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = official(), official_inputs()
    ditfast.accelerate(model, dtype=torch.bfloat16)
    held: list[int] = []

    def bytes_held() -> int:
        swaps = [vars(module)["forward"] for module in model.modules() if "forward" in vars(module)]
        return sum(copied.nbytes for swap in swaps for *_, copied in swap.caches._copies.values())

    with torch.no_grad():
        for _ in range(3):
            run(model, official_inputs())
            held.append(bytes_held())
        assert held[0] == held[1] == held[2] > 0
        weights = {p.data_ptr() for p in model.parameters() if p.numel() >= model.blocks[0].attn.proj.weight.numel()}
        cast: list[int] = []  # some CPUs widen the copies for each product: those are no weights of the model
        monkeypatch.setattr(
            Tensor, "to", lambda tensor, *args, to=Tensor.to: (cast.append(tensor.data_ptr()), to(tensor, *args))[1]
        )
        run(model, inputs)
        monkeypatch.undo()
        assert cast
        assert weights.isdisjoint(cast), "a weight was cast again"
        change_by_assigning(model)
        gc.collect()
        run(model, inputs)
        assert bytes_held() == held[0], "copies of weights that are gone"
        for _ in range(3):
            state = {key: value.clone() for key, value in model.state_dict().items()}
            torch.func.functional_call(model, state, kwargs=inputs)
        del state
        gc.collect()
        assert bytes_held() == held[0]
    run(model, inputs)
    assert bytes_held() == 0, "training needs no copies"


@pytest.mark.parametrize("kind", [*DITS, "diffusers, copies differ"])
def test_cached_modulation_has_the_same_bits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = KINDS[kind].build()
    batches = [KINDS[kind].example(torch.float32) for _ in range(3)]
    linears: list[object] = []
    plain = home.project
    monkeypatch.setattr(home, "project", lambda c, each, *args: (linears.extend(each), plain(c, each, *args))[1])
    with torch.no_grad():
        ditfast.accelerate(model)
        linears.clear()
        expected = [run(model, batch)[0] for batch in batches]
        assert len(linears) == 3 * 4
        ditfast.accelerate(model, cache_modulation=True)
        linears.clear()
        for _ in range(3):
            assert all(torch.equal(run(model, batch)[0], out) for batch, out in zip(batches, expected, strict=True))
            assert len(linears) == 12
        other_latents = {**batches[0], next(iter(batches[0])): torch.randn(2, 4, 8, 8)}
        run(model, other_latents)
        assert len(linears) == 12
        with torch.autocast("cpu", torch.bfloat16):
            run(model, batches[0])
        assert len(linears) == 16, "autocast computes other vectors"
        assert torch.equal(run(model, batches[0])[0], expected[0])
        copied = copy.deepcopy(model)
        assert torch.equal(run(copied, batches[0])[0], expected[0])
        assert len(linears) == 20
    model.train()
    run(model, batches[0])


def test_autocast_has_cached_modulation_of_its_own() -> None:
    """Also where the conditioning vectors are the same to the bit."""
    model, inputs = official(), official_inputs()
    model.t_embedder = randomize(nn.Embedding(1000, 64))
    inputs["t"] = inputs["t"].long()
    with torch.no_grad():
        expected = run(ditfast.accelerate(model), inputs)[0]
        ditfast.accelerate(model, cache_modulation=True)
        with torch.autocast("cpu", torch.bfloat16):
            run(model, inputs)
        assert torch.equal(run(model, inputs)[0], expected)


def test_cached_modulation_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ditfast.accelerate(official(), cache_modulation=True)
    one = 2 * (3 * 6 + 2) * 64 * 4  # bytes of the vectors of a batch of two
    monkeypatch.setattr(caches, "CACHE_BYTES", 2 * one)
    kept = vars(model)["forward"].caches._modulations
    batches = [official_inputs() for _ in range(4)]
    with torch.no_grad():
        for index in (0, 1, 0, 2):  # the least recently used goes
            run(model, batches[index])
        keys = list(kept)
        run(model, batches[0])
        assert sorted(kept) == sorted(keys), "0 and 2 are in"
        assert list(kept) != keys
        run(model, batches[3])
        assert len(kept) == 2
        assert sum(size for size, _ in kept.values()) == 2 * one
        monkeypatch.setattr(caches, "CACHE_BYTES", 0)
        run(model, batches[1])
        assert not kept


def test_cached_modulation_calls_who_wants_to_be_called() -> None:
    model, inputs, calls = official(), official_inputs(), []
    ditfast.accelerate(model, cache_modulation=True)
    for name in ("blocks.1.adaLN_modulation.1", "final_layer.adaLN_modulation.1", "t_embedder", "y_embedder.embedding_table"):
        handle = model.get_submodule(name).register_forward_hook(lambda *_: calls.append(1))
        with torch.no_grad():
            for _ in range(3):
                run(model, inputs)
        handle.remove()
        assert len(calls) == 3, name
        calls.clear()


def test_copies_of_the_embedder_that_stop_agreeing() -> None:
    model, inputs = diffusers_dit(), KINDS["diffusers"].example(torch.float32)
    ditfast.accelerate(model)
    with torch.no_grad():
        before = run(model, inputs)[0]
        for name in ("timestep_embedder.linear_2.bias", "class_embedder.embedding_table.weight"):
            model.transformer_blocks[2].norm1.emb.get_parameter(name).add_(0.5)
            found = run(model, inputs)[0]
            expected = run(ditfast.restore(model), inputs)[0]
            ditfast.accelerate(model)
            assert error(found, expected) <= 1e-5
            assert error(found, before) > 1e-3
            before = found
        model.transformer_blocks[2].norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
        found = run(model, inputs)[0]
        assert error(found, run(ditfast.restore(model), inputs)[0]) <= 1e-5


@pytest.mark.parametrize("kind", DITS)
def test_parameters_made_in_inference_mode(kind: str) -> None:
    with torch.inference_mode():
        model = KINDS[kind].build()
    inputs = KINDS[kind].example(torch.float32)
    with torch.inference_mode():
        expected = run(model, inputs)[0]
        for options in ({}, {"cache_modulation": True}, {"dtype": torch.bfloat16}):
            ditfast.accelerate(model, **options)
            assert error(run(model, inputs)[0], expected) <= (3e-2 if "dtype" in options else 1e-5)
            next(model.parameters()).mul_(1.5)
            found = run(model, inputs)[0]
            expected = run(ditfast.restore(model), inputs)[0]
            assert error(found, expected) <= (3e-2 if "dtype" in options else 1e-5)


def test_state_dicts_move_freely() -> None:
    plain, swapped, inputs = official(), ditfast.accelerate(official()), official_inputs()
    with torch.no_grad():
        swapped.load_state_dict(plain.state_dict(), strict=True)
        assert error(run(swapped, inputs)[0], run(plain, inputs)[0]) <= 1e-5
        randomize(swapped)
        plain.load_state_dict(swapped.state_dict(), strict=True)
        assert error(run(swapped, inputs)[0], run(plain, inputs)[0]) <= 1e-5
