import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DTYPES, ON_CPU, ON_SIMULATOR, TARGETS, Runner, assert_as_good_as, on_kernels, pairwise, raises_naming
from torch import Tensor

from ditfast import ops

DDPM = (1.02, -0.7, 0.3, 0.69, math.log(0.01), math.log(0.04))
EULER = (0.0, 1.0, -0.05, 1.0, -math.inf, -math.inf)


def oracle(
    x: Tensor, output: Tensor, noise: Tensor | None, update: Tensor, scale: Tensor | None, guided: int, clip: bool
) -> Tensor:
    """The formula a channel at a time, in the dtype of x."""
    batch, channels = x.shape[:2]
    a, b, c, d, low, high = update
    result = torch.empty_like(x)
    for k in range(channels):
        predicted = output[:batch, k]
        if scale is not None and k < guided:
            s = scale.view(-1, 1, 1)
            predicted = (1 - s) * output[batch:, k] + s * predicted
        x0 = a * x[:, k] + b * predicted
        if clip:
            x0 = torch.minimum(torch.maximum(x0, torch.full_like(x0, -1)), torch.full_like(x0, 1))
        result[:, k] = c * x0 + d * x[:, k]
        if noise is not None:
            place = (output[:batch, channels + k] + 1) / 2 if output.shape[1] > channels else torch.zeros_like(x0)
            result[:, k] += torch.exp(((1 - place) * low + place * high) / 2) * noise[:, k]
    return result


def check(
    runner: Runner,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    row: tuple[float, ...] = DDPM,
    learned: bool = True,
    guided: int | None = 3,
    noisy: bool = True,
    clip: bool = False,
) -> None:
    B, C, H, W = shape
    samples = B if guided is None else 2 * B
    x, noise = torch.randn(shape, device=runner.device), torch.randn(shape, device=runner.device)
    output = torch.randn(samples, C * (2 if learned else 1), H, W, device=runner.device).to(dtype)
    scale = None if guided is None else 1 + 3 * torch.rand(B, device=runner.device)
    update = torch.tensor(row, device=runner.device)
    arguments = (x, output, noise if noisy else None, update, scale)
    found = ops.denoise_update(*arguments, guided_channels=min(guided or 0, C), clip=clip)
    assert found.is_contiguous()
    exact, eager = (
        oracle(*(None if a is None else a.to(precision) for a in arguments), min(guided or 0, C), clip)
        for precision in (torch.float64, torch.float32)
    )
    if found.numel():
        assert_as_good_as(found, exact, eager)


CASES = pairwise(
    shape=((1, 4, 4, 4), (3, 4, 32, 32), (2, 1, 8, 8), (2, 3, 5, 7)),
    learned=(True, False),
    guided=(None, 0, 3),
    noisy=(True, False),
    clip=(True, False),
    dtype=DTYPES,
)
NAMES = ("shape", "learned", "guided", "noisy", "clip", "dtype")
ON_KERNELS = on_kernels(
    CASES,
    shape=((3, 4, 32, 32), (2, 3, 5, 7)),
    learned=(True, False),
    guided=(None, 3),
    noisy=(True, False),
    clip=(True, False),
    dtype=DTYPES,
)


@ON_KERNELS
def test_kernel(
    compiled: Runner, shape: tuple[int, ...], learned: bool, guided: int | None, noisy: bool, clip: bool, dtype: str
) -> None:
    check(compiled, shape, DTYPES[dtype], DDPM, learned, guided, noisy, clip)


@pytest.mark.parametrize(NAMES, CASES)
def test_torch(shape: tuple[int, ...], learned: bool, guided: int | None, noisy: bool, clip: bool, dtype: str) -> None:
    with Runner.open("torch") as runner:
        check(runner, shape, DTYPES[dtype], DDPM, learned, guided, noisy, clip)


@settings(max_examples=15, deadline=None)
@given(B=st.integers(0, 3), C=st.integers(1, 5), H=st.integers(0, 20), W=st.integers(1, 20), clip=st.booleans())
def test_any_shape(B: int, C: int, H: int, W: int, clip: bool) -> None:
    with Runner.open(TARGETS[0]) as runner:
        check(runner, (B, C, H, W), torch.bfloat16, clip=clip)


def test_without_noise_the_ends_of_the_variance_are_not_read(either: Runner) -> None:
    check(either, (2, 4, 8, 8), torch.bfloat16, EULER, noisy=False)


def test_clip_bounds_x0(either: Runner) -> None:
    x = 100 * torch.randn(2, 4, 8, 8, device=either.device)
    only_x0 = torch.tensor([1.0, 0.0, 1.0, 0.0, -math.inf, -math.inf], device=either.device)
    found = ops.denoise_update(x, torch.zeros_like(x), None, only_x0, clip=True)
    assert torch.equal(found, x.clamp(-1, 1))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_clip_keeps_nan_and_bounds_infinity(either: Runner, value: float) -> None:
    x, output = torch.zeros(1, 1, 2, 2, device=either.device), torch.full((1, 1, 2, 2), value, device=either.device)
    only_output = torch.tensor([0.0, 1.0, 1.0, 0.0, -1.0, -1.0], device=either.device)
    found = ops.denoise_update(x, output, None, only_output, clip=True)
    torch.testing.assert_close(found, output.clamp(-1, 1), equal_nan=True)


def test_update_and_scale_of_any_stride(either: Runner) -> None:
    """A row of numbers that is a column of a table, and one scale for all samples."""
    x, output = torch.randn(2, 4, 8, 8, device=either.device), torch.randn(4, 8, 8, 8, device=either.device)
    update = torch.randn(6, 5, device=either.device)[:, 2]
    for scale in (torch.full((1,), 4.0, device=either.device).expand(2), torch.rand(4, device=either.device)[::2]):
        found = ops.denoise_update(x, output, x, update, scale, 3)
        assert torch.equal(found, ops.denoise_update(x, output, x, update.contiguous(), scale.contiguous(), 3))


def test_channels_last_inputs_give_a_contiguous_result(either: Runner) -> None:
    x, output = torch.randn(2, 4, 8, 8, device=either.device), torch.randn(4, 8, 8, 8, device=either.device)
    update, scale = torch.tensor(DDPM, device=either.device), torch.rand(2, device=either.device)
    last = [tensor.to(memory_format=torch.channels_last) for tensor in (x, output, x)]
    for noise in (None, last[2]):
        found = ops.denoise_update(*last[:2], noise, update, scale, 3)
        assert found.is_contiguous()
        assert torch.equal(found, ops.denoise_update(x, output, None if noise is None else x, update, scale, 3))


def test_scale_one_is_the_conditional_model(either: Runner) -> None:
    x, output = torch.randn(2, 4, 8, 8, device=either.device), torch.randn(4, 8, 8, 8, device=either.device)
    update, ones = torch.tensor(EULER, device=either.device), torch.ones(2, device=either.device)
    guided = ops.denoise_update(x, output, None, update, ones, 4)
    torch.testing.assert_close(guided, ops.denoise_update(x, output[:2], None, update))


def test_errors_name_the_argument() -> None:
    x, output, update, scale = torch.zeros(2, 4, 8, 8), torch.zeros(4, 8, 8, 8), torch.zeros(6), torch.zeros(2)
    raises_naming("x", lambda: ops.denoise_update(x.double(), output, None, update, scale, 3))
    assert "(4, 4, 8, 8)" in raises_naming("output", lambda: ops.denoise_update(x, output[:3], None, update, scale, 3))
    assert "(2, 4, 8, 8)" in raises_naming("output", lambda: ops.denoise_update(x, output, None, update))
    raises_naming("noise", lambda: ops.denoise_update(x, output, x[:1], update, scale, 3))
    raises_naming("update", lambda: ops.denoise_update(x, output, None, update[:5], scale, 3))
    raises_naming("scale", lambda: ops.denoise_update(x, output, None, update, scale[:1], 3))
    assert "0..4" in raises_naming("guided_channels", lambda: ops.denoise_update(x, output, None, update, scale, 5))


@ON_SIMULATOR
def test_opcheck(compiled: Runner) -> None:
    x, output = torch.randn(1, 4, 4, 4, device=compiled.device), torch.randn(2, 8, 4, 4, device=compiled.device)
    update, scale = torch.tensor(DDPM, device=compiled.device), torch.full((1,), 4.0, device=compiled.device)
    torch.library.opcheck(torch.ops.ditfast.denoise_update.default, (x, output, x, update, scale, 3, False))


@ON_CPU
def test_fullgraph(either: Runner) -> None:
    x, output = torch.randn(1, 4, 4, 4, device=either.device), torch.randn(2, 8, 4, 4, device=either.device)
    update, scale = torch.tensor(DDPM, device=either.device), torch.full((1,), 4.0, device=either.device)
    graph = torch.compile(ops.denoise_update, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(graph(x, output, x, update, scale, 3), ops.denoise_update(x, output, x, update, scale, 3))
