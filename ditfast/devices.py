"""Devices that commands and benches run on: the option ``--device``, its default, and an index for every GPU."""

from __future__ import annotations

import argparse
import os
import re
import sys
import warnings

import torch

from .argument_checks import check_type, describe

AUTO = "auto"
OLDEST = (8, 0)  # the compute capability that Triton supports
CUDA_WHEELS = "https://download.pytorch.org/whl/cu130"


class DeviceError(ValueError):
    """A device that this machine or this build of torch does not have, or that is too old."""


def add_device_argument(parser: argparse.ArgumentParser, group: argparse._ArgumentGroup | None = None) -> None:
    """Add ``--device``, whose value is a device with an index that is the current one.

    The parser ends with status 2 and one line for a device that cannot be used; ``group`` lists the option in its help.
    """

    def parse(text: str) -> torch.device:
        try:
            device = default_device(parser.prog) if text == AUTO else find_device(text)
        except DeviceError as error:
            parser.exit(2, f"{parser.prog}: error: argument --device: {error}\n")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device

    # argparse parses a default that is a string, and only when the option was not given.
    (group or parser).add_argument(
        "--device", type=parse, default=AUTO, metavar="DEVICE", help="cpu, cuda or cuda:1; default: cuda if there is one"
    )


def find_device(text: str) -> torch.device:
    """Return the device of this name; ``cuda`` is the rank's own GPU under torchrun, else the current one.

    Raises:
        DeviceError: there is no such device here, or it is too old.
    """
    if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", text):
        raise DeviceError(f"got {text!r}, expected cpu, cuda or cuda:N")
    if text == "cpu":
        return torch.device("cpu")
    try:
        return find_gpu(int(text.partition(":")[2]) if ":" in text else None)
    except DeviceError as error:
        raise DeviceError(f"got {text!r}, but {error}, or use --device cpu") from error


def find_gpu(index: int | None = None) -> torch.device:
    """Return a GPU; without an index the rank's own under torchrun, else the current one.

    Raises:
        DeviceError: there is no such GPU here, or it is too old.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of what the error says
        available = torch.cuda.is_available()
    if not available:
        raise DeviceError(_why_unavailable())
    count = torch.cuda.device_count()
    gpus = "there is 1 GPU" if count == 1 else f"there are {count} GPUs"
    if index is None:
        index = _own_index()
        if index >= count:
            raise DeviceError(f"local rank {index} has none ({gpus}): start torchrun with --nproc-per-node {count}")
    elif index >= count:
        raise DeviceError(f"{gpus}: take {'cuda:0' if count == 1 else f'cuda:0 to cuda:{count - 1}'}")
    device = torch.device("cuda", index)
    reason = why_too_old(device)
    if reason:
        raise DeviceError(f"{reason}: take a newer GPU")
    return device


def as_device(name: str, value: torch.device | str | int) -> torch.device:
    """Return the device that an argument of Python names.

    Raises:
        ValueError: there is no such device here, or it is too old.
        TypeError: the value names no device.
    """
    check_type(name, value, (torch.device, str, int), "a device such as 'cuda' or 'cpu'")
    try:
        device = torch.device(value)
        if device.type == "cuda":
            return find_gpu(device.index)
        torch.empty(0, device=device)
    except (DeviceError, RuntimeError, AssertionError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise ValueError(f"{name}: got {describe(str(value))}, but {reason}") from error
    return device


def default_device(program: str = "ditfast") -> torch.device:
    """Return this process's GPU, or the CPU where there is none, or one that is too old, as the program then says on stderr.

    Raises:
        DeviceError: torchrun started more processes than there are GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = _own_index()
    reason = why_too_old(torch.device("cuda", index)) if index < torch.cuda.device_count() else ""
    if reason:
        print(f"{program}: warning: {reason}; the CPU is used", file=sys.stderr)
        return torch.device("cpu")
    return find_device("cuda")


def with_index(device: torch.device | str) -> torch.device:
    """Return the device, for ``cuda`` the current GPU: torch refuses some calls without an index, and ``==`` compares it."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def why_too_old(device: torch.device) -> str:
    """Return why Triton does not compile for a device; empty if it does, or if that is no NVIDIA GPU."""
    if device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return ""
    capability = torch.cuda.get_device_capability(device)
    if capability >= OLDEST:
        return ""
    found, needed = (".".join(map(str, one)) for one in (capability, OLDEST))
    return f"{torch.cuda.get_device_name(device)} has compute capability {found}, and Triton needs {needed} or later"


# What torch.compiler.assume_constant_result does: compiled graphs choose backends when they are traced.
vars(why_too_old)["_dynamo_marked_constant"] = True


def _own_index() -> int:
    local_rank = os.environ.get("LOCAL_RANK")
    if local_rank is None:
        return torch.cuda.current_device()
    if not local_rank.isdecimal():
        raise DeviceError(f"LOCAL_RANK: got {local_rank!r}, expected a number from 0, as torchrun sets it")
    return int(local_rank)


def _why_unavailable() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        install = f"pip install --force-reinstall torch --index-url {CUDA_WHEELS}"
        return f"torch {torch.__version__} is a CPU build: install one for CUDA with {install}"
    try:
        torch.cuda.init()
        reason = "torch.cuda.is_available() is False"
    except RuntimeError as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
    return f"torch {torch.__version__} finds no GPU ({reason}): see that nvidia-smi and CUDA_VISIBLE_DEVICES list one"
