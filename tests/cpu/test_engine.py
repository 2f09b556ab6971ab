"""The CPU engine against float64, on every instruction set it is written for."""

from __future__ import annotations

import cpu_variants as variants
import pytest
import torch
from cpu_chains import ANY_CHAIN, SMALL, called_at_once, exact_chain, in_int8, inputs, new_model, on_torch, random_chain
from hypothesis import HealthCheck, given, settings
from support import UNIT_ROUNDOFF, error
from torch import Tensor
from torch.nn import functional as F

import ditfast
from ditfast import DiT, DiTConfig, cpu, reference
from ditfast.config import CONDITIONINGS
from ditfast.cpu import engine, library, packed
from ditfast.cpu.packed import BYTE, FULL, HALF
from ditfast.ops import cpu_chain

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(params=variants.VARIANTS)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> engine.Engine:
    return variants.take(request.param, monkeypatch)


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> engine.Engine:
    return variants.take("native", monkeypatch)


@pytest.fixture
def calls(native: engine.Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sublayers of each call of the engine."""
    seen: list[int] = []
    call = native.call

    def count(x: Tensor, product: int, chain: bytes, norm: bytes) -> tuple[Tensor, Tensor]:
        seen.append(len(chain) // library.SUBLAYER.size)
        return call(x, product, chain, norm)

    monkeypatch.setattr(native, "call", count)
    return seen


# ------------------------------------------------------------------------------------------------ parity
@DTYPES
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@torch.inference_mode()
def test_models(variant: engine.Engine, conditioning: str, dtype: torch.dtype) -> None:
    config = DiTConfig(depth=2, hidden_size=100, num_heads=5, input_size=(8, 12), num_classes=10, conditioning=conditioning)
    model = new_model(config, dtype)
    oracle = reference.DiT(config).eval()
    oracle.load_state_dict(model.state_dict())
    for batch in (1, 3):
        x, t, y = inputs(config, batch, dtype)
        exact = oracle.double()(x.double(), t, y)
        bar = 1.1 * error(oracle.to(dtype)(x, t, y), exact) + UNIT_ROUNDOFF[dtype]
        assert cpu_chain.takes(x)
        assert error(model(x, t, y), exact) <= bar


@pytest.mark.parametrize("name", variants.VARIANTS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(**ANY_CHAIN)
def test_any_shape(name: str, B: int, T: int, heads: int, head_dim: int, dtype: torch.dtype, vectors: str) -> None:
    chosen = variants.built(name)
    if isinstance(chosen, str):
        pytest.skip(chosen)
    x, steps, final = random_chain(B, T, heads * head_dim, heads, dtype, vectors)
    exact_x, exact_u = exact_chain(x, steps, final)
    found_x, found_u = chosen.run(x, steps, final)
    rounded = error(exact_x.to(dtype), exact_x)
    bar = 3e-6 if dtype == torch.float32 else 2.5 * rounded + 1e-3  # bf16 between products as well, if that is multiplied
    assert error(found_x, exact_x) <= bar
    if heads * head_dim > 8:  # of two or three values the norm may be of nothing but noise
        assert error(found_u, exact_u) <= 2 * bar


@torch.inference_mode()
def test_int8(variant: engine.Engine) -> None:
    x, steps, final = random_chain(2, 37, 100, 5, torch.float32, "sample")
    exact, _ = exact_chain(x, steps, final)
    found, _ = variant.run(x, in_int8(steps), final)
    assert 1e-3 < error(found, exact) < 6e-3


@torch.inference_mode()
def test_int8_is_the_arithmetic_it_says(native: engine.Engine) -> None:
    """An MLP alone, against sums of integers in float64. Between products, activations are bf16 where the CPU multiplies it."""
    x, (_, mlp), final = random_chain(2, 20, 100, 5, torch.float32, "none")
    ((fc1,), (fc2,)) = mlp.products.first, mlp.products.second
    between = torch.bfloat16 if native._functions.ditfast_attention_is_half() else torch.float32

    def product(values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        values = values.to(between).float()
        low, high = values.amin(-1, keepdim=True).clamp_max(0), values.amax(-1, keepdim=True).clamp_min(0)
        whole, scale = packed.quantised(weight, pairs=bool(native._functions.ditfast_pairs_saturate()))
        step, whole = (high - low) / 255, whole.double()
        zero = (-low / step).round()
        stored = (values / step + zero).round().clamp(0, 255).double()
        return ((F.linear(stored, whole) - zero * whole.sum(1)) * step * scale + bias).float()

    u = F.layer_norm(x, (100,), eps=mlp.eps)
    expected = x + product(F.gelu(product(u, *fc1), approximate="tanh"), *fc2)
    found, _ = native.run(x, in_int8([mlp]), final)
    of_rows = ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).flatten().sort().values
    assert of_rows[-3] < 3e-7  # a value beside the middle of two steps may go to the other one, in two rows of forty
    assert error(native.run(x, [mlp], final)[0], expected) > 1e-3


@pytest.mark.parametrize("pairs", [False, True], ids=["bytes", "pairs"])
@pytest.mark.parametrize("K", [1, 7, 64])
def test_quantised(K: int, pairs: bool) -> None:
    weight = torch.randn(50, K)
    weight[3] = 0
    weight[4, :2] = 5
    stored, scale = packed.quantised(weight, pairs=pairs)
    assert stored.dtype == torch.int8
    assert ((stored * scale[:, None] - weight).abs() <= 0.501 * scale[:, None]).all()
    if pairs:
        both = F.pad(stored.int(), (0, K % 2)).unflatten(1, (-1, 2))
        assert both.clamp_min(0).sum(2).max() <= 128
        assert both.clamp_max(0).sum(2).min() >= -128
    else:
        assert (stored.abs().amax(1) == torch.where(weight.any(1), 127, 0)).all()


@torch.inference_mode()
def test_pairs_do_not_saturate(native: engine.Engine) -> None:
    """The largest activations on the largest weights, side by side."""
    ones, D = torch.ones(1, 3, 64), 64
    fc1 = (torch.ones(D, D), torch.full((D,), 100.0))
    step = cpu.Step(cpu.Products(cpu.MLP, (fc1,), ((torch.ones(D, D), torch.zeros(D)),), int8=True), None, None, None, 1e-6)
    found, _ = native.run(ones, [step], cpu.Final(None, None, 1e-6))
    torch.testing.assert_close(found, torch.full_like(ones, 1 + 100.0 * D), rtol=1e-2, atol=0)


@torch.inference_mode()
def test_long_sums_lose_few_bits(native: engine.Engine) -> None:
    """Of 4,096 products: in one go they would be off by ten times as much."""
    D, H = 16, 4096
    fc2 = (torch.randn(D, H).abs(), torch.zeros(D))
    mlp = cpu.Step(cpu.Products(cpu.MLP, ((torch.randn(H, D), torch.ones(H)),), (fc2,)), None, None, None, 1e-6)
    x, final = torch.randn(1, 64, D), cpu.Final(None, None, 1e-6)
    found, _ = native.run(x, [mlp], final)
    assert error(found, exact_chain(x, [mlp], final)[0]) < 2e-7


# ------------------------------------------------------------------------------------------------ the same bits
@DTYPES
@torch.inference_mode()
def test_threads_and_batch_do_not_change_the_bits(native: engine.Engine, dtype: torch.dtype) -> None:
    model = new_model(dtype=dtype)
    x, t, y = inputs(SMALL, 7, dtype)
    vectors = model.modulation_vectors(t, y)
    expected = model.forward_modulated(x, vectors)
    torch.set_num_threads(2)
    assert torch.equal(model.forward_modulated(x, vectors), expected)
    torch.set_num_threads(5)
    assert torch.equal(model.forward_modulated(x, vectors), expected)
    for _ in range(20):  # a sum in another order rarely shows in bf16
        x, steps, final = random_chain(7, 20, 100, 5, dtype, "token")
        whole, _ = native.run(x, steps, final)
        third = [step._replace(shift=alone(step.shift), scale=alone(step.scale), gate=alone(step.gate)) for step in steps]
        last = final._replace(shift=alone(final.shift), scale=alone(final.scale))
        assert torch.equal(native.run(x[2:3], third, last)[0], whole[2:3])


def alone(vector: Tensor | None) -> Tensor | None:
    """Of the third sample."""
    return None if vector is None else vector[2:3]


def test_two_threads_at_once(native: engine.Engine) -> None:
    models = [new_model(), new_model()]
    given = inputs(SMALL, 2)
    with torch.inference_mode():
        expected = [on_torch(model, *given) for model in models]
    for each, one in zip(called_at_once(models, given), expected, strict=True):
        for out in each:
            torch.testing.assert_close(out, one, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ weights that change
def load_others(model: DiT) -> None:
    model.load_state_dict(new_model().state_dict())


def assign_others(model: DiT) -> None:
    model.load_state_dict(new_model().state_dict(), assign=True)


def take_a_step(model: DiT) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with torch.enable_grad():
        model(*inputs(SMALL, 2)).square().mean().backward()
    optimizer.step()


def write_through_data(model: DiT) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.5)


def replace_one(model: DiT) -> None:
    fc1 = model.blocks[1].mlp.fc1
    fc1.weight = torch.nn.Parameter(fc1.weight + 0.3)


def write_a_bias(model: DiT) -> None:
    model.blocks[0].attn.proj.bias.data.add_(1.0)


@pytest.mark.parametrize(
    "change", [load_others, assign_others, take_a_step, write_through_data, replace_one, write_a_bias], ids=lambda f: f.__name__
)
@torch.no_grad()
def test_weights_are_never_stale(change: object, calls: list[int]) -> None:
    model, given = new_model(), inputs(SMALL, 2)
    before = model(*given)
    change(model)  # type: ignore[operator]
    after = model(*given)
    assert calls == [4, 4]
    torch.testing.assert_close(after, on_torch(model, *given), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after, before, rtol=1e-3)


@torch.no_grad()
def test_packed_weights_go_with_the_model(native: engine.Engine) -> None:
    chains = native._chains._chains
    before = len(chains)
    model = new_model()
    model(*inputs(SMALL, 1))
    assert len(chains) == before + 1
    for _ in range(3):
        replace_one(model)
        model(*inputs(SMALL, 1))
        assert len(chains) == before + 1
    del model
    assert len(chains) == before


# ------------------------------------------------------------------------------------------------ when it steps aside
@torch.no_grad()
def test_one_call_for_all_blocks(calls: list[int]) -> None:
    new_model()(*inputs(SMALL, 1))
    assert calls == [4]


def test_gradients_take_torch(calls: list[int]) -> None:
    assert new_model()(*inputs(SMALL, 1)).requires_grad
    assert calls == []


@torch.no_grad()
def test_hooks_are_called(calls: list[int]) -> None:
    model, given = new_model(), inputs(SMALL, 1)
    seen: list[object] = []
    handle = model.blocks[1].register_forward_hook(lambda *_: seen.append(1))
    model(*given)
    assert (seen, calls) == ([1], [2, 2])  # the other block, and the one that is called, for itself
    calls.clear()
    handle.remove()
    handle = model.blocks[1].mlp.fc1.register_forward_hook(lambda *_: seen.append(2))
    model(*given)
    assert (seen, calls) == ([1, 2], [])
    handle.remove()
    model(*given)
    assert calls == [4]


@torch.no_grad()
def test_where_tensors_are_made_by_default_does_not_matter(calls: list[int]) -> None:
    model, given = new_model(), inputs(SMALL, 1)
    expected = on_torch(model, *given)
    vectors = model.modulation_vectors(*given[1:])
    with torch.device("meta"):
        found = model.forward_modulated(given[0], vectors)
    assert calls == [4]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["torch", "triton"])
@torch.no_grad()
def test_forced_elsewhere(name: str) -> None:
    with ditfast.backend(name):
        assert not cpu_chain.takes(torch.randn(1, 2, 3))


@torch.no_grad()
def test_other_tensors(native: engine.Engine) -> None:
    assert cpu_chain.takes(torch.randn(1, 2, 3))
    assert not cpu_chain.takes(torch.randn(0, 2, 3))
    assert not cpu_chain.takes(torch.randn(1, 2, 3, device="meta"))
    assert not cpu_chain.takes(torch.randn(1, 2, 3).half())
    assert not cpu_chain.takes(torch.randn(1, 2, 3).double())
    with torch.autocast("cpu", torch.bfloat16):  # which casts what is multiplied, not the stream
        assert cpu_chain.takes(torch.randn(1, 2, 3))
        assert not cpu_chain.takes(torch.randn(1, 2, 3).half())
        assert not cpu_chain.takes(torch.randn(1, 2, 3).double())
    seen: list[bool] = []
    torch.vmap(lambda x: (seen.append(cpu_chain.takes(x)), x)[1])(torch.randn(2, 1, 2, 3))
    assert seen == [False]


@torch.no_grad()
def test_autocast(calls: list[int]) -> None:
    model, given = new_model(), inputs(SMALL, 2)
    exact = on_torch(model, *given)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(*given)
    assert calls == [4]
    assert 1e-5 < error(found, exact) < 1e-2
    with torch.autocast("cpu", torch.float16):
        model(*given)
    assert calls == [4]


@torch.no_grad()
def test_wrong_shapes_are_named_as_elsewhere(native: engine.Engine) -> None:
    model = new_model()
    model.blocks[0].mlp.fc1.weight = torch.nn.Parameter(torch.randn(400, 99))
    with pytest.raises(ValueError, match="fc1_weight"):
        model(*inputs(SMALL, 1))


@torch.no_grad()
def test_an_empty_batch(native: engine.Engine) -> None:
    assert new_model()(*inputs(SMALL, 0)).shape[0] == 0


def test_products_are_numbered_as_in_the_library() -> None:
    assert (FULL, HALF, BYTE) == (0, 1, 2)
