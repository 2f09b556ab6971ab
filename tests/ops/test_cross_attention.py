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
    UNIT_ROUNDOFF,
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


def arguments(runner: Runner, B: int, T: int, S: int, H: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What the q and kv linears give out."""
    q = torch.randn(B, T, H * d, device=runner.device).to(dtype).unflatten(-1, (H, d))
    return q, torch.randn(B, S, 2 * H * d, device=runner.device).to(dtype).unflatten(-1, (2, H, d))


def check(runner: Runner, B: int, T: int, S: int, H: int, d: int, dtype: torch.dtype) -> None:
    """Output and gradients; with one key the gradient of q is zero, and has no relative error."""
    given = arguments(runner, B, T, S, H, d, dtype)
    dout = torch.randn(B, T, H * d, device=runner.device).to(dtype)
    inputs = leaves(*given)
    out = ops.cross_attention(*inputs)
    assert out.is_contiguous()
    found = [out, *gradients([out], inputs, [dout])]

    def expected(precision: torch.dtype) -> list[Tensor]:
        copies = leaves(*given, dtype=precision)
        out = oracles.cross_attention(*copies, precision)
        return [out, *gradients([out], copies, [dout])]

    names = ("out", "dq", "dkv")
    for name, value, exact, eager in zip(names, found, expected(torch.float64), expected(dtype), strict=True):
        if name == "dq" and S == 1:
            cancelled = dout.abs().max() * given[1].abs().max() ** 2  # the size of the terms whose difference it is
            assert value.abs().max() <= 10 * UNIT_ROUNDOFF[torch.float32] * cancelled
        else:
            assert_as_good_as(value, exact, eager)


CASES = pairwise(T=(16, 70), S=(1, 2, 33, 100), d=(64, 72), dtype=DTYPES)
ON_KERNELS = on_kernels(CASES, T=(16, 70), S=(1, 100), d=(64, 72), dtype=DTYPES)


@ON_KERNELS
def test_kernels(compiled: Runner, T: int, S: int, d: int, dtype: str) -> None:
    check(compiled, 2, T, S, 3, d, DTYPES[dtype])


@pytest.mark.parametrize(("T", "S", "d", "dtype"), CASES)
def test_torch(T: int, S: int, d: int, dtype: str) -> None:
    with Runner.open("torch") as runner:
        q, kv = arguments(runner, 2, T, S, 3, d, DTYPES[dtype])
        out = ops.cross_attention(q, kv)
        assert out.is_contiguous()
        exact, eager = (oracles.cross_attention(q, kv, precision) for precision in (torch.float64, q.dtype))
        assert_as_good_as(out, exact, eager)


def test_gradients_of_torch() -> None:
    with Runner.open("torch") as runner:
        inputs = leaves(*arguments(runner, 2, 7, 2, 3, 8, torch.float32))
        dout = torch.randn(2, 7, 24, device=runner.device)
        found = gradients([ops.cross_attention(*inputs)], inputs, [dout])
        exact = gradients([oracles.cross_attention(*inputs, torch.float64)], inputs, [dout])
        torch.testing.assert_close(found, exact)


@settings(max_examples=10, deadline=None)
@given(B=st.integers(1, 3), T=st.integers(1, 70), S=st.integers(1, 70), H=st.integers(1, 3), d=st.sampled_from([8, 36, 72]))
def test_any_shape(B: int, T: int, S: int, H: int, d: int) -> None:
    with Runner.open(TARGETS[0]) as runner:
        check(runner, B, T, S, H, d, torch.bfloat16)


@pytest.mark.parametrize(("B", "T"), [(0, 16), (2, 0)])
def test_gradients_of_nothing(either: Runner, B: int, T: int) -> None:
    inputs = leaves(*arguments(either, B, T, 2, 2, 72, torch.float32))
    out = ops.cross_attention(*inputs)
    assert out.shape == (B, T, 144)
    dq, dkv = gradients([out], inputs, [torch.empty_like(out)])
    assert dq.shape == (B, T, 2, 72)
    assert dkv.shape == (B, 2, 2, 2, 72)
    assert not dkv.any()


def test_same_bits_in_any_order(compiled: Runner) -> None:
    inputs = leaves(*arguments(compiled, 2, 100, 2, 2, 72, torch.bfloat16))
    dout = torch.randn(2, 100, 144, device=compiled.device)
    runs = []
    for _ in in_any_order():
        out = ops.cross_attention(*inputs)
        runs.append([out, *gradients([out], inputs, [dout])])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_reads_its_arguments_as_they_lie(either: Runner) -> None:
    q, kv = (whole[:, 2:] for whole in arguments(either, 2, 20, 5, 4, 32, torch.float32))
    assert_same_however_it_lies(either, ops.cross_attention(q, kv), ops.cross_attention(q.contiguous(), kv.contiguous()))


def test_autocast(either: Runner) -> None:
    inputs = leaves(*arguments(either, 1, 17, 2, 2, 32, torch.float32))
    with torch.autocast(either.device.type, torch.bfloat16):
        out = ops.cross_attention(*inputs)
    assert out.dtype == torch.bfloat16
    found = gradients([out], inputs, [torch.randn(1, 17, 64, device=either.device)])
    assert [gradient.dtype for gradient in found] == [torch.float32] * 2


def test_errors_name_the_argument() -> None:
    q, kv = torch.zeros(2, 5, 2, 8), torch.zeros(2, 3, 2, 2, 8)
    assert "expected [B, T, H, d]" in raises_naming("q", lambda: ops.cross_attention(q[0], kv))
    assert "float64" in raises_naming("q", lambda: ops.cross_attention(q.double(), kv))
    assert "contiguous" in raises_naming("q", lambda: ops.cross_attention(q.transpose(1, 2), kv))
    assert "expected [B, S, 2, H, d]" in raises_naming("kv", lambda: ops.cross_attention(q, kv[:, :, :1]))
    assert "(2, 'S', 2, 2, 8)" in raises_naming("kv", lambda: ops.cross_attention(q, kv[:1]))
    assert "at least 1" in raises_naming("kv", lambda: ops.cross_attention(q, kv[:, :0]))
    assert "bfloat16" in raises_naming("kv", lambda: ops.cross_attention(q, kv.bfloat16()))
    assert "on meta" in raises_naming("kv", lambda: ops.cross_attention(q, kv.to("meta")))
    assert "contiguous" in raises_naming("kv", lambda: ops.cross_attention(q, kv.transpose(2, 3)))


def test_the_kernels_have_a_largest_head(compiled: Runner) -> None:
    q, kv = arguments(compiled, 1, 2, 2, 1, 320, torch.float32)
    assert "at most 256" in raises_naming("q", lambda: ops.cross_attention(q, kv))


@ON_SIMULATOR
def test_opcheck(compiled: Runner) -> None:
    inputs = leaves(*arguments(compiled, 2, 5, 2, 2, 16, torch.float32))
    torch.library.opcheck(torch.ops.ditfast.cross_attention.default, (*inputs, True))


@ON_CPU
def test_fullgraph(either: Runner) -> None:
    inputs = leaves(*arguments(either, 2, 5, 2, 2, 16, torch.float32))
    dout = torch.randn(2, 5, 32, device=either.device)
    graph = torch.compile(ops.cross_attention, fullgraph=True, backend="aot_eager")
    eager, traced = ops.cross_attention(*inputs), graph(*inputs)
    assert torch.equal(traced, eager)
    for a, b in zip(gradients([traced], inputs, [dout]), gradients([eager], inputs, [dout]), strict=True):
        torch.testing.assert_close(a, b)
