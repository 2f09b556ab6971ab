"""Launches: arguments become a parameter block, tensors memory that the kernel may touch; errors and counters come back."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from . import counters
from .library import MESSAGE_BYTES, Config, Program, SimError, library
from .options import options
from .tables import reached

ORDERS = {"forward": 0, "reverse": 1, "random": 2}


# ------------------------------------------------------------------ memory
class Memory(NamedTuple):
    """What a tensor argument gives access to."""

    address: int
    nbytes: int
    description: str


def _memory(tensor: Any, name: str) -> Memory | None:
    if not isinstance(tensor, torch.Tensor):
        tensor = getattr(tensor, "base", tensor)  # triton.reinterpret
    if not isinstance(tensor, torch.Tensor):
        return None
    if tensor.device.type not in options.device_types:
        raise SimError(f"ptxsim: tensor argument '{name}' is on {tensor.device}; only CPU tensors can be passed")
    description = f"{name} {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
    if not options.strict_views:
        storage = tensor.untyped_storage()
        return Memory(storage.data_ptr(), storage.nbytes(), description)
    if tensor.numel() == 0:
        return Memory(tensor.data_ptr(), 0, description)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return Memory(tensor.data_ptr(), (last + 1) * tensor.element_size(), description)


def _distinct(memories: Iterable[Memory | None]) -> list[Memory]:
    """Without empty ones, and the first of those that are the same."""
    distinct: dict[tuple[int, int], Memory] = {}
    for memory in memories:
        if memory is not None and memory.nbytes > 0:
            distinct.setdefault((memory.address, memory.nbytes), memory)
    return list(distinct.values())


# ------------------------------------------------------------------ arguments
@dataclass
class Argument:
    """A kernel parameter: a tensor, a number, None for a null pointer, or the bytes of a tensor map."""

    value: Any
    type: str  # Triton's; only floating-point types change how a number is stored
    name: str


def _pack(argument: Argument, size: int) -> bytes:
    value = argument.value
    if isinstance(value, bytes):
        return value
    if hasattr(value, "data_ptr"):
        value = value.data_ptr()
    if value is not None and argument.type.startswith(("f", "bf")):
        if argument.type == "bf16":
            return torch.tensor(float(value), dtype=torch.bfloat16).view(torch.int16).numpy().tobytes()
        return {8: np.float64, 4: np.float32, 2: np.float16}[size](value).tobytes()
    return (int(value or 0) & ((1 << (8 * size)) - 1)).to_bytes(size, "little")


def _parameter_block(program: Program, name: str, arguments: Sequence[Argument]) -> bytes:
    if len(arguments) != program.parameters:
        raise SimError(
            f"ptxsim: kernel '{name}' has {program.parameters} parameters but {len(arguments)} arguments were passed"
        )
    block = bytearray(max(1, program.parameter_bytes))
    for argument, offset, size in zip(arguments, program.parameter_offsets, program.parameter_sizes, strict=True):
        packed = _pack(argument, size)
        block[offset : offset + len(packed)] = packed
    return bytes(block)


# ------------------------------------------------------------------ launches
@dataclass
class Resources:
    """What a launch says about the compiled kernel."""

    threads: int  # per CTA
    shared: int  # bytes of dynamic shared memory per CTA
    n_regs: int = 0
    n_spills: int = 0


def _config(grid: Sequence[int], resources: Resources) -> Config:
    config = Config(
        shared=resources.shared,
        cta_order=ORDERS[options.cta_order],
        warp_order=ORDERS[options.warp_order],
        cp_early=options.cp_async == "early",
    )
    config.grid[:] = grid
    config.block[:] = [resources.threads, 1, 1]
    for name in ("threads", "max_instr", "check_init", "check_race", "check_global", "stats", "seed", "slice"):
        setattr(config, name, getattr(options, name))
    config.cta_begin, config.cta_end = options.cta_begin, options.cta_end
    return config


def launch(
    program: Program,
    name: str,
    grid: Sequence[int],
    arguments: Sequence[Argument],
    resources: Resources,
    further_tensors: Sequence[torch.Tensor] = (),
) -> counters.LaunchStats | None:
    """Runs a grid and reports its counters; None, and nothing is run, if the grid is empty.

    The kernel may touch the tensors among the arguments, those whose addresses an int64 tensor holds, and ``further_tensors``.
    """
    if options.unsupported == "eager" and (messages := program.unsupported()):
        raise SimError("ptxsim: " + "\n".join(messages))
    grid = [int(x) for x in grid]
    if any(x < 0 for x in grid):
        raise SimError(f"ptxsim: kernel '{name}': negative grid {grid}")
    if grid[1] > 65535 or grid[2] > 65535 or grid[0] > 2**31 - 1:
        raise SimError(f"ptxsim: kernel '{name}': grid {tuple(grid)} exceeds the CUDA limits (2^31-1, 65535, 65535)")
    if 0 in grid:
        return None
    block = _parameter_block(program, name, arguments)
    memories = _distinct(
        [
            *(_memory(a.value, a.name) for a in arguments if hasattr(a.value, "data_ptr")),
            *(_memory(tensor, "descriptor") for tensor in further_tensors),
            *(_memory(tensor, f"in {a.name}") for a in arguments for tensor in reached(a.value)),
        ]
    )
    addresses = np.array([m.address for m in memories], np.uint64)
    sizes = np.array([m.nbytes for m in memories], np.uint64)
    names = (ctypes.c_char_p * max(1, len(memories)))(*[m.description.encode() for m in memories])
    raw = np.zeros((program.instructions, len(counters.Column)), np.uint64)
    unique_sectors = np.zeros((len(memories), 3), np.uint64)
    message = ctypes.create_string_buffer(MESSAGE_BYTES)
    config = _config(grid, resources)
    begin = time.perf_counter()
    failed = library().ptxsim_launch(
        program.handle,
        ctypes.byref(config),
        block,
        len(block),
        addresses.ctypes.data,
        sizes.ctypes.data,
        names,
        len(memories),
        raw.ctypes.data,
        unique_sectors.ctypes.data,
        message,
        MESSAGE_BYTES,
    )
    seconds = time.perf_counter() - begin
    if failed:
        raise SimError(message.value.decode(errors="replace"))
    stats = counters.count(
        program,
        raw,
        unique_sectors,
        [m.description.split(" ")[0] for m in memories],
        kernel=name,
        grid=tuple(grid),
        num_warps=resources.threads // 32,
        shared=resources.shared,
        n_regs=resources.n_regs,
        n_spills=resources.n_spills,
        seconds=seconds,
    )
    counters.report(stats)
    return stats


def _type_of(value: Any) -> str:
    return "fp32" if isinstance(value, float) else "i64"


def run_ptx(
    ptx: str,
    grid: Sequence[int],
    args: Sequence[Any],
    types: Sequence[str] | None = None,
    num_warps: int = 4,
    shared: int = 0,
    entry: str = "",
) -> counters.LaunchStats | None:
    """Runs PTX text. ``args``: tensors, ints or floats in parameter order; missing ones are null pointers."""
    program = Program(ptx, entry)
    types = types or [_type_of(a) for a in args]
    arguments = [Argument(a, t, f"arg{i}") for i, (a, t) in enumerate(zip(args, types, strict=True))]
    missing = max(0, program.parameters - len(args))
    arguments += [Argument(None, "*i8", "missing")] * missing
    x, y, z = program.block
    threads = x * max(1, y) * max(1, z) if x else num_warps * 32
    grid = [*grid, *[1] * (3 - len(grid))]
    return launch(program, entry or "ptx", grid, arguments, Resources(threads, shared))
