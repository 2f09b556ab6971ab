"""torch.compile around, before and after accelerate."""

from __future__ import annotations

import pytest
import torch
from foreign import DITS, KINDS, diffusers_dit, gradients, joined, official, official_inputs, pixart, run, sd3
from support import error
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import ditfast

pytestmark = pytest.mark.usefixtures("one_thread")


def graphs(backend: str = "eager") -> CompileCounterWithBackend:
    return CompileCounterWithBackend(backend)


SHALLOW = {
    "official": lambda depth: official(depth=depth),
    "diffusers": lambda depth: diffusers_dit(num_layers=depth),
    "PixArt": lambda depth: pixart(num_layers=1),
    "SD3": lambda depth: sd3(num_layers=2),
}


@pytest.mark.parametrize("kind", SHALLOW)
def test_compiles_without_graph_breaks(kind: str) -> None:
    model, inputs = SHALLOW[kind](2), KINDS[kind].example(torch.float32)
    expected = run(model, inputs)[0]
    upstream = [torch.randn_like(expected)]
    gradient = joined(gradients(model, inputs, upstream))
    ditfast.accelerate(model)
    counter = graphs("aot_eager" if kind in DITS else "eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for _ in range(2):
            assert error(run(compiled, inputs)[0], expected) <= 1e-5
        assert counter.frame_count == 1, "compiled once"
    assert error(joined(gradients(compiled, inputs, upstream)), gradient) <= 1e-5
    assert counter.frame_count == 2, "and once with gradients"


@pytest.mark.parametrize("kind", DITS)
def test_options_compile(kind: str) -> None:
    model, inputs = SHALLOW[kind](1), KINDS[kind].example(torch.float32)
    with torch.no_grad():
        before = run(model, inputs)[0]
        ditfast.accelerate(model, dtype=torch.bfloat16, cache_modulation=True, attention="native")
        expected = run(model, inputs)[0]
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert error(run(compiled, inputs)[0], expected) <= 1e-2
        for parameter in model.parameters():
            parameter.data.mul_(1.1)
        found = run(compiled, inputs)[0]
        assert error(found, before) > 1e-1
        assert error(found, run(ditfast.restore(model), inputs)[0]) <= 3e-2


@pytest.mark.parametrize(("kind", "in_place"), [("official", False), ("official", True), ("diffusers", True)])
def test_accelerated_after_compiling(kind: str, in_place: bool) -> None:
    """What was compiled before notices accelerate, and restore."""
    model, inputs = SHALLOW[kind](1), KINDS[kind].example(torch.float32)
    counter = graphs()
    if in_place:
        model.compile(backend=counter, fullgraph=True)
        compiled: nn.Module = model
    else:
        compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        before = run(compiled, inputs)[0]
        ditfast.accelerate(compiled, dtype=torch.bfloat16)
        assert all(row.swapped for row in ditfast.acceleration_report(compiled).rows)
        assert 1e-4 < error(run(compiled, inputs)[0], before) < 3e-2
        assert counter.frame_count == 2
        ditfast.restore(compiled)
        assert torch.equal(run(compiled, inputs)[0], before)


def test_compiled_blocks() -> None:
    model, inputs = official(), official_inputs()
    with torch.no_grad():
        before = run(model, inputs)[0]
        ditfast.accelerate(model)
        counter = graphs()
        model.blocks[1] = torch.compile(model.blocks[1], backend=counter, fullgraph=True)
        assert error(run(model, inputs)[0], before) <= 1e-5
        assert counter.frame_count == 1
        rows = ditfast.acceleration_report(ditfast.accelerate(model)).rows
        assert [row.module for row in rows if row.swapped] == ["(model)", "blocks.0", "blocks.1._orig_mod", "blocks.2"]
        assert len(rows) == 4
        assert error(run(model, inputs)[0], before) <= 1e-5
        assert torch.equal(run(ditfast.restore(model), inputs)[0], before)


def test_hooks_inside_a_compiled_model() -> None:
    model, inputs, calls = official(), official_inputs(), []
    ditfast.accelerate(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        before = run(compiled, inputs)[0]
        model.blocks[1].mlp.register_forward_hook(lambda _, args, out: calls.append(1) or 2 * out)
        torch._dynamo.reset()  # torch's own rule: hooks belong in front of compiling
        found = run(compiled, inputs)[0]
        assert len(calls) == 1
        assert error(found, before) > 1e-4
        assert error(found, run(ditfast.restore(model), inputs)[0]) <= 1e-5
