"""``ditfast doctor``"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import platform

import torch
from rich.table import Table
from rich.text import Text

from .. import cpu, reference
from ..config import DiTConfig
from ..cpu import library
from ..devices import default_device
from ..dispatch import tuning_cache
from ..dispatch.backends import Choice
from ..dispatch.launchers import triton_kernels
from ..dispatch.selection import choose
from ..dispatch.shapes import SIZES, OpShape
from ..model import DiT
from ..ops.cpu_products import OPS_WITH_PRODUCTS, in_fp32
from ..terminal import make_console, new_table, print_table, say
from ..tuning.collect import model_shapes
from ..version import __version__

FP32_PRODUCTS = "fp32 products: this CPU has no bf16 ones"
BATCHES = (1, 32)
HELP = "versions, device, and which engine each op takes, and why"
DESCRIPTION = "What is installed, which engine each op takes on this machine, and whether a small model agrees with float64."
EXAMPLES = """example:
  ditfast doctor
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace) -> int:
    console = make_console()
    device = default_device(args.prog)
    print_table(_versions_table(device), console, "Installed")
    say("", console)
    print_table(_engines_table(device), console, f"Engines for DiT-XL/2 in bf16 on {device}")
    say("", console)
    say(_tuning_cache(torch.cuda.get_device_name(device) if device.type == "cuda" else None), console)
    if device.type == "cpu":
        say(f"blocks without gradients: {_cpu_engine()}", console)
    healthy, line = _parity(device)
    say(line, console)
    return 0 if healthy else 1


def _versions_table(device: torch.device) -> Table:
    table = new_table("", "version")
    table.add_row("ditfast", __version__)
    table.add_row("python", platform.python_version())
    for package in ("torch", "triton", "flash-attn", "numpy", "safetensors", "diffusers", "matplotlib", "scikit-learn"):
        try:
            table.add_row(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            table.add_row(package, Text("not installed", "dim"))
    cuda = torch.cuda.get_device_name(device) if device.type == "cuda" else f"none; {torch.get_num_threads()} CPU threads"
    table.add_row("GPU", cuda)
    return table


def _engines_table(device: torch.device) -> Table:
    """What the ops of DiT-XL/2 take."""
    table = new_table("op", "sizes", "batch", "takes", "why")
    for (shape, choice), batches in _choices(device).items():
        sizes = " ".join(f"{name}={size}" for name, size in zip(SIZES[shape.op], shape.sizes, strict=True))
        op = f"{shape.op}, in training" if shape.training else shape.op
        table.add_row(op, sizes, ", ".join(map(str, dict.fromkeys(batches))), *_named(choice))
    return table


def _choices(device: torch.device) -> dict[tuple[OpShape, Choice], list[int]]:
    """Return the batches that make each pair of a shape (but for its rows) and a choice."""
    config = DiTConfig.from_name("DiT-XL/2")
    found: dict[tuple[OpShape, Choice], list[int]] = {}
    for training, batch in itertools.product((False, True), BATCHES):
        for shape in model_shapes(config, batch, torch.bfloat16, training):
            found.setdefault((shape._replace(rows=0), _choice(device, shape)), []).append(batch)
    return found


def _choice(device: torch.device, shape: OpShape) -> Choice:
    choice = choose(device, shape)
    widened = shape.op in (*OPS_WITH_PRODUCTS, "attention") and in_fp32(torch.empty(0, device=device, dtype=shape.dtype))
    return choice._replace(why=FP32_PRODUCTS) if widened else choice


def _named(choice: Choice) -> tuple[str, str]:
    return f"triton ({triton_kernels().target()})" if choice.backend == "triton" else choice.backend, choice.why


def _cpu_engine() -> str:
    found, why_not = cpu.found()
    return why_not if found is None else f"the CPU engine, all in one call; products: {_products(library.cpu_features())}"


def _products(features: frozenset[str]) -> str:
    """Of the CPU engine on a CPU with these."""
    options = library.options_for(features)
    bf16 = "bf16" if "-mavx512bf16" in options else "bf16 widened to fp32"
    return f"fp32, {bf16}, int8 by {'VNNI' if '-mavx512vnni' in options else 'pairs'}"


def _tuning_cache(device_name: str | None) -> str:
    if device_name is None:
        return "tuning cache: none, without a CUDA device"
    path = tuning_cache.path_of(device_name)
    if path is None:
        return f"tuning cache: not read, since {tuning_cache.VARIABLE}={tuning_cache.OFF}"
    entries = tuning_cache.of_device(device_name)
    return (
        f"tuning cache: {path}, {len(entries)} shapes" if entries else f"tuning cache: none at {path}; `ditfast tune` makes one"
    )


def _parity(device: torch.device) -> tuple[bool, str]:
    """A small model with non-zero weights against the float64 reference, through the engines of the table."""
    config = DiTConfig(depth=2, hidden_size=128, num_heads=2, input_size=8, num_classes=10)
    torch.manual_seed(0)
    oracle = reference.DiT(config).eval()
    for parameter in oracle.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    fast = DiT(config).eval().to(device)
    fast.load_state_dict(oracle.state_dict())
    x, t, y = torch.randn(2, *config.input_shape), torch.tensor([10, 900]), torch.tensor([3, 10])
    with torch.inference_mode():
        exact = oracle.double()(x.double(), t, y)
        found = fast(x.to(device), t.to(device), y.to(device)).cpu()
    error = ((found - exact).norm() / exact.norm()).item()
    healthy = error < 1e-5
    verdict = "parity with the float64 reference" if healthy else "NO PARITY with the float64 reference: please report this"
    return healthy, f"{verdict}: relative error {error:.1e} in fp32 on {device}"
