"""A GPU with too little memory: every command and bench says so in one line, and rows that fit are kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fake_cuda import fake_cuda

import ditfast
from ditfast.benchmarks import sampling
from ditfast.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = 2**18  # bytes: less than any of the models

COMMANDS = {
    "doctor": (["doctor"], "ditfast doctor: the device has too little memory"),
    "sample": (["sample", "--out", "run", "--batch", "2"], "ditfast sample: --batch: got 2, for which the device has"),
    "train": (
        ["train", "--data", "digits", "--steps", "1", "--batch", "2", "--out", "run"],
        "ditfast train: --batch: got 2, for which the device has too little memory (about ",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), COMMANDS.values(), ids=COMMANDS)
def test_a_command_ends_with_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with fake_cuda(memory=SMALL):
        assert main(arguments) == 1
    said = capsys.readouterr().err
    assert said.startswith(message)
    assert said.count("\n") == 1


def sample_bench(out: Path) -> int:
    return sampling.main(["--width", "S", "--depth", "1", "--steps", "2", "--rounds", "1", "--out", str(out)])


def test_the_sampling_bench_ends_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fake_cuda(memory=SMALL), pytest.raises(SystemExit, match="1"):
        sample_bench(tmp_path)
    said = capsys.readouterr().err
    assert "the reference's run does not fit into memory (about " in said
    assert "take a smaller --batch or --width" in said
    assert said.count("\n") == 1


def test_the_sampling_bench_keeps_the_rows_of_rivals_that_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = sampling.Setting.rivals

    def two(setting: sampling.Setting) -> dict[str, Callable[[], sampling.Loop]]:
        def huge() -> sampling.Loop:
            yield torch.empty(2**40, device=setting.device)

        return {"reference": known(setting)["reference"], "ditfast": huge, "ditfast-torch": known(setting)["ditfast-torch"]}

    monkeypatch.setattr(sampling.Setting, "rivals", two)
    with fake_cuda(), ditfast.backend("torch"):
        assert sample_bench(tmp_path) == 0
    report = json.loads((tmp_path / "sampling.json").read_text())
    assert [row["rival"] for row in report["rows"]] == ["reference", "ditfast-torch"]
    assert any("sampling: ditfast skipped, out of memory: take a smaller" in note for note in report["notes"])
