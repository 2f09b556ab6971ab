import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import MODEL_TOKENS
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

import ditfast
from ditfast import ops


def arguments(runner: Runner, B: int, T: int, D: int, dtype: torch.dtype, hidden: int | None = None) -> list[Tensor]:
    H = hidden or 4 * D
    scaled = ((1, (B, T, D)), (2 * D**-0.5, (H, D)), (1, (H,)), (H**-0.5, (D, H)), (1, (D,)))
    return [(factor * torch.randn(*shape, device=runner.device)).to(dtype) for factor, shape in scaled]


def check(runner: Runner, B: int, T: int, D: int, dtype: torch.dtype, hidden: int | None = None) -> None:
    """Output and gradients."""
    given = arguments(runner, B, T, D, dtype, hidden)
    dy = torch.randn(B, T, D, device=runner.device).to(dtype)
    inputs = leaves(*given)
    y = ops.mlp(*inputs)
    found = [y, *gradients([y], inputs, [dy])]

    def expected(precision: torch.dtype) -> list[Tensor]:
        copies = leaves(*given, dtype=precision)
        y = oracles.mlp(*copies, precision)
        return [y, *gradients([y], copies, [dy])]

    for value, exact, eager in zip(found, expected(torch.float64), expected(dtype), strict=True):
        assert_as_good_as(value, exact, eager)


CASES = pairwise(D=(64, 200, 384), T=(1, 16, 17, 257), dtype=DTYPES)
ON_KERNELS = on_kernels(CASES, D=(384, 768), T=(17, *MODEL_TOKENS[:2]), dtype=DTYPES)


@ON_KERNELS
def test_kernel(compiled: Runner, D: int, T: int, dtype: str) -> None:
    check(compiled, 2, T, D, DTYPES[dtype])


@pytest.mark.parametrize(("D", "T", "dtype"), CASES)
def test_torch(D: int, T: int, dtype: str) -> None:
    with Runner.open("torch") as runner:
        check(runner, 2, T, D, DTYPES[dtype])


# Fewer hidden columns would leave a gradient of so few numbers that its error and eager's are two throws of dice.
@settings(max_examples=10, deadline=None)
@given(B=st.integers(1, 3), T=st.integers(1, 40), D=st.integers(1, 100), hidden=st.integers(16, 200))
def test_any_shape(B: int, T: int, D: int, hidden: int) -> None:
    with Runner.open(TARGETS[0]) as runner:
        check(runner, B, T, D, torch.bfloat16, hidden)


def test_inference_and_training_compute_the_same(either: Runner) -> None:
    inputs = leaves(*arguments(either, 2, 20, 64, torch.bfloat16))
    with torch.no_grad():
        without = ops.mlp(*inputs)
    assert torch.equal(ops.mlp(*inputs), without)


@pytest.mark.skipif(WHERE != "simulator", reason="counts launches on the simulator")
def test_one_tensor_of_the_hidden_layer_is_kept() -> None:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with Runner.open("sm_80") as runner, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ops.mlp(*leaves(*arguments(runner, 2, 16, 64, torch.bfloat16)))
    assert sum(tensor.shape == (2, 16, 256) for tensor in kept) == 1


def test_empty_batch(either: Runner) -> None:
    inputs = leaves(*arguments(either, 0, 5, 16, torch.float32))
    y = ops.mlp(*inputs)
    assert y.shape == (0, 5, 16)
    assert [g.shape for g in gradients([y], inputs, [y])] == [(0, 5, 16), (64, 16), (64,), (16, 64), (16,)]


def test_same_bits_in_any_order(compiled: Runner) -> None:
    inputs = leaves(*arguments(compiled, 2, 40, 72, torch.bfloat16))
    dy = torch.randn(2, 40, 72, device=compiled.device)
    runs = [gradients([ops.mlp(*inputs)], inputs, [dy]) for _ in in_any_order()]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_autocast(either: Runner) -> None:
    inputs = leaves(*arguments(either, 2, 4, 16, torch.float32))
    with torch.autocast(either.device.type, torch.bfloat16):
        y = ops.mlp(*inputs)
    assert y.dtype == torch.bfloat16
    assert {g.dtype for g in gradients([y], inputs, [torch.randn_like(y)])} == {torch.float32}


def test_errors_name_the_argument() -> None:
    with Runner.open("torch") as runner:
        given = arguments(runner, 2, 4, 8, torch.float32)
    for position, name, wrong in (
        (0, "x", lambda t: t[0]),
        (1, "fc1_weight", lambda t: t[:, :4]),
        (2, "fc1_bias", lambda t: t[:4]),
        (3, "fc2_weight", lambda t: t[:, :4]),
        (4, "fc2_bias", lambda t: t.bfloat16()),
    ):
        broken = [wrong(tensor) if i == position else tensor for i, tensor in enumerate(given)]
        raises_naming(name, lambda broken=broken: ops.mlp(*broken))
        with ditfast.backend("triton"):
            raises_naming(name, lambda broken=broken: ops.mlp(*leaves(*broken)))


@ON_SIMULATOR
def test_opcheck(compiled: Runner) -> None:
    inputs = leaves(*arguments(compiled, 2, 5, 16, torch.float32))
    torch.library.opcheck(torch.ops.ditfast.mlp.default, (*inputs, True))


@ON_CPU
def test_fullgraph(either: Runner) -> None:
    inputs = leaves(*arguments(either, 2, 5, 16, torch.float32))
    dy = torch.randn(2, 5, 16, device=either.device)
    graph = torch.compile(ops.mlp, fullgraph=True, backend="aot_eager")
    eager, traced = ops.mlp(*inputs), graph(*inputs)
    torch.testing.assert_close(traced, eager)
    for a, b in zip(gradients([traced], inputs, [dy]), gradients([eager], inputs, [dy]), strict=True):
        torch.testing.assert_close(a, b)
