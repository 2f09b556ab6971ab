"""What an architecture gives to kernels: how many programs fit a multiprocessor, how many instructions it issues meanwhile."""

from __future__ import annotations

from typing import NamedTuple

from .tiles import SHARED_BYTES, SMALLEST_SHARED_BYTES

SCHEDULERS = 4  # of an NVIDIA multiprocessor, each issues one warp instruction a cycle
REGISTERS = 65536
RESERVED_SHARED_BYTES = 1024  # of each program, by CUDA
TENSOR_MEMORY_COLUMNS = 512  # of an sm_100 multiprocessor


class Architecture(NamedTuple):
    """Limits of one multiprocessor, and what a GPU of the architecture issues while its memory delivers."""

    gpu: str
    warps: int
    programs: int
    multiply_adds: int  # a cycle and multiprocessor, dense 16-bit operands, fp32 accumulators
    instructions_a_byte: float  # warp instructions that the GPU issues in the time its memory takes for a byte


# From the CUDA programming guide's table of compute capabilities. Instructions a byte are multiprocessors * SCHEDULERS *
# clock / bandwidth; tests/test_gpu_table.py holds them against ``ditfast.flops.DEVICES``, which no kernel may import.
ARCHITECTURES = {
    "sm_80": Architecture("A100", 64, 32, 1024, 0.299),
    "sm_86": Architecture("RTX 3090", 48, 16, 256, 0.594),
    "sm_89": Architecture("RTX 4090", 48, 24, 256, 1.28),
    "sm_90": Architecture("H100", 64, 32, 2048, 0.277),
    "sm_100": Architecture("B200", 64, 32, 4096, 0.137),
    "sm_120": Architecture("RTX 5090", 48, 24, 256, 0.913),
}
AMD_WAVES = 8  # of each of the four SIMDs of a gfx942 compute unit, whose lanes have 512 registers
AMD_REGISTERS = 512


def largest_shared_bytes(arch: str) -> int:
    """That one program may have."""
    return SHARED_BYTES.get(arch, SMALLEST_SHARED_BYTES)


def occupancy(arch: str, registers: int, shared: int, num_warps: int, tensor_memory: int = 0) -> float:
    """Resident warps as a share of those that a multiprocessor can hold."""
    registers = -(-max(registers, 1) // 8) * 8
    if arch not in ARCHITECTURES:
        warps = SCHEDULERS * AMD_WAVES
        by_registers = SCHEDULERS * min(AMD_WAVES, AMD_REGISTERS // registers) // num_warps
        by_shared = largest_shared_bytes(arch) // max(shared, 1)
        return min(by_registers, by_shared, warps // num_warps) * num_warps / warps
    limits = ARCHITECTURES[arch]
    by_registers = SCHEDULERS * (REGISTERS // SCHEDULERS // (32 * registers)) // num_warps
    by_shared = (largest_shared_bytes(arch) + RESERVED_SHARED_BYTES) // (shared + RESERVED_SHARED_BYTES)
    by_tensor_memory = TENSOR_MEMORY_COLUMNS // max(tensor_memory, 1)
    return min(by_registers, by_shared, by_tensor_memory, limits.programs, limits.warps // num_warps) * num_warps / limits.warps
