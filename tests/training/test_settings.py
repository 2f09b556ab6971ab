"""The recipe's fields, and the learning rate that follows from them."""

from __future__ import annotations

import math
from typing import Any

import pytest
from support import raises_naming

from ditfast.training import RunOptions, TrainSettings
from ditfast.training.settings import learning_rate


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("steps", 1.5),
        ("batch", True),
        ("accumulate", 3),
        ("seed", -1),
        ("loss", "l1"),
        ("path", "cubic"),
        ("timesteps", "normal"),
        ("schedule", "step"),
        ("dtype", "fp64"),
        ("rate", math.nan),
        ("weight_decay", -0.1),
        ("max_norm", 0.0),
        ("ema", ()),
        ("ema", (0.9, 0.9)),
        ("ema", (1.0,)),
        ("prediction", "velocity"),
    ],
)
def test_a_field_out_of_range_is_named(field: str, value: Any) -> None:
    fields = {"steps": 10, "batch": 8} | {field: value}
    raises_naming(field, lambda: TrainSettings(**fields))


def test_a_flow_has_its_own_prediction() -> None:
    message = raises_naming("prediction", lambda: TrainSettings(steps=1, loss="flow", prediction="v"))
    assert "flow matching predicts a velocity" in message


def test_importance_is_of_steps_not_of_flow_times() -> None:
    raises_naming("timesteps", lambda: TrainSettings(steps=1, loss="flow", timesteps="importance"))


@pytest.mark.parametrize(("field", "value"), [("save_every", 0), ("keep", 0), ("workers", -1), ("sample_every", 1.0)])
def test_an_option_out_of_range_is_named(field: str, value: Any) -> None:
    raises_naming(field, lambda: RunOptions(**{field: value}))


def test_more_steps_are_the_same_run_only_at_a_constant_rate() -> None:
    def decisive(**fields: Any) -> dict[str, Any]:
        return TrainSettings(**fields).decisive("cpu")

    assert decisive(steps=1) == decisive(steps=2, max_skipped=3)
    assert decisive(steps=1, schedule="cosine") != decisive(steps=2, schedule="cosine")
    assert decisive(steps=1) != decisive(steps=1, rate=2e-4)


def test_determinism_decides_weights_on_a_gpu_only() -> None:
    free, fixed = TrainSettings(steps=1), TrainSettings(steps=1, deterministic=True)
    assert free.decisive("cpu") == fixed.decisive("cpu") == free.decisive("cuda")
    assert fixed.decisive("cuda") == {**free.decisive("cuda"), "deterministic": True}


def test_learning_rate() -> None:
    constant = TrainSettings(steps=10, rate=0.5)
    assert [learning_rate(constant, step) for step in (0, 9)] == [0.5, 0.5]
    warm = TrainSettings(steps=10, rate=1.0, warm_up=4)
    assert [learning_rate(warm, step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    cosine = TrainSettings(steps=10, rate=2.0, schedule="cosine", warm_up=2)
    assert learning_rate(cosine, 0) == 1.0
    assert learning_rate(cosine, 5) == pytest.approx(1.0)
    assert learning_rate(cosine, 9) == pytest.approx(1 + math.cos(0.9 * math.pi))
