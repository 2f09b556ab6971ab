"""The least time that a device's peaks allow."""

from __future__ import annotations

import torch

from ..argument_checks import check_type
from ..config import DiTConfig
from .devices import DeviceSpec
from .operations import operations


def floor_ms(
    config: DiTConfig,
    batch: int,
    dtype: torch.dtype,
    device: DeviceSpec,
    plan: str = "none",
    *,
    fused: bool = True,
    averages: int = 1,
) -> float:
    """Milliseconds of a forward, or of a step of training, if each operation ran at the device's peak.

    The sum over ``operations`` of what takes longer: its products at peak speed, or its bytes at peak bandwidth.

    Args:
        config: of the model.
        batch: images, on this device.
        dtype: of products.
        device: its peaks, one of ``DEVICES``.
        plan, fused, averages: as of ``operations``.

    Raises:
        ValueError: there is no such plan.
    """
    check_type("device", device, DeviceSpec, "one of ditfast.flops.DEVICES, such as DEVICES['H100']")
    seconds = 0.0
    for op in operations(config, batch, dtype, plan, fused=fused, averages=averages):
        forward = _seconds(op.macs, op.moved, dtype, device)
        backward = _seconds(op.back_macs, op.back_moved, dtype, device) if plan != "none" else 0.0
        again = forward if plan == "checkpoint" and op.again else 0.0
        seconds += op.times * (forward + backward + again)
    return 1e3 * seconds


def _seconds(macs: int, moved: int, dtype: torch.dtype, device: DeviceSpec) -> float:
    return max(2 * macs / device.peak(dtype), moved / device.bandwidth)
