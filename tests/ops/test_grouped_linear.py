"""Several linears of one input: by one kernel that reads a table of their addresses, or one after the other."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import oracles
import pytest
import torch
from fake_cuda import FakeCuda
from fake_cuda.fixtures import fake_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import MODEL_WIDTHS, WIDTHS
from support import (
    DTYPES,
    ON_CPU,
    ON_SIMULATOR,
    TARGETS,
    WHERE,
    Runner,
    assert_as_good_as,
    gradients,
    leaves,
    on_kernels,
    pairwise,
    raises_naming,
)
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import ditfast
import ditfast.kernels
from ditfast import ops
from ditfast.dispatch.shapes import GROUPED_ROWS

__all__ = ["fake_gpu"]

ROWS = (1, 3, 16)
OUTPUTS = (40, 96, 7)


def arguments(
    runner: Runner, M: int, outputs: tuple[int, ...], K: int, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    x = torch.randn(M, K, device=runner.device).to(dtype)
    weights = [(K**-0.5 * torch.randn(N, K, device=runner.device)).to(dtype) for N in outputs]
    return x, weights, [torch.randn(N, device=runner.device).to(dtype) for N in outputs]


def assert_right(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> None:
    found = ops.grouped_linear(x, weights, biases)
    for y, weight, bias in zip(found, weights, biases, strict=True):
        assert y.stride(1) == 1
        exact, eager = (oracles.linear(x, weight, bias, dtype) for dtype in (torch.float64, x.dtype))
        assert_as_good_as(y, exact, eager)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that ``kernels.grouped_linear`` launches."""
    names: list[str] = []
    for module in ("grouped_linear", "linear"):
        launch = sys.modules[f"ditfast.kernels.{module}"].launch

        def count(kernel: Any, *args: Any, launch: Callable[..., None] = launch, **options: Any) -> None:
            names.append(kernel.__name__)
            launch(kernel, *args, **options)

        monkeypatch.setattr(sys.modules[f"ditfast.kernels.{module}"], "launch", count)
    return names


def tables(weight: Tensor) -> list[Tensor]:
    """The table that is kept for calls whose first weight is this one, if one is."""
    return list(sys.modules["ditfast.kernels.grouped_linear"]._tables.get(weight, ())[1:])


# ------------------------------------------------------------------------------------------------ numbers
CASES = pairwise(K=WIDTHS, M=ROWS, dtype=DTYPES)


@on_kernels(CASES, K=MODEL_WIDTHS[::3], M=ROWS, dtype=["fp32", "bf16"])  # S and XL: one kernel for all
def test_kernel(compiled: Runner, K: int, M: int, dtype: str) -> None:
    assert_right(*arguments(compiled, M, OUTPUTS, K, DTYPES[dtype]))


@pytest.mark.parametrize("M", [*ROWS, GROUPED_ROWS + 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch(M: int, dtype: str) -> None:
    with Runner.open("torch") as runner:
        assert_right(*arguments(runner, M, OUTPUTS, 72, DTYPES[dtype]))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_row_has_the_same_bits_in_any_batch(compiled: Runner, dtype: str) -> None:
    x, weights, biases = arguments(compiled, GROUPED_ROWS, (200, 30), 96, DTYPES[dtype])
    whole = torch.cat(ops.grouped_linear(x, weights, biases), dim=1)
    for rows in (slice(3, 4), slice(2, 9)):
        assert torch.equal(torch.cat(ops.grouped_linear(x[rows], weights, biases), dim=1), whole[rows])


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 16), st.lists(st.integers(1, 150), min_size=1, max_size=6), st.integers(1, 140))
def test_any_sizes_on_kernels(M: int, outputs: list[int], K: int) -> None:
    with Runner.open(TARGETS[0]) as runner:
        assert_right(*arguments(runner, M, tuple(outputs), K, torch.bfloat16))


@ON_CPU
def test_gradients_are_those_of_each_linear(either: Runner) -> None:
    x, weights, biases = arguments(either, 3, OUTPUTS, 24, torch.float32)
    inputs = leaves(x, *weights, *biases)
    outputs = ops.grouped_linear(inputs[0], inputs[1:4], inputs[4:])
    upstream = [torch.randn_like(y) for y in outputs]
    copies = leaves(x, *weights, *biases)
    expected = [F.linear(copies[0], *pair) for pair in zip(copies[1:4], copies[4:], strict=True)]
    for found, wanted in zip(gradients(outputs, inputs, upstream), gradients(expected, copies, upstream), strict=True):
        torch.testing.assert_close(found, wanted)


# ------------------------------------------------------------------------------------------------ one launch, or one a linear
def test_one_launch_for_all(compiled: Runner, launches: list[str]) -> None:
    ops.grouped_linear(*arguments(compiled, 2, OUTPUTS, 32, torch.bfloat16))
    assert launches == ["grouped_linear_kernel"]


def off_alignment(weight: Tensor) -> Tensor:
    return torch.cat([weight.new_zeros(1), weight.flatten()])[1:].view(weight.shape)


@ON_SIMULATOR
def test_a_weight_off_alignment_is_multiplied_on_its_own(compiled: Runner, launches: list[str]) -> None:
    x, weights, biases = arguments(compiled, 2, OUTPUTS, 32, torch.bfloat16)
    weights[1] = off_alignment(weights[1])
    assert_right(x, weights, biases)
    assert launches == ["linear_kernel"] * 3


@ON_SIMULATOR
def test_a_bias_need_not_be_aligned(compiled: Runner, launches: list[str]) -> None:
    x, weights, biases = arguments(compiled, 2, OUTPUTS, 32, torch.bfloat16)
    biases[0] = off_alignment(biases[0])
    assert_right(x, weights, biases)
    assert launches == ["grouped_linear_kernel"]


@pytest.mark.parametrize("kind", ["many rows", "no rows", "gradients", "autocast", "transposed", "compiled"])
@ON_SIMULATOR
def test_what_the_kernel_leaves_to_torch(compiled: Runner, launches: list[str], kind: str) -> None:
    rows = {"many rows": GROUPED_ROWS + 1, "no rows": 0}.get(kind, 2)
    x, weights, biases = arguments(compiled, rows, OUTPUTS, 32, torch.float32)
    op: Callable[..., list[Tensor]] = ops.grouped_linear
    if kind == "gradients":
        biases[2].requires_grad_()
    elif kind == "transposed":
        weights[1] = weights[1].T.contiguous().T
    elif kind == "compiled":
        op = torch.compile(op, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        found = op(x, weights, biases)
        expected = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    torch.testing.assert_close(found, expected)
    assert launches == []


# ------------------------------------------------------------------------------------------------ the table
@ON_SIMULATOR
def test_a_table_is_made_once(compiled: Runner) -> None:
    x, weights, biases = arguments(compiled, 2, OUTPUTS, 32, torch.bfloat16)
    ops.grouped_linear(x, weights, biases)
    (table,) = tables(weights[0])
    assert table.tolist() == [
        [weight.data_ptr(), bias.data_ptr(), first, N]
        for weight, bias, first, N in zip(weights, biases, (0, 40, 136), OUTPUTS, strict=True)
    ]
    weights[1].mul_(2)
    assert_right(x[:1], weights, biases)
    assert [kept is table for kept in tables(weights[0])] == [True]


CHANGES: dict[str, Callable[[list[Tensor], list[Tensor]], None]] = {
    "address of a weight": lambda weights, biases: setattr(weights[1], "data", torch.randn(96, 32).bfloat16()),
    "address of a bias": lambda weights, biases: setattr(biases[0], "data", torch.randn(40).bfloat16()),
    "order": lambda weights, biases: (weights.append(weights.pop(1)), biases.append(biases.pop(1))),
    "number": lambda weights, biases: (weights.pop(), biases.pop()),
    "shape": lambda weights, biases: (
        setattr(weights[2], "data", weights[2].data[:5]),
        setattr(biases[2], "data", biases[2].data[:5]),
    ),
    "dtype": lambda weights, biases: [setattr(part, "data", part.data.half()) for part in (*weights, *biases)],
}


@pytest.mark.parametrize("change", CHANGES)
@ON_SIMULATOR
def test_a_changed_table_is_made_anew(compiled: Runner, change: str) -> None:
    x, weights, biases = arguments(compiled, 2, OUTPUTS, 32, torch.bfloat16)
    ops.grouped_linear(x, weights, biases)
    first = weights[0]
    CHANGES[change](weights, biases)
    assert_right(x.to(weights[0].dtype), weights, biases)
    (table,) = tables(first)
    assert table[:, 0].tolist() == [weight.data_ptr() for weight in weights]


@ON_SIMULATOR
def test_under_a_mode_that_sees_every_op_no_table_is_taken_for_another(compiled: Runner) -> None:
    with FlopCounterMode(display=False):
        for _ in range(2):
            assert_right(*arguments(compiled, 2, OUTPUTS, 32, torch.bfloat16))


@ON_SIMULATOR
def test_a_table_goes_with_its_first_weight(compiled: Runner) -> None:
    x, weights, biases = arguments(compiled, 2, OUTPUTS, 32, torch.bfloat16)
    ops.grouped_linear(x, weights, biases)
    known = sys.modules["ditfast.kernels.grouped_linear"]._tables
    gc.collect()
    before = len(known)
    del weights
    gc.collect()
    assert len(known) == before - 1


# ------------------------------------------------------------------------------------------------ CUDA graphs
needs_simulator = pytest.mark.skipif(WHERE != "simulator", reason="needs g++ for a fake GPU")


def captured(call: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return graph, outputs


@needs_simulator
@torch.no_grad()
def test_a_graph_keeps_the_table_of_its_warm_up(fake_gpu: FakeCuda, launches: list[str]) -> None:
    x, weights, biases = arguments(Runner("gpu", "triton", torch.device("cuda", 0)), 2, OUTPUTS, 32, torch.bfloat16)
    with ditfast.backend("triton"):
        ops.grouped_linear(x, weights, biases)
        (table,) = tables(weights[0])
        graph, outputs = captured(lambda: ops.grouped_linear(x, weights, biases))
    assert launches == ["grouped_linear_kernel"]  # and once more, by its plan, in the capture
    assert any(kept is table for kept in sys.modules["ditfast.kernels.grouped_linear"]._captured[weights[0]].values())
    with ditfast.backend("triton"):
        ops.grouped_linear(x, weights[:2], biases[:2])
    assert all(kept is not table for kept in tables(weights[0]))
    weights[1].mul_(2)
    x.add_(1)
    graph.replay()
    for y, weight, bias in zip(outputs, weights, biases, strict=True):
        exact, eager = (oracles.linear(x, weight, bias, dtype) for dtype in (torch.float64, x.dtype))
        assert_as_good_as(y, exact, eager)


@needs_simulator
@torch.no_grad()
def test_a_graph_s_table_goes_with_its_first_weight(fake_gpu: FakeCuda) -> None:
    known = sys.modules["ditfast.kernels.grouped_linear"]._captured
    gc.collect()
    before = len(known)
    x, weights, biases = arguments(Runner("gpu", "triton", torch.device("cuda", 0)), 2, OUTPUTS, 32, torch.bfloat16)
    with ditfast.backend("triton"):
        ops.grouped_linear(x, weights, biases)
        captured(partial(ops.grouped_linear, x, weights, biases))
    assert len(known) == before + 1
    del weights
    gc.collect()
    assert len(known) == before


@needs_simulator
@torch.no_grad()
def test_a_capture_without_a_warm_up_makes_no_table(fake_gpu: FakeCuda, launches: list[str]) -> None:
    """It would be copied from the host, which no capture allows."""
    x, weights, biases = arguments(Runner("gpu", "triton", torch.device("cuda", 0)), 2, OUTPUTS, 32, torch.bfloat16)
    with ditfast.backend("triton"):
        graph, outputs = captured(lambda: ops.grouped_linear(x, weights, biases))
    assert launches == ["linear_kernel"] * 3
    assert tables(weights[0]) == []
    graph.replay()
    for y, weight, bias in zip(outputs, weights, biases, strict=True):
        exact, eager = (oracles.linear(x, weight, bias, dtype) for dtype in (torch.float64, x.dtype))
        assert_as_good_as(y, exact, eager)


# ------------------------------------------------------------------------------------------------ errors
def test_errors_name_the_argument() -> None:
    x, weight, bias = torch.zeros(2, 8), torch.zeros(16, 8), torch.zeros(16)

    def call(x: Tensor = x, weight: Tensor = weight, bias: Tensor = bias) -> Callable[[], object]:
        return lambda: ops.grouped_linear(x, [weight, weight], [bias, bias])

    assert "expected [M, K]" in raises_naming("x", call(x=x[0]))
    assert "float64" in raises_naming("x", call(x=x.double()))
    assert "(16, 4) at 0, expected [N, 8]" in raises_naming("weights", call(weight=weight[:, :4]))
    assert "(0, 8) at 0" in raises_naming("weights", call(weight=weight[:0]))
    assert "torch.bfloat16 at 0, expected torch.float32" in raises_naming("weights", call(weight=weight.bfloat16()))
    assert "meta at 0, expected cpu" in raises_naming("weights", call(weight=weight.to("meta")))
    assert "(2,) at 0, expected (16,)" in raises_naming("biases", call(bias=bias[:2]))
    assert "1 for 2 weights" in raises_naming("biases", lambda: ops.grouped_linear(x, [weight] * 2, [bias]))
    assert "0 for 0 weights" in raises_naming("biases", lambda: ops.grouped_linear(x, [], []))


@ON_SIMULATOR
def test_opcheck(compiled: Runner) -> None:
    inputs = arguments(compiled, 2, OUTPUTS, 32, torch.float32)
    torch.library.opcheck(torch.ops.ditfast.grouped_linear.default, inputs)
