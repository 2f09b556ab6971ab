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
    leaves,
    on_kernels,
    pairwise,
    raises_naming,
)
from torch import Tensor

from ditfast import ops


def check(runner: Runner, B: int, T: int, N: int, K: int, dtype: torch.dtype) -> None:
    x = torch.randn(B, T, K, device=runner.device).to(dtype)
    weight = (2 * K**-0.5 * torch.randn(N, K, device=runner.device)).to(dtype)
    bias = torch.randn(N, device=runner.device).to(dtype)
    y = ops.linear_gelu(x, weight, bias)
    assert y.dtype == dtype
    exact, eager = (oracles.linear_gelu(x, weight, bias, precision) for precision in (torch.float64, dtype))
    assert_as_good_as(y, exact, eager)


CASES = pairwise(K=WIDTHS, T=GEMM_TOKENS, dtype=DTYPES)
ON_KERNELS = on_kernels(CASES, K=MODEL_WIDTHS, T=MODEL_TOKENS, dtype=DTYPES)


@ON_KERNELS
def test_kernel(compiled: Runner, K: int, T: int, dtype: str) -> None:
    check(compiled, 2, T, output_width(K, dtype), K, DTYPES[dtype])


def check_gradients(runner: Runner, B: int, T: int, N: int, K: int, dtype: torch.dtype) -> None:
    x, dy = (torch.randn(B, T, width, device=runner.device).to(dtype) for width in (K, N))
    weight = (2 * K**-0.5 * torch.randn(N, K, device=runner.device)).to(dtype)
    bias = torch.randn(N, device=runner.device).to(dtype)
    inputs = leaves(x, weight, bias)
    found = gradients([ops.linear_gelu(*inputs)], inputs, [dy])

    def expected(precision: torch.dtype) -> list[Tensor]:
        copies = leaves(x, weight, bias, dtype=precision)
        return gradients([oracles.linear_gelu(*copies, precision)], copies, [dy])

    for gradient, exact, eager in zip(found, expected(torch.float64), expected(dtype), strict=True):
        assert_as_good_as(gradient, exact, eager)


@ON_KERNELS
def test_kernel_gradients(compiled: Runner, K: int, T: int, dtype: str) -> None:
    check_gradients(compiled, 2, T, output_width(K, dtype), K, DTYPES[dtype])


@pytest.mark.parametrize(("K", "T", "dtype"), CASES)
def test_torch(K: int, T: int, dtype: str) -> None:
    with Runner.open("torch") as runner:
        check(runner, 2, T, 2 * K, K, DTYPES[dtype])


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_many_rows_take_the_large_tile(compiled: Runner, dtype: str) -> None:
    check(compiled, 3, 257, 384, 192, DTYPES[dtype])


# Fewer columns would leave a bias gradient of so few numbers that its error and eager's are two throws of dice.
@settings(max_examples=15, deadline=None)
@given(B=st.integers(0, 3), T=st.integers(0, 70), N=st.integers(16, 200), K=st.integers(1, 200))
def test_any_shape(B: int, T: int, N: int, K: int) -> None:
    with Runner.open(TARGETS[0]) as runner:
        check(runner, B, T, N, K, torch.bfloat16)


def test_extreme_inputs_saturate(either: Runner) -> None:
    x = torch.tensor([-1e4, -20.0, 0.0, 20.0, 1e4], device=either.device).view(1, 5, 1)
    y = ops.linear_gelu(x, torch.ones(1, 1, device=either.device), torch.zeros(1, device=either.device))
    assert y.flatten().tolist() == [0, 0, 0, 20, 1e4]


def test_strided_arguments(either: Runner) -> None:
    x = torch.randn(2, 20, 192, device=either.device)[:, 2:, :128]
    weight = torch.randn(256, 192, device=either.device)[:, :128]
    bias = torch.randn(256, device=either.device)
    expected = ops.linear_gelu(x.contiguous(), weight.contiguous(), bias)
    assert_same_however_it_lies(either, ops.linear_gelu(x, weight, bias), expected)


def test_autocast(either: Runner) -> None:
    x, weight, bias = (torch.randn(*shape, device=either.device) for shape in ((2, 4, 16), (8, 16), (8,)))
    with torch.autocast(x.device.type, torch.bfloat16):
        for weights in ((weight, bias), (weight.bfloat16(), bias)):
            y = ops.linear_gelu(x, *weights)
            assert y.dtype == torch.bfloat16
            graph = torch.compile(ops.linear_gelu, fullgraph=True, backend="aot_eager")
            assert torch.equal(graph(x, *weights), y)
    low = [tensor.bfloat16() for tensor in (x, weight, bias)]
    assert_as_good_as(y, oracles.linear_gelu(*low, torch.float64), oracles.linear_gelu(*low, torch.bfloat16))


def test_errors_name_the_argument() -> None:
    x, weight, bias = torch.zeros(2, 4, 8), torch.zeros(16, 8), torch.zeros(16)
    assert "expected [B, T, D]" in raises_naming("x", lambda: ops.linear_gelu(x[0], weight, bias))
    assert "expected (16, 8)" in raises_naming("weight", lambda: ops.linear_gelu(x, weight[:, :4], bias))
    assert "expected [N, K]" in raises_naming("weight", lambda: ops.linear_gelu(x, bias, bias))
    assert "bfloat16" in raises_naming("weight", lambda: ops.linear_gelu(x, weight.bfloat16(), bias))
    assert "expected (16,)" in raises_naming("bias", lambda: ops.linear_gelu(x, weight, bias[:2]))


@ON_SIMULATOR
def test_opcheck(compiled: Runner) -> None:
    inputs = leaves(*(torch.randn(*shape, device=compiled.device) for shape in ((2, 5, 64), (96, 64), (96,))))
    torch.library.opcheck(torch.ops.ditfast.linear_gelu.default, (*inputs, True))


@ON_CPU
def test_fullgraph(either: Runner) -> None:
    inputs = leaves(*(torch.randn(*shape, device=either.device) for shape in ((2, 5, 64), (96, 64), (96,))))
    dy = torch.randn(2, 5, 96, device=either.device)
    graph = torch.compile(ops.linear_gelu, fullgraph=True, backend="aot_eager")
    eager, traced = ops.linear_gelu(*inputs), graph(*inputs)
    torch.testing.assert_close(traced, eager)
    for a, b in zip(gradients([traced], inputs, [dy]), gradients([eager], inputs, [dy]), strict=True):
        torch.testing.assert_close(a, b)
