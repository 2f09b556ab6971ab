"""README and guides as programs: their blocks of shell and Python, in order."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
GUIDES = {path.name: path.read_text("utf-8") for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
BLOCK = re.compile(r"```(bash|python)\n((?s:.*?))```|^( {4}\S.*\n(?: {4}.*\n|\n(?= {4}))*)", re.MULTILINE)
SHELL = re.compile(r"(ditfast|torchrun|python|pytest|pip|bash|[A-Z_]+=\S+) ")
PYTHON = re.compile(r"(model|ditfast)\.\w+\(")  # a call on a line of its own


class Step(NamedTuple):
    """A command of a shell, or lines of Python."""

    kind: str
    code: str


def steps(text: str) -> Iterator[Step]:
    """Yield what a guide's blocks say to run; other indented text, such as output, is left out."""
    text = re.sub(r"\\\n\s*", "", text)
    for language, fenced, indented in BLOCK.findall(text):
        if language == "python":
            yield Step("python", fenced)
            continue
        for line in textwrap.dedent(fenced or indented).splitlines():
            if PYTHON.match(line):
                yield Step("python", line)
            elif SHELL.match(line):
                yield from (Step("shell", part) for part in re.split(r" && |; (?=ditfast )", line.partition("  #")[0].strip()))


def words_of(command: str) -> list[str]:
    """Split a command as a shell does; under torchrun what each rank runs."""
    words = shlex.split(command, comments=True)
    return words[words.index("-m", 1) + 1 :] if words[0] == "torchrun" else words
