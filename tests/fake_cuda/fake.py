"""Installs the fake and takes it away again."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import bindings, graphs, nvml, profiler
from .build import native
from .parameters import Parameters

VARIABLE = "FAKE_CUDA"
FOLDER = Path(__file__).parent
_installed: list[FakeCuda] = []


def forget_plans() -> None:
    """Forget launch plans, which launch what another driver loaded."""
    module = sys.modules.get("ditfast.dispatch.plan")
    if module is not None:
        module.forget_plans()


class FakeCuda:
    """The fake while it is installed: its faults, and what it counted."""

    def __init__(self, parameters: Parameters):
        self.parameters = parameters
        self.nvml = nvml.Nvml(parameters)
        self._undo = contextlib.ExitStack()
        self._failure: str | None = None

    # -------------------------------------------------------------- counts and faults
    @property
    def launches(self) -> int:
        """Kernels launched so far, torch's and Triton's."""
        return native().launches()

    def exp_off_by_one_ulp(self, on: bool = True) -> None:
        """Let the device's fp32 ``exp`` return the next larger number."""
        native().set_exp_off_by_one_ulp(on)

    def fail_next_launch(self, message: str = "an illegal memory access was encountered") -> None:
        """Let the next Triton launch raise; as after an illegal access, every later call of CUDA raises it too."""
        self._failure = message.removeprefix("CUDA error: ")

    @property
    def captures(self) -> int:
        """CUDA graphs captured so far."""
        return graphs.counts["captures"]

    @property
    def replays(self) -> int:
        """Replays of CUDA graphs so far."""
        return graphs.counts["replays"]

    # -------------------------------------------------------------- installing
    def install(self) -> None:
        parameters = self.parameters
        graphs.counts.update(captures=0, replays=0)
        bindings.machine.set(parameters)
        native().install(len(parameters.visible), parameters.memory)
        self._undo.callback(native().uninstall)
        forget_devices()
        self._undo.callback(forget_devices)
        _installed.append(self)
        self._undo.callback(_installed.remove, self)
        try:
            self._patch()
        except BaseException:
            self._undo.close()
            raise

    def uninstall(self) -> None:
        self._undo.close()

    def _patch(self) -> None:
        parameters = self.parameters
        core = bindings.functions()
        for name, value in core.items():
            self._set(torch._C, name, value)
        streams, cuda_graphs = _fresh("torch.cuda.streams"), _fresh("torch.cuda.graphs")
        cuda_graphs.graph.default_capture_stream = None
        in_cuda = {
            "_cudart": bindings.runtime(),
            "_exchange_device": core["_cuda_exchangeDevice"],
            "_maybe_exchange_device": core["_cuda_maybeExchangeDevice"],
            "_is_in_bad_fork": core["_cuda_isInBadFork"],
            "_get_device_properties": bindings.device_properties,
            "_CudaDeviceProperties": bindings.Properties,
            "_initialized": False,
            "_queued_calls": list(torch.cuda._queued_calls),
            "_cached_device_count": None,
            "default_generators": (),
            "_HAS_PYNVML": parameters.hip is None,
            "pynvml": self.nvml.module,
            "Stream": streams.Stream,
            "ExternalStream": streams.ExternalStream,
            "Event": streams.Event,
            "streams": streams,
            "graphs": cuda_graphs,
            **{name: getattr(cuda_graphs, name) for name in cuda_graphs.__all__},
        }
        for name, value in in_cuda.items():
            self._set(torch.cuda, name, value)
        self._put(sys.modules, "torch.cuda.streams", streams)
        self._put(sys.modules, "torch.cuda.graphs", cuda_graphs)
        self._set(torch.version, "cuda", None if parameters.hip else torch.version.cuda or "13.0")
        self._set(torch.version, "hip", parameters.hip)
        self._put(sys.modules, "pynvml", self.nvml.module)
        self._set(torch.UntypedStorage, "__new__", staticmethod(_new_storage))
        for name, value in profiler.PATCHES.items():
            self._set(torch.autograd.profiler.profile, name, value)
        self._set(torch._TorchCompileInductorWrapper, "__call__", _without_inductor)
        if not parameters.hip and os.environ.get("TRITON_INTERPRET") != "1" and importlib.util.find_spec("triton"):
            self._simulate()

    def _simulate(self) -> None:
        """Send Triton's launches to the simulator."""
        import ptxsim

        driver: Any = ptxsim.install(self.parameters.arch)
        driver.get_active_torch_device = lambda: torch.device("cuda", torch.cuda.current_device())
        driver.get_device_interface = lambda: torch.cuda
        forget_plans()
        self._undo.callback(forget_plans)
        self._undo.callback(ptxsim.uninstall)
        fast: dict[str, Any] = {"stats": False, "threads": 2}
        self._undo.enter_context(ptxsim.set_options(**fast, device_types=("cpu", "cuda"), around_launch=self._launch))

    def _launch(self, run: Callable[[], None], tensors: Sequence[torch.Tensor]) -> None:
        fake = native()
        fake.check_usable()
        for i, tensor in enumerate(tensors):
            if not tensor.is_cuda and not tensor.is_pinned():
                raise ValueError(f"Pointer argument (at {i}) cannot be accessed from Triton (cpu tensor?)")
        if any(tensor.is_cuda and tensor.device.index != torch.cuda.current_device() for tensor in tensors):
            self.fail_next_launch()
        if self._failure is not None:
            fake.set_error(self._failure)
            self._failure = None
            fake.check_usable()

        def counted() -> None:
            fake.count_launch()
            run()

        if fake.is_capturing():
            for tensor in tensors:
                fake.keep_for_capture(tensor)
            graphs.record(counted)
        counted()

    def _set(self, owner: Any, name: str, value: Any) -> None:
        self._put(owner.__dict__ if isinstance(owner, ModuleType) else _Attributes(owner), name, value)

    def _put(self, mapping: Any, name: str, value: Any) -> None:
        if name in mapping:
            self._undo.callback(mapping.__setitem__, name, mapping[name])
        else:
            self._undo.callback(mapping.pop, name, None)
        mapping[name] = value


def forget_devices() -> None:
    """Drop what ditfast has cached about the GPUs of another fake."""
    if "ditfast.dispatch.selection" in sys.modules:
        sys.modules["ditfast.dispatch.selection"].forget()


@functools.cache
def _fresh(name: str) -> ModuleType:
    """Load a module of torch again, whose classes take their bases from torch._C when it is loaded."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Attributes:
    """The attributes of a class, as a mapping."""

    def __init__(self, owner: type):
        self.owner = owner

    def __contains__(self, name: str) -> bool:
        return name in vars(self.owner)

    def __getitem__(self, name: str) -> Any:
        return vars(self.owner)[name]

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self.owner, name, value)

    def pop(self, name: str, default: None) -> None:
        delattr(self.owner, name)


def _new_storage(cls: type[torch.UntypedStorage], *args: Any, device: Any = None, **kwargs: Any) -> torch.UntypedStorage:
    """Allocate a storage; what torch compiled for it knows CUDA's own allocator or none."""
    if device is None or torch.device(device).type != "cuda" or len(args) != 1 or not isinstance(args[0], int):
        return torch._C.StorageBase.__new__(cls, *args, **({} if device is None else {"device": device}), **kwargs)
    return torch.empty(args[0], dtype=torch.uint8, device=device).untyped_storage()


def _without_inductor(wrapper: Any, graph: Any, inputs: Any) -> Any:
    """Trace and differentiate as torch.compile does, but run aten operators: Inductor's code needs a real GPU."""
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend("aot_eager")(graph, inputs)


@contextlib.contextmanager
def fake_cuda(**parameters: Any) -> Iterator[FakeCuda]:
    """Install a fake CUDA inside the ``with`` block; see ``Parameters`` for what can be chosen."""
    fake = FakeCuda(Parameters(**parameters))
    fake.install()
    try:
        yield fake
    finally:
        fake.uninstall()


def installed() -> FakeCuda | None:
    """Return the fake that this process has now."""
    return _installed[-1] if _installed else None


def environment(**parameters: Any) -> dict[str, str]:
    """Return variables with which a Python process has the fake from its import of torch on."""
    path = [str(FOLDER / "process"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {VARIABLE: Parameters(**parameters).to_json(), "PYTHONPATH": os.pathsep.join(path)}
