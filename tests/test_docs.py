"""Promises of README and guides: their commands parse, their tables are computed so (test_guides.py runs them)."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from guides import GUIDES
from torch.distributed.run import get_args_parser

from ditfast.benchmarks import bench
from ditfast.cli import _parser
from ditfast.flops import memory_table

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


def test_the_memory_table_is_as_computed(capsys: pytest.CaptureFixture[str]) -> None:
    assert "`python -m ditfast.flops.memory_table`" in TRAINING
    assert memory_table.main([]) == 0
    assert capsys.readouterr().out in TRAINING


def test_each_guide_has_commands() -> None:
    assert {name for name, text in GUIDES.items() if list(commands(text))} >= {"README.md", "sampling.md", "training.md"}
