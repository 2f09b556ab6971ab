from functools import partial

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import GRIDS, MODEL_WIDTHS, MODULATIONS
from support import (
    DTYPES,
    ON_CPU,
    ON_SIMULATOR,
    TARGETS,
    WHERE,
    Runner,
    assert_as_good_as,
    gradients,
    in_any_order,
    leaves,
    on_kernels,
    pairwise,
    raises_naming,
)
from torch import Tensor

from ditfast import ops


def arguments(runner: Runner, B: int, T: int, K: int, features: int, dtype: torch.dtype, kind: str) -> list[Tensor | None]:
    x = (3 + 2 * torch.randn(B, T, K, device=runner.device)).to(dtype)  # off centre: a one-pass variance would show
    weight = (2 * K**-0.5 * torch.randn(features, K, device=runner.device)).to(dtype)
    bias = torch.randn(features, device=runner.device).to(dtype)
    return [x, *oracles.modulation(kind, x)[1:], weight, bias]


def check(grid: tuple[int, int], p: int, *inputs: Tensor | None, eps: float = 1e-6) -> None:
    y = ops.final_layer(*inputs, grid, p, eps)
    assert y.dtype == inputs[0].dtype
    assert y.is_contiguous()
    exact, eager = (oracles.final_layer(*inputs, grid, p, dtype, eps) for dtype in (torch.float64, y.dtype))
    assert_as_good_as(y, exact, eager)


CASES = pairwise(K=(128, 200, 384, 1152), p=(2, 4, 8), grid=GRIDS, dtype=DTYPES, kind=MODULATIONS)
NAMES = ("K", "p", "grid", "dtype", "kind")
ON_KERNELS = on_kernels(CASES, K=MODEL_WIDTHS, p=(2, 4, 8), grid=("3x5", "8x8"), dtype=DTYPES, kind=("chunk6", "per_token"))


def case(runner: Runner, K: int, p: int, grid: str, dtype: str, kind: str) -> list[Tensor | None]:
    h, w = GRIDS[grid]
    return arguments(runner, 3, h * w, K, 8 * p * p, DTYPES[dtype], kind)


@ON_KERNELS
def test_kernel(compiled: Runner, K: int, p: int, grid: str, dtype: str, kind: str) -> None:
    check(GRIDS[grid], p, *case(compiled, K, p, grid, dtype, kind))


@pytest.mark.parametrize(NAMES, CASES)
def test_torch(K: int, p: int, grid: str, dtype: str, kind: str) -> None:
    with Runner.open("torch") as runner:
        check(GRIDS[grid], p, *case(runner, K, p, grid, dtype, kind))


@pytest.mark.parametrize("kind", ["chunk6", "per_token"])
@pytest.mark.parametrize("p", [2, 4])
def test_many_rows_take_the_large_tile(compiled: Runner, p: int, kind: str) -> None:
    check((32, 33), p, *arguments(compiled, 2, 1056, 192, 8 * p * p, torch.bfloat16, kind))


@settings(max_examples=12, deadline=None)
@given(
    B=st.integers(0, 3),
    C=st.integers(1, 5),
    p=st.sampled_from([1, 2, 3, 4, 6, 8]),
    grid=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    K=st.integers(2, 150),
    kind=st.sampled_from(MODULATIONS),
)
def test_any_shape(B: int, C: int, p: int, grid: tuple[int, int], K: int, kind: str) -> None:
    with Runner.open(TARGETS[0]) as runner:
        check(grid, p, *arguments(runner, B, grid[0] * grid[1], K, C * p * p, torch.bfloat16, kind))


@pytest.mark.skipif(WHERE != "simulator", reason="counts launches on the simulator")
@ON_SIMULATOR
@pytest.mark.parametrize(("p", "kernels"), [(2, 1), (4, 1), (8, 2)])
def test_one_kernel_where_a_program_holds_all_features(compiled: Runner, p: int, kernels: int) -> None:
    import ptxsim

    inputs = arguments(compiled, 2, 16, 128, 8 * p * p, torch.bfloat16, "chunk6")
    with ptxsim.record() as launches:
        ops.final_layer(*inputs, (4, 4), p)
    assert sum(stats.launches for stats in launches.values()) == kernels


@pytest.mark.parametrize("mean", [1e2, 1e4])
def test_statistics_do_not_cancel(compiled: Runner, mean: float) -> None:
    x, *others = arguments(compiled, 2, 15, 384, 32, torch.float32, "chunk6")
    x = x + mean
    x[:, :, 0] = -mean  # the element that a shifted sum of squares would shift by
    check((3, 5), 2, x, *others)


@pytest.mark.parametrize("dtype", ["fp16", *(pytest.param(dtype, marks=pytest.mark.full) for dtype in ("bf16", "fp32"))])
def test_rows_without_variance(either: Runner, dtype: str) -> None:
    for flat in (1000.0, -30000.0):
        x, *others = arguments(either, 2, 15, 200, 32, DTYPES[dtype], "chunk6")
        check((3, 5), 2, oracles.with_flat_rows(x, flat, nearly=either.backend == "triton"), *others)


def test_gradients_are_those_of_its_parts(either: Runner) -> None:
    inputs = leaves(*arguments(either, 2, 6, 128, 32, torch.bfloat16, "chunk6"))
    dy = torch.randn(2, 8, 4, 6, device=either.device)
    parts = ops.linear_unpatchify(ops.layer_norm_modulate(*inputs[:3]), *inputs[3:], (2, 3), 2)
    whole = ops.final_layer(*inputs, (2, 3), 2)
    for a, b in zip(gradients([whole], inputs, [dy]), gradients([parts], inputs, [dy]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("either", ["torch", "triton"], indirect=True)
@pytest.mark.parametrize("shape", [(), (32,), (0, 128), (32, 0)], ids=str)
def test_a_weight_without_features_is_refused(either: Runner, shape: tuple[int, ...]) -> None:
    x, shift, scale, _, bias = arguments(either, 2, 6, 128, 32, torch.float32, "chunk6")
    whole = torch.randn(shape, device=either.device)
    for weight in (whole, *leaves(whole)):
        raises_naming("weight", partial(ops.final_layer, x, shift, scale, weight, bias, (2, 3), 2))


def test_epsilon(either: Runner) -> None:
    x, *others = arguments(either, 1, 4, 128, 32, torch.float32, "none")
    check((2, 2), 2, 1e-3 * (x - 3), *others, eps=1e-5)


def test_same_bits_in_any_order(compiled: Runner) -> None:
    inputs = arguments(compiled, 3, 15, 200, 32, torch.bfloat16, "per_token")
    runs = [ops.final_layer(*inputs, (3, 5), 2) for _ in in_any_order()]
    assert all(torch.equal(run, runs[0]) for run in runs)


def test_strided_arguments(either: Runner) -> None:
    x, shift, scale, weight, bias = arguments(either, 2, 14, 96, 64, torch.float32, "per_token")
    inputs = [x[:, 2:, :64], shift[:, 2:, :64], scale[:, 2:, 32:], weight[::2, :64], bias[:32]]
    expected = ops.final_layer(*(tensor.contiguous() for tensor in inputs), (4, 3), 2)
    assert torch.equal(ops.final_layer(*inputs, (4, 3), 2), expected)


@pytest.mark.parametrize("stream", ["fp32", "bf16"])
def test_autocast(either: Runner, stream: str) -> None:
    x, *others = arguments(either, 2, 6, 64, 32, torch.float32, "chunk6")
    x = x.to(DTYPES[stream])
    with torch.autocast(either.device.type, torch.bfloat16):
        y = ops.final_layer(x, *others, (2, 3), 2)
    exact, eager = (oracles.final_layer(x, *others, (2, 3), 2, dtype) for dtype in (torch.float64, torch.bfloat16))
    assert_as_good_as(y, exact, eager)


@ON_CPU
def test_errors_name_the_argument(either: Runner) -> None:
    x, v = torch.zeros(2, 6, 8, device=either.device), torch.zeros(2, 8, device=either.device)
    weight, bias = torch.zeros(32, 8, device=either.device), torch.zeros(32, device=either.device)
    grid = (2, 3)
    assert "[B, T, D]" in raises_naming("x", lambda: ops.final_layer(x[0], v, v, weight, bias, grid, 2))
    assert "(2, 8)" in raises_naming("shift", lambda: ops.final_layer(x, v[:1], v, weight, bias, grid, 2))
    assert "(2, 8)" in raises_naming("scale", lambda: ops.final_layer(x, v, v[:1], weight, bias, grid, 2))
    assert "(32, 8)" in raises_naming("weight", lambda: ops.final_layer(x, v, v, weight[:, :4], bias, grid, 2))
    assert "[N, K]" in raises_naming("weight", lambda: ops.final_layer(x, v, v, bias, bias, grid, 2))
    assert "float32" in raises_naming("weight", lambda: ops.final_layer(x, v, v, weight.half(), bias, grid, 2))
    assert "(32,)" in raises_naming("bias", lambda: ops.final_layer(x, v, v, weight, bias[:3], grid, 2))
    assert "h * w = 6" in raises_naming("grid", lambda: ops.final_layer(x, v, v, weight, bias, (2, 2), 2))
    assert "32 values" in raises_naming("patch_size", lambda: ops.final_layer(x, v, v, weight, bias, grid, 3))


@ON_SIMULATOR
def test_opcheck(compiled: Runner) -> None:
    for kind in ("chunk6", "none", "per_token"):
        inputs = arguments(compiled, 2, 6, 64, 32, torch.float32, kind)
        torch.library.opcheck(torch.ops.ditfast.final_layer.default, (*inputs, (2, 3), 2, 1e-6))


@ON_CPU
def test_fullgraph(either: Runner) -> None:
    inputs = leaves(*arguments(either, 2, 6, 64, 32, torch.float32, "chunk6"))
    graph = torch.compile(ops.final_layer, fullgraph=True, backend="aot_eager")
    eager, traced = ops.final_layer(*inputs, (2, 3), 2), graph(*inputs, (2, 3), 2)
    assert torch.equal(traced, eager)
    dy = torch.randn_like(eager)
    for a, b in zip(gradients([traced], inputs, [dy]), gradients([eager], inputs, [dy]), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        assert torch.equal(graph(*inputs, (2, 3), 2), ops.final_layer(*inputs, (2, 3), 2))
