"""What is captured as a graph, how often, and that replaying it changes nothing; a stand-in captures where there is no GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import error
from test_sampling import DDIM, DDPM, LABELS, pair
from torch import Tensor

from ditfast import DiTConfig
from ditfast.diffusion import FlowMatching, Step, steps
from ditfast.sampling import Sampler, sample
from ditfast.sampling.folder import ImageFolder
from ditfast.sampling.graph import Graphed, cuda_capture
from ditfast.sampling.painter import Painter
from ditfast.sampling.run import Run

PIXELS = DiTConfig(depth=2, hidden_size=64, num_heads=2, input_size=8, in_channels=1, num_classes=5)

pytestmark = pytest.mark.usefixtures("one_thread")


class FakeGraphs:
    """Captures as a CUDA graph does: the function runs on fixed buffers, and its results land in fixed ones."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def capture(self, run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        self.captures += 1
        output = run().clone().fill_(math.nan)

        def replay() -> None:
            self.replays += 1
            output.copy_(run())

        return output, replay


def fake_graphs(monkeypatch: pytest.MonkeyPatch) -> FakeGraphs:
    """From here on every run captures, as on CUDA."""
    graphs, plain_init = FakeGraphs(), Run.__init__

    def init(self: Run, *arguments: Any) -> None:
        plain_init(self, *arguments)
        self.advance = Graphed(self._advance, graphs.capture)
        self.predict = Graphed(self._predict, graphs.capture)

    monkeypatch.setattr(Run, "__init__", init)
    return graphs


def test_a_graphed_loop_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair()
    expected = sample(model, DDPM, LABELS, cfg_scale=4.0, cfg_interval=(150.0, 850.0))
    graphs = fake_graphs(monkeypatch)
    found = sample(model, DDPM, LABELS, cfg_scale=4.0, cfg_interval=(150.0, 850.0))
    assert torch.equal(found, expected)
    assert (graphs.captures, graphs.replays) == (3, 6)  # unguided with noise, guided, and the last step has no noise


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
    schedule: list[Step], options: dict[str, Any], captures: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = pair()
    blocks = [range(0, 2), range(2, 4), range(4, 5)]
    labels = [torch.tensor([number % 5 for number in block]) for block in blocks]
    expected = [
        sample(model, schedule, y, cfg_scale=4.0, seed=3, images=block, **options)
        for y, block in zip(labels, blocks, strict=True)
    ]
    graphs, sampler = fake_graphs(monkeypatch), Sampler(model, schedule, seed=3, **options)
    after_each = []
    for y, block, images in zip(labels, blocks, expected, strict=True):
        assert torch.equal(sampler(y, cfg_scale=4.0, images=block), images)
        after_each.append(graphs.captures)
    assert after_each == captures
    assert graphs.replays == len(schedule) * (5 if "batch_invariant" in options else 3)


def test_a_folders_blocks_share_a_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, graphs, folder = pair(PIXELS)[0], fake_graphs(monkeypatch), ImageFolder(tmp_path, num=10, batch=4)
    painter = Painter(Sampler(model, DDIM), lambda image: image % 5, cfg_scale=2.0)
    folder.fill(folder.blocks, painter.paint)
    assert not folder.missing()
    assert (graphs.captures, graphs.replays) == (2, 3 * len(DDIM))  # blocks of 4, 4 and 2


def test_a_failed_capture_goes_on_without() -> None:
    def fail(run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        raise RuntimeError("operation not permitted when stream is capturing\nin 40 lines")

    graphed = Graphed(lambda x: x + 1, fail)
    with pytest.warns(UserWarning, match="without a CUDA graph, whose capture failed: operation not permitted"):
        assert graphed(torch.zeros(2)).tolist() == [1, 1]
    assert graphed(torch.ones(2)).tolist() == [2, 2]


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
