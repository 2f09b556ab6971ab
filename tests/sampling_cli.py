"""What tests of ``ditfast sample`` share."""

from __future__ import annotations

from pathlib import Path

from checkpoint_files import weights_of

from ditfast import DiTConfig, load_checkpoint, save_checkpoint
from ditfast.cli import main
from ditfast.threads import one_thread

QUICK = ["--steps", "ddim4", "--batch", "4"]
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def draw(out: Path, *arguments: str) -> int:
    """The exit status of a few steps."""
    with one_thread():
        return main(["sample", "--out", str(out), *QUICK, *arguments])


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def checkpoint(path: Path, config: DiTConfig) -> Path:
    save_checkpoint(load_checkpoint(weights_of(config), config=config), path)
    return path


def words(path: Path) -> str:
    path.write_text("\n".join(WORDS))
    return str(path)
