"""What tests of ``ditfast sample`` share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from checkpoint_files import weights_of

from ditfast import DiTConfig, load_checkpoint, save_checkpoint
from ditfast.cli import main

QUICK = ["--steps", "ddim4", "--batch", "4"]
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def draw(out: Path, *arguments: str) -> int:
    """The exit status of a few steps."""
    with one_thread():
        return main(["sample", "--out", str(out), *QUICK, *arguments])


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Of models this small several threads would mostly wait for each other, more so where tests run side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def checkpoint(path: Path, config: DiTConfig) -> Path:
    save_checkpoint(load_checkpoint(weights_of(config), config=config), path)
    return path


def words(path: Path) -> str:
    path.write_text("\n".join(WORDS))
    return str(path)
