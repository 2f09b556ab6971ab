import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import GRIDS, MODEL_WIDTHS
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


def arguments(runner: Runner, B: int, T: int, K: int, features: int, dtype: torch.dtype) -> list[Tensor]:
    x = torch.randn(B, T, K, device=runner.device).to(dtype)
    weight = (2 * K**-0.5 * torch.randn(features, K, device=runner.device)).to(dtype)
    return [x, weight, torch.randn(features, device=runner.device).to(dtype)]


def check(grid: tuple[int, int], p: int, *inputs: Tensor) -> None:
    y = ops.linear_unpatchify(*inputs, grid, p)
    assert y.dtype == inputs[0].dtype
    assert y.is_contiguous()
    exact, eager = (oracles.linear_unpatchify(*inputs, grid, p, dtype) for dtype in (torch.float64, y.dtype))
    assert_as_good_as(y, exact, eager)


def check_gradients(grid: tuple[int, int], p: int, *tensors: Tensor) -> None:
    inputs = leaves(*tensors)
    y = ops.linear_unpatchify(*inputs, grid, p)
    dy = torch.randn_like(y)

    def expected(precision: torch.dtype) -> list[Tensor]:
        copies = leaves(*tensors, dtype=precision)
        return gradients([oracles.linear_unpatchify(*copies, grid, p, precision)], copies, [dy])

    for gradient, exact, eager in zip(gradients([y], inputs, [dy]), expected(torch.float64), expected(y.dtype), strict=True):
        assert_as_good_as(gradient, exact, eager)


CASES = pairwise(K=(128, 200, 384, 1152), p=(2, 4, 8), grid=GRIDS, dtype=DTYPES)
NAMES = ("K", "p", "grid", "dtype")
ON_KERNELS = on_kernels(CASES, K=MODEL_WIDTHS, p=(2, 4, 8), grid=("3x5", "8x8"), dtype=DTYPES)


def case(runner: Runner, K: int, p: int, grid: str, dtype: str) -> list[Tensor]:
    h, w = GRIDS[grid]
    return arguments(runner, 3, h * w, K, 8 * p * p, DTYPES[dtype])


@ON_KERNELS
def test_kernel(compiled: Runner, K: int, p: int, grid: str, dtype: str) -> None:
    check(GRIDS[grid], p, *case(compiled, K, p, grid, dtype))


@ON_KERNELS
def test_kernel_gradients(compiled: Runner, K: int, p: int, grid: str, dtype: str) -> None:
    check_gradients(GRIDS[grid], p, *case(compiled, K, p, grid, dtype))


@pytest.mark.parametrize(NAMES, CASES)
def test_torch(K: int, p: int, grid: str, dtype: str) -> None:
    with Runner.open("torch") as runner:
        inputs = case(runner, K, p, grid, dtype)
        check(GRIDS[grid], p, *inputs)
        check_gradients(GRIDS[grid], p, *inputs)


@pytest.mark.parametrize("p", [2, 4])
def test_many_rows_take_the_large_tile(compiled: Runner, p: int) -> None:
    check((30, 35), p, *arguments(compiled, 2, 1050, 192, 8 * p * p, torch.bfloat16))


@settings(max_examples=12, deadline=None)
@given(
    B=st.integers(0, 3),
    C=st.integers(1, 7),
    p=st.sampled_from([1, 2, 3, 4, 6, 8]),
    grid=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    K=st.integers(1, 150),
)
def test_any_shape(B: int, C: int, p: int, grid: tuple[int, int], K: int) -> None:
    with Runner.open(TARGETS[0]) as runner:
        check(grid, p, *arguments(runner, B, grid[0] * grid[1], K, C * p * p, torch.bfloat16))


def test_gradients_of_nothing(either: Runner) -> None:
    inputs = leaves(*arguments(either, 0, 6, 64, 32, torch.float32))
    dy = torch.empty(0, 8, 4, 6, device=either.device)
    dx, dweight, dbias = gradients([ops.linear_unpatchify(*inputs, (2, 3), 2)], inputs, [dy])
    assert dx.shape == (0, 6, 64)
    assert not dweight.any()
    assert not dbias.any()


def test_same_bits_in_any_order(compiled: Runner) -> None:
    inputs = leaves(*arguments(compiled, 3, 15, 200, 32, torch.bfloat16))
    dy = torch.randn(3, 8, 6, 10, device=compiled.device).bfloat16()
    runs = []
    for _ in in_any_order():
        y = ops.linear_unpatchify(*inputs, (3, 5), 2)
        runs.append([y, *gradients([y], inputs, [dy])])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_strided_arguments(either: Runner) -> None:
    x, weight, bias = arguments(either, 2, 14, 96, 64, torch.float32)
    x, weight, bias = x[:, 2:, :64], weight[::2, :64], bias[:32]
    expected = ops.linear_unpatchify(x.contiguous(), weight.contiguous(), bias, (4, 3), 2)
    assert_same_however_it_lies(either, ops.linear_unpatchify(x, weight, bias, (4, 3), 2), expected)


def test_autocast(either: Runner) -> None:
    inputs = arguments(either, 2, 6, 64, 32, torch.float32)
    with torch.autocast(either.device.type, torch.bfloat16):
        y = ops.linear_unpatchify(*inputs, (2, 3), 2)
    low = [tensor.bfloat16() for tensor in inputs]
    assert torch.equal(y, ops.linear_unpatchify(*low, (2, 3), 2))


def test_errors_name_the_argument() -> None:
    x, weight, bias = torch.zeros(2, 6, 8), torch.zeros(32, 8), torch.zeros(32)
    assert "[B, T, D]" in raises_naming("u", lambda: ops.linear_unpatchify(x[0], weight, bias, (2, 3), 2))
    assert "(32, 8)" in raises_naming("weight", lambda: ops.linear_unpatchify(x, weight[:, :4], bias, (2, 3), 2))
    assert "(32,)" in raises_naming("bias", lambda: ops.linear_unpatchify(x, weight, bias[:2], (2, 3), 2))
    assert "h * w = 6" in raises_naming("grid", lambda: ops.linear_unpatchify(x, weight, bias, (2, 2), 2))
    assert "32 values" in raises_naming("patch_size", lambda: ops.linear_unpatchify(x, weight, bias, (2, 3), 3))


@ON_SIMULATOR
def test_opcheck(compiled: Runner) -> None:
    tensors = arguments(compiled, 2, 6, 64, 32, torch.float32)
    torch.library.opcheck(torch.ops.ditfast.linear_unpatchify.default, (*leaves(*tensors), (2, 3), 2))
    dy = torch.randn(2, 8, 4, 6, device=compiled.device)
    backward = torch.ops.ditfast.linear_unpatchify_backward.default
    torch.library.opcheck(backward, (dy, *tensors[:2], 2, [True, False, True]))


@ON_CPU
def test_fullgraph(either: Runner) -> None:
    inputs = leaves(*arguments(either, 2, 6, 64, 32, torch.float32))
    graph = torch.compile(ops.linear_unpatchify, fullgraph=True, backend="aot_eager")
    eager, traced = ops.linear_unpatchify(*inputs, (2, 3), 2), graph(*inputs, (2, 3), 2)
    assert torch.equal(traced, eager)
    dy = torch.randn_like(eager)
    for a, b in zip(gradients([traced], inputs, [dy]), gradients([eager], inputs, [dy]), strict=True):
        torch.testing.assert_close(a, b)
