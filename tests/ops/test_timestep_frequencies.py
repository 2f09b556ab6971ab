"""The frequencies of timesteps: the same bits on every device, in every mode that may see them first."""

from __future__ import annotations

import copy
import math
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from fake_cuda import FakeCuda
from fake_cuda.fixtures import fake_gpu
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ditfast import DiT, DiTConfig, model, ops, reference

__all__ = ["fake_gpu"]
OURS = sys.modules["ditfast.ops.timestep_embedding"]
TINY = DiTConfig(depth=1, hidden_size=32, num_heads=2, input_size=4)


def exact(divisor: int = 128) -> Tensor:
    """The frequencies that models were trained with."""
    return torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / divisor)


def reference_features(t: Tensor) -> Tensor:
    angles = t.float()[:, None] * reference.frequencies(t, 128)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


@pytest.fixture(autouse=True)
def _no_device_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (OURS, reference):
        monkeypatch.setattr(module, "_tables", {})


@pytest.fixture(params=["ops", "reference"])
def features(request: pytest.FixtureRequest) -> Callable[[Tensor], Tensor]:
    """A function of t [B]: [B, 256]."""
    return ops.timestep_embedding if request.param == "ops" else reference_features


def kept() -> list[Tensor]:
    return [*OURS._tables.values(), *reference._tables.values()]


@pytest.mark.parametrize("divisor", [128, 127], ids=["official", "diffusers"])
def test_a_device_whose_exp_is_off_by_one_ulp_has_the_cpu_s_bits(divisor: int, fake_gpu: FakeCuda) -> None:
    fake_gpu.exp_off_by_one_ulp()
    t = torch.zeros(1, device="cuda")
    assert not torch.equal(t.exp().cpu(), torch.ones(1))
    for found in (OURS._frequencies(t, 128, divisor), reference.frequencies(t, divisor)):
        assert found.is_cuda
        assert torch.equal(found.cpu(), exact(divisor))


def test_positions_of_a_model_built_on_a_device_are_the_cpu_s(fake_gpu: FakeCuda) -> None:
    expected = model.sincos_positions(TINY)
    with torch.device("cuda"):
        for found in (DiT(TINY).pos_embed, reference.DiT(TINY).pos_embed):
            assert found.is_cuda
            assert torch.equal(found.cpu(), expected)
    with torch.device("meta"):
        assert DiT(TINY).pos_embed.is_meta
        assert reference.DiT(TINY).pos_embed.is_meta


def test_first_used_in_a_capture_they_are_the_graph_s_own(features: Callable[[Tensor], Tensor], fake_gpu: FakeCuda) -> None:
    fake_gpu.exp_off_by_one_ulp()
    t, graph = torch.tensor([999.0], device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = features(t)
    assert not any(table.is_cuda for table in kept())
    graph.replay()
    assert torch.equal(found, features(t))


def test_used_again_they_wait_for_no_device(features: Callable[[Tensor], Tensor], fake_gpu: FakeCuda) -> None:
    t = torch.ones(3, device="cuda")
    features(t)
    torch.cuda.set_sync_debug_mode("error")
    try:
        features(t)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_first_seen_in_inference_mode_they_serve_a_backward(features: Callable[[Tensor], Tensor]) -> None:
    with torch.inference_mode():
        expected = features(torch.tensor([7.0, 999.0]))
    t = torch.tensor([7.0, 999.0], requires_grad=True)
    found = features(t)
    assert torch.equal(found, expected)
    assert torch.autograd.grad(found.sum(), t)[0].isfinite().all()
    assert not any(table.is_inference() or table.requires_grad for table in kept())


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_traced_by_make_fx(mode: str, features: Callable[[Tensor], Tensor]) -> None:
    t = torch.tensor([7.0, 999.0])
    assert torch.equal(make_fx(lambda t: features(t), tracing_mode=mode)(t)(t), features(t))
    assert all(type(table) is Tensor for table in kept())


def test_first_seen_by_fake_tensors(features: Callable[[Tensor], Tensor]) -> None:
    with FakeTensorMode():
        assert isinstance(features(torch.empty(3)), FakeTensor)
    assert all(type(table) is Tensor for table in kept())
    assert not isinstance(features(torch.ones(3)), FakeTensor)


def test_first_seen_by_functorch(features: Callable[[Tensor], Tensor]) -> None:
    t = torch.tensor([[7.0], [999.0]])
    torch.func.grad(lambda t: features(t).sum())(t[0])
    assert all(type(table) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(table) for table in kept())
    assert torch.equal(torch.func.vmap(features)(t), torch.stack([features(row) for row in t]))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_exported(strict: bool, features: Callable[[Tensor], Tensor]) -> None:
    class Features(torch.nn.Module):
        def forward(self, t: Tensor) -> Tensor:
            return features(t)

    t = torch.tensor([7.0, 999.0])
    program = torch.export.export(Features(), (t,), strict=strict)
    assert torch.equal(program.module()(t), features(t))
    assert all(type(table) is Tensor for table in kept())


def test_compiled_in_one_graph(features: Callable[[Tensor], Tensor]) -> None:
    t = torch.tensor([7.0, 999.0], requires_grad=True)
    found = torch.compile(features, fullgraph=True, backend="aot_eager")(t)
    assert torch.equal(found, features(t))
    found.sum().backward()


@pytest.mark.parametrize("kind", [DiT, reference.DiT], ids=["DiT", "reference"])
def test_a_model_that_has_run_can_be_copied(kind: Callable[[DiTConfig], torch.nn.Module]) -> None:
    given = torch.randn(1, *TINY.input_shape), torch.ones(1), torch.zeros(1, dtype=torch.long)
    first = kind(TINY).eval()
    assert torch.equal(first(*given), copy.deepcopy(first)(*given))
    assert not any("freq" in name for name in first.state_dict())


def test_threads_share_one_table(features: Callable[[Tensor], Tensor]) -> None:
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(features(torch.tensor([999.0])))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(torch.equal(one, found[0]) for one in found)
    assert len(kept()) == 1


def test_the_default_device_is_not_where_they_are_computed(features: Callable[[Tensor], Tensor]) -> None:
    t = torch.tensor([999.0])
    with torch.device("meta"):
        found = features(t)
        assert features(torch.empty(2)).shape == (2, 256)
    assert torch.equal(found, features(t))
