"""The way from a call to its kernel: the project's files that it enters."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from op_cases import OPS, cases
from support import TARGETS, WHERE, Runner

import ditfast
from ditfast.dispatch import selection

PACKAGE = Path(ditfast.__file__).parent


def files_entered(call: Callable[[], Any]) -> set[str]:
    """Return the files of the package in which functions are called; what only runs on a device has none."""
    files: set[str] = set()

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            files.add(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return {str(Path(file).relative_to(PACKAGE)) for file in files if file.startswith(str(PACKAGE))}


@pytest.mark.skipif(WHERE == "interpreter", reason="the interpreter launches nothing that a plan could hold")
@pytest.mark.parametrize("op", OPS)
@torch.no_grad()
def test_a_call_enters_few_files(op: str) -> None:
    """Printed with ``pytest -s``. The first call with a signature checks, selects and compiles; later ones launch."""
    case = cases()[op]
    operands = [torch.randn(shape).to(case.dtype) for shape in case.shapes.values()]
    with Runner.open(TARGETS[0], checks=False):
        case.op(*operands)
        selection.forget()
        cold, warm = (sorted(files_entered(lambda: case.op(*operands))) for _ in range(2))
    print(f"\n{op}: cold {len(cold)}: {', '.join(cold)}; warm {len(warm)}: {', '.join(warm)}")
    assert "dispatch/plan.py" in warm
    assert len(warm) <= 6
    assert len(cold) <= 9
