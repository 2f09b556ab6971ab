"""The CPU engine as other CPUs have it: built with less than this one can, or with an AVX-512 that is emulated."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from zlib import crc32

import pytest

from ditfast.cpu import engine, library
from ditfast.files import cache_folder

EMULATION = Path(__file__).with_name("cpu") / "avx512_emulation.h"
EMULATED = (
    "-O1",
    "-mavx2",
    "-mfma",
    f"-DEMULATED={crc32(EMULATION.read_bytes())}",
    f"-I{EMULATION.parent}",
)  # else a cached one
WITHOUT = {"avx2": {*library.AVX512, *library.EXTRAS}, "avx512_without_extras": {*library.EXTRAS}, "native": set()}
VARIANTS = ("native", "avx2", "avx512_without_extras", "emulated_avx512")


@functools.cache
def built(variant: str) -> engine.Engine | str:
    """An engine, or why this machine has none like that; the native one of an AVX2 machine is its avx2."""
    try:
        if variant == "emulated_avx512":
            return load(EMULATED)
        features = library.cpu_features()
        if variant.startswith("avx512") and not features >= {*library.AVX512}:
            return "needs AVX-512"
        if variant == "avx2" and not features >= {*library.AVX512}:
            return "native is avx2 here"
        return load(library.options_for(features - WITHOUT[variant]))
    except library.Unavailable as error:
        return str(error)


def load(options: tuple[str, ...]) -> engine.Engine:
    sanitizers = os.environ.get("CPU_SANITIZERS", "")  # docs/cpu.md has the command
    if sanitizers:
        options += ("-O1", "-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all")
    return engine.Engine(library.load(library.build(options, cache_folder("cpu"))))


def take(variant: str, monkeypatch: pytest.MonkeyPatch) -> engine.Engine:
    """Makes a variant the machine's engine, or skips."""
    chosen = built(variant)
    if isinstance(chosen, str):
        pytest.skip(chosen)
    monkeypatch.setattr(engine, "found", lambda: (chosen, ""))
    return chosen
