"""Origin of a bench's figures: the machine, the versions of packages, the commit."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

import ditfast
from ditfast import cpu
from ditfast.cpu import library

from .precision import precision

FEATURES = (*library.AVX2, *library.AVX512, *library.EXTRAS, "avx_vnni", "amx_bf16", "amx_int8")
PACKAGES = ("triton", "flash-attn", "diffusers", "openvino", "nncf")

Facts = dict[str, str | int | float | None]


def machine(device: torch.device) -> Facts:
    """Return device, features, clock, threads and precision settings; None where something cannot be told."""
    on_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else _cpu_name(),
        "cpu engine": None if on_cuda else _cpu_engine(),
        "cpu features": None if on_cuda else " ".join(name for name in FEATURES if name in library.cpu_features()) or None,
        "clock_mhz": None if on_cuda else _cpu_clock_mhz(),  # a GPU's is read at work
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if on_cuda else None,
        **precision(),
    }


def versions() -> Facts:
    """Return versions of ditfast, Python and packages; None for one that is not installed."""
    return {
        "ditfast": ditfast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: _version(package) for package in PACKAGES},
    }


def commit() -> str | None:
    """Return ``git describe`` of the clone that runs, None outside of one."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_engine() -> str:
    engine, why = cpu.found()
    return f"none: {why}" if engine is None else "found"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_info(field: str) -> str | None:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), None)


def _cpu_name() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cpu_clock_mhz() -> float | None:
    clock = _cpu_info("cpu MHz")
    return None if clock is None else float(clock)
