"""The CPU engine's inner loops as the compiler leaves them for AVX-512, which this machine need not have: no spills."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from ditfast.cpu import library
from ditfast.files import cache_folder


class Instruction(NamedTuple):
    address: int
    name: str
    operands: str


FEATURES = {"avx2": {*library.AVX2}, "avx512": {*library.AVX2, *library.AVX512, *library.EXTRAS}}


@pytest.fixture(scope="module", params=FEATURES)
def loops(request: pytest.FixtureRequest) -> list[list[Instruction]]:
    """Innermost ones of the library for a CPU with AVX2 and no more, or with everything."""
    if not shutil.which("objdump"):
        pytest.skip("needs objdump")
    options = library.options_for(frozenset(FEATURES[request.param]))
    try:
        path = library.build(options, cache_folder("cpu"))
    except library.Unavailable as error:
        pytest.skip(str(error))
    return list(innermost(disassembled(path)))


def disassembled(path: Path) -> list[Instruction]:
    text = subprocess.run(["objdump", "-d", "--no-show-raw-insn", str(path)], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^\s*([0-9a-f]+):\s+(\S+)[ \t]*(.*)$", text, re.MULTILINE)
    return [Instruction(int(address, 16), name, operands) for address, name, operands in found]


def innermost(code: list[Instruction]) -> Iterator[list[Instruction]]:
    """From each backward jump's target to the jump, where there is no other jump between."""
    places = {instruction.address: i for i, instruction in enumerate(code)}
    for i, instruction in enumerate(code):
        target = re.match(r"[0-9a-f]+", instruction.operands)
        if not instruction.name.startswith("j") or target is None:
            continue
        start = places.get(int(target[0], 16), i)
        body = code[start : i + 1]
        if start < i and not any(other.name.startswith("j") for other in body[:-1]):
            yield body


TILES = {"avx2": {"vfmadd231ps": 12, "vpmaddubsw": 12}, "avx512": {"vfmadd231ps": 24, "vdpbf16ps": 24, "vpdpbusd": 24}}
OTHERS = {
    "vfmadd231ps": 18,
    "vdpbf16ps": 18,
    "vpdpbusd": 25,
    "vpmaddubsw": 42,
}  # loads, broadcasts, a prefetch, the loop; additions


@pytest.mark.parametrize(
    ("loops", "product", "count"),
    [(features, product, count) for features, tiles in TILES.items() for product, count in tiles.items()],
    indirect=["loops"],
)
def test_a_tile_stays_in_registers(loops: list[list[Instruction]], product: str, count: int) -> None:
    of_a_tile = [
        loop for loop in loops if sum(i.name == product for i in loop) == count and any("prefetch" in i.name for i in loop)
    ]
    assert of_a_tile
    for loop in of_a_tile:
        assert not [i for i in loop if re.search(r"\(%r[sb]p", i.operands)]
        assert len(loop) <= count + OTHERS[product]
