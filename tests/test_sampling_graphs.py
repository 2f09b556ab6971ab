"""Captures of sampling's graphs on the fake GPU: what, how often, and that a replay changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda, fake_cuda
from fake_cuda.fixtures import fake_gpu
from support import error
from test_sampling import DDIM, DDPM, LABELS, pair
from torch import Tensor

import ditfast
from ditfast import DiT, DiTConfig
from ditfast.diffusion import FlowMatching, Step, steps
from ditfast.sampling import Sampler, sample
from ditfast.sampling.folder import ImageFolder
from ditfast.sampling.graph import Graphed, cuda_capture
from ditfast.sampling.painter import Painter

__all__ = ["fake_gpu"]

PIXELS = DiTConfig(depth=2, hidden_size=64, num_heads=2, input_size=8, in_channels=1, num_classes=5)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def gpu(fake_gpu: FakeCuda) -> Iterator[FakeCuda]:
    """The fake GPU, with torch's kernels: what is captured does not depend on them."""
    with ditfast.backend("torch"):
        yield fake_gpu


def without_graphs(model: DiT, schedule: list[Step], labels: Tensor, **options: Any) -> Tensor:
    """Sample in the same way, but run each step as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ditfast.sampling.run.Graphed", lambda function: function)
        return sample(model, schedule, labels, **options)


def test_a_graphed_loop_computes_the_same(gpu: FakeCuda) -> None:
    model = pair()[0].cuda()
    expected = without_graphs(model, DDPM, LABELS, cfg_scale=4.0, cfg_interval=(150.0, 850.0))
    assert gpu.captures == 0
    found = sample(model, DDPM, LABELS, cfg_scale=4.0, cfg_interval=(150.0, 850.0))
    assert torch.equal(found, expected)
    assert (gpu.captures, gpu.replays) == (3, 6)  # unguided with noise, guided, and the last step has no noise


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_model_on_another_gpu_than_the_current_one(backend: str) -> None:
    model = pair()[0]
    with ditfast.backend("torch"):
        expected = sample(model, DDPM, LABELS, cfg_scale=4.0)
    with fake_cuda(count=2) as gpus, ditfast.backend(backend):
        found = sample(model.to("cuda:1"), DDPM, LABELS, cfg_scale=4.0)
        assert gpus.replays > 0
        assert torch.cuda.current_device() == 0
        assert error(found.cpu(), expected) < 1e-5


@pytest.mark.parametrize(
    ("schedule", "options", "captures"),
    [
        pytest.param(DDIM, {}, [1, 1, 2], id="ddim"),
        pytest.param(DDPM, {}, [2, 2, 4], id="ddpm: the last step has no noise"),
        pytest.param(steps(FlowMatching(num_steps=3), "heun"), {}, [1, 1, 2], id="heun"),
        pytest.param(DDIM, {"table_bytes": 0}, [1, 1, 2], id="no table"),
        pytest.param(DDIM, {"offload_conditioning": True}, [1, 1, 2], id="offloaded"),
        pytest.param(DDIM, {"batch_invariant": True}, [1, 1, 1], id="batch invariant: one shape for all blocks"),
    ],
)
def test_blocks_of_one_size_share_a_graph(
    schedule: list[Step], options: dict[str, Any], captures: list[int], gpu: FakeCuda
) -> None:
    model = pair()[0].cuda()
    blocks = [range(0, 2), range(2, 4), range(4, 5)]
    labels = [torch.tensor([number % 5 for number in block]) for block in blocks]
    expected = [
        without_graphs(model, schedule, y, cfg_scale=4.0, seed=3, images=block, **options)
        for y, block in zip(labels, blocks, strict=True)
    ]
    sampler = Sampler(model, schedule, seed=3, **options)
    after_each = []
    for y, block, images in zip(labels, blocks, expected, strict=True):
        assert torch.equal(sampler(y, cfg_scale=4.0, images=block), images)
        after_each.append(gpu.captures)
    assert after_each == captures
    assert gpu.replays == len(schedule) * (5 if "batch_invariant" in options else 3)


def test_a_folders_blocks_share_a_graph(tmp_path: Path, gpu: FakeCuda) -> None:
    model, folder = pair(PIXELS)[0].cuda(), ImageFolder(tmp_path, num=10, batch=4)
    painter = Painter(Sampler(model, DDIM), lambda image: image % 5, cfg_scale=2.0)
    folder.fill(folder.blocks, painter.paint)
    assert not folder.missing()
    assert (gpu.captures, gpu.replays) == (2, 3 * len(DDIM))  # blocks of 4, 4 and 2


@pytest.mark.usefixtures("gpu")
def test_a_failed_capture_goes_on_without() -> None:
    graphed = Graphed(lambda x: x + 1 if x.sum() == 0 else x + 2)  # reads a value, which a capture does not allow
    with pytest.warns(UserWarning, match="without a CUDA graph, whose capture failed: CUDA error: operation"):
        assert graphed(torch.zeros(2, device="cuda")).tolist() == [1, 1]
    assert graphed(torch.ones(2, device="cuda")).tolist() == [3, 3]


@pytest.mark.gpu
def test_graph_and_offload_on_a_gpu() -> None:
    model, _ = pair()
    expected = sample(model, DDPM, LABELS, cfg_scale=4.0)
    found = sample(model.cuda(), DDPM, LABELS, cfg_scale=4.0, offload_conditioning=True)
    assert error(found.cpu(), expected) < 1e-4


@pytest.mark.gpu
def test_blocks_share_a_graph_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair()
    expected = [sample(model, DDIM, LABELS, cfg_scale=4.0, images=range(k, k + 3)) for k in (0, 3)]
    captures: list[object] = []
    monkeypatch.setattr("ditfast.sampling.graph.cuda_capture", lambda run: captures.append(run) or cuda_capture(run))
    sampler = Sampler(model.cuda(), DDIM, offload_conditioning=True)
    found = [sampler(LABELS, cfg_scale=4.0, images=range(k, k + 3)) for k in (0, 3)]
    assert all(error(f.cpu(), e) < 1e-4 for f, e in zip(found, expected, strict=True))
    assert len(captures) == 1
