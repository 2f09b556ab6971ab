import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import MODEL_TOKENS, MODEL_WIDTHS, MODULATIONS, TOKENS, WIDTHS
from support import (
    DTYPES,
    ON_CPU,
    ON_SIMULATOR,
    TARGETS,
    Runner,
    assert_rounded_once,
    error,
    gradients,
    in_any_order,
    leaves,
    on_kernels,
    pairwise,
    raises_naming,
)
from torch import Tensor

from ditfast import ops


def check(runner: Runner, B: int, T: int, D: int, dtype: torch.dtype, kind: str, flat: float | None = None) -> None:
    x = (3 + torch.randn(B, T, D, device=runner.device)).to(dtype)
    h = torch.randn(B, T, D, device=runner.device).to(dtype)
    if flat is not None:
        x, h = oracles.with_flat_rows(x, flat, nearly=runner.backend == "triton"), oracles.with_flat_rows(h, 0.0, nearly=False)
    gate, shift, scale = oracles.modulation(kind, x)
    x_new, u = ops.gated_residual_layer_norm_modulate(x, h, gate, shift, scale)
    assert x_new.dtype == u.dtype == dtype
    exact, eager = (oracles.gated_residual(x, h, gate, precision) for precision in (torch.float64, torch.float32))
    assert_rounded_once(x_new, exact, eager.to(dtype))
    exact, eager = (oracles.layer_norm_modulate(x_new, shift, scale, precision) for precision in (torch.float64, torch.float32))
    assert_rounded_once(u, exact, eager.to(dtype))


CASES = pairwise(D=WIDTHS, T=TOKENS, dtype=DTYPES, kind=MODULATIONS)
ON_KERNELS = on_kernels(CASES, D=MODEL_WIDTHS, T=MODEL_TOKENS, dtype=DTYPES, kind=("chunk6", "per_token", "fp32"))


@ON_KERNELS
def test_kernel(compiled: Runner, D: int, T: int, dtype: str, kind: str) -> None:
    check(compiled, 2, T, D, DTYPES[dtype], kind)


def check_gradients(runner: Runner, B: int, T: int, D: int, dtype: torch.dtype, kind: str, flat: float | None = None) -> None:
    x = (3 + 2 * torch.randn(B, T, D, device=runner.device)).to(dtype)
    h = torch.randn(B, T, D, device=runner.device).to(dtype)
    if flat is not None:
        x, h = oracles.with_flat_rows(x, flat, nearly=runner.backend == "triton"), oracles.with_flat_rows(h, 0.0, nearly=False)
    vectors = oracles.modulation(kind, x)
    upstream = torch.randn(2, B, T, D, device=runner.device).to(dtype)
    inputs = leaves(x, h, *vectors)
    outputs = ops.gated_residual_layer_norm_modulate(*inputs)
    found = gradients(outputs, inputs, upstream)

    def expected(precision: torch.dtype) -> list[Tensor]:
        copies = leaves(x, h, *vectors, dtype=precision)
        total = oracles.gated_residual(*copies[:3], precision)
        stored = total + (outputs[0].to(precision) - total).detach()  # what was normalised, and what the backward sees
        return gradients([stored, oracles.layer_norm_modulate(stored, *copies[3:], precision)], copies, upstream)

    for gradient, exact, eager in zip(found, expected(torch.float64), expected(torch.float32), strict=True):
        assert_rounded_once(gradient, exact, eager.to(gradient.dtype))


@ON_KERNELS
def test_kernel_gradients(compiled: Runner, D: int, T: int, dtype: str, kind: str) -> None:
    check_gradients(compiled, 2, T, D, DTYPES[dtype], kind)


@settings(max_examples=10, deadline=None)
@given(B=st.integers(1, 3), T=st.integers(1, 40), D=st.sampled_from([24, 72, 2000]), kind=st.sampled_from(MODULATIONS))
def test_gradients_of_any_shape(B: int, T: int, D: int, kind: str) -> None:
    with Runner.open(TARGETS[0]) as runner:
        check_gradients(runner, B, T, D, torch.bfloat16, kind)


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp16", marks=pytest.mark.full)])
def test_rows_without_variance(either: Runner, dtype: str) -> None:
    for flat in (1000.0, -30000.0):
        check(either, 2, 8, 384, DTYPES[dtype], "fp32", flat)
        if either.backend == "triton":
            check_gradients(either, 2, 8, 384, DTYPES[dtype], "fp32", flat)


def test_many_rows_add_up(compiled: Runner) -> None:
    """Enough rows for 8 and for 16 a program, in a last program that is not full."""
    check_gradients(compiled, 3, 500, 128, torch.bfloat16, "chunk6")
    check_gradients(compiled, 3, 1400, 128, torch.float32, "chunk6")


def test_same_bits_in_any_order(compiled: Runner) -> None:
    x, h, *upstream = torch.randn(4, 3, 40, 384, device=compiled.device).bfloat16()
    inputs = leaves(x, h, *oracles.modulation("chunk6", x))
    runs = []
    for _ in in_any_order():
        outputs = ops.gated_residual_layer_norm_modulate(*inputs)
        runs.append([*outputs, *gradients(outputs, inputs, upstream)])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_only_one_of_the_outputs_used(compiled: Runner) -> None:
    x, h, dy = torch.randn(3, 2, 5, 128, device=compiled.device)
    vectors = oracles.modulation("chunk6", x)
    for used in (0, 1):
        for some in (vectors, (None, None, None)):
            inputs, copies = leaves(x, h, *some), leaves(x, h, *some, dtype=torch.float64)
            output = ops.gated_residual_layer_norm_modulate(*inputs)[used]
            total = oracles.gated_residual(*copies[:3], torch.float64)
            exact = oracles.layer_norm_modulate(total, *copies[3:], torch.float64) if used else total
            for a, b in zip(
                *(
                    torch.autograd.grad(o, [v for v in i if v is not None], d, allow_unused=True)
                    for o, i, d in ((output, inputs, dy), (exact, copies, dy.double()))
                ),
                strict=True,
            ):
                assert (a is None) == (b is None)
                assert a is None or torch.allclose(a.double(), b, rtol=1e-4, atol=1e-5)


def test_mixed_dtypes(compiled: Runner) -> None:
    """As under autocast: an fp32 stream, a bf16 branch, bf16 vectors; the gradients have the dtypes of their inputs."""
    x, h, *upstream = torch.randn(4, 2, 20, 128, device=compiled.device)
    vectors = [vector.bfloat16() for vector in torch.randn(3, 2, 128, device=compiled.device)]
    for some in (vectors, [None] * 3):
        inputs = leaves(x, h.bfloat16(), *some)
        copies = leaves(*inputs, dtype=torch.float64)
        outputs = ops.gated_residual_layer_norm_modulate(*inputs)
        total = oracles.gated_residual(*copies[:3], torch.float64)
        exact = gradients([total, oracles.layer_norm_modulate(total, *copies[3:], torch.float64)], copies, upstream)
        for a, b, argument in zip(
            gradients(outputs, inputs, upstream), exact, [i for i in inputs if i is not None], strict=True
        ):
            assert a.dtype == argument.dtype
            assert error(a, b) < (1e-6 if a.dtype == torch.float32 else 2.5e-3)


@pytest.mark.parametrize(("D", "T", "dtype", "kind"), CASES)
def test_torch(D: int, T: int, dtype: str, kind: str) -> None:
    with Runner.open("torch") as runner:
        check(runner, 2, T, D, DTYPES[dtype], kind)


@settings(max_examples=15, deadline=None)
@given(B=st.integers(0, 5), T=st.integers(0, 70), D=st.sampled_from([1, 24, 72, 128, 2000]), kind=st.sampled_from(MODULATIONS))
def test_any_shape(B: int, T: int, D: int, kind: str) -> None:
    with Runner.open(TARGETS[0]) as runner:
        check(runner, B, T, D, torch.bfloat16, kind)


def test_strided_inputs(either: Runner) -> None:
    x, h = torch.randn(2, 3, 20, 384, device=either.device)[:, :, :18]
    vectors = oracles.modulation("chunk6", x)
    found = ops.gated_residual_layer_norm_modulate(x, h, *vectors)
    for a, b in zip(found, ops.gated_residual_layer_norm_modulate(x.contiguous(), h.contiguous(), *vectors), strict=True):
        assert torch.equal(a, b)


def test_errors_name_the_argument() -> None:
    x, v = torch.zeros(2, 4, 8), torch.zeros(2, 8)
    op = ops.gated_residual_layer_norm_modulate
    assert "expected [B, T, D]" in raises_naming("x", lambda: op(x[0], x, v, v, v))
    assert "expected (2, 4, 8)" in raises_naming("h", lambda: op(x, x[:, :2], v, v, v))
    for position, name in ((2, "gate"), (3, "shift"), (4, "scale")):
        arguments = [x, x, v, v, v]
        arguments[position] = v[:, :4]
        assert "(2, 8) or (2, 4, 8)" in raises_naming(name, lambda arguments=arguments: op(*arguments))


@ON_SIMULATOR
def test_opcheck(compiled: Runner) -> None:
    x, h = torch.randn(2, 2, 5, 128, device=compiled.device)
    op = torch.ops.ditfast.gated_residual_layer_norm_modulate.default
    for kind in ("chunk6", "none", "per_token"):
        torch.library.opcheck(op, (*leaves(x, h, *oracles.modulation(kind, x)), 1e-6, True))


@ON_CPU
def test_fullgraph(either: Runner) -> None:
    x, h, *upstream = torch.randn(4, 2, 5, 128, device=either.device)
    graph = torch.compile(ops.gated_residual_layer_norm_modulate, fullgraph=True, backend="aot_eager")
    for kind in ("chunk6", "none"):
        inputs = leaves(x, h, *oracles.modulation(kind, x))
        eager, traced = ops.gated_residual_layer_norm_modulate(*inputs), graph(*inputs)
        assert all(torch.equal(a, b) for a, b in zip(traced, eager, strict=True))
        for a, b in zip(gradients(traced, inputs, upstream), gradients(eager, inputs, upstream), strict=True):
            torch.testing.assert_close(a, b)
