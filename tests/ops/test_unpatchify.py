import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import GRIDS
from support import DTYPES, ON_CPU, ON_SIMULATOR, TARGETS, Runner, in_any_order, on_kernels, pairwise, raises_naming

from ditfast import ops


def check(runner: Runner, B: int, C: int, p: int, grid: tuple[int, int], dtype: torch.dtype) -> None:
    """It moves values, so everything is exact."""
    x = torch.randn(B, grid[0] * grid[1], C * p * p, device=runner.device).to(dtype).requires_grad_()
    y, expected = ops.unpatchify(x, grid, p), oracles.unpatchify(x, grid, p)
    assert y.is_contiguous()
    assert torch.equal(y, expected)
    dy = torch.randn_like(y)
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(expected, x, dy)[0])


CASES = pairwise(p=(1, 2, 4, 8), C=(1, 4, 6), grid=GRIDS, dtype=DTYPES)
NAMES = ("p", "C", "grid", "dtype")
ON_KERNELS = on_kernels(CASES, p=(2, 4, 8), C=(4, 6), grid=("3x5", "8x8"), dtype=DTYPES)


@ON_KERNELS
def test_kernel(compiled: Runner, p: int, C: int, grid: str, dtype: str) -> None:
    check(compiled, 3, C, p, GRIDS[grid], DTYPES[dtype])


@pytest.mark.parametrize(NAMES, CASES)
def test_torch(p: int, C: int, grid: str, dtype: str) -> None:
    with Runner.open("torch") as runner:
        check(runner, 3, C, p, GRIDS[grid], DTYPES[dtype])


@settings(max_examples=12, deadline=None)
@given(
    B=st.integers(0, 4),
    C=st.integers(1, 9),
    p=st.sampled_from([1, 2, 3, 4, 6, 8]),
    grid=st.tuples(st.integers(0, 20), st.integers(0, 20)),
)
def test_any_shape(B: int, C: int, p: int, grid: tuple[int, int]) -> None:
    with Runner.open(TARGETS[0]) as runner:
        check(runner, B, C, p, grid, torch.bfloat16)


def test_same_bits_in_any_order(compiled: Runner) -> None:
    x = torch.randn(3, 240, 32, device=compiled.device)
    runs = [ops.unpatchify(x, (12, 20), 2) for _ in in_any_order()]
    assert all(torch.equal(run, runs[0]) for run in runs)


def test_strided_input(either: Runner) -> None:
    x = torch.randn(2, 14, 48, device=either.device)[:, 2:, :32]
    assert torch.equal(ops.unpatchify(x, (3, 4), 4), ops.unpatchify(x.contiguous(), (3, 4), 4))


def test_errors_name_the_argument() -> None:
    x = torch.zeros(2, 6, 32)
    assert "[B, T, D]" in raises_naming("x", lambda: ops.unpatchify(x[0], (2, 3), 2))
    assert "int64" in raises_naming("x", lambda: ops.unpatchify(x.long(), (2, 3), 2))
    assert "(2, 4)" in raises_naming("grid", lambda: ops.unpatchify(x, (2, 4), 2))
    assert "(h, w)" in raises_naming("grid", lambda: ops.unpatchify(x, (6,), 2))
    assert "(h, w)" in raises_naming("grid", lambda: ops.unpatchify(x, (-2, -3), 2))
    assert "32 values" in raises_naming("patch_size", lambda: ops.unpatchify(x, (2, 3), 5))
    assert "1 or more" in raises_naming("patch_size", lambda: ops.unpatchify(x, (2, 3), 0))


@ON_SIMULATOR
def test_opcheck(compiled: Runner) -> None:
    x = torch.randn(2, 6, 32, device=compiled.device, requires_grad=True)
    torch.library.opcheck(torch.ops.ditfast.unpatchify.default, (x, (2, 3), 2))
    dy = torch.randn(2, 8, 4, 6, device=compiled.device)
    torch.library.opcheck(torch.ops.ditfast.unpatchify_backward.default, (dy, 2))


@ON_CPU
def test_fullgraph(either: Runner) -> None:
    x = torch.randn(2, 6, 32, device=either.device, requires_grad=True)
    graph = torch.compile(ops.unpatchify, fullgraph=True, backend="aot_eager")
    eager, traced = ops.unpatchify(x, (2, 3), 2), graph(x, (2, 3), 2)
    assert torch.equal(traced, eager)
    dy = torch.randn_like(eager)
    assert torch.equal(torch.autograd.grad(traced, x, dy)[0], torch.autograd.grad(eager, x, dy)[0])
