"""Steps with the same bits in every run, on a GPU too."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from ..dispatch.override import attention_engine
from .errors import RunError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # cuBLAS reads it when its first product is computed
FIXED_WORKSPACES = (":4096:8", ":16:8")  # with others its streams may share memory, and add in any order


def fix_workspace() -> None:
    """Set cuBLAS's workspace for a process that has computed nothing on a GPU yet, unless the environment has one."""
    os.environ.setdefault(WORKSPACE, FIXED_WORKSPACES[0])


def check_workspace() -> None:
    """Raise RunError unless the environment gives cuBLAS a workspace that keeps its bits."""
    found = os.environ.get(WORKSPACE)
    if torch.version.hip is None and found not in FIXED_WORKSPACES:
        got = f"{WORKSPACE}={found}" if found else f"no {WORKSPACE} in the environment"
        raise RunError(f"deterministic: got {got}, expected {FIXED_WORKSPACES[0]}: set it before the process starts")


@contextlib.contextmanager
def deterministic(device: torch.device, compiled: bool = False) -> Iterator[None]:
    """Make forwards and backwards in the ``with`` block repeatable to the bit, and operations that cannot be an error.

    On CUDA attention takes our Triton kernels, whose sums have a fixed order: the backwards of libraries may add with atomics.

    If ``compiled``, the block runs torch.compile's kernels, whose sums are not to follow what is measured to be fast.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    strict, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.use_deterministic_algorithms, strict, warn_only=warns)
        stack.callback(_set_cudnn, *before)
        torch.use_deterministic_algorithms(True)
        _set_cudnn(True, False)
        if device.type == "cuda":
            stack.enter_context(attention_engine("triton"))
        if compiled:
            from torch._inductor import config

            stack.enter_context(config.patch(deterministic=True))
        yield


def _set_cudnn(deterministic: bool, benchmark: bool) -> None:
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = benchmark
