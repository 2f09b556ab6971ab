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
    gradients,
    in_any_order,
    leaves,
    on_kernels,
    pairwise,
    raises_naming,
)
from torch import Tensor

from ditfast import ops


def arguments(
    runner: Runner, B: int, C: int, p: int, grid: tuple[int, int], D: int, dtype: torch.dtype, positions: torch.dtype
) -> list[Tensor]:
    h, w = grid
    x = torch.randn(B, C, h * p, w * p, device=runner.device).to(dtype)
    weight = (2 * (C * p * p) ** -0.5 * torch.randn(D, C, p, p, device=runner.device)).to(dtype)
    bias = torch.randn(D, device=runner.device).to(dtype)
    return [x, weight, bias, torch.randn(1, h * w, D, device=runner.device).to(positions)]


def check(p: int, *inputs: Tensor) -> None:
    y = ops.patch_embed(*inputs, p)
    dtype = inputs[1].dtype
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert_as_good_as(y, oracles.patch_embed(*inputs, torch.float64), oracles.patch_embed(*inputs, dtype))


def check_gradients(p: int, *tensors: Tensor) -> None:
    inputs = leaves(*tensors)
    y = ops.patch_embed(*inputs, p)
    dy = torch.randn_like(y)
    found = gradients([y], inputs, [dy])

    def expected(precision: torch.dtype) -> list[Tensor]:
        copies = leaves(*tensors, dtype=precision)
        return gradients([oracles.patch_embed(*copies, precision)], copies, [dy])

    for tensor, gradient, exact, eager in zip(tensors, found, expected(torch.float64), expected(y.dtype), strict=True):
        assert gradient.dtype == tensor.dtype
        assert_as_good_as(gradient, exact, eager.to(tensor.dtype))


CASES = pairwise(D=(128, 200, 384, 1152), p=(2, 4, 8), grid=GRIDS, dtype=DTYPES, positions=("same_dtype", "fp32"))
NAMES = ("D", "p", "grid", "dtype", "positions")
ON_KERNELS = on_kernels(CASES, D=MODEL_WIDTHS, p=(2, 4, 8), grid=("3x5", "8x8"), dtype=DTYPES, positions=("same_dtype", "fp32"))


def case(runner: Runner, D: int, p: int, grid: str, dtype: str, positions: str) -> list[Tensor]:
    return arguments(runner, 3, 4, p, GRIDS[grid], D, DTYPES[dtype], DTYPES.get(positions, DTYPES[dtype]))


@ON_KERNELS
def test_kernel(compiled: Runner, D: int, p: int, grid: str, dtype: str, positions: str) -> None:
    check(p, *case(compiled, D, p, grid, dtype, positions))


@ON_KERNELS
def test_kernel_gradients(compiled: Runner, D: int, p: int, grid: str, dtype: str, positions: str) -> None:
    check_gradients(p, *case(compiled, D, p, grid, dtype, positions))


@pytest.mark.parametrize(NAMES, CASES)
def test_torch(D: int, p: int, grid: str, dtype: str, positions: str) -> None:
    with Runner.open("torch") as runner:
        inputs = case(runner, D, p, grid, dtype, positions)
        check(p, *inputs)
        check_gradients(p, *inputs)


@pytest.mark.parametrize("p", [2, 8])
def test_many_rows_take_the_large_tile(compiled: Runner, p: int) -> None:
    check(p, *arguments(compiled, 5, 4, p, (12, 10), 256, torch.bfloat16, torch.bfloat16))


@settings(max_examples=12, deadline=None)
@given(
    B=st.integers(0, 3),
    C=st.integers(1, 5),
    p=st.sampled_from([1, 2, 3, 4, 6, 8]),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    D=st.integers(1, 150),
)
def test_any_shape(B: int, C: int, p: int, grid: tuple[int, int], D: int) -> None:
    with Runner.open(TARGETS[0]) as runner:
        check(p, *arguments(runner, B, C, p, grid, D, torch.bfloat16, torch.float32))


def test_only_the_gradients_that_are_needed(compiled: Runner) -> None:
    inputs = arguments(compiled, 2, 4, 2, (2, 3), 64, torch.float32, torch.float32)
    every = leaves(*inputs)
    dy = torch.randn(2, 6, 64, device=compiled.device)
    whole = gradients([ops.patch_embed(*every, 2)], every, [dy])
    for i, gradient in enumerate(whole):
        mixed = [tensor.clone().requires_grad_(i == j) for j, tensor in enumerate(inputs)]
        (alone,) = torch.autograd.grad(ops.patch_embed(*mixed, 2), mixed[i], dy)
        assert torch.equal(alone, gradient)


def test_gradients_of_nothing(either: Runner) -> None:
    inputs = leaves(*arguments(either, 0, 4, 2, (2, 3), 64, torch.float32, torch.float32))
    dx, *others = gradients([ops.patch_embed(*inputs, 2)], inputs, [torch.empty(0, 6, 64, device=either.device)])
    assert dx.shape == (0, 4, 4, 6)
    assert not any(gradient.any() for gradient in others)


def test_same_bits_in_any_order(compiled: Runner) -> None:
    inputs = leaves(*arguments(compiled, 3, 4, 2, (8, 8), 200, torch.bfloat16, torch.float32))
    dy = torch.randn(3, 64, 200, device=compiled.device).bfloat16()
    runs = []
    for _ in in_any_order():
        y = ops.patch_embed(*inputs, 2)
        runs.append([y, *gradients([y], inputs, [dy])])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_strided_and_flat_arguments(either: Runner) -> None:
    x, weight, bias, pos_embed = arguments(either, 2, 4, 2, (4, 4), 64, torch.float32, torch.float32)
    expected = ops.patch_embed(x[:, :2, 2:, :6].contiguous(), weight[:, :2].contiguous(), bias, pos_embed[:, :9], 2)
    assert torch.equal(ops.patch_embed(x[:, :2, 2:, :6], weight[:, :2], bias, pos_embed[0, :9], 2), expected)


def test_autocast(either: Runner) -> None:
    tensors = arguments(either, 2, 4, 2, (3, 5), 64, torch.float32, torch.float32)
    inputs, copies = leaves(*tensors), leaves(*tensors)
    with torch.autocast(tensors[0].device.type, torch.bfloat16):
        y = ops.patch_embed(*inputs, 2)
        eager = torch.nn.functional.conv2d(*copies[:3], stride=2).flatten(2).transpose(1, 2) + copies[3]
    assert y.dtype == eager.dtype == torch.float32
    dy = torch.randn_like(y)
    oracle_inputs = leaves(*tensors, dtype=torch.float64)
    exact = oracles.patch_embed(*oracle_inputs, torch.float64)
    assert_as_good_as(y, exact, eager)
    triples = zip(*(gradients([o], i, [dy]) for o, i in ((y, inputs), (exact, oracle_inputs), (eager, copies))), strict=True)
    for found, expected, bar in triples:
        assert_as_good_as(found, expected, bar)


def test_channels_last(either: Runner) -> None:
    """As ``model.to(memory_format=torch.channels_last)`` lays out the weight."""
    latents, weight = torch.randn(2, 4, 8, 8, device=either.device), torch.randn(32, 4, 2, 2, device=either.device)
    bias, positions = torch.randn(32, device=either.device), torch.randn(16, 32, device=either.device)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        inputs = leaves(latents.to(memory_format=layout), weight.to(memory_format=layout))
        out = ops.patch_embed(*inputs, bias, positions, 2)
        results.append([out, *gradients([out], inputs, [torch.ones_like(out)])])
    assert results[1][0].is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_errors_name_the_argument() -> None:
    x, weight, bias, pos_embed = torch.zeros(2, 4, 6, 8), torch.zeros(16, 4, 2, 2), torch.zeros(16), torch.zeros(1, 12, 16)
    assert "multiples of 2" in raises_naming("latents", lambda: ops.patch_embed(x[:, :, 1:], weight, bias, pos_embed, 2))
    assert "[B, C, H, W]" in raises_naming("latents", lambda: ops.patch_embed(x[0], weight, bias, pos_embed, 2))
    assert "float64" in raises_naming("latents", lambda: ops.patch_embed(x.double(), weight, bias, pos_embed, 2))
    assert "1 or more" in raises_naming("patch_size", lambda: ops.patch_embed(x, weight, bias, pos_embed, 0))
    assert "[D, C, 2, 2]" in raises_naming("weight", lambda: ops.patch_embed(x, weight.flatten(1), bias, pos_embed, 2))
    assert "(16, 4, 2, 2)" in raises_naming("weight", lambda: ops.patch_embed(x, weight[:, :3], bias, pos_embed, 2))
    assert "float32" in raises_naming("weight", lambda: ops.patch_embed(x, weight.half(), bias, pos_embed, 2))
    assert "(16,)" in raises_naming("bias", lambda: ops.patch_embed(x, weight, bias[:3], pos_embed, 2))
    assert "(12, 16)" in raises_naming("pos_embed", lambda: ops.patch_embed(x, weight, bias, pos_embed[:, 1:], 2))
    assert "on meta" in raises_naming("pos_embed", lambda: ops.patch_embed(x, weight, bias, pos_embed.to("meta"), 2))


@ON_SIMULATOR
def test_opcheck(compiled: Runner) -> None:
    x, weight, bias, pos_embed = arguments(compiled, 3, 4, 2, (2, 3), 64, torch.float32, torch.float32)
    inputs = leaves(x, weight, bias, pos_embed[0])
    torch.library.opcheck(torch.ops.ditfast.patch_embed.default, (*inputs, torch.float32))
    dy = torch.randn(3, 6, 64, device=compiled.device)
    gradient_inputs = (dy, x, weight, torch.float32, torch.float32, [False, True, True, True])
    torch.library.opcheck(torch.ops.ditfast.patch_embed_backward.default, gradient_inputs)


@ON_CPU
def test_fullgraph(either: Runner) -> None:
    inputs = leaves(*arguments(either, 2, 4, 2, (2, 3), 64, torch.float32, torch.float32))
    graph = torch.compile(ops.patch_embed, fullgraph=True, backend="aot_eager")
    eager, traced = ops.patch_embed(*inputs, 2), graph(*inputs, 2)
    assert torch.equal(traced, eager)
    dy = torch.randn_like(eager)
    for a, b in zip(gradients([traced], inputs, [dy]), gradients([eager], inputs, [dy]), strict=True):
        torch.testing.assert_close(a, b)
