"""``ditfast train``: what it makes, what it refuses, and how it ends when something goes wrong: in one line."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from extraction import SIZE, extracted, photographs
from full_disk import files_of_process_end_at
from torchrun import parent, processes, wait_for
from train_processes import Run, assert_same_runs, cleaned_up, lines, saved, steps_logged, tiny_model

from ditfast import load_checkpoint
from ditfast.cli import main
from ditfast.commands.arguments import warnings_on_one_line
from ditfast.sampling.ranks import Ranks

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = ["--batch", "8", "--schedule", "constant", "--warm-up", "2", "--rate", "1e-2", "--ema", "0.9", "0.5"]


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model(tmp_path_factory.mktemp("init") / "init.safetensors")


@pytest.fixture
def train(init: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs the command on the digits in the folder ``run``: its exit status, and what it said on stderr."""

    def train(*arguments: str, steps: int = 6, recipe: list[str] = RECIPE) -> tuple[int, str]:
        command = ["train", "--data", "digits", "--init", init, "--out", str(tmp_path / "run"), "--steps", str(steps)]
        status = main([*command, "--save-every", "2", *recipe, *arguments])
        return status, capsys.readouterr().err

    return train


Train = Callable[..., tuple[int, str]]


# ------------------------------------------------------------------------------------------------ what it makes
def test_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With nothing said about the model it is the one that ships."""
    assert main(["train", "--data", "digits", "--steps", "1", "--batch", "2", "--out", str(tmp_path / "run")]) == 0
    weights = tmp_path / "run" / "model.safetensors"
    assert capsys.readouterr().out.endswith(f"{weights}: 1 steps of 2, average 0.999, 0 skipped\n")
    assert load_checkpoint(weights).config.depth == 6
    assert [path.name for path in saved(tmp_path / "run")] == ["step-00000001"]


@pytest.mark.parametrize(
    ("data", "shape"), [("photographs", (3, SIZE, SIZE)), ("latents", (4, SIZE // 2, SIZE // 2))], ids=["images", "latents"]
)
def test_images_and_latents(data: str, shape: tuple[int, int, int], tmp_path: Path) -> None:
    photographs(tmp_path / "photographs")
    extracted(tmp_path)
    out, init = tmp_path / "run", tiny_model(tmp_path / "init.safetensors", in_channels=shape[0], input_size=shape[1])
    command = ["train", "--data", str(tmp_path / data), "--image-size", str(SIZE), "--init", init, "--steps", "3"]
    assert main([*command, "--batch", "4", "--sample-every", "3" if data == "photographs" else "0", "--out", str(out)]) == 0
    assert load_checkpoint(out / "model.safetensors").config.input_shape == shape
    assert [line["step"] for line in lines(out)] == [1, 2, 3]
    assert (out / "samples" / "step-00000003.png").exists() == (data == "photographs")


def test_v_from_training_to_images(train: Train, tmp_path: Path) -> None:
    assert train("--prediction", "v", steps=2)[0] == 0
    weights = tmp_path / "run" / "model.safetensors"
    assert load_checkpoint(weights).config.prediction == "v"
    out = tmp_path / "digit.png"
    assert main(["sample", "--checkpoint", str(weights), "--classes", "3", "--steps", "ddim2", "--out", str(out)]) == 0
    assert out.exists()


# ------------------------------------------------------------------------------------------------ arguments
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "digits"], "required: --out, --steps"),
        (["--resume", "maybe"], "argument --resume: invalid choice: 'maybe'"),
        (["--steps", "0"], "argument --steps: got '0', expected a positive integer"),
        (["--batch", "many"], "argument --batch: got 'many', expected a positive integer"),
        (["--accumulate", "0"], "argument --accumulate: got '0', expected a positive integer"),
        (["--rate", "inf"], "argument --rate: got 'inf', expected a number"),
        (["--ema", "0.9", "x"], "argument --ema: got 'x', expected a number"),
        (["--loss", "l1"], "argument --loss: invalid choice: 'l1'"),
        (["--seed", "-1"], "argument --seed: got '-1', expected an integer 0..2^64-1"),
        (["--save-every", "0"], "argument --save-every: got '0', expected a positive integer"),
        (["--sample-every", "-2"], "argument --sample-every: got '-2', expected an integer, 0 or more"),
        (["--device", "tpu"], "argument --device: got 'tpu', expected cpu, cuda or cuda:N"),
        (["--parallel", "zero"], "argument --parallel: invalid choice: 'zero'"),
        (["--model", "DiT-S/3"], "argument --model: invalid choice: 'DiT-S/3'"),
    ],
)
def test_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["train", *arguments])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "-1"], "--rate: got -1.0, expected a finite number, 0 or more"),
        (["--weight-decay", "-0.1"], "--weight-decay: got -0.1, expected a finite number, 0 or more"),
        (["--max-norm", "0"], "--max-norm: got 0.0, expected a positive number, or None"),
        (["--ema", "0.9", "1"], "--ema: got (0.9, 1.0), expected one or more different decays, 0 <= decay < 1"),
        (["--loss", "flow", "--prediction", "v"], "--prediction: got 'v', but flow matching predicts a velocity"),
        (["--accumulate", "3"], "--accumulate: got 3, expected a divisor of the batch 8"),
        (
            ["--timesteps", "importance", "--loss", "flow"],
            "--timesteps: got 'importance', but flow matching's times are no steps",
        ),
        (["--model", "DiT-S/2"], "--model: got DiT-S/2, but --init brings its own"),
        (["--init", "nowhere.safetensors"], "nowhere.safetensors: there is no such file or folder"),
        (["--data", "nowhere"], "data: nowhere: nothing there, expected a folder of images or of latents, or digits"),
        (["--vae", "./nowhere"], "vae: ./nowhere: there is no such folder"),
        (["--batch", "1800"], "batch: got 1800, expected at most the 1797 records of the data"),
    ],
)
def test_one_line_for_what_cannot_be(
    arguments: list[str], message: str, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, said = train(*arguments)
    assert (status, said.count("\n")) == (2, 1)
    assert said.startswith(f"ditfast train: {message}")
    assert not (tmp_path / "run").exists()


def test_a_model_that_does_not_fit_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photographs(tmp_path / "photographs")
    command = ["train", "--data", str(tmp_path / "photographs"), "--image-size", "9", "--batch", "1", "--steps", "1"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.startswith("ditfast train: --model: got DiT-S/2, which does not fit the data: ")


def test_samples_of_latents_need_a_vae(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photographs(tmp_path / "photographs")
    latents = extracted(tmp_path)
    command = ["train", "--data", str(latents), "--batch", "2", "--steps", "1", "--sample-every", "1"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == "ditfast train: --sample-every: got 1, but latents need --vae to be seen\n"


def test_ranks_that_do_not_find_each_other(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    status, said = train()
    assert (status, said.count("\n")) == (1, 1)
    assert said.startswith("ditfast train (rank 1): rank 1 of 2 does not find the others: ")
    assert "MASTER_ADDR" in said


def test_a_batch_that_ranks_cannot_share(init: str, tmp_path: Path) -> None:
    run = Run(
        ["train", "--data", "digits", "--init", init, "--steps", "1", "--batch", "7", "--out", str(tmp_path / "run")],
        2,
        tmp_path,
    )
    with cleaned_up([run]):
        assert run.wait() == [2, 2]
    why = "batch: got 7, expected a multiple of 2: 2 ranks, accumulate 1"
    assert run.errors() == [[f"ditfast train (rank {rank}): {why}"] for rank in range(2)]
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------ the folder
@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("file", "{out}: a file is in the way"),
        ("file/run", "{out}: a file is in the way"),
        ("/proc/run", "/proc/run: cannot be written: "),
        ("thesis", "{out}: holds chapter.tex and no run.json, expected an empty folder or an earlier run's"),
    ],
)
def test_a_folder_that_cannot_be(out: str, message: str, train: Train, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    for resume in ("no", "auto"):
        status, said = train("--out", str(tmp_path / out), "--resume", resume)
        assert (status, said.count("\n")) == (2, 1)
        assert said.startswith(f"ditfast train: {message.format(out=tmp_path / out)}")


def test_a_run_that_is_there_already(train: Train, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train()[0] == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert train() == (
        2,
        f"ditfast train: {run}: holds a run already; --resume auto goes on with it\n",
    )
    differing = "holds a run with other settings: seed: was 0, is 1; rate: was 0.01, is 0.02; give another folder"
    assert train("--resume", "auto", "--seed", "1", "--rate", "2e-2") == (2, f"ditfast train: {run}: {differing}\n")
    fewer = f"steps: got 4, but {run} has taken 6 already"
    assert train("--resume", "auto", steps=4) == (2, f"ditfast train: {fewer}\n")
    assert {path: path.read_bytes() for path in before} == before


# ------------------------------------------------------------------------------------------------ data
def test_an_unreadable_image_is_named_and_the_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = photographs(tmp_path / "photographs")
    names[3].write_bytes(b"no image")
    init = tiny_model(tmp_path / "init.safetensors", in_channels=3, input_size=SIZE)
    command = ["train", "--data", str(tmp_path / "photographs"), "--image-size", str(SIZE), "--init", init]
    command += ["--batch", "2", "--steps", "4", "--evaluate-every", "4"]
    with pytest.warns(
        UserWarning, match=f"^unreadable record, its neighbour takes its place: {names[3]}: not a readable image"
    ):
        assert main([*command, "--out", str(tmp_path / "run")]) == 0
    assert [line["step"] for line in lines(tmp_path / "run", "evaluation")] == [4]
    assert main([*command, "--max-bad-records", "0", "--out", str(tmp_path / "strict")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"ditfast train: data: 1 unreadable records, more than the 0 allowed; the last: {names[3]}: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "latents"), r"data: {}/latents: nothing there"),
        (lambda folder: (folder / "latents" / "index.json").write_text("{"), "data: {}/latents/index.json: does not hold what"),
        (lambda folder: os.truncate(folder / "latents" / "000001.safetensors", 999), "data: {}/latents/000001.safetensors: "),
    ],
    ids=["gone", "a torn index", "a truncated shard"],
)
def test_latents_that_cannot_be_read(
    spoil: Callable[[Path], object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photographs(tmp_path / "photographs")
    latents = extracted(tmp_path)
    spoil(tmp_path)
    assert main(["train", "--data", str(latents), "--steps", "1", "--batch", "2", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"ditfast train: {message.format(tmp_path)}")
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_that_reads_and_is_killed(init: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["train", "--data", "digits", "--init", init, "--steps", "10000", "--save-every", "5000", *RECIPE]
    run = Run([*command, "--workers", "1", "--out", str(out)], 1, tmp_path)
    with cleaned_up([run]):
        wait_for(lambda: steps_logged(out) >= 6 or run.is_over())
        (reader,) = [pid for pid in processes() if parent(pid) == run.ranks[0].pid]
        os.kill(reader, signal.SIGKILL)
        assert run.wait() == [2]
    (said,) = [line for line in run.errors()[0] if line.startswith("ditfast")]  # beside what torch says
    assert said.startswith("ditfast train: data: a process that reads records ended: ")


# ------------------------------------------------------------------------------------------------ numbers
def test_nan_ends_the_run_with_its_step_and_records(train: Train, tmp_path: Path) -> None:
    status, said = train("--rate", "1e30", "--max-skipped", "2")  # the first step is taken, and spoils every later one
    assert (status, said.count("\n")) == (1, 1)
    why = "the loss or gradient was infinite or NaN for 3 steps in a row, of the records ["
    assert said.startswith(f"ditfast train: step 4: {why}")
    assert [line["loss"] is None for line in lines(tmp_path / "run")] == [False, True, True, True]


# ------------------------------------------------------------------------------------------------ the disk
@pytest.mark.skipif(sys.platform != "linux", reason="limits another process")
@pytest.mark.parametrize(
    ("room", "message"),
    [
        (20_000, "{out}/checkpoints/step-0000000{due}: File too large"),
        (300, r"step \d: {out}: File too large; --resume auto goes on from the newest checkpoint"),
    ],
    ids=["checkpoint", "log"],
)
def test_a_full_disk_ends_the_run_and_a_later_one_goes_on(
    room: int, message: str, train: Train, init: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = ["train", "--data", "digits", "--init", init, "--out", str(out), "--steps", "8", "--save-every", "2", *RECIPE]
    run = Run(command, 1, tmp_path)
    with cleaned_up([run]):
        wait_for(lambda: len(saved(out)) >= 1 or run.is_over())
        files_of_process_end_at(run.ranks[0].pid, room)
        assert run.wait() == [1]
    due = int(saved(out)[-1].name[-1]) + 2
    ((said,),) = run.errors()
    assert re.fullmatch(rf"ditfast train: {message.format(out=out, due=due)}", said)
    assert train("--resume", "auto", steps=8) == (0, "")
    assert train("--out", str(tmp_path / "whole"), steps=8) == (0, "")
    assert_same_runs(out, tmp_path / "whole", tmp_path)


def test_a_warning_is_a_line_and_torch_s_own_keep_their_place() -> None:
    with warnings_on_one_line("train", Ranks(1, 2)):
        assert (
            warnings.formatwarning("it is torn", UserWarning, "module.py", 3) == "ditfast train (rank 1): warning: it is torn\n"
        )
        assert warnings.formatwarning("it is old", FutureWarning, "module.py", 3).startswith("module.py:3: FutureWarning: it")
    assert warnings.formatwarning("it is torn", UserWarning, "module.py", 3).startswith("module.py:3: ")


def flip_a_bit(checkpoint: Path) -> None:
    (file,) = checkpoint.glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


SPOILT = {
    "a flipped bit": (flip_a_bit, "__0_0.distcp does not match its checksum"),
    "cut off": (lambda checkpoint: os.truncate(checkpoint / "__0_0.distcp", 1000), "__0_0.distcp has 1000 bytes, expected"),
    "no manifest": (lambda checkpoint: (checkpoint / "manifest.json").unlink(), "manifest.json is missing"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_checkpoint_is_named_and_the_one_before_it_taken(how: str, train: Train, tmp_path: Path) -> None:
    spoil, why = SPOILT[how]
    out = tmp_path / "run"
    assert train(steps=4) == (0, "")
    spoil(saved(out)[-1])
    with pytest.warns(UserWarning, match=f"^{saved(out)[-1]}: not a whole checkpoint: {why}"):
        assert train("--resume", "auto") == (0, "")
    assert train("--out", str(tmp_path / "whole")) == (0, "")
    assert_same_runs(out, tmp_path / "whole", tmp_path)


def test_a_run_whose_checkpoints_are_all_spoilt_does_not_begin_anew(train: Train, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train(steps=4) == (0, "")
    for checkpoint in saved(out):
        flip_a_bit(checkpoint)
    with pytest.warns(UserWarning, match="not a whole checkpoint: __0_0.distcp does not match its checksum"):
        status, said = train("--resume", "auto")
    assert (status, said.count("\n")) == (1, 1)
    assert said.startswith(f"ditfast train: {out}/checkpoints: no checkpoint in it is whole: step-00000004: ")
    assert len(lines(out)) == 4
