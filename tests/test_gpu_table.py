"""The table of GPUs: found by name, and in agreement with itself and with what kernels are held to."""

from __future__ import annotations

import pytest
import torch

from ditfast.flops import DEVICES
from ditfast.flops.devices import spec_named, spec_of

LANES = {"sm_80": 64}  # of fp32 in a multiprocessor, 128 on the others
SCHEDULED_LANES = 4 * 32  # a cycle: an instruction of each scheduler


@pytest.mark.parametrize(
    ("name", "multiprocessors", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 132, "H100"),
        ("NVIDIA A100-SXM4-80GB", 108, "A100"),
        ("AMD Instinct MI300X", 304, "MI300X"),
        ("NVIDIA H200", None, "H200"),
        ("NVIDIA GeForce RTX 4090", 128, "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 76, None),
        ("NVIDIA GeForce RTX 4090D", 114, None),
        ("NVIDIA H100 PCIe", 114, None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", 60, None),
        ("NVIDIA GH200 480GB", 132, None),
        ("AMD EPYC 7763 64-Core Processor", None, None),
    ],
)
def test_devices_by_name(name: str, multiprocessors: int | None, expected: str | None) -> None:
    spec = spec_named(name, multiprocessors)
    assert (None if spec is None else spec.name) == expected


def test_a_cpu_is_no_known_device() -> None:
    assert spec_of(torch.device("cpu")) is None
    if not torch.cuda.is_available():
        assert spec_of(torch.device("cuda")) is None


def test_kernels_are_held_to_budgets_of_the_gpus_in_the_table() -> None:
    """A GPU issues as many instructions at its boost clock, by its fp32 peak, or up to 12% more."""
    hardware = pytest.importorskip("ditfast.kernels.hardware")
    for arch, limits in hardware.ARCHITECTURES.items():
        spec = DEVICES[limits.gpu]
        assert spec.arch == arch
        lanes = LANES.get(arch, SCHEDULED_LANES)
        clock = spec.fp32 / (2 * lanes * spec.multiprocessors)
        issued = spec.multiprocessors * hardware.SCHEDULERS * clock / spec.bandwidth
        assert 0.88 * issued < limits.instructions_a_byte < 1.005 * issued
        assert spec.half == pytest.approx(2 * spec.multiprocessors * limits.multiply_adds * clock, rel=0.08)
