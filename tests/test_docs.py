"""The guides' promises that a machine can check: their commands are ones, their examples run, their tables are computed so."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from ditfast.benchmarks import bench, predictions
from ditfast.cli import _parser

ROOT = Path(__file__).resolve().parents[1]
GUIDES = {path.name: path.read_text("utf-8") for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
TRAINING = GUIDES["training.md"]
MODULE = "ditfast"


def commands(text: str) -> Iterator[list[str]]:
    """What a guide's code says to run: lines of blocks and of running text, as a shell splits them."""
    text = re.sub(r"\\\n\s*", "", text)
    blocks = re.findall(r"^(?: {4})(\S.*)$", text, re.MULTILINE) + re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", text)
    for line in lines:
        if not re.match(r"(ditfast|torchrun) ", line):
            continue
        for part in re.split(r" && |; ", line):
            yield shlex.split(part, comments=True)


def documented(program: str) -> list[object]:
    found = [(name, words) for name, text in GUIDES.items() for words in commands(text) if words[0] == program]
    return [pytest.param(words, id=f"{name}: {' '.join(words)}") for name, words in found if not is_mentioned(words)]


def is_mentioned(words: list[str]) -> bool:
    """``ditfast sample``, ``ditfast convert IN OUT --to official|diffusers``"""
    return len(words) < 3 or any("|" in word or "..." in word for word in words)


@pytest.mark.parametrize("words", documented("ditfast"))
def test_commands_parse(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    parse(words[1:])


@pytest.mark.parametrize("words", documented("torchrun"))
def test_commands_under_torchrun_parse(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    args = get_args_parser().parse_args(words[1:])
    assert args.module
    assert args.training_script == MODULE
    parse(args.training_script_args)


def parse(arguments: list[str]) -> argparse.Namespace:
    if arguments[0] == "bench":
        return bench.parse_arguments(arguments[1:])
    return _parser().parse_args(arguments)


@pytest.mark.usefixtures("one_thread")
def test_the_trainings_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    train, read_log = re.findall(r"```python\n(.*?)```", TRAINING, re.DOTALL)
    exec(train.replace("steps=5000, batch=128", "steps=2, batch=4"), names := {})
    assert names["weights"].is_file()
    exec(read_log, {})
    assert 0.5 < float(capsys.readouterr().out) < 2


def test_the_trainings_tables_are_as_computed(capsys: pytest.CaptureFixture[str]) -> None:
    command, *arguments = ["benchmarks/predictions.py", "--training"]
    assert f"`python {command} {' '.join(arguments)}`" in TRAINING
    assert predictions.main(arguments) == 0
    for table in capsys.readouterr().out.strip().split("\n\n"):
        assert table in TRAINING


def test_the_predictions_are_as_computed(capsys: pytest.CaptureFixture[str]) -> None:
    command = "`python benchmarks/predictions.py --out docs/predictions.md`"
    assert command in GUIDES["predictions.md"]
    assert predictions.main([]) == 0
    assert capsys.readouterr().out == GUIDES["predictions.md"]


def test_the_readme_s_predictions_are_as_computed(capsys: pytest.CaptureFixture[str]) -> None:
    assert "`python benchmarks/predictions.py --summary`" in GUIDES["README.md"].replace("\n", " ")
    assert predictions.main(["--summary"]) == 0
    assert capsys.readouterr().out.strip() in GUIDES["README.md"]


def test_each_guide_has_commands() -> None:
    assert {name for name, text in GUIDES.items() if list(commands(text))} >= {"README.md", "sampling.md", "training.md"}
