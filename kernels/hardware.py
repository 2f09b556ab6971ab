"""What an architecture gives to kernels: how many programs fit a multiprocessor, how many instructions it issues meanwhile."""

from __future__ import annotations

from typing import NamedTuple

from .tiles import SHARED_BYTES, SMALLEST_SHARED_BYTES

SCHEDULERS = 4  # of an NVIDIA multiprocessor, each issues one warp instruction a cycle
REGISTERS = 65536
RESERVED_SHARED_BYTES = 1024  # of each program, by CUDA
TENSOR_MEMORY_COLUMNS = 512  # of an sm_100 multiprocessor


class Device(NamedTuple):
    """The device that stands for an architecture, and the limits of one of its multiprocessors."""

    name: str
    warps: int
    programs: int
    multiprocessors: int
    clock: float  # GHz
    bandwidth: float  # GB/s
    multiply_adds: int  # a cycle and multiprocessor, dense 16-bit operands, fp32 accumulators

    @property
    def instructions_a_byte(self) -> float:
        """Warp instructions that the device issues in the time its memory takes for a byte."""
        return self.multiprocessors * SCHEDULERS * self.clock / self.bandwidth


# From NVIDIA's data sheets and the CUDA programming guide's table of compute capabilities; boost clocks.
DEVICES = {
    "sm_80": Device("A100", 64, 32, 108, 1.41, 2000, 1024),
    "sm_86": Device("RTX 3090", 48, 16, 82, 1.695, 936, 256),
    "sm_89": Device("RTX 4090", 48, 24, 128, 2.52, 1008, 256),
    "sm_90": Device("H100", 64, 32, 132, 1.755, 3350, 2048),
    "sm_100": Device("B200", 64, 32, 148, 1.85, 8000, 4096),
    "sm_120": Device("RTX 5090", 48, 24, 170, 2.407, 1792, 256),
}
AMD_WAVES = 8  # of each of the four SIMDs of a gfx942 compute unit, whose lanes have 512 registers
AMD_REGISTERS = 512


def largest_shared_bytes(arch: str) -> int:
    """That one program may have."""
    return SHARED_BYTES.get(arch, SMALLEST_SHARED_BYTES)


def occupancy(arch: str, registers: int, shared: int, num_warps: int, tensor_memory: int = 0) -> float:
    """Resident warps as a share of those that a multiprocessor can hold."""
    registers = -(-max(registers, 1) // 8) * 8
    if arch not in DEVICES:
        warps = SCHEDULERS * AMD_WAVES
        by_registers = SCHEDULERS * min(AMD_WAVES, AMD_REGISTERS // registers) // num_warps
        by_shared = largest_shared_bytes(arch) // max(shared, 1)
        return min(by_registers, by_shared, warps // num_warps) * num_warps / warps
    device = DEVICES[arch]
    by_registers = SCHEDULERS * (REGISTERS // SCHEDULERS // (32 * registers)) // num_warps
    by_shared = (largest_shared_bytes(arch) + RESERVED_SHARED_BYTES) // (shared + RESERVED_SHARED_BYTES)
    by_tensor_memory = TENSOR_MEMORY_COLUMNS // max(tensor_memory, 1)
    return min(by_registers, by_shared, by_tensor_memory, device.programs, device.warps // num_warps) * num_warps / device.warps
