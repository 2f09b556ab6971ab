"""Where the numbers come from."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

import ditfast
from ditfast import cpu
from ditfast.cpu import library

FEATURES = (*library.AVX2, *library.AVX512, *library.EXTRAS, "avx_vnni", "amx_bf16", "amx_int8")


def describe(device: torch.device) -> dict[str, str | int | float | None]:
    """Date, versions, device, clocks, threads and git revision; None where a thing cannot be told."""
    on_cuda = device.type == "cuda"
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "ditfast": ditfast.__version__,
        "git": _git_revision(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "flash-attn": _version("flash-attn"),
        "diffusers": _version("diffusers"),
        "openvino": _version("openvino"),
        "nncf": _version("nncf"),
        "cpu engine": None if on_cuda else _cpu_engine(),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if on_cuda else _cpu_name(),
        "cpu features": None if on_cuda else " ".join(name for name in FEATURES if name in library.cpu_features()) or None,
        "clock_mhz": _gpu_clock_mhz(device) if on_cuda else _cpu_clock_mhz(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if on_cuda else None,
    }


def _cpu_engine() -> str:
    engine, why = cpu.found()
    return f"none: {why}" if engine is None else "found"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
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


def _gpu_clock_mhz(device: torch.device) -> int | None:
    try:
        return torch.cuda.clock_rate(device)
    except Exception:  # no nvidia-ml-py, no NVML in the container, or a driver that will not tell
        return None
