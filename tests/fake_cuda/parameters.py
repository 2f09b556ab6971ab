"""What a fake GPU is: the parameters of the fake, and the device properties that follow from them."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass

from ptxsim.driver import MAX_SHARED, MULTIPROCESSORS, REGISTERS

L2_MIB = {80: 40, 86: 6, 89: 72, 90: 50, 100: 126, 120: 96}  # of NVIDIA's data sheets
THREADS = {86: 1536, 89: 1536, 120: 1536}  # of a multiprocessor, where not 2048
ARCHITECTURES = "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120"  # that PyTorch's wheels are built for
AMD_ARCHITECTURE = "gfx942"


@dataclass(frozen=True)
class Parameters:
    """A machine with ``count`` GPUs of one kind.

    Args:
        name: as CUDA tells it.
        capability: compute capability.
        memory: bytes of each GPU.
        count: number of GPUs; 0 for a CUDA build without one.
        hip: version of ROCm, for an AMD GPU.
    """

    name: str = "NVIDIA H200"
    capability: tuple[int, int] = (9, 0)
    memory: int = 141 * 2**30
    count: int = 1
    hip: str | None = None

    @property
    def arch(self) -> int:
        """Compute capability as one number: 90."""
        return 10 * self.capability[0] + self.capability[1]

    @property
    def visible(self) -> list[int]:
        """GPUs that CUDA_VISIBLE_DEVICES leaves."""
        listed = os.environ.get("CUDA_VISIBLE_DEVICES")
        if listed is None:
            return list(range(self.count))
        chosen: list[int] = []
        for part in listed.split(","):
            if not part.strip().isdecimal() or int(part) >= self.count:
                break  # as CUDA does
            chosen.append(int(part))
        return chosen

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Parameters:
        """Read parameters from JSON; ``1`` is an H200."""
        given = json.loads(text)
        if not isinstance(given, dict):
            return Parameters()
        if "capability" in given:
            given["capability"] = tuple(given["capability"])
        return Parameters(**given)


@dataclass(frozen=True)
class Properties:
    """What torch.cuda.get_device_properties returns."""

    name: str
    major: int
    minor: int
    total_memory: int
    multi_processor_count: int
    L2_cache_size: int
    uuid: str
    gcnArchName: str
    shared_memory_per_block_optin: int
    max_threads_per_multi_processor: int
    warp_size: int
    shared_memory_per_block: int = 48 * 1024
    shared_memory_per_multiprocessor: int = 228 * 1024
    regs_per_multiprocessor: int = REGISTERS
    max_threads_per_block: int = 1024
    clock_rate: int = 1980000  # kHz
    memory_clock_rate: int = 3201000
    memory_bus_width: int = 6144
    is_integrated: int = 0
    is_multi_gpu_board: int = 0
    pci_bus_id: int = 1
    pci_device_id: int = 0
    pci_domain_id: int = 0


def uuid_of(index: int) -> str:
    return f"00000000-0000-0000-0000-{index:012d}"


def properties(parameters: Parameters, index: int) -> Properties:
    arch = parameters.arch
    return Properties(
        name=parameters.name,
        major=parameters.capability[0],
        minor=parameters.capability[1],
        total_memory=parameters.memory,
        multi_processor_count=MULTIPROCESSORS.get(arch, 108),
        L2_cache_size=L2_MIB.get(arch, 40) * 2**20,
        uuid=uuid_of(parameters.visible[index]),
        gcnArchName=AMD_ARCHITECTURE if parameters.hip else f"sm_{arch}",
        shared_memory_per_block_optin=MAX_SHARED.get(arch, 101376),
        max_threads_per_multi_processor=THREADS.get(arch, 2048),
        warp_size=64 if parameters.hip else 32,
    )
