"""The native library: built from cpp/ on first use, loaded with ctypes; programs parsed by it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
import threading
from pathlib import Path

import numpy as np

SOURCES = Path(__file__).parent / "cpp"
FLAGS = [
    *("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread", "-fno-strict-aliasing", "-fwrapv"),
    # PTX says where multiply and add are fused. No code looks at errno or floating-point traps.
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
]
MESSAGE_BYTES = 1 << 15


class SimError(RuntimeError):
    """Raised when the simulated kernel does something a GPU would not (or when an instruction is unsupported)."""


class Config(ctypes.Structure):
    """The layout of Config in cpp/state.h."""

    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("threads", ctypes.c_uint32),
        ("max_instr", ctypes.c_uint64),
        ("check_init", ctypes.c_uint32),
        ("check_race", ctypes.c_uint32),
        ("check_global", ctypes.c_uint32),
        ("stats", ctypes.c_uint32),
        ("cta_order", ctypes.c_uint32),
        ("warp_order", ctypes.c_uint32),
        ("seed", ctypes.c_uint32),
        ("cp_early", ctypes.c_uint32),
        ("cta_begin", ctypes.c_uint64),
        ("cta_end", ctypes.c_uint64),
        ("slice", ctypes.c_uint64),
    ]


# ------------------------------------------------------------------ building
def _cpu_features() -> str:
    """A library built for another CPU may not run on this one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def build() -> Path:
    """The library for the present sources, compiler and CPU, built if the cache has none."""
    compiler = os.environ.get("CXX", "g++")
    key = hashlib.sha256(" ".join([compiler, *FLAGS, _cpu_features()]).encode())
    for source in sorted(SOURCES.iterdir()):
        key.update(source.name.encode() + source.read_bytes())
    cache = Path(os.environ.get("PTXSIM_CACHE") or Path.home() / ".cache" / "ptxsim")
    cache.mkdir(parents=True, exist_ok=True)
    library = cache / f"ptxsim-{key.hexdigest()[:20]}.so"
    if not library.exists():
        # Under another name first: another process may build or load at the same time.
        handle, unfinished = tempfile.mkstemp(suffix=".so", dir=cache)
        os.close(handle)
        command = [compiler, *FLAGS, "-o", unfinished, str(SOURCES / "ptxsim.cpp")]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            os.unlink(unfinished)
            raise RuntimeError("ptxsim: building cpp/ptxsim.cpp failed\n" + result.stderr[-4000:])
        os.replace(unfinished, library)
    return library


_loaded: ctypes.CDLL | None = None
_lock = threading.Lock()


def library() -> ctypes.CDLL:
    """The C interface at the end of cpp/ptxsim.cpp."""
    global _loaded
    with _lock:
        if _loaded is None:
            lib = ctypes.CDLL(str(build()))
            pointer, text, integer = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
            lib.ptxsim_load.restype = pointer
            lib.ptxsim_load.argtypes = [text, text, text, integer]
            lib.ptxsim_free.argtypes = [pointer]
            lib.ptxsim_info.argtypes = [pointer] * 2
            lib.ptxsim_params.argtypes = [pointer] * 3
            lib.ptxsim_code.argtypes = [pointer] * 6
            lib.ptxsim_unsupported.argtypes = [pointer, integer, text, integer]
            lib.ptxsim_file.argtypes = [pointer, integer, text, integer]
            tensors = [pointer, pointer, pointer, integer]  # addresses, sizes, names, how many
            lib.ptxsim_launch.argtypes = [pointer, pointer, text, integer, *tensors, pointer, pointer, text, integer]
            assert lib.ptxsim_config_size() == ctypes.sizeof(Config), "ptxsim: Config layout mismatch"
            _loaded = lib
    return _loaded


# ------------------------------------------------------------------ programs
class Program:
    """A parsed PTX kernel: sizes of its parameters, and per instruction its class, PTX line, flops and source line."""

    def __init__(self, ptx: str, entry: str = "") -> None:
        lib = library()
        message = ctypes.create_string_buffer(MESSAGE_BYTES)
        self.handle = lib.ptxsim_load(ptx.encode(), entry.encode(), message, MESSAGE_BYTES)
        if not self.handle:
            raise SimError(message.value.decode())
        self.lines = ptx.split("\n")

        info = np.zeros(7, np.int64)
        lib.ptxsim_info(self.handle, info.ctypes.data)
        self.instructions, self.parameters, self.parameter_bytes = (int(x) for x in info[:3])
        self.block = tuple(int(x) for x in info[3:6])  # zeros if the kernel does not say
        self._unsupported = int(info[6])

        offsets, sizes = np.zeros((2, max(1, self.parameters)), np.int32)
        lib.ptxsim_params(self.handle, offsets.ctypes.data, sizes.ctypes.data)
        self.parameter_offsets = offsets[: self.parameters].tolist()
        self.parameter_sizes = sizes[: self.parameters].tolist()

        columns = [np.zeros(self.instructions, np.int32) for _ in range(5)]
        lib.ptxsim_code(self.handle, *[column.ctypes.data for column in columns])
        self.cls, self.line, self.flops, self.file, self.source_line = columns
        self._files: dict[int, str] = {}

    def filename(self, file: int) -> str:
        """Name of a file that ``self.file`` refers to."""
        if file not in self._files:
            name = ctypes.create_string_buffer(4096)
            known = library().ptxsim_file(self.handle, int(file), name, 4096)
            self._files[file] = name.value.decode() if known else "?"
        return self._files[file]

    def unsupported(self) -> list[str]:
        """Messages of the instructions that would be errors if they were executed."""
        message = ctypes.create_string_buffer(4096)
        messages = []
        for k in range(self._unsupported):
            library().ptxsim_unsupported(self.handle, k, message, 4096)
            messages.append(message.value.decode())
        return messages

    def __del__(self) -> None:
        if getattr(self, "handle", None) and _loaded is not None:  # None when the interpreter shuts down
            _loaded.ptxsim_free(self.handle)
