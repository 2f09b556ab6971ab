import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import MODULATIONS, TOKENS, WIDTHS
from support import DTYPES, TARGETS, Runner, assert_rounded_once, pairwise, raises_naming

from ditfast import ops


def check(runner: Runner, B: int, T: int, D: int, dtype: torch.dtype, kind: str) -> None:
    x = (3 + torch.randn(B, T, D, device=runner.device)).to(dtype)
    h = torch.randn(B, T, D, device=runner.device).to(dtype)
    gate, shift, scale = oracles.modulation(kind, x)
    x_new, u = ops.gated_residual_layer_norm_modulate(x, h, gate, shift, scale)
    assert x_new.dtype == u.dtype == dtype
    exact, eager = (oracles.gated_residual(x, h, gate, precision) for precision in (torch.float64, torch.float32))
    assert_rounded_once(x_new, exact, eager.to(dtype))
    exact, eager = (oracles.layer_norm_modulate(x_new, shift, scale, precision) for precision in (torch.float64, torch.float32))
    assert_rounded_once(u, exact, eager.to(dtype))


CASES = pairwise(D=WIDTHS, T=TOKENS, dtype=DTYPES, kind=MODULATIONS)


@pytest.mark.parametrize(("D", "T", "dtype", "kind"), CASES)
def test_kernel(compiled: Runner, D: int, T: int, dtype: str, kind: str) -> None:
    check(compiled, 2, T, D, DTYPES[dtype], kind)


@pytest.mark.parametrize(("D", "T", "dtype", "kind"), CASES)
def test_torch(D: int, T: int, dtype: str, kind: str) -> None:
    with Runner.open("torch") as runner:
        check(runner, 2, T, D, DTYPES[dtype], kind)


@settings(max_examples=15, deadline=None)
@given(B=st.integers(0, 5), T=st.integers(0, 70), D=st.sampled_from([1, 8, 72, 128, 2048]), kind=st.sampled_from(MODULATIONS))
def test_any_shape(B: int, T: int, D: int, kind: str) -> None:
    with Runner.open(TARGETS[0]) as runner:
        check(runner, B, T, D, torch.bfloat16, kind)


def test_strided_inputs(either: Runner) -> None:
    x, h = torch.randn(2, 3, 20, 384, device=either.device)[:, :, :18]
    vectors = oracles.modulation("chunk6", x)
    found = ops.gated_residual_layer_norm_modulate(x, h, *vectors)
    for a, b in zip(found, ops.gated_residual_layer_norm_modulate(x.contiguous(), h.contiguous(), *vectors), strict=True):
        assert torch.equal(a, b)


def test_gradients_take_torch(either: Runner) -> None:
    inputs = [torch.randn(2, 4, 128, device=either.device, requires_grad=True) for _ in range(2)]
    inputs += [torch.randn(2, 128, device=either.device, requires_grad=True) for _ in range(3)]
    weights = torch.randn(2, 2, 4, 128, device=either.device)
    x_new, u = ops.gated_residual_layer_norm_modulate(*inputs)
    found = torch.autograd.grad((x_new * weights[0] + u * weights[1]).sum(), inputs)
    exact = oracles.gated_residual(*inputs[:3], torch.float64)
    normalised = oracles.layer_norm_modulate(exact, *inputs[3:], torch.float64)
    for a, b in zip(found, torch.autograd.grad((exact * weights[0] + normalised * weights[1]).sum(), inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_errors_name_the_argument() -> None:
    x, v = torch.zeros(2, 4, 8), torch.zeros(2, 8)
    op = ops.gated_residual_layer_norm_modulate
    assert "expected [B, T, D]" in raises_naming("x", lambda: op(x[0], x, v, v, v))
    assert "expected (2, 4, 8)" in raises_naming("h", lambda: op(x, x[:, :2], v, v, v))
    for position, name in ((2, "gate"), (3, "shift"), (4, "scale")):
        arguments = [x, x, v, v, v]
        arguments[position] = v[:, :4]
        assert "(2, 8) or (2, 4, 8)" in raises_naming(name, lambda arguments=arguments: op(*arguments))


def test_opcheck_and_fullgraph(either: Runner) -> None:
    x, h = torch.randn(2, 2, 5, 128, device=either.device)
    for vectors in (oracles.modulation("chunk6", x), (None, None, None)):
        torch.library.opcheck(torch.ops.ditfast.gated_residual_layer_norm_modulate.default, (x, h, *vectors, 1e-6))
        graph = torch.compile(ops.gated_residual_layer_norm_modulate, fullgraph=True, backend="aot_eager")
        found, expected = graph(x, h, *vectors), ops.gated_residual_layer_norm_modulate(x, h, *vectors)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
