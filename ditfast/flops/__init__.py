"""What a model costs, computed from its config alone: multiply-adds, parameters, memory, and the least time on a device."""

from .counts import parameters
from .devices import DEVICES, DeviceSpec
from .memory import PLANS, TrainingBytes, activation_bytes, training_bytes
from .operations import Op, flops, macs, operations
from .roofline import floor_ms

__all__ = [
    "DEVICES",
    "PLANS",
    "DeviceSpec",
    "Op",
    "TrainingBytes",
    "activation_bytes",
    "floor_ms",
    "flops",
    "macs",
    "operations",
    "parameters",
    "training_bytes",
]
