"""Gives a process the fake CUDA when it has imported torch, if the variable FAKE_CUDA is set; see fake_cuda.environment."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

TESTS = Path(__file__).parents[2]


class AfterTorch(importlib.abc.MetaPathFinder):
    """Finds torch as the other finders do, and installs the fake once it is imported."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_install(module: ModuleType) -> None:
                execute(module)
                install()

            spec.loader.exec_module = execute_and_install  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Install the fake for the rest of the process."""
    sys.path.append(str(TESTS))
    from fake_cuda import FakeCuda, Parameters

    FakeCuda(Parameters.from_json(os.environ["FAKE_CUDA"])).install()


if os.environ.get("FAKE_CUDA"):
    sys.meta_path.insert(0, AfterTorch())
