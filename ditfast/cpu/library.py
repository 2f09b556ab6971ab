"""The C++ library behind the CPU engine: built by this machine's compiler at first use, kept in the user's cache folder."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ..files import visible_entries, whole_file

SOURCES = Path(__file__).with_name("src")
OPTIONS = ("-O3", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-w")
AVX2 = ("avx2", "fma")
AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq")
READ_AHEAD = 4096  # bytes behind packed weights that may be prefetched
EXTRAS = ("avx512_bf16", "avx512_vnni")  # of AVX-512, as the kernel of the system names them


class Unavailable(Exception):
    """Says why in one line."""


class NotBuilt(Unavailable):
    """On a CPU that could have the engine."""


# Structures, as the sources have them; eight bytes a field.
VECTOR = "P3q"  # rows.h: values, batch stride, token stride, whether they are bf16
LINEAR = "4P2q"  # linear.h: weight, bias, scale, sums, outputs, inputs
SUBLAYER = struct.Struct(f"q{2 * LINEAR}{3 * VECTOR}dqPq")  # engine.cpp, and the next
NORM = struct.Struct(f"{2 * VECTOR}d")
FEW_ROWS_LINEAR = "3Pq"  # few_rows.h: weight, bias, scale, outputs


@functools.cache
def cpu_features() -> frozenset[str]:
    """What the CPU can, in Linux's names; nothing elsewhere."""
    path = Path("/proc/cpuinfo")
    if platform.machine().lower() not in ("x86_64", "amd64") or not path.exists():
        return frozenset()
    line = next((line for line in path.read_text().splitlines() if line.startswith("flags")), "")
    return frozenset(line.partition(":")[2].split())


def options_for(features: frozenset[str]) -> tuple[str, ...]:
    """The compiler's.

    Raises:
        Unavailable: a CPU that has too little.
    """
    if features >= {*AVX2, *AVX512}:
        extras = [feature.replace("_", "") for feature in EXTRAS if feature in features]
        return (*(f"-m{name}" for name in (*AVX2, *AVX512, *extras)), "-mprefer-vector-width=512")
    if features >= {*AVX2}:
        return tuple(f"-m{name}" for name in AVX2)
    raise Unavailable("the CPU engine needs an x86 CPU with AVX2, and Linux")


def compiler() -> list[str]:
    """Return the words of ``CXX``, quoted as in a shell and perhaps with arguments (``ccache g++``), or g++.

    Raises:
        NotBuilt: there is none.
    """
    value = os.environ.get("CXX", "").strip() or "g++"
    try:
        words = [value] if shutil.which(value) else shlex.split(value)  # a path may have spaces that nobody quoted
    except ValueError as error:
        raise NotBuilt(f"CXX: got {value!r}, expected a command, quoted as in a shell") from error
    if not shutil.which(words[0]):
        raise NotBuilt(f"the CPU engine needs a C++ compiler, and {words[0]!r} is not installed")
    return words


def build(options: Sequence[str], folder: Path) -> Path:
    """Return the library in ``folder``, under a hash of its sources, options and compiler; several processes may build at once.

    A library that is cut off or otherwise damaged, as after a power cut, is built again.

    Raises:
        NotBuilt: the compiler fails, or the folder cannot be written.
    """
    command = [*compiler(), *OPTIONS, *options]
    digest = hashlib.sha256(" ".join(command).encode())
    for source in visible_entries(SOURCES):
        digest.update(Path(source).read_bytes())
    path = folder / f"{digest.hexdigest()[:16]}.so"
    if _is_whole(path):
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            _compile([*command, str(SOURCES / "engine.cpp"), "-o", str(temporary)])
            content = temporary.read_bytes()
            with temporary.open("ab") as stream:
                stream.write(hashlib.sha256(content).digest())  # loaders read no further than the tables in front say
    except OSError as error:
        raise NotBuilt(f"the CPU engine was not built: {error}; XDG_CACHE_HOME may name another folder of caches") from error
    return path


def _is_whole(path: Path) -> bool:
    """Return whether a file is there and ends with the hash of the rest: the system's loader ends the process otherwise."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    size = hashlib.sha256().digest_size
    return content[-size:] == hashlib.sha256(content[:-size]).digest()


def _compile(command: Sequence[str]) -> None:
    try:
        built = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise NotBuilt(f"the CPU engine was not built, {command[0]} cannot be run: {error.strerror}") from error
    if built.returncode:
        first_line = built.stderr.strip().partition("\n")[0] or f"exit status {built.returncode}"
        raise NotBuilt(f"the CPU engine was not built, {command[0]} failed: {first_line}")
    if not Path(command[-1]).exists():
        raise NotBuilt(f"the CPU engine was not built, {command[0]} wrote nothing")


def load(path: Path) -> ctypes.CDLL:
    """With the types of what it exports.

    Raises:
        NotBuilt: the system's loader refuses it.
    """
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NotBuilt(f"the CPU engine does not load: {error}") from error
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.ditfast_run.argtypes = [pointer, number, *[pointer] * 4, *[number] * 6]
    library.ditfast_few_rows.argtypes = [number, *[pointer] * 2, number, pointer, *[number] * 3]
    library.ditfast_few_rows.restype = None
    library.ditfast_pack.argtypes = [number, pointer, *[number] * 4, pointer, number]
    library.ditfast_packed_bytes.argtypes = [number] * 3
    library.ditfast_packed_bytes.restype = number
    library.ditfast_spot_check.argtypes = [pointer, pointer, number]
    library.ditfast_spot_check.restype = ctypes.c_uint64
    library.ditfast_hash.argtypes = [pointer, pointer, number]
    library.ditfast_hash.restype = ctypes.c_uint64
    library.ditfast_panel.restype = number
    library.ditfast_attention_is_half.restype = number
    library.ditfast_pairs_saturate.restype = number
    return library
