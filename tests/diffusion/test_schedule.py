import math

import pytest
import torch
from support import raises_naming

from ditfast.diffusion import betas, respaced_timesteps


def test_linear_betas() -> None:
    linear = betas("linear")
    assert linear.dtype == torch.float64
    assert linear[[0, 999]].tolist() == [1e-4, 2e-2]
    assert linear[500].item() == pytest.approx(1e-4 + 500 / 999 * (2e-2 - 1e-4))


def test_cosine_betas() -> None:
    def alpha_bar(step: int) -> float:
        return math.cos((step / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    cosine = betas("cosine")
    assert cosine[123].item() == pytest.approx(1 - alpha_bar(124) / alpha_bar(123))
    assert cosine[999].item() == 0.999


def test_all_steps_by_default() -> None:
    assert respaced_timesteps(None) == list(range(1000))


def test_evenly_spread() -> None:
    steps = respaced_timesteps("250")
    assert len(steps) == 250
    assert steps[:4] == [0, 4, 8, 12]
    assert steps[-1] == 999
    assert respaced_timesteps("2") == [0, 999]
    assert respaced_timesteps("1") == [0]
    assert respaced_timesteps("1000") == list(range(1000))


def test_sections() -> None:
    steps = respaced_timesteps("10,15,20")
    assert len(steps) == 45
    assert steps[:2] == [0, 37]
    assert steps[9:11] == [333, 334]
    assert sum(step < 334 for step in steps) == 10
    assert sum(334 <= step < 667 for step in steps) == 15


def test_ddim_strides() -> None:
    assert respaced_timesteps("ddim50") == list(range(0, 1000, 20))
    assert respaced_timesteps("ddim1000") == list(range(1000))


def test_explicit_steps() -> None:
    assert respaced_timesteps([999, 0, 500]) == [0, 500, 999]


@pytest.mark.parametrize(
    "respacing", ["", "0", "-5", "2.5", "ddim", "ddim3,4", "ten", "ddim51", "600,600", "1001", [], [1000], [1, 1], [0.5]]
)
def test_errors(respacing: object) -> None:
    raises_naming("respacing", lambda: respaced_timesteps(respacing))  # type: ignore[arg-type]


def test_unknown_betas() -> None:
    assert "linear, cosine" in raises_naming("betas", lambda: betas("sigmoid"))
