import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import raises_naming
from torch import Tensor

from ditfast.diffusion import SOLVERS, FlowMatching, GaussianDiffusion, Update, apply_update, steps

LEARNED = Update(1.5, -0.5, 0.3, 0.6, math.log(0.01), math.log(0.09))
FIXED = LEARNED._replace(log_variance_max=LEARNED.log_variance_min)
QUIET = LEARNED._replace(log_variance_min=-math.inf, log_variance_max=-math.inf)


def one_value(number: float) -> Tensor:
    return torch.full((1, 1, 1, 1), number, dtype=torch.float64)


def by_hand(x: float, output: float, v: float, noise: float, clip: bool) -> float:
    x0 = 1.5 * x - 0.5 * output
    x0 = min(max(x0, -1.0), 1.0) if clip else x0
    variance = 0.01 ** ((1 - v) / 2) * 0.09 ** ((1 + v) / 2)
    return 0.3 * x0 + 0.6 * x + math.sqrt(variance) * noise


@pytest.mark.parametrize("clip", [False, True])
@given(numbers=st.tuples(*[st.floats(-3, 3)] * 4))
@settings(max_examples=50, deadline=None)
def test_by_hand(clip: bool, numbers: tuple[float, float, float, float]) -> None:
    x, output, v, noise = numbers
    both = torch.cat([one_value(output), one_value(v)], dim=1)
    found = apply_update(one_value(x), both, one_value(noise), LEARNED, clip)
    assert found.item() == pytest.approx(by_hand(x, output, v, noise, clip), rel=1e-12, abs=1e-12)


def test_equal_ends_leave_the_variance_channels_unread() -> None:
    x, output, noise = torch.randn(3, 2, 4, 5, 5).double()
    both = torch.cat([output, torch.full_like(output, math.nan)], dim=1)
    expected = 0.3 * (1.5 * x - 0.5 * output) + 0.6 * x
    torch.testing.assert_close(apply_update(x, both, noise, FIXED), expected + 0.1 * noise)
    torch.testing.assert_close(apply_update(x, output, noise, FIXED), expected + 0.1 * noise)
    for unread in (None, noise * math.nan):
        torch.testing.assert_close(apply_update(x, both, unread, QUIET), expected)
    assert FIXED.adds_noise
    assert not QUIET.adds_noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_arithmetic_is_fp32_with_one_rounding(dtype: torch.dtype) -> None:
    x, noise = torch.randn(2, 2, 3, 6, 6).to(dtype)
    output = torch.randn(2, 6, 6, 6).to(dtype)
    found = apply_update(x, output, noise, LEARNED)
    assert found.dtype == dtype
    exact = apply_update(x.double(), output.double(), noise.double(), LEARNED)
    spacing = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2 * 1.01
    torch.testing.assert_close(found.double(), exact, rtol=spacing, atol=1e-6)


def test_a_low_precision_output_leaves_the_state_fp32() -> None:
    x, noise = torch.randn(2, 2, 3, 6, 6)
    output = torch.randn(2, 6, 6, 6).bfloat16()
    torch.testing.assert_close(apply_update(x, output, noise, LEARNED), apply_update(x, output.float(), noise, LEARNED))


def test_errors_name_the_argument() -> None:
    x = torch.randn(2, 4, 3, 3)
    double = torch.randn(2, 8, 3, 3)
    assert "(2, 8, 3, 3) for x (2, 4, 3, 3)" in raises_naming("output", lambda: apply_update(x, x, x, LEARNED))
    assert "(2, 4, 3, 3) or (2, 8, 3, 3)" in raises_naming("output", lambda: apply_update(x, double[:1], x, FIXED))
    assert "None" in raises_naming("noise", lambda: apply_update(x, double, None, LEARNED))
    assert "(1, 4, 3, 3)" in raises_naming("noise", lambda: apply_update(x, double, x[:1], LEARNED))


def test_every_solver_belongs_to_a_process() -> None:
    assert (*GaussianDiffusion("5").solvers, *FlowMatching().solvers) == SOLVERS


def test_a_solver_is_found_by_name() -> None:
    diffusion, flow = GaussianDiffusion("5"), FlowMatching(num_steps=5)
    assert steps(diffusion, "ddpm") == diffusion.ddpm_steps()
    assert steps(diffusion, "ddim", eta=0.5) == diffusion.ddim_steps(0.5) != diffusion.ddim_steps()
    assert steps(flow, "euler") == flow.euler_steps()
    assert steps(flow, "heun") == flow.heun_steps()
    assert steps(flow, "sde", diffusion="decreasing") == flow.sde_steps("decreasing") != flow.sde_steps()


def test_a_solver_of_another_process() -> None:
    message = raises_naming("solver", lambda: steps(GaussianDiffusion("5"), "euler"))
    assert "GaussianDiffusion has ddpm, ddim" in message
    assert "FlowMatching has euler, heun, sde" in raises_naming("solver", lambda: steps(FlowMatching(), "ddim"))
    raises_naming("solver", lambda: steps(FlowMatching(), "rk4"))
    with pytest.raises(TypeError, match="eta"):
        steps(GaussianDiffusion("5"), "ddpm", eta=1.0)


@given(
    respacing=st.sampled_from([None, "250", "ddim50", (0, 100, 999), (7,)]),
    betas=st.sampled_from(["linear", "cosine"]),
    learn_sigma=st.booleans(),
    prediction=st.sampled_from(["epsilon", "x0"]),
    eta=st.none() | st.sampled_from([0.0, 0.3, 1.0]),
    clip=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_rows_are_what_the_step_methods_do(
    respacing: object, betas: str, learn_sigma: bool, prediction: str, eta: float | None, clip: bool, seed: int
) -> None:
    diffusion = GaussianDiffusion(respacing, betas, learn_sigma, prediction)  # type: ignore[arg-type]
    rows = {int(step.t): step.update for step in (diffusion.ddpm_steps() if eta is None else diffusion.ddim_steps(eta))}
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, 3, 2, 4, 4, generator=generator)
    output = torch.randn(3, 4 if learn_sigma else 2, 4, 4, generator=generator)
    t = torch.tensor(diffusion.timesteps)[torch.randint(len(diffusion.timesteps), (3,), generator=generator)]
    if eta is None:
        found = diffusion.ddpm_step(output, x, t, clip, noise)
    else:
        found = diffusion.ddim_step(output, x, t, eta, clip, noise)
    samples = zip(x.split(1), output.split(1), noise.split(1), t.tolist(), strict=True)
    expected = torch.cat([apply_update(x, output, noise, rows[t], clip) for x, output, noise, t in samples])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
