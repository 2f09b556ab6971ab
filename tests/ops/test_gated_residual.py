import oracles
import pytest
import torch
from oracles import MODEL_TOKENS, MODEL_WIDTHS, TOKENS, WIDTHS
from support import (
    DTYPES,
    ON_CPU,
    ON_SIMULATOR,
    Runner,
    assert_rounded_once,
    gradients,
    leaves,
    on_kernels,
    pairwise,
    raises_naming,
)
from torch import Tensor

from ditfast import ops

CASES = pairwise(D=WIDTHS, T=TOKENS, dtype=DTYPES, kind=("chunk6", "per_token", "fp32", "none"))
ON_KERNELS = on_kernels(CASES, D=MODEL_WIDTHS, T=MODEL_TOKENS, dtype=DTYPES, kind=("chunk6", "per_token", "fp32"))


def check(runner: Runner, T: int, D: int, dtype: torch.dtype, kind: str) -> None:
    x, h = torch.randn(2, 2, T, D, device=runner.device).to(dtype)
    gate, _, _ = oracles.modulation(kind, x)
    total = ops.gated_residual(x, h, gate)
    assert total.dtype == dtype
    exact, eager = (oracles.gated_residual(x, h, gate, precision) for precision in (torch.float64, torch.float32))
    assert_rounded_once(total, exact, eager.to(dtype))


@ON_KERNELS
def test_kernel(compiled: Runner, D: int, T: int, dtype: str, kind: str) -> None:
    check(compiled, T, D, DTYPES[dtype], kind)


@pytest.mark.parametrize(("D", "T", "dtype", "kind"), CASES)
def test_torch(D: int, T: int, dtype: str, kind: str) -> None:
    with Runner.open("torch") as runner:
        check(runner, T, D, DTYPES[dtype], kind)


@pytest.mark.parametrize("gated", [False, True])
def test_mixed_dtypes(either: Runner, gated: bool) -> None:
    x, h = torch.randn(2, 5, 128, device=either.device), torch.randn(2, 5, 128, device=either.device).bfloat16()
    gate = torch.randn(2, 128, device=either.device).bfloat16() if gated else None
    for stream, branch in ((x, h), (h, x)):
        exact, eager = (oracles.gated_residual(stream, branch, gate, precision) for precision in (torch.float64, torch.float32))
        assert_rounded_once(ops.gated_residual(stream, branch, gate), exact, eager.to(stream.dtype))


def test_empty_batch(either: Runner) -> None:
    x = torch.empty(0, 16, 384, device=either.device)
    assert ops.gated_residual(x, x, torch.empty(0, 384, device=either.device)).shape == (0, 16, 384)


@ON_KERNELS
def test_kernel_gradients(compiled: Runner, D: int, T: int, dtype: str, kind: str) -> None:
    x, h, dy = torch.randn(3, 2, T, D, device=compiled.device).to(DTYPES[dtype])
    gate, _, _ = oracles.modulation(kind, x)
    inputs = leaves(x, h, gate)
    found = gradients([ops.gated_residual(*inputs)], inputs, [dy])

    def expected(precision: torch.dtype) -> list[Tensor]:
        copies = leaves(x, h, gate, dtype=precision)
        return gradients([oracles.gated_residual(*copies, precision)], copies, [dy])

    assert torch.equal(found[0], dy)
    for gradient, exact, eager in zip(found[1:], expected(torch.float64)[1:], expected(torch.float32)[1:], strict=True):
        assert_rounded_once(gradient, exact, eager.to(gradient.dtype))


def test_errors_name_the_argument() -> None:
    x = torch.zeros(2, 4, 8)
    assert "expected (2, 4, 8)" in raises_naming("h", lambda: ops.gated_residual(x, x[:1], None))
    assert "float64" in raises_naming("h", lambda: ops.gated_residual(x, x.double(), None))
    assert "(2, 8) or (2, 4, 8)" in raises_naming("gate", lambda: ops.gated_residual(x, x, torch.zeros(8)))


@ON_SIMULATOR
def test_opcheck(compiled: Runner) -> None:
    x, h = torch.randn(2, 2, 5, 128, device=compiled.device)
    for gate in (torch.randn(2, 128, device=compiled.device), torch.randn_like(x), None):
        torch.library.opcheck(torch.ops.ditfast.gated_residual.default, leaves(x, h, gate))


@ON_CPU
def test_fullgraph(either: Runner) -> None:
    x, h, dy = torch.randn(3, 2, 5, 128, device=either.device)
    graph = torch.compile(ops.gated_residual, fullgraph=True, backend="aot_eager")
    for gate in (torch.randn(2, 128, device=either.device), None):
        inputs = leaves(x, h, gate)
        eager, traced = ops.gated_residual(*inputs), graph(*inputs)
        assert torch.equal(traced, eager)
        for a, b in zip(gradients([traced], inputs, [dy]), gradients([eager], inputs, [dy]), strict=True):
            torch.testing.assert_close(a, b)
