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
    x = (3 + 2 * torch.randn(B, T, D, device=runner.device)).to(dtype)  # off centre: a one-pass variance would show
    x = x if flat is None else oracles.with_flat_rows(x, flat, nearly=runner.backend == "triton")
    _, shift, scale = oracles.modulation(kind, x)
    y = ops.layer_norm_modulate(x, shift, scale)
    assert y.dtype == dtype
    assert y.is_contiguous()
    exact = oracles.layer_norm_modulate(x, shift, scale, torch.float64)
    assert_rounded_once(y, exact, oracles.layer_norm_modulate(x, shift, scale, torch.float32).to(dtype))


CASES = pairwise(D=WIDTHS, T=TOKENS, dtype=DTYPES, kind=MODULATIONS)
ON_KERNELS = on_kernels(CASES, D=MODEL_WIDTHS, T=MODEL_TOKENS, dtype=DTYPES, kind=("chunk6", "per_token", "fp32"))


@ON_KERNELS
def test_kernel(compiled: Runner, D: int, T: int, dtype: str, kind: str) -> None:
    check(compiled, 2, T, D, DTYPES[dtype], kind)


def check_gradients(runner: Runner, B: int, T: int, D: int, dtype: torch.dtype, kind: str, flat: float | None = None) -> None:
    x = (3 + 2 * torch.randn(B, T, D, device=runner.device)).to(dtype)
    x = x if flat is None else oracles.with_flat_rows(x, flat, nearly=runner.backend == "triton")
    _, shift, scale = oracles.modulation(kind, x)
    dy = torch.randn(B, T, D, device=runner.device).to(dtype)
    inputs = leaves(x, shift, scale)
    found = gradients([ops.layer_norm_modulate(*inputs)], inputs, [dy])

    def expected(precision: torch.dtype) -> list[Tensor]:
        copies = leaves(x, shift, scale, dtype=precision)
        return gradients([oracles.layer_norm_modulate(*copies, precision)], copies, [dy])

    for gradient, exact, eager in zip(found, expected(torch.float64), expected(torch.float32), strict=True):
        assert_rounded_once(gradient, exact, eager.to(gradient.dtype))


@ON_KERNELS
def test_kernel_gradients(compiled: Runner, D: int, T: int, dtype: str, kind: str) -> None:
    check_gradients(compiled, 2, T, D, DTYPES[dtype], kind)


@pytest.mark.parametrize("either", ["torch", "triton"], indirect=True)
@pytest.mark.parametrize(("D", "dtype"), [(384, "bf16"), (200, "fp16"), pytest.param(384, "fp32", marks=pytest.mark.full)])
def test_rows_without_variance(either: Runner, D: int, dtype: str) -> None:
    for flat in (1000.0, -30000.0, 0.1):
        if either.backend == "torch":  # which takes large samples another way
            check(either, 2, 64, D, DTYPES[dtype], "fp32", flat)
        check(either, 2, 8, D, DTYPES[dtype], "fp32", flat)
        if either.backend == "triton":  # torch's own backward is off, by 1e-3 to 0.3
            check_gradients(either, 2, 8, D, DTYPES[dtype], "fp32", flat)


def test_same_bits_in_any_order(compiled: Runner) -> None:
    x, dy = torch.randn(2, 3, 40, 384, device=compiled.device).bfloat16()
    inputs = leaves(x, *oracles.modulation("chunk6", x)[1:])
    runs = [gradients([ops.layer_norm_modulate(*inputs)], inputs, [dy]) for _ in in_any_order()]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize(("D", "T", "dtype", "kind"), CASES)
def test_torch(D: int, T: int, dtype: str, kind: str) -> None:
    with Runner.open("torch") as runner:
        check(runner, 2, T, D, DTYPES[dtype], kind)


@settings(max_examples=15, deadline=None)
@given(B=st.integers(0, 5), T=st.integers(0, 70), D=st.sampled_from([1, 24, 72, 128, 2000]), kind=st.sampled_from(MODULATIONS))
def test_any_shape(B: int, T: int, D: int, kind: str) -> None:
    with Runner.open(TARGETS[0]) as runner:
        check(runner, B, T, D, torch.bfloat16, kind)


def test_strided_input(either: Runner) -> None:
    whole = torch.randn(3, 20, 384, device=either.device)
    x = whole[:, 2:]
    _, shift, scale = oracles.modulation("chunk6", x)
    assert not x.is_contiguous()
    assert torch.equal(ops.layer_norm_modulate(x, shift, scale), ops.layer_norm_modulate(x.contiguous(), shift, scale))


def test_epsilon(either: Runner) -> None:
    x = 1e-3 * torch.randn(1, 4, 128, device=either.device)
    y = ops.layer_norm_modulate(x, None, None, eps=1e-5)
    exact, eager = (oracles.layer_norm_modulate(x, None, None, dtype, eps=1e-5) for dtype in (torch.float64, torch.float32))
    assert_rounded_once(y, exact, eager)
    assert not torch.allclose(ops.layer_norm_modulate(x, None, None), y, rtol=1e-2)


@settings(max_examples=10, deadline=None)
@given(B=st.integers(1, 3), T=st.integers(1, 40), D=st.sampled_from([1, 24, 72, 2000]), kind=st.sampled_from(MODULATIONS))
def test_gradients_of_any_shape(B: int, T: int, D: int, kind: str) -> None:
    with Runner.open(TARGETS[0]) as runner:
        if D == 1 and kind != "none":  # everything but the shift is zero, and has no relative error
            kind = "none"
        x = torch.randn(B, T, D, device=runner.device, requires_grad=True)
        if D == 1:
            (dx,) = gradients([ops.layer_norm_modulate(x, None, None)], [x], [torch.randn_like(x)])
            assert not dx.any()
        else:
            check_gradients(runner, B, T, D, torch.bfloat16, kind)


@pytest.mark.parametrize("shape", [(0, 16, 384), (2, 0, 384)])
def test_gradients_of_nothing(compiled: Runner, shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, device=compiled.device)
    inputs = leaves(x, *(torch.randn(len(x), 384, device=compiled.device) for _ in range(2)))
    found = gradients([ops.layer_norm_modulate(*inputs)], inputs, [x])
    assert [gradient.shape for gradient in found] == [shape, (len(x), 384), (len(x), 384)]
    assert not any(gradient.any() for gradient in found)


def test_errors_name_the_argument() -> None:
    x, v = torch.zeros(2, 4, 8), torch.zeros(2, 8)
    assert "expected [B, T, D]" in raises_naming("x", lambda: ops.layer_norm_modulate(x[0], v, v))
    assert "float64" in raises_naming("x", lambda: ops.layer_norm_modulate(x.double(), v, v))
    assert "unit inner stride" in raises_naming("x", lambda: ops.layer_norm_modulate(x.transpose(0, 2), v, v))
    assert "(2, 8) or (2, 4, 8)" in raises_naming("shift", lambda: ops.layer_norm_modulate(x, v[:1], v))
    assert "int64" in raises_naming("scale", lambda: ops.layer_norm_modulate(x, v, v.long()))
    assert "on meta" in raises_naming("scale", lambda: ops.layer_norm_modulate(x, v, v.to("meta")))


@ON_SIMULATOR
def test_opcheck(compiled: Runner) -> None:
    x = torch.randn(2, 6, 128, device=compiled.device)[:, 1:]
    for kind in ("chunk6", "none", "shift_only", "per_token"):
        inputs = leaves(x, *oracles.modulation(kind, x)[1:])
        torch.library.opcheck(torch.ops.ditfast.layer_norm_modulate.default, (*inputs, 1e-6, True))


@ON_CPU
def test_fullgraph(either: Runner) -> None:
    x, dy = torch.randn(2, 2, 5, 128, device=either.device)
    graph = torch.compile(ops.layer_norm_modulate, fullgraph=True, backend="aot_eager")
    for kind in ("chunk6", "none", "shift_only"):
        inputs = leaves(x, *oracles.modulation(kind, x)[1:])
        eager, traced = ops.layer_norm_modulate(*inputs), graph(*inputs)
        assert torch.equal(traced, eager)
        for a, b in zip(gradients([traced], inputs, [dy]), gradients([eager], inputs, [dy]), strict=True):
            torch.testing.assert_close(a, b)
