"""Places where the bodies of GPU tests run: on a CPU, and on a GPU or the fake one, so that no line is new to the first GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import fake_cuda
import torch
from support import randomize
from torch import Tensor

from ditfast import DiT, DiTConfig

Capture = tuple[Sequence[Tensor], Callable[[], None]]  # what a function returned, and what computes it anew in place
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
DELAY = 50_000_000  # clock cycles: some 30 ms


class Place(Protocol):
    device: torch.device
    many: int  # steps of a test of what grows

    def allocated(self) -> int:
        """Bytes of the tensors on the device."""

    def captured(self, run: Callable[[], Sequence[Tensor]]) -> Capture:
        """A CUDA graph of the function."""

    def late_copy(self, source: Tensor, target: Tensor) -> AbstractContextManager[object]:
        """Inside, on a stream of its own, the copy comes late: what other streams do comes before it."""

    def without_waiting(self) -> AbstractContextManager[object]:
        """Inside, whatever waits for the device raises."""


@dataclass(frozen=True)
class Cpu:
    """Nothing here is asynchronous."""

    device: torch.device = CPU
    many: int = 4

    def allocated(self) -> int:
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, torch.nn.Parameter)]
        storages = [tensor.untyped_storage() for tensor in tensors if tensor.layout is torch.strided]
        return sum({storage._cdata: storage.nbytes() for storage in storages}.values())

    def captured(self, run: Callable[[], Sequence[Tensor]]) -> Capture:
        outputs = run()

        def replay() -> None:
            for output, again in zip(outputs, run(), strict=True):
                output.detach().copy_(again)

        return outputs, replay

    def late_copy(self, source: Tensor, target: Tensor) -> AbstractContextManager[object]:
        target.copy_(source)
        return contextlib.nullcontext()

    def without_waiting(self) -> AbstractContextManager[object]:
        return contextlib.nullcontext()


@dataclass(frozen=True)
class Gpu:
    """The first CUDA device."""

    device: torch.device = CUDA
    many: int = dataclasses.field(default_factory=lambda: 6 if fake_cuda.installed() else 1000)

    def allocated(self) -> int:
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def captured(self, run: Callable[[], Sequence[Tensor]]) -> Capture:
        warm_up = torch.cuda.Stream()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):
            run()
        torch.cuda.current_stream().wait_stream(warm_up)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run()

        def replay() -> None:
            graph.replay()
            torch.cuda.synchronize()

        return outputs, replay

    @contextlib.contextmanager
    def late_copy(self, source: Tensor, target: Tensor) -> Any:
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(DELAY)
            target.copy_(source)
            yield
        torch.cuda.synchronize()

    @contextlib.contextmanager
    def without_waiting(self) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


CONFIG = DiTConfig(depth=2, hidden_size=144, num_heads=2, input_size=(8, 12), num_classes=7)


def new_model(place: Place, dtype: torch.dtype = torch.float32) -> DiT:
    return randomize(DiT(CONFIG)).to(place.device, dtype).eval()


def inputs(place: Place, dtype: torch.dtype = torch.float32, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(batch, *CONFIG.input_shape).to(place.device, dtype)
    return x, (torch.rand(batch) * 999).to(place.device), torch.randint(7, (batch,)).to(place.device)


def growth(place: Place, step: Callable[[], object], warm_up: int = 3) -> int:
    """Bytes that many steps leave, beyond what the first few do."""
    for _ in range(warm_up):
        step()
    before = place.allocated()
    for _ in range(place.many):
        step()
    return place.allocated() - before
