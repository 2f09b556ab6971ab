"""What a compiled kernel is made of: NVIDIA cubins through the disassembler in Triton's wheel, AMD code from its assembly."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton

NVIDIA_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)(.*)")
NVIDIA_LABEL = re.compile(r"(\.L_x_\w+):")
NVIDIA_BRANCH_TARGET = re.compile(r"`\((\.L_x_\w+)\)")
AMD_INSTRUCTION = re.compile(r"\t([a-z]+_[a-z0-9_]+)(.*)")
AMD_LABEL = re.compile(r"(\.LBB\w+):")
AMD_BRANCH_TARGET = re.compile(r"(\.LBB\w+)")

AMD_BITS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "short": 16, "ushort": 16, "sshort": 16, "ubyte": 8}


@dataclass
class Code:
    """Instructions in the order of the program, by opcode."""

    target: str
    opcodes: Counter[str]

    def __len__(self) -> int:
        return self.opcodes.total()

    def count(self, *prefixes: str) -> int:
        return sum(number for opcode, number in self.opcodes.items() if opcode.startswith(prefixes))

    @property
    def mma(self) -> Counter[str]:
        """Matrix instructions by opcode."""
        return Counter({op: n for op, n in self.opcodes.items() if "MMA" in op.split(".")[0] or op.startswith("v_mfma")})

    @property
    def multiply_adds(self) -> float | None:
        """Of the matrix instructions, for one warp; None where an opcode does not tell its shape (sm_100)."""
        products = [_multiply_adds(opcode) for opcode in self.mma.elements()]
        return None if None in products else sum(product for product in products if product is not None)

    @property
    def loads(self) -> Counter[int]:
        """Global loads, also those straight into shared memory, by bits a thread."""
        return self._widths(r"LDG(STS)?\b", r"(global|buffer|flat)_load_")

    @property
    def stores(self) -> Counter[int]:
        return self._widths(r"STG\b", r"(global|buffer|flat)_store_")

    def _widths(self, nvidia: str, amd: str) -> Counter[int]:
        widths: Counter[int] = Counter()
        for opcode, number in self.opcodes.items():
            if re.match(nvidia, opcode):
                widths[_nvidia_bits(opcode)] += number
            elif match := re.match(amd, opcode):
                widths[AMD_BITS[opcode[match.end() :].split("_")[0]]] += number
        return widths

    @property
    def bytes_moved(self) -> int:
        """By one thread's global loads and stores."""
        return sum(bits // 8 * number for bits, number in (*self.loads.items(), *self.stores.items()))


@dataclass
class MachineCode(Code):
    """A compiled kernel."""

    registers: int  # a thread
    spills: int  # instructions that move registers to or from memory (NVIDIA), registers spilled (AMD)
    loops: list[Code] = field(default_factory=list)  # the innermost ones

    @property
    def main_loop(self) -> Code | None:
        """The innermost loop that does the work: most matrix instructions, else most instructions if any reads memory."""
        reading = [loop for loop in self.loops if loop.mma or loop.loads or loop.count("LDS", "ds_read", "ds_load")]
        return max(reading, key=lambda loop: (loop.mma.total(), len(loop)), default=None)


def machine_code(compiled: Any) -> MachineCode:
    """Of a kernel that Triton compiled, whether or not this machine could run it."""
    if "cubin" in compiled.asm:
        return _nvidia(compiled.asm["cubin"], f"sm_{compiled.metadata.target.arch}")
    return _amd(compiled.asm["amdgcn"], compiled.metadata.target.arch)


def _nvidia(cubin: bytes, target: str) -> MachineCode:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = _output(triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path))
        listing = _output(triton.knobs.nvidia.nvdisasm.path, "-c", str(path))
    opcodes, loops = _read(listing.splitlines(), NVIDIA_INSTRUCTION, NVIDIA_LABEL, NVIDIA_BRANCH_TARGET)
    while opcodes and opcodes[-1] in ("NOP", "BRA"):  # behind the end: never executed
        opcodes.pop()
    spills = sum(opcode.startswith(("LDL", "STL")) for opcode in opcodes)
    registers = int(_field(r"REG:(\d+)", usage))
    return MachineCode(target, Counter(opcodes), registers, spills, [Code(target, Counter(loop)) for loop in loops])


def _amd(assembly: str, target: str) -> MachineCode:
    opcodes, loops = _read(assembly.splitlines(), AMD_INSTRUCTION, AMD_LABEL, AMD_BRANCH_TARGET)
    return MachineCode(
        target,
        Counter(opcodes),
        registers=int(_field(r"\.vgpr_count:\s+(\d+)", assembly)),
        spills=int(_field(r"\.vgpr_spill_count:\s+(\d+)", assembly)),
        loops=[Code(target, Counter(loop)) for loop in loops],
    )


def _read(
    lines: Iterable[str], instruction: re.Pattern[str], label: re.Pattern[str], branch_target: re.Pattern[str]
) -> tuple[list[str], list[list[str]]]:
    """All opcodes, and those of each innermost loop: what lies between a label and a later branch to it, and holds no loop."""
    opcodes: list[str] = []
    starts: dict[str, int] = {}
    spans: dict[int, int] = {}
    for line in lines:
        if found := label.match(line.strip()):
            starts[found[1]] = len(opcodes)
        elif found := instruction.search(line):
            opcodes.append(found[1])
            target = branch_target.search(found[2]) if "BRA" in found[1] or "branch" in found[1] else None
            if target and target[1] in starts:
                spans[starts[target[1]]] = len(opcodes)
    loops = {(start, end) for start, end in spans.items() if end - start > 1}
    outer = {loop for loop in loops for other in loops - {loop} if loop[0] <= other[0] and other[1] <= loop[1]}
    return opcodes, [opcodes[start:end] for start, end in sorted(loops - outer)]


def _multiply_adds(opcode: str) -> float | None:
    """Of one warp: a quarter of what its warp group does, on sm_90."""
    if match := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", opcode):
        return int(match[1]) * int(match[2]) * int(match[3]) / 4
    if match := re.match(r"HMMA\.16(8)(8|16)\b", opcode):
        return 16 * 8 * int(match[2])
    if match := re.match(r"v_mfma_\w+?_(\d+)x(\d+)x(\d+)", opcode):
        return int(match[1]) * int(match[2]) * int(match[3])
    return None


def _nvidia_bits(opcode: str) -> int:
    for part in opcode.split("."):
        if part in ("256", "128", "64"):
            return int(part)
        if part in ("U16", "S16", "U8", "S8"):
            return int(part[1:])
    return 32


def _field(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"{pattern!r} is not in the compiler's output: {text[:200]!r}")
    return match[1]


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr.strip()}")
    return done.stdout
