import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import MODULATIONS, TOKENS, WIDTHS
from support import DTYPES, TARGETS, Runner, assert_rounded_once, pairwise, raises_naming

from ditfast import ops


def check(runner: Runner, B: int, T: int, D: int, dtype: torch.dtype, kind: str) -> None:
    x = (3 + 2 * torch.randn(B, T, D, device=runner.device)).to(dtype)  # off centre: a one-pass variance would show
    _, shift, scale = oracles.modulation(kind, x)
    y = ops.layer_norm_modulate(x, shift, scale)
    assert y.dtype == dtype
    assert y.is_contiguous()
    exact = oracles.layer_norm_modulate(x, shift, scale, torch.float64)
    assert_rounded_once(y, exact, oracles.layer_norm_modulate(x, shift, scale, torch.float32).to(dtype))


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


def test_strided_input(either: Runner) -> None:
    whole = torch.randn(3, 20, 384, device=either.device)
    x = whole[:, 2:]
    _, shift, scale = oracles.modulation("chunk6", x)
    assert not x.is_contiguous()
    assert torch.equal(ops.layer_norm_modulate(x, shift, scale), ops.layer_norm_modulate(x.contiguous(), shift, scale))


def test_epsilon(either: Runner) -> None:
    x = 1e-3 * torch.randn(1, 4, 128, device=either.device)
    y = ops.layer_norm_modulate(x, None, None, eps=1e-5)
    exact, eager = (oracles.layer_norm_modulate(x, None, None, dtype, eps=1e-5) for dtype in (torch.float64, torch.float32))
    assert_rounded_once(y, exact, eager)
    assert not torch.allclose(ops.layer_norm_modulate(x, None, None), y, rtol=1e-2)


def test_gradients_take_torch(either: Runner) -> None:
    x = torch.randn(2, 4, 128, device=either.device, requires_grad=True)
    shift, scale = (torch.randn(2, 128, device=either.device, requires_grad=True) for _ in range(2))
    weight = torch.randn(2, 4, 128, device=either.device)
    found = torch.autograd.grad((ops.layer_norm_modulate(x, shift, scale) * weight).sum(), (x, shift, scale))
    exact = oracles.layer_norm_modulate(x, shift, scale, torch.float64)
    for a, b in zip(found, torch.autograd.grad((exact * weight).sum(), (x, shift, scale)), strict=True):
        torch.testing.assert_close(a, b)


def test_errors_name_the_argument() -> None:
    x, v = torch.zeros(2, 4, 8), torch.zeros(2, 8)
    assert "expected [B, T, D]" in raises_naming("x", lambda: ops.layer_norm_modulate(x[0], v, v))
    assert "float64" in raises_naming("x", lambda: ops.layer_norm_modulate(x.double(), v, v))
    assert "unit inner stride" in raises_naming("x", lambda: ops.layer_norm_modulate(x.transpose(0, 2), v, v))
    assert "(2, 8) or (2, 4, 8)" in raises_naming("shift", lambda: ops.layer_norm_modulate(x, v[:1], v))
    assert "int64" in raises_naming("scale", lambda: ops.layer_norm_modulate(x, v, v.long()))
    assert "on meta" in raises_naming("scale", lambda: ops.layer_norm_modulate(x, v, v.to("meta")))


def test_opcheck_and_fullgraph(either: Runner) -> None:
    x = torch.randn(2, 5, 128, device=either.device)
    shift, scale = torch.randn(2, 256, device=either.device).chunk(2, dim=1)
    for vectors in ((shift, scale), (None, None), (shift, None)):
        torch.library.opcheck(torch.ops.ditfast.layer_norm_modulate.default, (x[:, 1:], *vectors, 1e-6))
        graph = torch.compile(ops.layer_norm_modulate, fullgraph=True, backend="aot_eager")
        assert torch.equal(graph(x, *vectors), ops.layer_norm_modulate(x, *vectors))
