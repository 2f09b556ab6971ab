import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import GEMM_TOKENS, MODEL_TOKENS, MODEL_WIDTHS, WIDTHS
from support import (
    DTYPES,
    ON_CPU,
    ON_SIMULATOR,
    TARGETS,
    Runner,
    assert_as_good_as,
    gradients,
    leaves,
    on_kernels,
    pairwise,
    raises_naming,
)
from torch import Tensor

from ditfast import ops

KINDS = ("chunk6", "per_token", "fp32", "none")


def arguments(
    runner: Runner, B: int, T: int, N: int, K: int, dtype: torch.dtype, kind: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    x = torch.randn(B, T, K, device=runner.device).to(dtype)
    weight = (K**-0.5 * torch.randn(N, K, device=runner.device)).to(dtype)
    residual = torch.randn(B, T, N, device=runner.device).to(dtype)
    return x, weight, torch.randn(N, device=runner.device).to(dtype), residual, oracles.modulation(kind, residual)[0]


def check(runner: Runner, B: int, T: int, N: int, K: int, dtype: torch.dtype, kind: str) -> None:
    given = arguments(runner, B, T, N, K, dtype, kind)
    y = ops.linear_gated_residual(*given)
    assert y.dtype == dtype
    exact, eager = (oracles.linear_gated_residual(*given, precision) for precision in (torch.float64, dtype))
    assert_as_good_as(y, exact, eager)


CASES = pairwise(N=WIDTHS, T=GEMM_TOKENS, dtype=DTYPES, kind=KINDS)
ON_KERNELS = on_kernels(CASES, N=MODEL_WIDTHS, T=MODEL_TOKENS, dtype=DTYPES, kind=("chunk6", "fp32"))


@ON_KERNELS
def test_kernel(compiled: Runner, N: int, T: int, dtype: str, kind: str) -> None:
    check(compiled, 2, T, N, 128, DTYPES[dtype], kind)


@pytest.mark.parametrize(("N", "T", "dtype", "kind"), CASES)
def test_torch(N: int, T: int, dtype: str, kind: str) -> None:
    with Runner.open("torch") as runner:
        check(runner, 2, T, N, 128, DTYPES[dtype], kind)


@pytest.mark.parametrize("T", [256, 300])
def test_many_rows_take_the_large_tile(compiled: Runner, T: int) -> None:
    check(compiled, 3, T, 384, 192, torch.bfloat16, "chunk6")


@settings(max_examples=15, deadline=None)
@given(B=st.integers(0, 3), T=st.integers(0, 70), N=st.integers(1, 200), K=st.integers(1, 200), kind=st.sampled_from(KINDS))
def test_any_shape(B: int, T: int, N: int, K: int, kind: str) -> None:
    with Runner.open(TARGETS[0]) as runner:
        check(runner, B, T, N, K, torch.bfloat16, kind)


def test_gradients(either: Runner) -> None:
    given = arguments(either, 2, 20, 48, 32, torch.bfloat16, "chunk6")
    dy = torch.randn(2, 20, 48, device=either.device).bfloat16()
    inputs, copies, low = leaves(*given), leaves(*given, dtype=torch.float64), leaves(*given)
    found = gradients([ops.linear_gated_residual(*inputs)], inputs, [dy])
    exact = gradients([oracles.linear_gated_residual(*copies, torch.float64)], copies, [dy])
    eager = gradients([oracles.linear_gated_residual(*low, torch.bfloat16)], low, [dy])
    for triple in zip(found, exact, eager, strict=True):
        assert_as_good_as(*triple)


def test_an_fp32_stream_under_autocast(either: Runner) -> None:
    given = arguments(either, 2, 20, 48, 32, torch.float32, "chunk6")
    with torch.autocast(either.device.type, torch.bfloat16):
        y = ops.linear_gated_residual(*given)
    assert y.dtype == torch.float32


@ON_CPU
def test_errors_name_the_argument(either: Runner) -> None:
    x, weight, bias, residual, gate = arguments(either, 2, 4, 8, 16, torch.float32, "chunk6")
    op = ops.linear_gated_residual
    assert "expected (8, 16)" in raises_naming("weight", lambda: op(x, weight[:, :4], bias, residual, gate))
    assert "expected (2, 4, 8)" in raises_naming("residual", lambda: op(x, weight, bias, residual[:, :2], gate))
    assert "(2, 8) or (2, 4, 8)" in raises_naming("gate", lambda: op(x, weight, bias, residual, gate[:1]))
    assert "int64" in raises_naming("gate", lambda: op(x, weight, bias, residual, gate.long()))


@ON_SIMULATOR
def test_opcheck_and_fullgraph(compiled: Runner) -> None:
    given = arguments(compiled, 2, 5, 24, 32, torch.float32, "chunk6")
    torch.library.opcheck(torch.ops.ditfast.linear_gated_residual.default, given)
    graph = torch.compile(ops.linear_gated_residual, fullgraph=True, backend="aot_eager")
    assert torch.equal(graph(*given), ops.linear_gated_residual(*given))
