"""Chains on a CPU without an engine: the ops' own values, and their errors."""

from __future__ import annotations

import copy

import pytest
import torch
from cpu_chains import ANY_CHAIN, SMALL, exact_chain, inputs, new_model, on_torch, random_chain
from hypothesis import HealthCheck, given, settings
from support import error, randomize
from torch import Tensor, nn

import ditfast
from ditfast import DiTConfig, blocks, cpu
from ditfast.config import CONDITIONINGS
from ditfast.cpu import engine
from ditfast.cpu.chain import DoesNotFit
from ditfast.ops import torch_chain

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine without an engine: sublayers of each chain that runs there."""
    seen: list[int] = []
    run = torch_chain.run

    def count(x: Tensor, steps: list[cpu.Step], final: cpu.Final) -> tuple[Tensor, Tensor]:
        found = run(x, steps, final)
        seen.append(len(steps))
        return found

    monkeypatch.setattr(engine, "found", lambda: (None, "the CPU engine needs a compiler"))
    monkeypatch.setattr(torch_chain, "run", count)
    return seen


# ------------------------------------------------------------------------------------------------ the ops' values
@DTYPES
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@torch.inference_mode()
def test_models(calls: list[int], conditioning: str, batch: int, dtype: torch.dtype) -> None:
    config = DiTConfig(depth=2, hidden_size=100, num_heads=5, input_size=(8, 12), num_classes=10, conditioning=conditioning)
    model, given = new_model(config, dtype), inputs(config, batch, dtype)
    expected = on_torch(model, *given)
    assert calls == []
    assert torch.equal(model(*given), expected)
    assert calls == [6 if conditioning == "cross_attention" else 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@torch.no_grad()
def test_autocast(calls: list[int], dtype: torch.dtype) -> None:
    model, given = new_model(), inputs(SMALL, 2)
    with torch.autocast("cpu", dtype):
        assert torch.equal(model(*given), on_torch(model, *given))
    assert calls == ([4] if dtype == torch.bfloat16 else [])


@torch.no_grad()
def test_a_swapped_model(calls: list[int]) -> None:
    """Whose q, k and v are apart."""
    q, k, v, proj, fc1, fc2 = (blocks.view(nn.Linear(60, 60)) for _ in range(6))
    attn, mlp = blocks.SelfAttention(3, blocks.SeparateQKV(q, k, v), proj), blocks.Mlp(fc1, fc2)
    x, chain = torch.randn(2, 7, 60), blocks.sublayers(blocks.Modulation(*torch.randn(6, 2, 60)), attn, mlp)
    found = blocks.run_through(x, [chain])
    assert calls == [2]
    with ditfast.backend("torch"):
        assert torch.equal(found, blocks.run_through(x, [chain]))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(**ANY_CHAIN)
def test_any_shape(B: int, T: int, heads: int, head_dim: int, dtype: torch.dtype, vectors: str) -> None:
    x, steps, final = random_chain(B, T, heads * head_dim, heads, dtype, vectors)
    with torch.no_grad():
        found, _ = torch_chain.run(x, steps, final)
    exact, _ = exact_chain(x, steps, final)
    assert error(found, exact) <= (3e-6 if dtype == torch.float32 else 1.5e-2)


# ------------------------------------------------------------------------------------------------ what is left to the ops
def test_gradients_go_through_the_ops(calls: list[int]) -> None:
    model, given = new_model(), inputs(SMALL, 2)
    model(*given).square().mean().backward()
    assert calls == []
    assert model.blocks[0].mlp.fc1.weight.grad is not None


@torch.no_grad()
def test_a_hooked_linear_is_called(calls: list[int]) -> None:
    model, given = new_model(), inputs(SMALL, 2)
    expected, seen = model(*given), []
    model.blocks[1].mlp.fc2.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model(*given), expected, rtol=1e-4, atol=1e-5)
    assert (seen, calls) == ([1], [4])


@pytest.mark.parametrize(
    ("name", "shape"),
    [("mlp.fc1.weight", (400, 99)), ("mlp.fc1.bias", (1,)), ("mlp.fc2.bias", (1,)), ("attn.qkv.weight", (299, 100))],
)
@torch.no_grad()
def test_weights_that_do_not_fit_are_named(calls: list[int], name: str, shape: tuple[int, ...]) -> None:
    model = new_model()
    path, _, parameter = name.rpartition(".")
    setattr(model.blocks[0].get_submodule(path), parameter, nn.Parameter(torch.randn(shape)))
    with pytest.raises((ValueError, RuntimeError)) as found:
        model(*inputs(SMALL, 1))
    with pytest.raises(type(found.value)) as expected:
        on_torch(model, *inputs(SMALL, 1))
    assert (str(found.value), calls) == (str(expected.value), [])


@pytest.mark.parametrize(("shape", "device"), [((1, 40), "cpu"), ((2, 1, 40), "cpu"), ((2, 40), "meta")])
@pytest.mark.parametrize("place", ["shift", "scale", "gate", "final"])
@torch.no_grad()
def test_vectors_that_do_not_fit(place: str, shape: tuple[int, ...], device: str) -> None:
    """In the engine too."""
    x, steps, final = random_chain(2, 9, 40, 2, torch.float32, "sample")
    vector = torch.randn(shape, device=device)
    if place == "final":
        final = final._replace(scale=vector)
    else:
        steps[1] = steps[1]._replace(**{place: vector})
    chosen, _ = engine.found()
    for run in (torch_chain.run, *([] if chosen is None else [chosen.run])):
        with pytest.raises(DoesNotFit):
            run(x, steps, final)


@pytest.mark.parametrize(
    ("tokens", "weight", "bias"),
    [((3, 2, 40), 80, 80), ((2, 0, 40), 80, 80), ((2, 2, 40, 5), 80, 80), ((2, 2, 40), 120, 80), ((2, 2, 40), 80, 1)],
    ids=["batch", "empty", "4-D", "weight", "bias"],
)
@torch.no_grad()
def test_a_context_that_does_not_fit(tokens: tuple[int, ...], weight: int, bias: int) -> None:
    """In the engine too; and one that does."""
    x, (attention, _), final = random_chain(2, 9, 40, 2, torch.float32, "sample")
    q = ((torch.randn(40, 40), torch.randn(40)),)

    def crossing(context: cpu.Context) -> list[cpu.Step]:
        return [attention._replace(products=cpu.Products(cpu.CROSS_ATTENTION, q, attention.products.second, 2, context))]

    chosen, _ = engine.found()
    for run in (torch_chain.run, *([] if chosen is None else [chosen.run])):
        run(x, crossing(cpu.Context(torch.randn(2, 2, 40), torch.randn(80, 40), torch.randn(80))), final)
        with pytest.raises(DoesNotFit):
            run(x, crossing(cpu.Context(torch.randn(tokens), torch.randn(weight, 40), torch.randn(bias))), final)


@torch.no_grad()
def test_weights_that_changed(calls: list[int]) -> None:
    model, given = new_model(), inputs(SMALL, 1)
    model(*given)
    other = randomize(copy.deepcopy(model))
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(*given), other(*given))
    assert calls == [4, 4, 4]
