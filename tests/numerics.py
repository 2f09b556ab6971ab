"""How far every op and whole models are from float64, fused and eager: python tests/numerics.py > docs/numerics.md

Runs the kernels where the tests do: on a GPU, else as compiled code on the simulator, else in the interpreter.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import oracles
import torch
from rich.console import Console
from rich.progress import track
from support import DTYPES, TARGETS, Runner, error, leaves, randomize
from torch import Tensor

import ditfast
from ditfast import DiT, DiTConfig, ops, reference

LOW = {name: dtype for name, dtype in DTYPES.items() if dtype != torch.float32}
B, T, D, HEADS, PATCH, CHANNELS, SIDE = 2, 64, 1152, 16, 2, 4, 16


class Row(NamedTuple):
    """Relative errors in the 2-norm: of the output, and of all gradients of its inputs together."""

    name: str
    dtype: str
    fused: float
    eager: float
    fused_gradient: float | None = None
    eager_gradient: float | None = None

    def cells(self) -> str:
        errors = (compare(self.fused, self.eager), compare(self.fused_gradient, self.eager_gradient))
        return f"| {self.name} | {self.dtype} | {' | '.join(errors)} |"


def compare(fused: float | None, eager: float | None) -> str:
    if fused is None or eager is None:
        return "| |"
    return f"{fused:.2e} | {eager:.2e} | {fused / eager:.2f}" if eager else f"{fused:.2e} | {eager:.2e} |"


def cases() -> dict[str, tuple[Callable[..., Any], Callable[..., Any], list[tuple[int, ...]]]]:
    """op, the same in eager PyTorch in a dtype, the shapes of its arguments (weights are scaled by their fan-in)."""
    x, v = (B, T, D), (B, D)
    latents, grid = (B, CHANNELS, SIDE, SIDE), (SIDE // PATCH, SIDE // PATCH)
    out = PATCH * PATCH * 2 * CHANNELS
    ends = {"grid": grid, "patch_size": PATCH}

    def joint(x: Tensor, h: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        stored = oracles.gated_residual(x, h, gate, dtype)
        return stored, oracles.layer_norm_modulate(stored, shift, scale, dtype)

    return {
        "layer_norm_modulate": (ops.layer_norm_modulate, oracles.layer_norm_modulate, [x, v, v]),
        "gated_residual": (ops.gated_residual, oracles.gated_residual, [x, x, v]),
        "gated_residual_layer_norm_modulate": (ops.gated_residual_layer_norm_modulate, joint, [x, x, v, v, v]),
        "linear": (ops.linear, oracles.linear, [x, (D, D), (D,)]),
        "linear_gelu": (ops.linear_gelu, oracles.linear_gelu, [x, (4 * D, D), (4 * D,)]),
        "linear_gated_residual": (ops.linear_gated_residual, oracles.linear_gated_residual, [x, (D, D), (D,), x, v]),
        "mlp": (ops.mlp, oracles.mlp, [x, (4 * D, D), (4 * D,), (D, 4 * D), (D,)]),
        "attention, head dim 72": (ops.attention, oracles.attention, [(B, T, 3, HEADS, D // HEADS)]),
        "attention, head dim 64": (ops.attention, oracles.attention, [(B, T, 3, HEADS, 64)]),
        "cross_attention": (ops.cross_attention, oracles.cross_attention, [(B, T, HEADS, 72), (B, 2, 2, HEADS, 72)]),
        "patch_embed": (
            partial(ops.patch_embed, patch_size=PATCH),
            oracles.patch_embed,
            [latents, (D, CHANNELS, PATCH, PATCH), (D,), (1, T, D)],
        ),
        "unpatchify": (
            partial(ops.unpatchify, **ends),
            lambda x, dtype: oracles.unpatchify(x.to(dtype), grid, PATCH),
            [(B, T, out)],
        ),
        "linear_unpatchify": (
            partial(ops.linear_unpatchify, **ends),
            lambda u, w, b, dtype: oracles.linear_unpatchify(u, w, b, grid, PATCH, dtype),
            [x, (out, D), (out,)],
        ),
        "final_layer": (
            partial(ops.final_layer, **ends),
            lambda x, shift, scale, w, b, dtype: oracles.final_layer(x, shift, scale, w, b, grid, PATCH, dtype),
            [x, v, v, (out, D), (out,)],
        ),
        "classifier_free_guidance": (
            partial(ops.classifier_free_guidance, scale=4.0, channels=3),
            lambda out, dtype: oracles.classifier_free_guidance(out, 4.0, 3, dtype),
            [(2 * B, 2 * CHANNELS, SIDE, SIDE)],
        ),
    }


def errors(name: str, runner: Runner, dtype: str) -> Row:
    op, eager_op, shapes = cases()[name]
    scaled = [torch.randn(shape) * (shape[1:].numel() ** -0.5 if is_weight(shape) else 1) for shape in map(torch.Size, shapes)]
    given = [tensor.to(runner.device, LOW[dtype]) for tensor in scaled]
    results = []
    for call, precision in (
        (op, LOW[dtype]),
        (partial(eager_op, dtype=LOW[dtype]), LOW[dtype]),
        (partial(eager_op, dtype=torch.float64), torch.float64),
    ):
        inputs = leaves(*given, dtype=precision)
        outputs = call(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.manual_seed(1)
        upstream = [torch.randn(output.shape, device=output.device).to(LOW[dtype], copy=True) for output in outputs]
        found = torch.autograd.grad(outputs, inputs, [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True)])
        results.append(
            (outputs[-1].detach(), torch.cat([(gradient.double() / gradient.double().norm()).flatten() for gradient in found]))
        )
    (out, gradient), (eager, eager_gradient), (exact, exact_gradient) = results
    return Row(
        name,
        dtype,
        error(out, exact),
        error(eager, exact),
        error(gradient, exact_gradient),
        error(eager_gradient, exact_gradient),
    )


def timestep_errors(runner: Runner) -> Row:
    """The features are fp32 in every dtype, and so are the frequencies, of which float64 gets the same."""
    t = torch.rand(4096, device=runner.device) * 1000
    half = 128
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half).to(runner.device)
    angles = t.double()[:, None] * frequencies.double()
    exact = torch.cat([angles.cos(), angles.sin()], dim=1)
    with ditfast.backend("torch"):
        eager = ops.timestep_embedding(t)
    return Row("timestep_embedding", "fp32", error(ops.timestep_embedding(t), exact), error(eager, exact))


def is_weight(shape: torch.Size) -> bool:
    """[N, K] or [D, C, p, p], and neither a modulation nor latents."""
    return len(shape) in (2, 4) and shape[0] not in (B, 2 * B)


@torch.inference_mode()
def model_errors(name: str, config: DiTConfig, runner: Runner, dtype: str) -> Row:
    oracle = randomize(reference.DiT(config)).to(LOW[dtype]).eval()
    fast = DiT(config).to(LOW[dtype]).eval()
    fast.load_state_dict(oracle.state_dict())
    oracle, fast = oracle.to(runner.device), fast.to(runner.device)
    x = torch.randn(1, *config.input_shape).to(runner.device, LOW[dtype])
    t, y = torch.tensor([417.0], device=runner.device), torch.tensor([7], device=runner.device)
    found, eager = fast(x, t, y), oracle(x, t, y)
    exact = oracle.double()(x.double(), t, y)
    return Row(name, dtype, error(found, exact), error(eager, exact))


def rows(runner: Runner) -> Iterator[Row]:
    models = {
        "DiT-S/2 at 256px": DiTConfig.from_name("DiT-S/2"),
        "2 blocks of DiT-XL/2 at 256px": DiTConfig(depth=2),
    }
    jobs = [partial(errors, name, runner, dtype) for name in cases() for dtype in LOW]
    jobs += [partial(timestep_errors, runner)]
    jobs += [partial(model_errors, name, config, runner, dtype) for name, config in models.items() for dtype in LOW]
    for job in track(jobs, "measuring", console=Console(file=sys.stderr)):
        torch.manual_seed(0)
        yield job()


def main() -> None:
    target = TARGETS[-1]
    with Runner.open(target, checks=False) as runner:
        lines = [row.cells() for row in rows(runner)]
    print(f"""# Numerics

Relative errors in the 2-norm against float64, on inputs rounded to the dtype; `python tests/numerics.py` ({target}, torch
{torch.__version__}). Fused is ditfast's Triton kernels, eager plain PyTorch in the same dtype. Gradients: all inputs' together,
each scaled to norm 1, for a random gradient of the output. XL/2's width, {B} x {T} tokens; models in inference; timesteps have
fp32 features in every dtype.

| op | dtype | fused | eager | ratio | fused, gradients | eager, gradients | ratio |
|---|---|---|---|---|---|---|---|""")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
