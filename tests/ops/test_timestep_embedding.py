import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    ON_CPU,
    ON_SIMULATOR,
    TARGETS,
    UNIT_ROUNDOFF,
    Runner,
    assert_rounded_once,
    in_any_order,
    on_kernels,
    pairwise,
    raises_naming,
)
from torch import Tensor

from ditfast import ops

ROUNDING = UNIT_ROUNDOFF[torch.float32]


def frequencies(dim: int, divisor: int | None) -> Tensor:
    """The fp32 frequencies that models were trained with."""
    return torch.exp(-math.log(10000) * torch.arange(dim // 2, dtype=torch.float32) / (divisor or dim // 2))


def features(t: Tensor, dim: int = 256, divisor: int | None = None) -> Tensor:
    """float64, of the fp32 angles: at an angle of 1000 their rounding is the features' largest error, and part of the op."""
    angles = (t.cpu().float()[:, None] * frequencies(dim, divisor)).double()
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def check(runner: Runner, t: Tensor, dim: int, divisor: int | None) -> None:
    y = ops.timestep_embedding(t.to(runner.device), dim, divisor)
    assert y.shape == (len(t), dim)
    assert y.dtype == torch.float32
    assert y.is_contiguous()
    torch.testing.assert_close(y.cpu().double(), features(t, dim, divisor), rtol=0, atol=1.5 * ROUNDING)


TIMESTEPS = {
    "int64": torch.arange(0, 1000, 37),
    "int32": torch.arange(0, 1000, 91, dtype=torch.int32),
    "fp32": torch.tensor([0.0, 1e-3, 0.5, 7.25, 999.0, 9999.9, -3.5]),
    "fp64": torch.linspace(0, 999, 9, dtype=torch.float64),
    "bf16": torch.linspace(0, 999, 9).bfloat16(),
    "far": torch.tensor([1e5, 3.3e6, 1e8]),
}
CASES = pairwise(t=TIMESTEPS, dim=(2, 6, 256, 320), divisor=("own", "diffusers"))
ON_KERNELS = on_kernels(CASES, t=TIMESTEPS, dim=(256,), divisor=("own",))


@ON_KERNELS
def test_kernel(compiled: Runner, t: str, dim: int, divisor: str) -> None:
    check(compiled, TIMESTEPS[t], dim, None if divisor == "own" else 127)


@pytest.mark.parametrize(("t", "dim", "divisor"), CASES)
def test_torch(t: str, dim: int, divisor: str) -> None:
    with Runner.open("torch") as runner:
        check(runner, TIMESTEPS[t], dim, None if divisor == "own" else 127)


@settings(max_examples=15, deadline=None)
@given(t=st.lists(st.floats(-1e4, 1e4, width=32), max_size=20), half=st.integers(1, 200))
def test_any_shape(t: list[float], half: int) -> None:
    with Runner.open(TARGETS[0]) as runner:
        check(runner, torch.tensor(t), 2 * half, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["fp32", "fp64", "bf16"])
def test_gradients(compiled: Runner, dtype: torch.dtype) -> None:
    t = (999 * torch.rand(5, device=compiled.device)).to(dtype).requires_grad_()
    dy = torch.randn(5, 320, device=compiled.device)
    (found,) = torch.autograd.grad(ops.timestep_embedding(t, 320), t, dy)
    cosines, sines = features(t.detach(), 320).chunk(2, dim=1)
    dcos, dsin = dy.cpu().double().chunk(2, dim=1)
    exact = ((dsin * cosines - dcos * sines) * frequencies(320, None).double()).sum(1)
    with Runner.open("torch"):
        (eager,) = torch.autograd.grad(ops.timestep_embedding(t, 320), t, dy)
    assert found.dtype == dtype
    # A float64 timestep does not make the fp32 features' gradient any finer.
    assert_rounded_once(*(g.float() if dtype == torch.float64 else g for g in (found, exact, eager)))


def test_no_gradient_of_integers(either: Runner) -> None:
    assert not ops.timestep_embedding(torch.arange(3, device=either.device)).requires_grad


def test_same_bits_in_any_order(compiled: Runner) -> None:
    t = torch.rand(7, device=compiled.device, requires_grad=True)
    dy = torch.randn(7, 256, device=compiled.device)
    runs = []
    for _ in in_any_order():
        y = ops.timestep_embedding(t)
        runs.append((y, *torch.autograd.grad(y, t, dy)))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_strided_and_empty_input(either: Runner) -> None:
    t = torch.arange(10, device=either.device, dtype=torch.float32)
    assert torch.equal(ops.timestep_embedding(t[1::3]), ops.timestep_embedding(t[1::3].clone()))
    assert torch.equal(ops.timestep_embedding(t[:1].expand(3)), ops.timestep_embedding(t[:1]).expand(3, 256))
    assert ops.timestep_embedding(t[:0]).shape == (0, 256)
    assert ops.timestep_embedding(t, dim=0).shape == (10, 0)


def test_errors_name_the_argument() -> None:
    assert "[B]" in raises_naming("t", lambda: ops.timestep_embedding(torch.zeros(2, 1)))
    assert "even" in raises_naming("dim", lambda: ops.timestep_embedding(torch.zeros(2), dim=7))


@ON_SIMULATOR
def test_opcheck(compiled: Runner) -> None:
    t = 999 * torch.rand(3, device=compiled.device)
    table = frequencies(256, None).to(compiled.device)
    torch.library.opcheck(torch.ops.ditfast.timestep_embedding.default, (t.clone().requires_grad_(), table))
    dy = torch.randn(3, 256, device=compiled.device)
    torch.library.opcheck(torch.ops.ditfast.timestep_embedding_backward.default, (dy, t, table))


@ON_CPU
def test_fullgraph(either: Runner) -> None:
    t = (999 * torch.rand(3, device=either.device)).requires_grad_()
    graph = torch.compile(ops.timestep_embedding, fullgraph=True, backend="aot_eager")
    eager, traced = ops.timestep_embedding(t), graph(t)
    assert torch.equal(traced, eager)
    dy = torch.randn_like(eager)
    torch.testing.assert_close(*(torch.autograd.grad(y, t, dy)[0] for y in (traced, eager)))
