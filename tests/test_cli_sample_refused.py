"""What ``ditfast sample`` refuses, in one line and before the first step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_files import small
from sampling_cli import checkpoint, draw, words
from tiny_vae import saved as saved_vae

from ditfast.cli import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "digits.jpg"], "expected a folder or a name that ends in .png"),
        (["--out", "missing/digits.png"], "the folder missing does not exist"),
        (["--out", "/proc/digits.png"], "argument --out: got '/proc/digits.png', but no file can be written there: "),
        (["--out", "a.png", "--per-class", "0"], "expected a positive integer"),
        (["--out", "a.png", "--seed", "-1"], "expected an integer 0..2^64-1"),
        (["--out", "a.png", "--cfg", "nan"], "argument --cfg: got 'nan', expected a number, in fp32's range"),
        (["--out", "a.png", "--cfg", "1e39"], "argument --cfg: got '1e39', expected a number, in fp32's range"),
        (["--out", "a.png", "--cfg-interval", "0", "1e39"], "argument --cfg-interval: got '1e39', expected a number"),
        (
            ["--out", "a.png", "--seed", str(2**64)],
            "argument --seed: got '18446744073709551616', expected an integer 0..2^64-1",
        ),
        (
            ["--out", "a.png", "--per-class", "9" * 5000],
            "argument --per-class: got a str of length 5000, expected a positive integer",
        ),
        (
            ["--out", "a.png", "--batch", str(10**12)],
            "argument --batch: got '1000000000000', expected a positive integer up to",
        ),
        (["--out", "a", "--num", "3", "--per-class", "3"], "not allowed with argument"),
        (["--out", "a", "--solver", "dopri"], "invalid choice: 'dopri'"),
        (["--out", "a", "--device", "nonsense"], "argument --device: got 'nonsense', expected cpu, cuda or cuda:N"),
        (["--out", "a", "--device", "meta"], "argument --device: got 'meta', expected cpu, cuda or cuda:N"),
    ],
)
def test_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["sample", *arguments])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes", "12"], "--classes: got 12, expected 0..9"),
        (["--classes", "seven"], "--classes: got 'seven', expected a number 0..9, or --labels with names"),
        (
            ["--labels", "{words}", "--classes", "sevn"],
            "--classes: got 'sevn', which no class is called; close are 'seven' (7)",
        ),
        (["--labels", "{few}"], "--labels: got 2 names, expected 10, one for each class"),
        (["--labels", "nowhere"], "nowhere: cannot be read: No such file or directory"),
        (["--steps", "ddim51"], "--steps: got 'ddim51'"),
        (
            ["--steps", "ddim50", "--solver", "heun", "--force-solver"],
            "--steps: got 'ddim50', expected a positive integer with",
        ),
        (
            ["--steps", "9" * 20, "--solver", "euler", "--force-solver"],
            "--steps: got '99999999999999999999', expected a positive integer with euler",
        ),
        (["--steps", "9" * 5000], "--steps: got a str of length 5000, expected like '250'"),
        (["--per-class", "1000001"], "--per-class: got 10000010 images in all, expected at most 10000000"),
        (["--num", "100000000000", "--out", "folder"], "--num: got 100000000000 images in all, expected at most 10000000"),
        (["--steps", "0", "--solver", "sde", "--force-solver"], "--steps: got '0', expected a positive integer with sde"),
        (["--cfg-interval", "3", "1"], "--cfg-interval: got 3 1, expected LO <= HI"),
        (["--vae", "./nowhere"], "vae: ./nowhere: there is no such folder"),
        (["--checkpoint", "nowhere.pt"], "--classes or --num: got neither, expected one with --checkpoint"),
        (["--checkpoint", "nowhere.pt", "--num", "3"], "nowhere.pt: there is no such file or folder"),
        (["--checkpoint", "{latent}", "--num", "3", "--vae", "none"], "--vae: got none, but the model makes 4 channels"),
        (
            ["--checkpoint", "{without}", "--num", "3", "--cfg", "4"],
            "--cfg: got 4, expected 1, as this model has no null class",
        ),
        (["--checkpoint", "{pixel}", "--num", "3", "--vae", "{vae}"], "vae: decodes 4 channels, but the model makes 3"),
    ],
)
def test_one_line_for_what_cannot_be(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words(tmp_path / "words")
    (tmp_path / "few").write_text("zero\none")
    configs = {"latent": small(), "without": small(class_dropout_prob=0.0), "pixel": small(in_channels=3)}
    for name, config in configs.items():
        if f"{{{name}}}" in arguments:
            checkpoint(tmp_path / f"{name}.safetensors", config)
    if "{vae}" in arguments:
        pytest.importorskip("diffusers")
        saved_vae(tmp_path / "vae")
    places = {name: f"{name}.safetensors" for name in configs} | {"words": "words", "few": "few", "vae": "vae"}
    assert main(["sample", "--out", "run", *(argument.format(**places) for argument in arguments)]) == 2
    printed, found = capsys.readouterr()
    assert printed == ""
    assert found.startswith(f"ditfast sample: {message}")
    assert found.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", [["--num", "3"], ["--npz"]])
def test_a_grid_alone_is_no_folder(option: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "--out", str(tmp_path / "a.png"), *option]) == 2
    assert f"a.png, but {option[0]} needs a folder" in capsys.readouterr().err


def test_int8_is_for_a_cpu_with_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ditfast.cpu.engine.found", lambda: (None, "the CPU engine needs a compiler"))
    assert draw(tmp_path / "run", "--dtype", "int8") == 2
    assert capsys.readouterr().err == "ditfast sample: --dtype: got int8, but the CPU engine needs a compiler\n"
    monkeypatch.setattr("ditfast.devices.default_device", lambda program: torch.device("meta"))
    assert draw(tmp_path / "run", "--dtype", "int8") == 2
    message = "--dtype: got int8 for weights of torch.float32 on meta, expected fp32 or bf16 weights on the CPU"
    assert capsys.readouterr().err == f"ditfast sample: {message}\n"
    assert not list(tmp_path.iterdir())


def test_ranks_need_a_folder_and_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert draw(tmp_path / "a.png") == 2
    assert "ditfast sample (rank 1): --out: got " in capsys.readouterr().err
    assert draw(tmp_path / "run", "--num", "3") == 1
    found = capsys.readouterr().err
    assert found.startswith("ditfast sample (rank 1): rank 1 of 2 does not find the others: ")
    assert "MASTER_ADDR" in found
    assert found.count("\n") == 1


def test_a_folder_that_cannot_be_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ditfast.sampling.Sampler.__call__", lambda *arguments, **options: pytest.fail("a step was taken"))
    (tmp_path / "file").touch()
    assert draw(tmp_path / "file", "--num", "3") == 2
    assert capsys.readouterr().err == f"ditfast sample: {tmp_path / 'file'}: a file is in the way\n"
    assert draw(Path("/proc/images"), "--num", "3") == 2
    assert capsys.readouterr().err.startswith("ditfast sample: /proc/images: cannot be written: ")
