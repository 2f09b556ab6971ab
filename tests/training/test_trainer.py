"""Runs of a few steps in this process: what they learn, what they write, and that a resumed one cannot be told apart."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import randomize
from torch import Tensor

import ditfast
from ditfast import DiTConfig, reference
from ditfast.training import Digits, RunError, RunOptions, Trainer, TrainingStopped, TrainSettings
from ditfast.training.data import Record
from ditfast.training.order import batch_indices

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = DiTConfig(depth=2, hidden_size=32, num_heads=2, patch_size=2, input_size=8, in_channels=1, num_classes=10)
SETTINGS = TrainSettings(steps=6, batch=8, rate=1e-2, ema=(0.9, 0.5), max_norm=1.0)


def new_model(kind: Callable[[DiTConfig], torch.nn.Module] = ditfast.DiT, config: DiTConfig = CONFIG) -> torch.nn.Module:
    torch.manual_seed(0)
    return randomize(kind(config))


def train(out: Path, settings: TrainSettings = SETTINGS, **given: Any) -> Trainer:
    resume = given.pop("resume", False)
    model = given.pop("model", None) or new_model()
    trainer = Trainer(model, given.pop("data", None) or Digits(), settings, out, given.pop("options", None), **given)
    trainer.run(resume)
    return trainer


def weights(trainer: Trainer) -> dict[str, Tensor]:
    found = {f"model.{name}": p.detach() for name, p in trainer.model.named_parameters()}
    for decay, average in trainer.averages.by_decay.items():
        found |= {f"{decay}.{name}": value for name, value in average.items()}
    return found


def lines(out: Path, name: str = "log") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


class Killed(Exception):
    pass


def killed_after(step: int) -> Callable[..., None]:
    def on_step(report: object, done: int, speed: object) -> None:
        if done == step:
            raise Killed

    return on_step


def assert_same(one: Trainer, other: Trainer) -> None:
    for (name, a), b in zip(weights(one).items(), weights(other).values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("timesteps", ["uniform", "importance"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_resumed_run_is_the_same_to_the_bit(dtype: str, timesteps: str, tmp_path: Path) -> None:
    settings = TrainSettings(steps=6, batch=8, rate=1e-2, ema=(0.9, 0.5), dtype=dtype, timesteps=timesteps, accumulate=2)
    options = RunOptions(save_every=2)
    whole = train(tmp_path / "whole", settings, options=options)
    with pytest.raises(Killed):  # three steps done, two of them saved
        train(tmp_path / "killed", settings, options=options, on_step=killed_after(3))
    again = train(tmp_path / "killed", settings, options=options, resume=True)
    assert_same(again, whole)
    for name in ("log.jsonl", "timesteps.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert [line["step"] for line in lines(tmp_path / "killed")] == [1, 2, 3, 4, 5, 6]


def test_it_learns(tmp_path: Path) -> None:
    settings = TrainSettings(steps=80, batch=16, rate=3e-3, warm_up=10)
    train(tmp_path / "run", settings, model=new_model())
    losses = [line["loss"] for line in lines(tmp_path / "run")]
    assert sum(losses[-20:]) < 0.6 * sum(losses[:20])


def test_it_takes_the_reference_s_steps(tmp_path: Path) -> None:
    fast, oracle = new_model(), new_model(reference.DiT)
    oracle.load_state_dict(fast.state_dict())
    train(tmp_path / "fast", model=fast)
    train(tmp_path / "oracle", model=oracle)
    pairs = zip(lines(tmp_path / "fast"), lines(tmp_path / "oracle"), strict=True)
    for ours, theirs in pairs:
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["norm"] == pytest.approx(theirs["norm"], rel=1e-3)


@pytest.mark.parametrize("change", [{"accumulate": 4}, {"checkpoint_activations": True}], ids=str)
def test_how_a_step_is_computed_changes_it_by_rounding_only(change: dict[str, Any], tmp_path: Path) -> None:
    train(tmp_path / "plain")
    train(tmp_path / "changed", TrainSettings(**{**SETTINGS.__dict__, **change}))
    for ours, theirs in zip(lines(tmp_path / "changed"), lines(tmp_path / "plain"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


@pytest.mark.parametrize("conditioning", ["in_context", "cross_attention", "adaln"])
@pytest.mark.parametrize("loss", ["mse", "flow"])
def test_every_design_and_loss_trains(conditioning: str, loss: str, tmp_path: Path) -> None:
    config = DiTConfig(**{**CONFIG.__dict__, "conditioning": conditioning})
    model = new_model(config=config)
    before = copy.deepcopy(model.state_dict())
    train(tmp_path / "run", TrainSettings(steps=2, batch=8, loss=loss), model=model)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed >= {name for name, p in model.named_parameters() if p.requires_grad and "final_layer" not in name}


def test_the_export_is_the_first_average_and_loads(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, ema=(0.3, 0.1))  # in the first steps larger ones are alike
    trainer = train(tmp_path / "run", settings)
    loaded = ditfast.load_checkpoint(tmp_path / "run" / "model.safetensors")
    assert loaded.config == CONFIG
    for name, value in trainer.averages.by_decay[0.3].items():
        assert torch.equal(loaded.get_parameter(name), value)
        assert not torch.equal(value, trainer.averages.by_decay[0.1][name])


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_what_is_predicted_is_learned_and_stands_in_the_file(prediction: str, tmp_path: Path) -> None:
    settings = TrainSettings(steps=80, batch=16, rate=3e-3, warm_up=10, prediction=prediction)
    trainer = train(tmp_path / "run", settings, options=RunOptions(sample_every=80, evaluate_every=80))
    losses = [line["loss"] for line in lines(tmp_path / "run")]
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])
    loaded = ditfast.load_checkpoint(tmp_path / "run" / "model.safetensors")
    assert loaded.config == dataclasses.replace(CONFIG, prediction=prediction)
    assert trainer.model.config == loaded.config
    again = train(tmp_path / "again", model=loaded)  # settings that name no prediction keep the model's
    assert again.config.prediction == prediction
    assert json.loads((tmp_path / "again" / "run.json").read_text())["settings"]["model"]["prediction"] == prediction


def test_another_prediction_than_the_checkpoints_is_said_aloud(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    ditfast.save_checkpoint(new_model(), path)
    settings = dataclasses.replace(SETTINGS, steps=1, prediction="v")
    with pytest.warns(UserWarning, match="^prediction: the checkpoint's weights predict epsilon, and are trained to predict v"):
        train(tmp_path / "run", settings, model=ditfast.load_checkpoint(path))


def test_a_model_of_v_is_not_trained_as_a_flow(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, prediction="v")
    model = new_model(config=config)
    with pytest.raises(RunError, match=r"^model: got one that predicts v, but loss 'flow' trains a velocity"):
        train(tmp_path / "run", dataclasses.replace(SETTINGS, loss="flow"), model=model)
    assert model.config == config


def test_records_of_earlier_versions_are_of_the_same_run(tmp_path: Path) -> None:
    train(tmp_path / "run")
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert "prediction" not in settings
    assert "prediction" not in settings["model"]


def test_samples_and_evaluations_change_no_weight(tmp_path: Path) -> None:
    plain = train(tmp_path / "plain")
    options = RunOptions(sample_every=4, evaluate_every=6)
    seen = train(tmp_path / "seen", options=options)
    assert_same(seen, plain)
    assert sorted(path.name for path in (tmp_path / "seen" / "samples").iterdir()) == ["step-00000004.png", "step-00000006.png"]
    evaluations = lines(tmp_path / "seen", "evaluation")
    assert [line["step"] for line in evaluations] == [6]
    assert evaluations[0]["loss"] > 0
    assert evaluations[0]["frechet_distance"] > 0
    assert 0 <= evaluations[0]["accuracy"] <= 1


class Poisoned(Digits):
    """The digits, of which some are NaN."""

    def __init__(self, bad: Callable[[int], bool]):
        super().__init__()
        self.is_bad = bad

    def __getitem__(self, index: int) -> Record:
        record = super().__getitem__(index)
        return record._replace(values=torch.full_like(record.values, float("nan"))) if self.is_bad(index) else record


def test_a_step_of_nan_is_skipped_and_counted(tmp_path: Path) -> None:
    bad = batch_indices(0, len(Digits()), 8, 2)[3]
    trainer = train(tmp_path / "run", data=Poisoned(lambda index: index == bad))
    third = lines(tmp_path / "run")[2]
    assert third["loss"] is None
    assert third["skipped"] == 1
    assert trainer.skipped == 1
    assert all(value.isfinite().all() for value in weights(trainer).values())


def test_nan_without_end_stops_the_run_and_names_step_and_records(tmp_path: Path) -> None:
    settings = TrainSettings(steps=9, batch=4, max_skipped=2)
    with pytest.raises(TrainingStopped, match=r"^step 3: .* 3 steps in a row, of the records \[\d+, \d+, \d+, \d+\]"):
        train(tmp_path / "run", settings, data=Poisoned(lambda index: True))
    assert [line["skipped"] for line in lines(tmp_path / "run")] == [1, 2, 3]


def test_asked_to_stop_it_saves_and_goes_on_later(tmp_path: Path) -> None:
    def stop(report: object, done: int, speed: object) -> None:
        if done == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    whole = train(tmp_path / "whole")
    with pytest.raises(TrainingStopped, match="stopped at step 3"):
        train(tmp_path / "stopped", on_step=stop)
    assert_same(train(tmp_path / "stopped", resume=True), whole)


@pytest.mark.skipif(sys.platform == "win32", reason="sends itself a signal")
def test_ctrl_c_in_a_python_program_speaks_of_python(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def press(report: object, done: int, speed: object) -> None:
        if done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingStopped, match=r"stopped at step [23], .*; run\(resume=True\) goes on from there$"):
        train(tmp_path / "run", on_step=press)
    said = capfd.readouterr().err
    assert said.startswith("Trainer: Ctrl-C: writes a checkpoint behind this step and ends")
    assert said.count("\n") == 1


def test_another_recipe_does_not_go_on_in_the_folder(tmp_path: Path) -> None:
    train(tmp_path / "run")
    with pytest.raises(RunError, match=r"rate: was 0\.01, is 0\.02; max_norm: was 1\.0, is null"):
        train(tmp_path / "run", TrainSettings(steps=6, batch=8, rate=2e-2, ema=(0.9, 0.5)), resume=True)


def test_a_finished_run_is_finished(tmp_path: Path) -> None:
    whole = train(tmp_path / "run")
    log = (tmp_path / "run" / "log.jsonl").read_bytes()
    assert_same(train(tmp_path / "run", resume=True), whole)
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == log


def test_at_a_constant_rate_a_run_may_be_prolonged(tmp_path: Path) -> None:
    longer = TrainSettings(**{**SETTINGS.__dict__, "steps": 9})
    train(tmp_path / "short")
    assert_same(train(tmp_path / "short", longer, resume=True), train(tmp_path / "long", longer))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"input_size": 16}, r"^data: got latents \(1, 8, 8\), but the model takes \(1, 16, 16\)"),
        ({"num_classes": 9}, "^data: got 10 classes, but the model has 9"),
    ],
    ids=["size", "classes"],
)
def test_data_that_does_not_fit_is_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=message):
        train(tmp_path / "run", model=new_model(config=DiTConfig(**{**CONFIG.__dict__, **config})))
