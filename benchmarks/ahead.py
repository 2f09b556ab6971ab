"""Compiling ahead: first calls of rivals in parallel processes, which fill Inductor's and Triton's caches."""

from __future__ import annotations

import contextlib
import copyreg
import functools
import hashlib
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import torch

import ditfast
from ditfast.interrupt import end_children, shielding_children

from .gauges import first_line
from .gpu import open_gpu
from .precision import fix_precision
from .rivals import COMPILED, OURS, Case

BYTES_OF_A_PROCESS = 8 * 2**30  # of a GPU's memory: CUDA's context, XL/2 and its activations


class Job(NamedTuple):
    """A rival to compile for a case, which ``make`` makes in the other process."""

    title: str
    make: functools.partial[Case]
    rival: str
    blocks: int  # of the model


def needs_compiling(rival: str, device: torch.device) -> bool:
    """True for torch.compile, and on a GPU for Triton's kernels."""
    return rival in COMPILED or (device.type == "cuda" and rival in OURS)


def is_compiled(job: Job) -> bool:
    """True if an earlier run compiled this, and Inductor's cache has not been cleared since."""
    return _marker(job).exists()


def count_processes(device: torch.device, jobs: int) -> int:
    """Return how many processes compile at the same time: one per core, as far as the GPU's memory goes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpu = open_gpu(device)
    fitting = cores if gpu is None else max(1, gpu.free_bytes() // BYTES_OF_A_PROCESS)
    return max(1, min(cores, fitting, jobs))


def compile_ahead(jobs: Sequence[Job], processes: int) -> Iterator[tuple[Job, str | None]]:
    """Compile; yield each job when it ends, with its error. One that fails costs itself: its rival compiles when called."""
    if not jobs:
        return
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(processes, context, _start_worker, (torch.get_num_threads(),)) as pool, _ended_at_once(pool):
        with shielding_children():
            running = {pool.submit(_first_call, job): job for job in jobs}
        for future in as_completed(running):
            job = running[future]
            try:
                future.result()
            except BrokenProcessPool:
                yield job, "a process that compiled ended by itself"
            except Exception as error:  # whatever a compiler comes up with
                yield job, f"{type(error).__name__}: {first_line(error)}"
            else:
                yield job, None


@contextlib.contextmanager
def _ended_at_once(pool: ProcessPoolExecutor) -> Iterator[None]:
    """End the pool's processes when Ctrl-C ends the block, where the pool waits for all jobs."""
    try:
        yield
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        end_children()
        raise


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)  # Inductor's C++ depends on it
    fix_precision()


def _first_call(job: Job) -> None:
    case = job.make()
    gpu = open_gpu(case.device)
    inputs = case.inputs()  # outside of inference mode, as where they are timed: Inductor's cache tells them apart
    with torch.inference_mode():
        case.rival(job.rival, {})(*inputs)
    if gpu is not None:
        gpu.wait()
    torch._dynamo.reset()
    marker = _marker(job)
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.touch()


def _memory_format(name: str) -> torch.memory_format:
    found: torch.memory_format = getattr(torch, name)
    return found


# Inductor's cache keys are pickles. Pickle writes a memory format as an attribute of whichever module imported torch first,
# which is another one in another process: nothing that was compiled ahead would be found. torch does the same for layouts.
copyreg.pickle(torch.memory_format, lambda one: (_memory_format, (str(one).removeprefix("torch."),)))


def _marker(job: Job) -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    key = repr((job.title, job.rival, job.make.args, torch.__version__, ditfast.__version__, torch.get_num_threads()))
    return Path(cache_dir()) / "ditfast-bench" / hashlib.sha256(key.encode()).hexdigest()[:32]
