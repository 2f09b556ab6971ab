"""Graphs, streams and devices: what is asynchronous on a GPU."""

from __future__ import annotations

import pytest
import torch
from devices import Place, inputs, new_model
from torch import Tensor

from ditfast import DiT, ops


def step(model: DiT, x: Tensor, t: Tensor, y: Tensor) -> list[Tensor]:
    """Return output and all gradients, without the graph: torch refuses a capture while an earlier one of these is kept."""
    out = model(x, t, y)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, trained, out.detach())]


def test_nothing_waits_for_the_device(place: Place) -> None:
    model, given = new_model(place, torch.bfloat16), inputs(place, torch.bfloat16)
    vectors = model.modulation_vectors(*given[1:]).detach()
    step(model, *given)
    with place.without_waiting():
        step(model, *given)
        model.forward_modulated(given[0], vectors)


@pytest.mark.usefixtures("deterministic")
def test_a_captured_step_replays_to_the_same_bits_twice(place: Place) -> None:
    model, given = new_model(place, torch.bfloat16), inputs(place, torch.bfloat16)
    expected = step(model, *given)
    captured, replay = place.captured(lambda: step(model, *given))
    for _ in range(2):
        for tensor in captured:
            tensor.detach().fill_(torch.nan)
        replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_a_captured_forward_follows_its_inputs(place: Place) -> None:
    model, (x, t, y) = new_model(place, torch.bfloat16), inputs(place, torch.bfloat16)
    with torch.no_grad():
        (captured,), replay = place.captured(lambda: [model(x, t, y)])
        x.copy_(torch.randn_like(x))
        replay()
        assert torch.equal(captured, model(x, t, y))


def test_kernels_run_on_the_current_stream(place: Place) -> None:
    x = torch.randn(8, 256, 1152, device=place.device, dtype=torch.bfloat16)
    expected, late = ops.layer_norm_modulate(x, None, None), torch.zeros_like(x)
    with place.late_copy(x, late):
        found = ops.layer_norm_modulate(late, None, None)  # on another stream it would read zeros
    assert torch.equal(found, expected)


def test_tensors_of_another_than_the_current_device(place: Place) -> None:
    if place.device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    other = torch.device("cuda", 1) if place.device.type == "cuda" else place.device
    x = torch.randn(2, 20, 384, device=other, requires_grad=True)
    y = ops.layer_norm_modulate(x, None, None)
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert y.device == dx.device == x.device
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (384,), eps=1e-6))
