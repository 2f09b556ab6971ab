import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import GEMM_TOKENS, MODEL_TOKENS, MODEL_WIDTHS, WIDTHS, output_width
from support import (
    DTYPES,
    ON_CPU,
    ON_SIMULATOR,
    TARGETS,
    Runner,
    assert_as_good_as,
    assert_same_however_it_lies,
    gradients,
    in_any_order,
    leaves,
    on_kernels,
    pairwise,
    raises_naming,
)
from torch import Tensor

from ditfast import ops


def arguments(runner: Runner, B: int, T: int, N: int, K: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    x = torch.randn(B, T, K, device=runner.device).to(dtype)
    weight = (K**-0.5 * torch.randn(N, K, device=runner.device)).to(dtype)
    return x, weight, torch.randn(N, device=runner.device).to(dtype)


def check(runner: Runner, B: int, T: int, N: int, K: int, dtype: torch.dtype) -> None:
    """Output and gradients."""
    given = arguments(runner, B, T, N, K, dtype)
    dy = torch.randn(B, T, N, device=runner.device).to(dtype)
    inputs = leaves(*given)
    y = ops.linear(*inputs)
    assert y.is_contiguous()
    found = [y, *gradients([y], inputs, [dy])]

    def expected(precision: torch.dtype) -> list[Tensor]:
        copies = leaves(*given, dtype=precision)
        y = oracles.linear(*copies, precision)
        return [y, *gradients([y], copies, [dy])]

    for value, exact, eager in zip(found, expected(torch.float64), expected(dtype), strict=True):
        assert_as_good_as(value, exact, eager)


CASES = pairwise(K=WIDTHS, T=GEMM_TOKENS, dtype=DTYPES)
ON_KERNELS = on_kernels(CASES, K=MODEL_WIDTHS, T=MODEL_TOKENS, dtype=DTYPES)


@ON_KERNELS
def test_kernel(compiled: Runner, K: int, T: int, dtype: str) -> None:
    check(compiled, 2, T, min(192, output_width(K, dtype)), K, DTYPES[dtype])


@pytest.mark.parametrize(("K", "T", "dtype"), CASES)
def test_torch(K: int, T: int, dtype: str) -> None:
    with Runner.open("torch") as runner:
        check(runner, 2, T, 192, K, DTYPES[dtype])


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_many_rows(compiled: Runner, dtype: str) -> None:
    """The large tile, and a weight gradient summed in parts of which the last is short."""
    check(compiled, 3, 700, 256, 72, DTYPES[dtype])


@pytest.mark.parametrize("N", [256, 384])
def test_the_widest_tile(compiled: Runner, N: int) -> None:
    check(compiled, 1, 8200, N, 64, torch.bfloat16)


@settings(max_examples=15, deadline=None)
@given(B=st.integers(1, 3), T=st.integers(1, 70), N=st.integers(1, 200), K=st.integers(1, 200))
def test_any_shape(B: int, T: int, N: int, K: int) -> None:
    with Runner.open(TARGETS[0]) as runner:
        check(runner, B, T, N, K, torch.bfloat16)


def test_empty_batch(either: Runner) -> None:
    inputs = leaves(*arguments(either, 0, 5, 16, 8, torch.float32))
    y = ops.linear(*inputs)
    assert y.shape == (0, 5, 16)
    dx, dweight, dbias = gradients([y], inputs, [torch.empty_like(y)])
    assert dx.shape == (0, 5, 8)
    assert dweight.shape == (16, 8)
    assert not dweight.any()
    assert not dbias.any()


def test_frozen_weights_cost_nothing(compiled: Runner) -> None:
    x, weight, bias = arguments(compiled, 1, 5, 16, 8, torch.float32)
    x.requires_grad_()
    (dx,) = gradients([ops.linear(x, weight, bias)], [x], [torch.ones(1, 5, 16, device=x.device)])
    torch.testing.assert_close(dx, weight.sum(0).expand(1, 5, 8))


def test_same_bits_in_any_order(compiled: Runner) -> None:
    inputs = leaves(*arguments(compiled, 2, 600, 200, 72, torch.bfloat16))
    dy = torch.randn(2, 600, 200, device=compiled.device)
    runs = [gradients([ops.linear(*inputs)], inputs, [dy]) for _ in in_any_order()]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_strided_arguments(either: Runner) -> None:
    x = torch.randn(2, 20, 192, device=either.device)[:, 2:, :128]
    weight, bias = torch.randn(256, 192, device=either.device)[:, :128], torch.randn(256, device=either.device)
    assert_same_however_it_lies(either, ops.linear(x, weight, bias), ops.linear(x.contiguous(), weight.contiguous(), bias))


def test_autocast(either: Runner) -> None:
    inputs = leaves(*arguments(either, 2, 4, 8, 16, torch.float32))
    with torch.autocast(either.device.type, torch.bfloat16):
        y = ops.linear(*inputs)
    assert y.dtype == torch.bfloat16
    found = gradients([y], inputs, [torch.randn(2, 4, 8, device=either.device)])
    assert [gradient.dtype for gradient in found] == [torch.float32] * 3


def test_errors_name_the_argument() -> None:
    x, weight, bias = torch.zeros(2, 4, 8), torch.zeros(16, 8), torch.zeros(16)
    assert "expected [B, T, D]" in raises_naming("x", lambda: ops.linear(x[0], weight, bias))
    assert "expected (16, 8)" in raises_naming("weight", lambda: ops.linear(x, weight[:, :4], bias))
    assert "bfloat16" in raises_naming("weight", lambda: ops.linear(x, weight.bfloat16(), bias))
    assert "expected features" in raises_naming("x", lambda: ops.linear(x[..., :0], weight[:, :0], bias))
    assert "expected features" in raises_naming("weight", lambda: ops.linear(x, weight[:0], bias[:0]))
    assert "expected (16,)" in raises_naming("bias", lambda: ops.linear(x, weight, bias[:2]))


@ON_SIMULATOR
def test_opcheck(compiled: Runner) -> None:
    inputs = leaves(*arguments(compiled, 2, 5, 24, 32, torch.float32))
    torch.library.opcheck(torch.ops.ditfast.linear.default, inputs)


@ON_CPU
def test_fullgraph(either: Runner) -> None:
    inputs = leaves(*arguments(either, 2, 5, 24, 32, torch.float32))
    dy = torch.randn(2, 5, 24, device=either.device)
    graph = torch.compile(ops.linear, fullgraph=True, backend="aot_eager")
    eager, traced = ops.linear(*inputs), graph(*inputs)
    assert torch.equal(traced, eager)
    for a, b in zip(gradients([traced], inputs, [dy]), gradients([eager], inputs, [dy]), strict=True):
        torch.testing.assert_close(a, b)
