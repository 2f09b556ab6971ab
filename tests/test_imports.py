"""Imports go one way: a module imports nothing of a later layer, neither at the top of its file nor inside a function."""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = [  # each imports itself and those above; kernels nothing but torch and triton
    "argument_checks class_names config data devices dtypes files flops free_memory image_files images interrupt notebook "
    "plain reference terminal threads timer torch_modes vae version",
    "kernels cpu",
    "dispatch problem",
    "ops",
    "blocks activation_checkpointing",
    "conditioning",
    "layers",
    "reading",
    "model pretrained checkpoints diffusion",
    "digits homes modulation_table",
    "accelerate refresh sampling",
    "ahead evaluation",
    "training tuning",
    "commands",
    "benchmarks",
    "cli __main__ ditfast",  # and the package itself, which gives out names of all
]
LAYER = {name: i for i, names in enumerate(LAYERS) for name in names.split()}
KERNELS_IMPORT = {"torch", "triton"}
COMMANDS = {"ditfast.kernels.inspect": {"rich", "ditfast"}}  # what a command among them shows tables with


@functools.cache
def modules() -> dict[str, Path]:
    """Return the file of each module, by its name."""
    found = {}
    for name, folder in (("ditfast", "ditfast"), ("ditfast.kernels", "kernels"), ("ditfast.benchmarks", "benchmarks")):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if name == "ditfast" and parts[0] in ("kernels", "benchmarks"):  # links of an editable install
                continue
            found[".".join([name, *(part for part in parts if part != "__init__")])] = path
    return found


@functools.cache
def imports(module: str) -> frozenset[str]:
    """Return the modules of ditfast that a module imports anywhere in its file."""
    return frozenset(_imports(module))


def _imports(module: str) -> Iterator[str]:
    path = modules()[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "ditfast")
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            if base.partition(".")[0] == "ditfast":
                for alias in node.names:
                    inner = f"{base}.{alias.name}"
                    yield inner if inner in modules() else base


def part(module: str) -> str:
    """Return the package or top-level module that a module belongs to."""
    return module.split(".")[1] if "." in module else "ditfast"


def test_every_module_has_a_layer() -> None:
    assert {part(module) for module in modules()} == set(LAYER)


@pytest.mark.parametrize("name", LAYER)
def test_nothing_of_a_later_layer_is_imported(name: str) -> None:
    upward = [
        f"{module} imports {other}"
        for module in modules()
        if part(module) == name
        for other in imports(module)
        if LAYER[part(other)] > LAYER[name] and not (name == "benchmarks" and other == "ditfast")  # a bench is a user
    ]
    assert not upward


def test_kernels_import_torch_and_triton_only() -> None:
    for module, path in modules().items():
        if part(module) == "kernels":
            nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
            names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
            names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
            outside = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
            assert outside <= KERNELS_IMPORT | COMMANDS.get(module, set()), module


@pytest.mark.parametrize("name", ["ops", "dispatch"])
def test_nothing_beneath_reaches_tuning(name: str) -> None:
    """Not through other modules either."""
    reached = {module for module in modules() if part(module) == name}
    waiting = list(reached)
    while waiting:
        new = imports(waiting.pop()) - reached
        reached |= new
        waiting += new
    assert len(reached) > 10
    assert not [module for module in reached if part(module) in ("tuning", "commands", "benchmarks", "ditfast")]


def test_an_import_inside_a_function_counts() -> None:
    assert "ditfast.checkpoints.save" in imports("ditfast.pretrained")
    assert "ditfast.kernels.tiles" in imports("ditfast.dispatch.selection")
