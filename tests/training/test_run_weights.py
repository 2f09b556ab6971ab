"""A training run that was stopped can be sampled, converted and gone on with: its folder and its checkpoints are weights."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import ranks_of_training
import torch
from checkpoint_files import same_weights
from several_ranks import on_ranks
from support import randomize

import ditfast
from ditfast import CheckpointError, DiTConfig, load_checkpoint
from ditfast.checkpoints import CheckpointSource
from ditfast.checkpoints.runs import sha256, sha256_of
from ditfast.checkpoints.trained_for import TrainedFor
from ditfast.cli import main
from ditfast.training import Digits, RunOptions, Trainer, TrainSettings

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = DiTConfig(depth=1, hidden_size=32, num_heads=2, patch_size=2, input_size=8, in_channels=1, num_classes=10)
SETTINGS = TrainSettings(steps=3, batch=4, rate=1e-2, ema=(0.9, 0.5), loss="mse", prediction="v", flip=False)
DIGITS = tuple("0123456789")
TOLD = TrainedFor("v", "linear", False, "mse", (8, 8), None, DIGITS, 3, stated=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps with a checkpoint of each, and its weights."""
    out = tmp_path_factory.mktemp("runs") / "run"
    torch.manual_seed(0)
    model = randomize(ditfast.DiT(CONFIG))
    model.pos_embed.requires_grad_(False)
    trainer = Trainer(model, Digits(), SETTINGS, out, RunOptions(save_every=1, keep=3))
    trainer.run()
    torch.save(model.state_dict(), out.parent / "raw.pt")
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """The run as it is stopped: without the file that its last step writes."""
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    return tmp_path / "run"


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"step-{number:08d}"


def path_and_record(model: ditfast.DiT) -> tuple[str | None, TrainedFor]:
    assert model.source is not None
    return model.source.path, model.source.trained_for


def rewritten(checkpoint: Path, change: Any) -> None:
    """Change a checkpoint's manifest, whole as before."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["sha256"]
    change(manifest)
    (checkpoint / "manifest.json").write_text(json.dumps({**manifest, "sha256": sha256_of(manifest)}))


def test_the_newest_average_is_what_the_last_step_exports(finished: Path, run: Path) -> None:
    exported = load_checkpoint(finished / "model.safetensors")
    assert path_and_record(exported) == (str(finished / "model.safetensors"), TOLD)
    for path in (run, run / "checkpoints", step(run, 3)):
        model = load_checkpoint(path)
        assert same_weights(model.state_dict(), exported.state_dict())
        assert model.config == exported.config
        assert path_and_record(model) == (str(step(run, 3)), TOLD)
        assert model.source is not None
        assert model.source.weights == "ema"
    assert same_weights(ditfast.DiT.from_pretrained(run).state_dict(), exported.state_dict())
    raw = load_checkpoint(run, weights="model")
    assert same_weights(raw.state_dict(), torch.load(finished.parent / "raw.pt"))
    assert not same_weights(load_checkpoint(step(run, 2)).state_dict(), exported.state_dict())


def test_commands_take_it_and_say_which(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = f"ema weights, official layout, from {step(run, 3)}"
    draw = ["sample", "--classes", "1", "--per-class", "1", "--steps", "2", "--out"]
    assert main([*draw, str(run.parent / "a"), "--checkpoint", str(run)]) == 0
    assert said in capsys.readouterr().out
    assert main(["convert", str(run), str(run.parent / "x.pt"), "--to", "official"]) == 0
    assert said in capsys.readouterr().out
    assert path_and_record(load_checkpoint(run.parent / "x.pt"))[1] == TOLD
    go_on = ["train", "--data", "digits", "--steps", "1", "--batch", "4", "--out", str(run.parent / "next"), "--init"]
    assert main([*go_on, str(run)]) == 0
    captured = capsys.readouterr().out
    assert said in captured
    assert "was trained with loss mse, and so it is now" in captured


def test_damaged_checkpoints_are_passed_over_and_named(run: Path) -> None:
    file = step(run, 3) / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    (step(run, 2) / "manifest.json").unlink()
    (run / "checkpoints" / ".step-00000004.part").mkdir()  # as while one is written
    with pytest.warns(UserWarning, match=r"step-0000000[23]: not a whole checkpoint: ") as warned:
        model = load_checkpoint(run)
    assert path_and_record(model)[0] == str(step(run, 1))
    assert [str(w.message).rsplit(": ", 1)[1].split(" ")[0] for w in warned] == ["__0_0.distcp", "manifest.json"]
    with pytest.raises(CheckpointError, match=rf"__0_0.distcp has .*; the newest whole one is {step(run, 1)}$"):
        load_checkpoint(step(run, 3))
    shutil.rmtree(step(run, 1))
    with (
        pytest.warns(UserWarning, match="not a whole"),
        pytest.raises(CheckpointError, match="no checkpoint in it is whole: step-00000003: "),
    ):
        load_checkpoint(run)


def test_exported_weights_are_taken_unless_a_checkpoint_is_newer(finished: Path, run: Path) -> None:
    weights = run / "model.safetensors"
    shutil.copy(finished / "model.safetensors", weights)
    os.utime(weights, (0, 0))  # as a copy may have it: the steps decide
    assert path_and_record(load_checkpoint(run))[0] == str(weights)
    ditfast.save_checkpoint(load_checkpoint(step(run, 2)), weights)
    with pytest.warns(UserWarning, match=rf"^{step(run, 3)}: taken, as it is newer than {weights}$"):
        assert path_and_record(load_checkpoint(run))[0] == str(step(run, 3))
    shutil.rmtree(step(run, 3))
    assert path_and_record(load_checkpoint(run))[0] == str(weights)


def test_runs_of_earlier_versions_say_it_by_their_settings(run: Path) -> None:
    for number, loss, prediction in ((2, "flow", "velocity"), (3, "hybrid", "v")):
        rewritten(step(run, number), lambda manifest, loss=loss: manifest["about"].pop("trained_for"))
        rewritten(step(run, number), lambda manifest, loss=loss: manifest["about"]["settings"].update(loss=loss, path="gvp"))
        if loss == "flow":
            rewritten(step(run, number), lambda manifest: manifest["about"]["settings"]["model"].pop("prediction"))
        model = load_checkpoint(step(run, number))
        assert model.config.prediction == prediction
        schedule = "gvp" if loss == "flow" else "linear"
        expected = TrainedFor(prediction, schedule, loss == "hybrid", loss, step=number, stated=True)
        assert path_and_record(model)[1] == expected


class Touch:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_code_in_an_index_does_not_run(run: Path, tmp_path: Path) -> None:
    index = step(run, 3) / ".metadata"
    for content in (pickle.dumps(Touch(tmp_path / "hacked")), pickle.dumps({"a": 1}), b"\x80\x04garbage"):
        index.write_bytes(content)
        entry = {"size": len(content), "sha256": sha256(index)}
        rewritten(step(run, 3), lambda manifest, entry=entry: manifest["files"].update({".metadata": entry}))
        with pytest.raises(CheckpointError, match=rf"^{step(run, 3)}: cannot be read: "):
            load_checkpoint(step(run, 3))
    assert not (tmp_path / "hacked").exists()


def flow_run(tmp_path: Path) -> list[str]:
    """Arguments that go on with a tiny flow over gvp."""
    config = DiTConfig(**{**vars(CONFIG), "prediction": "velocity"})
    model = randomize(ditfast.DiT(config))
    record = TrainedFor("velocity", "gvp", False, "flow", (8, 8), None, DIGITS, 3, stated=True)
    model.source = CheckpointSource(None, "official", "ema", "", record)
    ditfast.save_checkpoint(model, tmp_path / "flow.pt")
    given = ["--init", str(tmp_path / "flow.pt"), "--out", str(tmp_path / "run")]
    return ["train", "--data", "digits", "--steps", "1", "--batch", "4", *given]


@pytest.mark.parametrize(
    ("given", "said", "loss", "path"),
    [
        ([], "", "flow", "gvp"),
        (
            ["--path", "linear"],
            "path: the checkpoint's weights follow 'gvp', and are trained to",
            "flow",
            "linear",
        ),
        (["--loss", "hybrid"], "predict velocity (loss 'flow'), and are trained to predict epsilon from", "hybrid", "linear"),
        (["--prediction", "v"], "predict velocity (loss 'flow'), and are trained to predict v from", "hybrid", "linear"),
    ],
    ids=["as before", "another path", "hybrid", "v"],
)
def test_fine_tuning_goes_on_as_before_or_says_to_what_else(
    given: list[str],
    said: str,
    loss: str,
    path: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    assert main([*flow_run(tmp_path), *given]) == 0
    changes = [line for w in recwarn if (line := str(w.message)).startswith(("prediction: ", "path: "))]
    assert len(changes) == bool(said)
    assert all(said in line for line in changes)
    assert ("was trained with loss flow, and so it is now" in capsys.readouterr().out) == (loss == "flow")
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert (settings["loss"], settings["path"]) == (loss, path)
    record = path_and_record(load_checkpoint(tmp_path / "run"))[1]
    assert (record.loss, record.schedule, record.is_flow) == (loss, path, loss == "flow")


def test_a_folder_with_a_manifest_of_somebody_else_is_no_checkpoint(tmp_path: Path) -> None:
    randomize(ditfast.DiT(CONFIG)).save_pretrained(tmp_path / "dit")
    (tmp_path / "dit" / "manifest.json").write_text("{}")
    assert path_and_record(load_checkpoint(tmp_path / "dit"))[0] == str(tmp_path / "dit")


def test_a_run_before_its_first_checkpoint_says_so(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match="got a training run without a checkpoint yet"):
        load_checkpoint(run)


def test_a_checkpoint_of_two_sharded_ranks_is_read_by_one_process(tmp_path: Path) -> None:
    on_ranks(2, ranks_of_training.train_and_stop, str(tmp_path / "run"))
    model, expected = load_checkpoint(tmp_path / "run"), load_checkpoint(tmp_path / "run" / "expected.safetensors")
    assert same_weights(model.state_dict(), expected.state_dict())
    assert path_and_record(model)[1] == TrainedFor("velocity", "gvp", False, "flow", (8, 8), None, DIGITS, 3, stated=True)
