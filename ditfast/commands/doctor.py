"""``ditfast doctor``"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import platform

import torch
from rich.console import Console
from rich.table import Table

from .. import __version__, ops, reference
from ..config import DiTConfig
from ..model import DiT
from ..ops.attention import choose_engine
from ..ops.cpu_products import OPS_WITH_PRODUCTS, in_fp32
from ..ops.dispatch import choose_backend, kernels

FP32_PRODUCTS = "fp32 products: this CPU has no bf16 ones"
HELP = "versions, device, and which engine each op takes, and why"
DESCRIPTION = "What is installed, which engine each op takes on this machine, and whether a small model agrees with float64."
EXAMPLES = """example:
  ditfast doctor
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace) -> int:
    console = Console(width=None if Console().is_terminal else 120)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console.print(_versions_table(device))
    console.print(_engines_table(device))
    healthy, line = _parity(device)
    console.print(line, highlight=False)
    return 0 if healthy else 1


def _versions_table(device: torch.device) -> Table:
    table = Table("", "version", title="Installed", title_justify="left")
    table.add_row("ditfast", __version__)
    table.add_row("python", platform.python_version())
    for package in ("torch", "triton", "flash-attn", "numpy", "safetensors", "diffusers", "matplotlib", "scikit-learn"):
        try:
            table.add_row(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            table.add_row(package, "[dim]not installed[/dim]")
    cuda = torch.cuda.get_device_name() if device.type == "cuda" else f"none; {torch.get_num_threads()} CPU threads"
    table.add_row("GPU", cuda)
    return table


def _engines_table(device: torch.device) -> Table:
    table = Table("op", "takes", "why", title=f"Engines for bf16 tensors on {device}", title_justify="left")
    widened = in_fp32(torch.empty(0, device=device, dtype=torch.bfloat16))
    for op in ops.__all__:
        if widened and op in OPS_WITH_PRODUCTS:
            table.add_row(op, "torch", FP32_PRODUCTS)
        elif op != "attention":
            table.add_row(op, *_named(choose_backend(device, op)))
            if choose_backend(device, op, training=True) != choose_backend(device, op):
                table.add_row(f"{op}, in training", *_named(choose_backend(device, op, training=True)))
    for head_dim, num_tokens in itertools.product((64, 72), (256, 1024)):
        engine, reason = choose_engine(device, torch.bfloat16, head_dim, num_tokens)
        table.add_row(f"attention, head dim {head_dim}, {num_tokens} tokens", engine, FP32_PRODUCTS if widened else reason)
    return table


def _named(choice: tuple[str, str]) -> tuple[str, str]:
    backend, reason = choice
    return f"triton ({kernels().target()})" if backend == "triton" else backend, reason


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
