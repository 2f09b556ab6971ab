"""ThreadSanitizer on the CPU engine: nothing to report, and it does report races that are put there."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ditfast.cpu import library

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not library.cpu_features() >= {*library.AVX2}, reason="needs AVX2, and Linux"),
]
DRIVER = Path(__file__).with_name("races.cpp")
OPTIONS = ("-std=c++17", "-O1", "-g", "-w", "-fopenmp", "-fsanitize=thread", *library.options_for(frozenset(library.AVX2)))
PLANTED = {
    "shares overlap": ("parallel.h", "first = count * own / team", "first = count * own / team - (own > 0)"),
    "one scratch for all": ("engine.cpp", "static thread_local Scratch", "static Scratch"),
    "one widened panel for all": ("linear.h", "static thread_local std::vector<float> wide", "static std::vector<float> wide"),
}


def reports(sources: Path, folder: Path) -> str:
    """What ThreadSanitizer says of the engine in ``sources``."""
    program = folder / "races"
    command = [*library.compiler(), *OPTIONS, f"-I{sources}", str(DRIVER), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if "fsanitize" in built.stderr or "tsan" in built.stderr:
        pytest.skip(f"no ThreadSanitizer: {built.stderr.splitlines()[0]}")
    assert built.returncode == 0, built.stderr
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert (done.returncode == 0) == (not done.stderr), done.stderr
    return done.stderr


def test_no_races(tmp_path: Path) -> None:
    assert reports(library.SOURCES, tmp_path) == ""


@pytest.mark.parametrize("name", PLANTED)
def test_planted_races_are_found(name: str, tmp_path: Path) -> None:
    file, before, after = PLANTED[name]
    sources = tmp_path / "src"
    shutil.copytree(library.SOURCES, sources)
    text = (sources / file).read_text()
    assert text.count(before) == 1
    (sources / file).write_text(text.replace(before, after))
    assert "WARNING: ThreadSanitizer: data race" in reports(sources, tmp_path)
