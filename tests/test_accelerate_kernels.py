"""Accelerated models on the compiled kernels: the same numbers, and one kernel between any two sublayers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from foreign import (
    KINDS,
    assert_same_gradients,
    assert_same_outputs,
    diffusers_dit,
    gradients,
    in_dtype,
    in_float64,
    official,
    pixart,
    run,
    sd3,
)
from support import DTYPES, TARGETS, WHERE, Runner, on_kernels, pairwise
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import ditfast

DEPTH = 2
SHALLOW = {
    "official": lambda: official(depth=DEPTH),
    "diffusers": lambda: diffusers_dit(num_layers=DEPTH),
    "diffusers, copies differ": lambda: diffusers_dit(agree=False, num_layers=DEPTH),
    "PixArt": lambda: pixart(num_layers=1),
    "SD3": lambda: sd3(num_layers=2),
}


def on(runner: Runner, inputs: dict[str, Any]) -> dict[str, Any]:
    return tree_map_only(Tensor, lambda tensor: tensor.to(runner.device), inputs)


@on_kernels(pairwise(kind=tuple(SHALLOW), dtype=("fp32", "bf16")), kind=("official", "diffusers"), dtype=("fp32", "bf16"))
def test_outputs(compiled: Runner, kind: str, dtype: str) -> None:
    model = SHALLOW[kind]().to(compiled.device, DTYPES[dtype])
    inputs = on(compiled, KINDS[kind].example(DTYPES[dtype]))
    with torch.no_grad():
        eager, exact = run(model, inputs), run(in_float64(model), in_dtype(inputs, torch.float64))
        ditfast.accelerate(model)
        found = run(model, inputs)
    assert_same_outputs(found, exact, eager)


@on_kernels(pairwise(kind=("official", "diffusers", "PixArt", "SD3")), kind=("official", "diffusers"))
def test_gradients(compiled: Runner, kind: str) -> None:
    model = SHALLOW[kind]().to(compiled.device, torch.bfloat16)
    inputs = on(compiled, KINDS[kind].example(torch.bfloat16))
    upstream = [torch.randn_like(tensor) for tensor in run(model, inputs)]
    eager = gradients(model, inputs, upstream)
    exact = gradients(in_float64(model), in_dtype(inputs, torch.float64), [gradient.double() for gradient in upstream])
    ditfast.accelerate(model)
    found = gradients(model, inputs, upstream)
    assert_same_gradients(found, exact, eager)


def launches(model: nn.Module, kind: str) -> dict[str, int]:
    import ptxsim

    inputs = KINDS[kind].example(torch.bfloat16)
    with (
        Runner.open(TARGETS[-1], checks=False),
        torch.inference_mode(),
        ptxsim.set_options(stats=True),
        ptxsim.record() as found,
    ):
        run(model, inputs)
    return {name.removesuffix("_kernel"): stats.launches for name, stats in found.items()}


@pytest.mark.skipif(WHERE != "simulator", reason="counts launches on the simulator")
@pytest.mark.parametrize("kind", ["official", "diffusers", "diffusers, copies differ"])
def test_one_kernel_between_any_two_sublayers(kind: str) -> None:
    model = ditfast.accelerate(SHALLOW[kind]().bfloat16())
    found = launches(model, kind)
    assert found == {
        "grouped_linear": DEPTH if kind == "diffusers, copies differ" else 1,  # the final layer's goes with the first block's
        "layer_norm_modulate": 1,
        "gated_residual_layer_norm_modulate": 2 * DEPTH,
        "linear": (5 if kind.startswith("diffusers") else 3) * DEPTH,
        "attention": DEPTH,
        "linear_gelu": DEPTH,
        "linear_unpatchify": 1,
        **({} if kind.startswith("diffusers") else {"patch_embed": 1}),
    }
    blocks = getattr(model, "blocks", None) or model.transformer_blocks
    blocks[-1].register_forward_hook(lambda *_: None)
    hooked = launches(model, kind)
    joints = {name: hooked[name] for name in ("layer_norm_modulate", "gated_residual_layer_norm_modulate", "gated_residual")}
    # In front of the called block, in it, and behind it: a norm each; each chain but the last ends in a residual.
    assert joints == {"layer_norm_modulate": 3, "gated_residual_layer_norm_modulate": 2 * DEPTH - 2, "gated_residual": 2}
    assert launches(ditfast.restore(model), kind) == {}


@pytest.mark.skipif(WHERE != "simulator", reason="counts launches on the simulator")
def test_sites_of_other_families() -> None:
    assert launches(ditfast.accelerate(pixart(num_layers=2).bfloat16()), "PixArt") == {
        "layer_norm_modulate": 2,
        "gated_residual_layer_norm_modulate": 2,
        "gated_residual": 4,
    }
    assert launches(ditfast.accelerate(sd3(num_layers=2).bfloat16()), "SD3") == {
        "layer_norm_modulate": 4,
        "gated_residual_layer_norm_modulate": 3,  # the last block has no use for its text
        "gated_residual": 3,
    }
