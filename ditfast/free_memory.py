"""Free memory, and work that does not fit into it: refused in one line before it starts, or ended by one line."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from .files import format_bytes

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
MARGIN = 1.1  # other processes may end, and page caches shrink, before the work is at its peak
KB = 1024  # bytes, in /proc/meminfo
MESSAGES = (  # of torch's allocators, its libraries, the C++ runtime, mmap and threads, in lower case
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "alloc_failed",
    "bad_alloc",
    "storage size calculation overflowed",
    "can't start new thread",
)


class MemoryShortage(RuntimeError):
    """Too little memory for the work: how much it takes, how much is free and what to change, on one line."""


@contextmanager
def enough_memory(what: str, device: torch.device, advice: str, *, least: int, estimate: int | None = None) -> Iterator[None]:
    """Refuse work that cannot fit, warn of work that may not, and turn running out of memory in the block into one line.

    Args:
        what: argument and value that decide the size, such as ``"--batch: got 256"``.
        device: that holds the work.
        advice: what to change, which ends the line.
        least: bytes that the work takes at its peak, at least, beside what this process holds already.
        estimate: bytes that it takes, for the line and the warning; ``least`` unless given.

    Raises:
        MemoryShortage: ``least`` is beyond what is free, by ``MARGIN``; or the block ran out of memory.
    """
    free = free_bytes(device)
    estimate = max(least, estimate or 0)
    about, too_little = f"about {format_bytes(estimate)}", f"{what}, for which the device has too little memory"
    sizes = about if free is None else f"{about}, but {format_bytes(free)} are free"
    then = "" if free is None else f", and {format_bytes(free)} were free"
    if free is not None and least > MARGIN * free:
        raise MemoryShortage(f"{too_little} ({sizes}): {advice}")
    if free is not None and estimate > free:
        warnings.warn(f"{what}, which may not fit into the memory ({sizes}): {advice}", stacklevel=3)
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise MemoryShortage(f"{too_little} ({about}{then}): {advice}") from error
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """True for the errors in which torch, its libraries, Python and the system say that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError | MemoryShortage):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM or "os error 12" in str(error)  # the latter is safetensors'
    return isinstance(error, RuntimeError) and any(message in str(error).lower() for message in MESSAGES)


def shortage(error: BaseException) -> str:
    """Return one line on work that ran out of memory outside of what ``enough_memory`` asks for."""
    if isinstance(error, MemoryShortage):
        return str(error)
    device = torch.device("cuda" if torch.cuda.is_initialized() else "cpu")
    free = free_bytes(device)
    sizes = "" if free is None else f" ({format_bytes(free)} are free now)"
    see = "nvidia-smi lists it" if device.type == "cuda" else "free -h and ulimit -v tell"
    return f"the device has too little memory{sizes}: see what else uses it ({see})"


@contextmanager
def shortage_exits(program: str) -> Iterator[None]:
    """End the process with status 1 and one line where the block, or the decorated ``main``, runs out of memory."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        sys.stderr.write(f"{program}: {shortage(error)}\n")
        raise SystemExit(1) from error


def why_too_large(needed: int, device: torch.device) -> str:
    """Return the sizes in words if work needs surely more than a device has free, else an empty string."""
    free = free_bytes(device)
    if free is None or needed <= MARGIN * free:
        return ""
    return f"about {format_bytes(needed)}, but {format_bytes(free)} are free"


def free_bytes(device: torch.device) -> int | None:
    """Return how much memory this process may still take on a device; None where the system does not say.

    On a CPU that is the least of what the machine has (swap among it), its cgroups allow (file caches count as free) and
    ``ulimit`` leaves; of the first two, processes that torchrun started on this machine share alike.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu":
        return None
    swap = _meminfo("SwapFree") or 0
    shared = [available + swap for available in (_meminfo("MemAvailable"), *_left_by_cgroups()) if available is not None]
    world = os.environ.get("LOCAL_WORLD_SIZE", "1")
    ranks = int(world) if world.isdecimal() and int(world) else 1
    return min((*(size // ranks for size in shared), *_left_by_ulimit()), default=None)


def _meminfo(name: str) -> int | None:
    for line in _read(PROC / "meminfo").splitlines():
        if line.startswith(f"{name}:"):
            return KB * int(line.split()[1])
    return None


def _left_by_cgroups() -> Iterator[int]:
    """Yield what this process's cgroups, of either version, and those around them leave."""
    for line in _read(PROC / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, most, used, prefix = CGROUPS, "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            root, most, used, prefix = CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        else:
            continue
        own = root / path.strip("/")  # in a container it may not be there, and the root is the container's
        for folder in (own, *own.parents):
            if not folder.is_relative_to(root):
                break
            limit, usage = _read(folder / most).strip(), _read(folder / used).strip()
            if limit.isdecimal() and usage.isdecimal():
                caches = dict(entry.split() for entry in _read(folder / "memory.stat").splitlines())
                files = sum(int(caches.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
                yield max(0, int(limit) - int(usage) + files)


def _left_by_ulimit() -> Iterator[int]:
    pages = _read(PROC / "self" / "statm").split()
    if sys.platform == "win32" or not pages:
        return
    import resource

    for limit, used in ((resource.RLIMIT_AS, pages[0]), (resource.RLIMIT_DATA, pages[5])):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            yield max(0, soft - int(used) * resource.getpagesize())


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
