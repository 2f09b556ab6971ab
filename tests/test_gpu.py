"""What only a GPU can show: graphs, streams, devices. Kernels' parity runs there with the same tests as everywhere."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support import randomize
from torch import Tensor

from ditfast import DiT, DiTConfig, ops

pytestmark = pytest.mark.gpu
CONFIG = DiTConfig(depth=2, hidden_size=144, num_heads=2, input_size=8, num_classes=5)


@pytest.fixture
def model() -> DiT:
    return randomize(DiT(CONFIG)).cuda().bfloat16().eval()


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(4, *CONFIG.input_shape, device="cuda", dtype=torch.bfloat16)
    return x, torch.rand(4, device="cuda") * 999, torch.randint(5, (4,), device="cuda")


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def step(model: DiT, x: Tensor, t: Tensor, y: Tensor) -> list[Tensor]:
    """Output and all gradients."""
    out = model(x, t, y)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [out, *torch.autograd.grad(out, trained, out.detach())]


def test_nothing_waits_for_the_device(model: DiT, inputs: tuple[Tensor, ...], no_synchronisation: None) -> None:
    step(model, *inputs)


def test_a_captured_step_replays_to_the_same_bits(model: DiT, inputs: tuple[Tensor, ...]) -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = step(model, *inputs)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(model, *inputs)
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_kernels_run_on_the_current_stream(inputs: tuple[Tensor, ...]) -> None:
    x = torch.randn(8, 1024, 1152, device="cuda", dtype=torch.bfloat16)
    expected = ops.layer_norm_modulate(x, None, None)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        found = ops.layer_norm_modulate(late, None, None)  # on another stream it would read zeros
    torch.cuda.synchronize()
    assert torch.equal(found, expected)


def test_tensors_of_another_than_the_current_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = torch.randn(2, 20, 384, device="cuda:1", requires_grad=True)
    with torch.cuda.device(0):
        y = ops.layer_norm_modulate(x, None, None)
        (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert y.device == dx.device == x.device
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (384,), eps=1e-6))
