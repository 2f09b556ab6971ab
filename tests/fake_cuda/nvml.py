"""A fake of NVML, as the package nvidia-ml-py (``pynvml``) shows it."""

from __future__ import annotations

import time
from types import ModuleType, SimpleNamespace
from typing import Any

from .parameters import Parameters, uuid_of

WATTS = 300
CLOCK_MHZ = 1980
DRIVER = "999.1"


class NVMLError(Exception):
    """An error of NVML."""


class NVMLError_NotSupported(NVMLError):
    """The GPU cannot do that."""


class NVMLError_NotFound(NVMLError):
    """No GPU has that UUID."""


class NVMLError_DriverNotLoaded(NVMLError):
    """There is no driver."""


class Nvml:
    """The module ``pynvml`` of a machine, and ways to break it."""

    def __init__(self, parameters: Parameters):
        self.module: Any = ModuleType("pynvml")
        self.slowdowns = 0  # NVML's bits of what holds the clocks down
        self.watts, self.clock_mhz = WATTS, CLOCK_MHZ
        self._start = time.monotonic()
        self._uuids = [f"GPU-{uuid_of(index)}" for index in range(parameters.count)]
        self._parameters = parameters
        for name in ("NVMLError", "NVMLError_NotSupported", "NVMLError_NotFound", "NVMLError_DriverNotLoaded"):
            setattr(self.module, name, globals()[name])
        self.module.NVML_CLOCK_GRAPHICS, self.module.NVML_CLOCK_SM, self.module.NVML_CLOCK_MEM = 0, 1, 2
        for name in dir(self):
            if name.startswith("nvml"):
                setattr(self.module, name, getattr(self, name))

    def break_function(self, name: str, error: Exception | None = None) -> None:
        """Let a function of the module raise: as unsupported, unless another error is given."""

        def fail(*arguments: object) -> None:
            raise error or NVMLError_NotSupported("Not Supported")

        if not hasattr(self.module, name):
            raise AttributeError(f"pynvml.{name}: the fake has no such function")
        setattr(self.module, name, fail)

    def nvmlInit(self) -> None:
        if not self._uuids:
            raise NVMLError_DriverNotLoaded("Driver Not Loaded")

    def nvmlShutdown(self) -> None:
        pass

    def nvmlSystemGetDriverVersion(self) -> str:
        return DRIVER

    def nvmlDeviceGetCount(self) -> int:
        return len(self._uuids)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        if uuid not in self._uuids:
            raise NVMLError_NotFound("Not Found")
        return self._uuids.index(uuid)

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return self._uuids[handle]

    def nvmlDeviceGetName(self, handle: int) -> str:
        return self._parameters.name

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        """Millijoules."""
        return round(1e3 * self.watts * (time.monotonic() - self._start))

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        """Milliwatts."""
        return 1000 * self.watts

    def nvmlDeviceGetPowerManagementLimit(self, handle: int) -> int:
        """Milliwatts."""
        return 700_000

    def nvmlDeviceGetClockInfo(self, handle: int, clock: int) -> int:
        return self.clock_mhz

    def nvmlDeviceGetMaxClockInfo(self, handle: int, clock: int) -> int:
        return CLOCK_MHZ

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: int) -> int:
        return self.slowdowns

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: int) -> int:
        return self.slowdowns

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        return 40

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(gpu=0, memory=0)

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        total = self._parameters.memory
        return SimpleNamespace(total=total, free=total, used=0)
