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

FEWEST_PRODUCTS = 8  # of a loop that counts


class Instruction(NamedTuple):
    address: int
    name: str
    operands: str


@pytest.fixture(scope="module")
def loops(tmp_path_factory: pytest.TempPathFactory) -> list[list[Instruction]]:
    """Innermost ones of the library for a CPU with everything."""
    if not shutil.which("objdump"):
        pytest.skip("needs objdump")
    options = library.options_for(frozenset({*library.AVX2, *library.AVX512, *library.EXTRAS}))
    try:
        path = library.build(options, tmp_path_factory.mktemp("library"))
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


@pytest.mark.parametrize("product", ["vdpbf16ps", "vpdpbusd", "vfmadd231ps"])
def test_accumulators_stay_in_registers(loops: list[list[Instruction]], product: str) -> None:
    of_a_tile = [loop for loop in loops if sum(i.name == product for i in loop) == 24]
    assert of_a_tile
    for loop in loops:
        products = sum(i.name == product for i in loop)
        spilled = [i for i in loop if re.search(r"\(%r[sb]p", i.operands) and "zmm" in i.operands]
        assert products < FEWEST_PRODUCTS or len(spilled) <= (0 if product != "vfmadd231ps" else products / 2), spilled


def test_a_tile_is_products_and_little_else(loops: list[list[Instruction]]) -> None:
    """24 products, 3 loads of weights, 3 prefetches, and no more than a dozen for activations, addresses and the loop."""
    counts = [len(loop) for loop in loops if sum(i.name == "vdpbf16ps" for i in loop) == 24]
    assert min(counts) <= 42
    assert max(counts) <= 44
