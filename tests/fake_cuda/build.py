"""Builds the C++ half for the installed torch on first use, and loads it: its functions are torch.ops.fake_cuda.*."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

SOURCES = Path(__file__).parent / "cpp"
FLAGS = ["-std=c++20", "-O1", "-shared", "-fPIC"]


def build() -> Path:
    """Return the library for the present sources, compiler and torch, built if the cache has none."""
    compiler = os.environ.get("CXX", "g++")
    package = Path(torch.__file__).parent
    key = hashlib.sha256(" ".join([compiler, *FLAGS, torch.__version__, str(torch.version.git_version), str(package)]).encode())
    for source in sorted(SOURCES.iterdir()):
        key.update(source.name.encode() + source.read_bytes())
    cache = Path(os.environ.get("FAKE_CUDA_CACHE") or Path.home() / ".cache" / "ditfast-fake-cuda")
    cache.mkdir(parents=True, exist_ok=True)
    library = cache / f"fake_cuda-{key.hexdigest()[:20]}.so"
    if not library.exists():
        # Under another name first: another process may build or load at the same time.
        handle, unfinished = tempfile.mkstemp(suffix=".so", dir=cache)
        os.close(handle)
        include = package / "include"
        headers = [f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}"]
        libraries = [f"-L{package / 'lib'}", "-ltorch_cpu", "-ltorch_python", "-lc10"]
        command = [compiler, *FLAGS, *headers, str(SOURCES / "fake_cuda.cpp"), *libraries, "-o", unfinished]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            os.unlink(unfinished)
            raise RuntimeError("fake_cuda: building cpp/fake_cuda.cpp failed\n" + result.stderr[-4000:])
        os.replace(unfinished, library)
    return library


@functools.cache
def native() -> Any:
    """Return torch.ops.fake_cuda, built and loaded at the first call."""
    torch.ops.load_library(str(build()))
    return torch.ops.fake_cuda
