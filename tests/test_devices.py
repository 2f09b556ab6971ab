"""The helpers of the GPU tests: what grows is seen to grow, and the calls that only a GPU takes are made in order."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from devices import Cpu, Gpu, growth


class StandIn:
    """Of torch.cuda, as far as ``Gpu`` calls it: writes down what it is asked for."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: object) -> Any:
            self.calls.append(" ".join([name, *(argument for argument in arguments if isinstance(argument, str))]))
            return self.within(name) if name in ("graph", "stream") else 7 if name == "memory_allocated" else self

        return call

    @contextlib.contextmanager
    def within(self, name: str) -> Iterator[None]:
        yield
        self.calls.append(f"end of {name}")


@pytest.fixture
def gpu() -> Gpu:
    return Gpu(torch.device("cpu"), many=2, cuda=StandIn())


def test_growth() -> None:
    kept = []
    assert growth(Cpu(), lambda: torch.zeros(1000)) == 0
    assert growth(Cpu(), lambda: kept.append(torch.zeros(1000))) == 4000 * Cpu().many
    assert growth(Cpu(), lambda: kept.append(kept[0][:10])) == 0  # of which only views are new


def test_growth_asks_the_device(gpu: Gpu) -> None:
    steps: list[None] = []
    assert growth(gpu, lambda: steps.append(None)) == 0
    assert len(steps) == 3 + 2
    assert gpu.cuda.calls == ["synchronize", "memory_allocated"] * 2


def test_a_graph_is_captured_after_a_warm_up_on_another_stream(gpu: Gpu) -> None:
    (output,), replay = gpu.captured(lambda: [torch.ones(2)])
    replay()
    assert output.tolist() == [1, 1]
    warm_up = ["Stream", "current_stream", "wait_stream", "stream", "end of stream", "current_stream", "wait_stream"]
    assert gpu.cuda.calls == [*warm_up, "CUDAGraph", "graph", "end of graph", "replay", "synchronize"]


def test_a_replay_computes_in_place() -> None:
    x = torch.ones(2)
    (output,), replay = Cpu().captured(lambda: [2 * x])
    x.fill_(3)
    assert output.tolist() == [2, 2]
    replay()
    assert output.tolist() == [6, 6]


@pytest.mark.parametrize("place", [Cpu(), Gpu(torch.device("cpu"), cuda=StandIn())], ids=["cpu", "gpu"])
def test_late_copies_arrive(place: Cpu | Gpu) -> None:
    target = torch.zeros(2)
    with place.late_copy(torch.ones(2), target):
        assert target.tolist() == [1, 1]
    if isinstance(place, Gpu):
        assert place.cuda.calls == ["synchronize", "Stream", "stream", "_sleep", "end of stream", "synchronize"]


def test_waiting_is_allowed_again(gpu: Gpu) -> None:
    with pytest.raises(KeyError), gpu.without_waiting():
        raise KeyError
    assert gpu.cuda.calls == ["set_sync_debug_mode error", "set_sync_debug_mode default"]


ON_A_GPU = """
import sys, pytest, torch
torch.cuda.is_available = lambda: True
sys.exit(pytest.main(["-q", "--collect-only", "-p", "no:cacheprovider", "-m", "gpu", *sys.argv[1:]]))
"""


def test_the_mark_gpu_selects_kernels_on_a_gpu() -> None:
    """There also the tests of ops, which here are none of it; the slow ones are left out."""
    tests = Path(__file__).parent
    files = [tests / "gpu", tests / "ops" / "test_linear_gelu.py", tests / "test_config.py"]
    done = subprocess.run(
        [sys.executable, "-c", ON_A_GPU, *map(str, files)], cwd=tests.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    collected = done.stdout.splitlines()
    assert sum("[cuda" in line for line in collected) > 30
    assert sum("test_linear_gelu.py::test_kernel" in line for line in collected) > 5
    assert not any("test_config.py" in line or ("gpu/" in line and "[cpu" in line) for line in collected)
    assert any("deselected" in line for line in collected)
