"""Products of fp16 and bf16 on CPU tensors, on either route: torch's own, and fp32 ones of widened operands."""

from __future__ import annotations

import platform
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import oracles
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import DTYPES, assert_as_good_as, assert_rounded_once, gradients, leaves, randomize
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import ditfast
from ditfast import conditioning, ops
from ditfast.cli import main
from ditfast.ops import cpu_products

HALVES = (torch.float16, torch.bfloat16)
ROUTES = {"own": frozenset(), "widened": frozenset(HALVES)}
pytestmark = pytest.mark.usefixtures("one_thread", "on_torch")


@pytest.fixture
def on_torch() -> Iterator[None]:
    with ditfast.backend("torch"):
        yield


@pytest.fixture(params=ROUTES)
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(cpu_products, "SLOW_DTYPES", ROUTES[request.param])
    return request.param


@pytest.fixture
def widened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_products, "SLOW_DTYPES", ROUTES["widened"])


# ------------------------------------------------------------------------------------------------ parity
class Product(NamedTuple):
    call: Callable[..., Tensor]
    oracle: Callable[..., Tensor]
    inputs: Callable[[int, int], list[Tensor]]  # of T tokens and width D
    eager: Callable[..., Tensor] | None = None  # where it is not the oracle in the inputs' dtype


def tokens(T: int, D: int) -> Tensor:
    """[2, T, D] behind two other tokens."""
    return torch.randn(2, T + 2, D)[:, 2:]


def weights(N: int, K: int) -> list[Tensor]:
    """A weight within a wider one, and a bias."""
    return [(K**-0.5 * torch.randn(N, K + 8))[:, 4 : K + 4], torch.randn(N)]


def heads(T: int, D: int, *packed: int) -> Tensor:
    """[2, T, packed, 2, D], as a linear's output lies."""
    return tokens(T, 2 * D * max(1, *packed, 0)).unflatten(-1, (*packed, 2, D))


def eager_cross_attention(q: Tensor, kv: Tensor, dtype: torch.dtype) -> Tensor:
    """torch's own: of two sources its dq and dk have 1.6 times the error of a softmax between two products."""
    q, k, v = (heads.to(dtype).transpose(1, 2) for heads in (q, *kv.unbind(2)))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def eager_attention(qkv: Tensor, dtype: torch.dtype) -> Tensor:
    return eager_cross_attention(qkv[:, :, 0], qkv[:, :, 1:], dtype)


PRODUCTS = {
    "linear": Product(ops.linear, oracles.linear, lambda T, D: [tokens(T, D), *weights(2 * D + 1, D)]),
    "linear_gelu": Product(ops.linear_gelu, oracles.linear_gelu, lambda T, D: [tokens(T, D), *weights(2 * D + 1, D)]),
    "mlp": Product(ops.mlp, oracles.mlp, lambda T, D: [tokens(T, D), *weights(2 * D, D), *weights(D, 2 * D)]),
    "linear_gated_residual": Product(
        ops.linear_gated_residual,
        oracles.linear_gated_residual,
        lambda T, D: [tokens(T, D), *weights(D, D), tokens(T, D), torch.randn(2, D)],
    ),
    "attention": Product(ops.attention, oracles.attention, lambda T, D: [heads(T, D, 3)], eager_attention),
    "cross_attention": Product(
        ops.cross_attention, oracles.cross_attention, lambda T, D: [heads(T, D), heads(2, D, 2)], eager_cross_attention
    ),
    "patch_embed": Product(
        lambda *inputs: ops.patch_embed(*inputs, 2),
        oracles.patch_embed,
        lambda T, D: [torch.randn(2, 3, 2, 2 * T), torch.randn(D, 3, 2, 2), torch.randn(D), torch.randn(1, T, D)],
    ),
    "linear_unpatchify": Product(
        lambda x, *inputs: ops.linear_unpatchify(x, *inputs, (1, x.shape[1]), 2),
        lambda x, w, b, dtype: oracles.linear_unpatchify(x, w, b, (1, x.shape[1]), 2, dtype),
        lambda T, D: [tokens(T, D), *weights(12, D)],
    ),
    "final_layer": Product(
        lambda x, *inputs: ops.final_layer(x, *inputs, (1, x.shape[1]), 2),
        lambda x, *inputs: oracles.final_layer(x, *inputs[:4], (1, x.shape[1]), 2, inputs[4]),
        lambda T, D: [tokens(T, D), torch.randn(2, D), torch.randn(2, D), *weights(12, D)],
    ),
}


def check(name: str, T: int, D: int, dtype: torch.dtype) -> None:
    """Output and gradients."""
    product = PRODUCTS[name]
    given = [lying_as(tensor, dtype) for tensor in product.inputs(T, D)]
    inputs = leaves(*given)
    y = product.call(*inputs)
    dy = torch.randn(y.shape).to(dtype)
    assert y.is_contiguous()
    found = [y, *gradients([y], inputs, [dy])]

    def expected(model: Callable[..., Tensor], precision: torch.dtype) -> list[Tensor]:
        copies = leaves(*given, dtype=precision)
        y = model(*copies, precision)
        return [y, *gradients([y], copies, [dy])]

    exacts, eagers = expected(product.oracle, torch.float64), expected(product.eager or product.oracle, dtype)
    for value, exact, eager in zip(found, exacts, eagers, strict=True):
        assert_as_good_as(value, exact, eager)


def lying_as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In another dtype, with the same strides."""
    whole = torch.empty(tensor.untyped_storage().nbytes() // 4, dtype=dtype)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(tensor)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_parity(route: str, name: str, dtype: str) -> None:
    check(name, 17, 40, DTYPES[dtype])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(sorted(PRODUCTS)), T=st.integers(2, 40), D=st.integers(2, 70), dtype=st.sampled_from(("bf16", "fp16"))
)
def test_parity_of_any_shape(widened: None, name: str, T: int, D: int, dtype: str) -> None:
    check(name, T, D, DTYPES[dtype])


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 64])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_linear_rounds_once(widened: None, rows: int, dtype: torch.dtype) -> None:
    x, weight, bias = (tensor.to(dtype) for tensor in (torch.randn(1, rows, 500), *weights(200, 500)))
    inputs = leaves(x, weight, bias)
    y = ops.linear(*inputs)
    dy = torch.randn(y.shape).to(dtype)
    found = [y, *gradients([y], inputs, [dy])]
    copies = leaves(x, weight, bias, dtype=torch.float64)
    exact = oracles.linear(*copies, torch.float64)
    for value, expected in zip(found, [exact, *gradients([exact], copies, [dy])], strict=True):
        assert_rounded_once(value, expected, expected)


# ------------------------------------------------------------------------------------------------ which route
class Dispatched(TorchDispatchMode):
    """The operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", PRODUCTS)
def test_which_route(route: str, name: str) -> None:
    for dtype in DTYPES.values():
        with Dispatched() as seen, torch.no_grad():
            PRODUCTS[name].call(*(tensor.to(dtype) for tensor in PRODUCTS[name].inputs(9, 8)))
        ours = any(operator.startswith("ditfast::") for operator in seen.count)
        assert ours == (route == "widened" and dtype in HALVES)


def test_elsewhere_than_on_a_cpu_nothing_is_widened(widened: None) -> None:
    assert cpu_products.in_fp32(torch.empty(1, dtype=torch.bfloat16))
    assert not cpu_products.in_fp32(torch.empty(1, dtype=torch.bfloat16, device="meta"))
    assert not cpu_products.in_fp32(torch.empty(1))


def test_what_this_cpu_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    if platform.machine() != "x86_64":
        assert frozenset() == cpu_products.SLOW_DTYPES
        return
    assert (torch.bfloat16 in cpu_products.slow_dtypes()) != torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert (torch.float16 in cpu_products.slow_dtypes()) != torch.ops.mkldnn._is_mkldnn_fp16_supported()
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert cpu_products.slow_dtypes() == frozenset()


def test_doctor_says_so(route: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert ("this CPU has no bf16 ones" in capsys.readouterr().out) == (route == "widened")


# ------------------------------------------------------------------------------------------------ autograd's other uses
@pytest.mark.parametrize("name", ["linear", "mlp", "attention", "cross_attention"])
def test_what_is_kept_for_the_backward_is_no_wider(widened: None, name: str) -> None:
    kept: list[tuple[torch.dtype, tuple[int, ...]]] = []
    inputs = leaves(*PRODUCTS[name].inputs(16, 40), dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append((t.dtype, tuple(t.shape))), t)[1], lambda t: t):
        PRODUCTS[name].call(*inputs)
    sums = (torch.float32, (2, 16, 2))  # of a row's exponentials
    assert [tensor for tensor in kept if tensor[0] != torch.bfloat16] == ([sums] if "attention" in name else [])


def test_what_only_a_frozen_weight_needs_is_not_kept(widened: None) -> None:
    kept: list[tuple[int, ...]] = []
    x, weight, bias = (tensor.bfloat16() for tensor in PRODUCTS["linear"].inputs(16, 40))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(tuple(t.shape)), t)[1], lambda t: t):
        ops.linear(x.requires_grad_(), weight, bias)
    assert kept == [tuple(weight.shape)]


def test_nothing(widened: None) -> None:
    weight, bias = torch.randn(24, 8).bfloat16(), torch.randn(24).bfloat16()
    for shape in ((0, 5, 8), (2, 0, 8)):
        inputs = leaves(torch.empty(shape, dtype=torch.bfloat16), weight, bias)
        y = ops.linear(*inputs)
        dx, dweight, dbias = gradients([y], inputs, [torch.empty_like(y)])
        assert (y.shape, dx.shape) == ((*shape[:2], 24), shape)
        assert not dweight.any()
        assert not dbias.any()
    for B, T in ((0, 5), (2, 0)):
        q, kv = leaves(torch.empty(B, T, 2, 8, dtype=torch.bfloat16), torch.randn(B, 3, 2, 2, 8).bfloat16())
        out = ops.cross_attention(q, kv)
        dq, dkv = gradients([out], [q, kv], [torch.empty_like(out)])
        assert (out.shape, dq.shape, dkv.shape) == ((B, T, 16), q.shape, kv.shape)
        assert not dkv.any()


def test_a_view_used_twice(route: str) -> None:
    whole, weight, bias = (torch.randn(*shape).bfloat16() for shape in ((2, 9, 40), (40, 32), (40,)))
    inputs = leaves(whole, weight, bias)

    def twice(call: Callable[..., Tensor], whole: Tensor, weight: Tensor, bias: Tensor, *dtype: torch.dtype) -> Tensor:
        x = whole[:, 1:, :32]
        y = call(x, weight, bias, *dtype)
        return call(y[..., :32], weight, bias, *dtype) + y

    y = twice(ops.linear, *inputs)
    dy = torch.randn(y.shape).bfloat16()
    found = [y, *gradients([y], inputs, [dy])]

    def expected(precision: torch.dtype) -> list[Tensor]:
        copies = leaves(whole, weight, bias, dtype=precision)
        y = twice(oracles.linear, *copies, precision)
        return [y, *gradients([y], copies, [dy])]

    for value, exact, eager in zip(found, expected(torch.float64), expected(torch.bfloat16), strict=True):
        assert_as_good_as(value, exact, eager)


def test_second_derivatives(route: str) -> None:
    given = [tensor.bfloat16() for tensor in PRODUCTS["mlp"].inputs(16, 40)]

    def expected(call: Callable[..., Tensor], dtype: torch.dtype, *others: object) -> list[Tensor]:
        inputs = leaves(*given, dtype=dtype)
        first = torch.autograd.grad(call(*inputs, *others).square().sum(), inputs, create_graph=True)
        return list(torch.autograd.grad(sum(gradient.square().sum() for gradient in first), inputs))

    found = expected(ops.mlp, torch.bfloat16)
    exact, eager = (expected(oracles.mlp, dtype, dtype) for dtype in (torch.float64, torch.bfloat16))
    for value, right, bar in zip(found, exact, eager, strict=True):
        assert_as_good_as(value, right, bar)


def test_attention_has_no_second_derivative_on_either_route(route: str) -> None:
    (qkv,) = leaves(heads(8, 16, 3).bfloat16())
    (first,) = torch.autograd.grad(ops.attention(qkv).square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="derivative"):
        torch.autograd.grad(first.square().sum(), qkv)


def test_autocast(route: str) -> None:
    given = [torch.randn(2, 16, 40), *weights(80, 40), *weights(3 * 48, 80)]
    inputs = leaves(*given)

    def through(x: Tensor, *others: Tensor) -> Tensor:
        return ops.attention(ops.mlp(x, *others).unflatten(-1, (3, 4, 12)))

    with torch.autocast("cpu", torch.bfloat16):
        out = through(*inputs)
        found = gradients([out], inputs, [torch.ones_like(out)])  # a backward under autocast is as one outside
    assert out.dtype == torch.bfloat16
    assert [gradient.dtype for gradient in found] == [torch.float32] * 5
    halves = leaves(*given, dtype=torch.bfloat16)
    alone = through(*halves)
    assert torch.equal(alone, out)
    for gradient, expected in zip(found, gradients([alone], halves, [torch.ones_like(out)]), strict=True):
        assert torch.equal(gradient, expected.float())


@pytest.mark.parametrize("name", PRODUCTS)
def test_fullgraph(route: str, name: str) -> None:
    inputs = leaves(*PRODUCTS[name].inputs(17, 40), dtype=torch.bfloat16)
    graph = torch.compile(PRODUCTS[name].call, fullgraph=True, backend="aot_eager")
    eager, traced = PRODUCTS[name].call(*inputs), graph(*inputs)
    assert torch.equal(traced, eager)
    dy = torch.randn_like(eager)
    for a, b in zip(gradients([traced], inputs, [dy]), gradients([eager], inputs, [dy]), strict=True):
        torch.testing.assert_close(a, b)


def test_opcheck() -> None:
    linear, attention = torch.ops.ditfast.linear_in_fp32.default, torch.ops.ditfast.attention_in_fp32.default
    x, weight, bias = leaves(*PRODUCTS["linear"].inputs(16, 40), dtype=torch.bfloat16)
    torch.library.opcheck(linear, (x, weight, bias))
    torch.library.opcheck(linear, (x, weight, None))
    torch.library.opcheck(attention, leaves(*heads(16, 40, 3).bfloat16().unbind(2)))


# ------------------------------------------------------------------------------------------------ models
def test_checkpointed_blocks_compute_no_product_twice(widened: None) -> None:
    config = ditfast.DiTConfig(depth=2, hidden_size=64, num_heads=2, input_size=8, num_classes=10, class_dropout_prob=0)
    model = randomize(ditfast.DiT(config)).bfloat16()
    x, t, y = torch.randn(2, *config.input_shape).bfloat16(), torch.tensor([3, 700]), torch.tensor([1, 9])
    results, counts = [], []
    for model.checkpoint_activations in (False, True):
        out = model(x, t, y)
        with Dispatched() as seen:
            out.square().sum().backward()
        results.append([out, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)])
        counts.append({name: seen.count[f"ditfast::{name}"] for name in ("linear_in_fp32", "attention_in_fp32")})
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert counts[0] == counts[1]


def test_timestep_embedder(route: str) -> None:
    config = ditfast.DiTConfig(depth=2, hidden_size=64, num_heads=2, input_size=8, num_classes=10)
    oracle = randomize(ditfast.reference.TimestepEmbedder(config)).bfloat16()
    embedder = conditioning.TimestepEmbedder(config).bfloat16()
    embedder.load_state_dict(oracle.state_dict())
    t = torch.linspace(0, 999, 16)
    found, eager = embedder(t), oracle(t)
    assert_as_good_as(found, oracle.double()(t), eager)


def test_a_wide_weight_is_widened_in_parts(widened: None, monkeypatch: pytest.MonkeyPatch) -> None:
    x, (weight, bias) = torch.randn(8, 32).bfloat16(), (tensor.bfloat16() for tensor in weights(100, 32))
    with torch.no_grad():
        (whole,) = ops.grouped_linear(x, [weight], [bias])
        monkeypatch.setattr(sys.modules["ditfast.ops.grouped_linear"], "WIDENED_AT_ONCE", 32 * 30)
        with Dispatched() as seen:
            (parts,) = ops.grouped_linear(x, [weight], [bias])
    assert torch.equal(parts, whole)
    assert seen.count["ditfast::linear_in_fp32"] == 4
