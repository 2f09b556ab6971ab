"""The helpers of the GPU tests, on the fake GPU: what grows is seen to grow, a graph computes, waiting is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from devices import Cpu, Gpu, growth
from fake_cuda import FakeCuda, environment
from fake_cuda.fixtures import fake_gpu

__all__ = ["fake_gpu"]


def test_growth() -> None:
    kept = []
    assert growth(Cpu(), lambda: torch.zeros(1000)) == 0
    assert growth(Cpu(), lambda: kept.append(torch.zeros(1000))) == 4000 * Cpu().many
    assert growth(Cpu(), lambda: kept.append(kept[0][:10])) == 0  # of which only views are new


def test_growth_asks_the_device(fake_gpu: FakeCuda) -> None:
    gpu, kept = Gpu(many=2), []
    assert growth(gpu, lambda: torch.zeros(1000)) == 0
    assert growth(gpu, lambda: torch.zeros(1000, device=gpu.device)) == 0
    assert growth(gpu, lambda: kept.append(torch.zeros(1024, device=gpu.device))) == 4096 * 2


def test_a_graph_is_captured_after_a_warm_up_on_another_stream(fake_gpu: FakeCuda) -> None:
    streams = []

    def run() -> list[torch.Tensor]:
        streams.append(torch.cuda.current_stream())
        return [torch.ones(2, device="cuda")]

    (output,), replay = Gpu().captured(run)
    assert output.isnan().all()
    replay()
    assert output.tolist() == [1, 1]
    assert len({torch.cuda.default_stream(), *streams}) == 3
    assert (fake_gpu.captures, fake_gpu.replays) == (1, 1)


def test_a_replay_computes_in_place() -> None:
    x = torch.ones(2)
    (output,), replay = Cpu().captured(lambda: [2 * x])
    x.fill_(3)
    assert output.tolist() == [2, 2]
    replay()
    assert output.tolist() == [6, 6]


@pytest.mark.parametrize("place", [Cpu(), Gpu()], ids=["cpu", "gpu"])
def test_late_copies_arrive(place: Cpu | Gpu, fake_gpu: FakeCuda) -> None:
    target = torch.zeros(2, device=place.device)
    with place.late_copy(torch.ones(2, device=place.device), target):
        pass
    assert target.tolist() == [1, 1]


@pytest.mark.usefixtures("fake_gpu")
def test_waiting_is_allowed_again() -> None:
    x = torch.ones(1, device="cuda")
    with pytest.raises(RuntimeError, match="synchronizing"), Gpu().without_waiting():
        x.item()
    assert x.item() == 1


def test_the_mark_gpu_selects_kernels_on_a_gpu() -> None:
    """There also the tests of ops, which here are none of it; the slow ones are left out."""
    tests = Path(__file__).parent
    files = [tests / "gpu", tests / "ops" / "test_linear_gelu.py", tests / "test_config.py"]
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "-m", "gpu", *map(str, files)]
    on_a_gpu = {**os.environ, **environment()}
    done = subprocess.run(command, cwd=tests.parent, env=on_a_gpu, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    collected = done.stdout.splitlines()
    assert sum("[cuda" in line for line in collected) > 30
    assert sum("test_linear_gelu.py::test_kernel" in line for line in collected) > 5
    assert not any("test_config.py" in line or ("gpu/" in line and "[cpu" in line) for line in collected)
    assert any("deselected" in line for line in collected)
