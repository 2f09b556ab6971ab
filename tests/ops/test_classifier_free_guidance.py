import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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


def check(runner: Runner, shape: tuple[int, ...], scale: float, channels: int, dtype: torch.dtype) -> None:
    (out,) = leaves(torch.randn(shape, device=runner.device).to(dtype))
    y = ops.classifier_free_guidance(out, scale, channels)
    assert y.dtype == dtype
    assert y.is_contiguous()
    dy = torch.randn(shape, device=runner.device).to(dtype)
    found = [y, *gradients([y], [out], [dy])]

    def expected(precision: torch.dtype) -> list[Tensor]:
        (copy,) = leaves(out, dtype=precision)
        guided = oracles.classifier_free_guidance(copy, scale, channels, precision)
        return [guided, *gradients([guided], [copy], [dy])]

    for value, exact, eager in zip(found, expected(torch.float64), expected(torch.float32), strict=True):
        assert_rounded_once(value, exact, eager.to(dtype))
    assert torch.equal(y[:, channels:], out[:, channels:])


CASES = pairwise(
    shape=((2, 8, 4, 4), (6, 4, 3, 5), (4, 8, 32, 16)),
    scale=(0.0, 0.3, 1.0, 1.5, 4.0, -1.0),
    channels=(0, 3, 4),
    dtype=DTYPES,
)
NAMES = ("shape", "scale", "channels", "dtype")
ON_KERNELS = on_kernels(CASES, shape=((4, 8, 32, 16), (6, 4, 3, 5)), scale=(1.5, 4.0), channels=(3, 4), dtype=DTYPES)


@ON_KERNELS
def test_kernel(compiled: Runner, shape: tuple[int, ...], scale: float, channels: int, dtype: str) -> None:
    check(compiled, shape, scale, channels, DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch(dtype: str) -> None:
    with Runner.open("torch") as runner:
        for scale in (0.0, 0.3, 4.0):
            check(runner, (6, 4, 3, 5), scale, 3, DTYPES[dtype])


@settings(max_examples=15, deadline=None)
@given(
    half=st.integers(0, 3),
    C=st.integers(0, 5),
    H=st.integers(0, 20),
    W=st.integers(0, 20),
    scale=st.floats(-10, 10),
    data=st.data(),
)
def test_any_shape(half: int, C: int, H: int, W: int, scale: float, data: st.DataObject) -> None:
    with Runner.open(TARGETS[0]) as runner:
        check(runner, (2 * half, C, H, W), scale, data.draw(st.integers(0, C)), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_at_either_end(either: Runner, dtype: str) -> None:
    out = (1e3 * torch.randn(2, 4, 4, 4, device=either.device)).to(DTYPES[dtype])
    for scale, half in ((1.0, out[:1]), (0.0, out[1:])):
        assert torch.equal(ops.classifier_free_guidance(out, scale, 4), half.expand_as(out))


def test_same_bits_in_any_order(compiled: Runner) -> None:
    (out,) = leaves(torch.randn(4, 8, 16, 16, device=compiled.device))
    dy = torch.randn(4, 8, 16, 16, device=compiled.device)
    runs = []
    for _ in in_any_order():
        y = ops.classifier_free_guidance(out, 4.0, 3)
        runs.append([y, *gradients([y], [out], [dy])])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_strided_input(either: Runner) -> None:
    out = torch.randn(4, 4, 6, 8, device=either.device).permute(0, 3, 1, 2)[:, 1:]
    assert torch.equal(ops.classifier_free_guidance(out, 4.0, 3), ops.classifier_free_guidance(out.contiguous(), 4.0, 3))


def test_errors_name_the_argument() -> None:
    out = torch.zeros(4, 8, 2, 2)
    assert "[2B, C, H, W]" in raises_naming("out", lambda: ops.classifier_free_guidance(out[0], 4.0, 3))
    assert "batch of 3" in raises_naming("out", lambda: ops.classifier_free_guidance(out[:3], 4.0, 3))
    assert "float64" in raises_naming("out", lambda: ops.classifier_free_guidance(out.double(), 4.0, 3))
    for channels in (-1, 9):
        assert "0..8" in raises_naming("channels", lambda: ops.classifier_free_guidance(out, 4.0, channels))  # noqa: B023


@ON_SIMULATOR
def test_opcheck(compiled: Runner) -> None:
    (out,) = leaves(torch.randn(2, 4, 3, 5, device=compiled.device))
    torch.library.opcheck(torch.ops.ditfast.classifier_free_guidance.default, (out, 4.0, 3))
    torch.library.opcheck(torch.ops.ditfast.classifier_free_guidance_backward.default, (out.detach(), 4.0, 3))


@ON_CPU
def test_fullgraph(either: Runner) -> None:
    (out,) = leaves(torch.randn(2, 4, 3, 5, device=either.device))
    graph = torch.compile(ops.classifier_free_guidance, fullgraph=True, backend="aot_eager")
    eager, traced = ops.classifier_free_guidance(out, 4.0, 3), graph(out, 4.0, 3)
    assert torch.equal(traced, eager)
    dy = torch.randn_like(eager)
    for a, b in zip(gradients([traced], [out], [dy]), gradients([eager], [out], [dy]), strict=True):
        torch.testing.assert_close(a, b)
