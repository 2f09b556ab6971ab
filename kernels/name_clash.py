"""Stand-in under the name ``kernels``, which is Hugging Face's: from the clone's root, Python finds this folder first.

transformers and diffusers look for their ``kernels`` when they are imported. They get it where it is installed. Else a
statement such as ``import kernels`` finds that it is not installed, and why; ``importlib.import_module``, which transformers
calls for a version where ``find_spec`` found something, gives a package of version 0, older than any that is used.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import FrameType, ModuleType

MESSAGE = (
    "`import kernels` found ditfast's source folder, because the current directory is on sys.path. "
    "Ours is `ditfast.kernels`; for Hugging Face's package `kernels`, run `pip install kernels`."
)


class NoSubmodules(list[str]):
    """``__path__`` of a package without submodules; names MESSAGE to whoever imports one."""

    def __iter__(self) -> Iterator[str]:
        raise not_installed()


def step_aside(module: ModuleType) -> None:
    """Replace the module ``kernels`` by Hugging Face's where that is installed, else make it an empty package.

    Raises:
        ModuleNotFoundError: it is not installed, and a statement imports it.
    """
    spec = find_installed()
    if spec is not None and spec.loader is not None:
        installed = sys.modules["kernels"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(installed)
        return
    if importer() != "importlib":
        raise not_installed()

    def no_attribute(name: str) -> object:
        raise AttributeError(MESSAGE)

    vars(module).update(__version__="0", __path__=NoSubmodules(), __getattr__=no_attribute)


def not_installed() -> ModuleNotFoundError:
    return ModuleNotFoundError(MESSAGE, name="kernels")


def importer() -> str:
    """Return the name of the module that imports ``kernels``; ``importlib`` where it calls ``import_module``."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (_module(frame).startswith("kernels") or "<frozen importlib" in frame.f_code.co_filename):
        frame = frame.f_back
    return "" if frame is None else _module(frame)


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__"))


def find_installed() -> ModuleSpec | None:
    """Find a package ``kernels`` that is neither this folder nor that of another clone."""
    this_file = os.path.basename(__file__)
    path = [entry for entry in sys.path if not os.path.exists(os.path.join(entry, "kernels", this_file))]
    specs = (finder.find_spec("kernels", path) for finder in sys.meta_path if hasattr(finder, "find_spec"))
    return next((spec for spec in specs if spec is not None and spec.origin is not None), None)
