"""Which kernels a model launches, found by running it without data, so that they can be compiled where there is no GPU.

    builds = launches(DiTConfig.from_name("DiT-XL/2"), "sm_90", [1, 8, 32], torch.bfloat16, training=True)
    outcomes = list(ditfast.kernels.ahead.compile_all(builds, jobs=16))

Every op runs on its kernels, whatever the target's device would choose, so what is found is at least what any choice launches.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from . import ops
from .config import DiTConfig
from .diffusion import FlowMatching, GaussianDiffusion, Step, steps
from .dispatch.launchers import launchers, triton_kernels
from .dispatch.override import backend
from .model import DiT
from .modulation_table import ROWS
from .sampling.models import Denoiser
from .sampling.run import Batch, Run


def launches(config: DiTConfig, arch: str, batches: Sequence[int], dtype: torch.dtype, training: bool) -> Sequence[Any]:
    """One ``kernels.ahead.Build`` of each kernel and specialisation.

    Covers forwards, guided and not, with adaLN's vectors from a table or not; the steps of every solver and of schedulers; and
    of training forwards and backwards. A dtype other than fp32 is that of the weights, or autocast's over fp32 weights.

    Args:
        config: of the model.
        arch: one of ``kernels.ahead.TARGETS``.
        batches: images in a forward; a guided one has twice as many samples.
        dtype: fp32, fp16 or bf16.
        training: backwards too.

    Raises:
        ValueError: no such target, or a batch below 1.
        RuntimeError: triton is missing, kernels were jitted for the interpreter, or no tile fits the target.
    """
    for batch in batches:
        if batch < 1:
            raise ValueError(f"batch: got {batch}, expected at least 1")
    triton_kernels()
    from .kernels.ahead import compiling_for

    kinds = [(dtype, None)] if dtype == torch.float32 else [(dtype, None), (torch.float32, dtype)]  # weights', autocast's
    solvers = _solvers(config)
    with compiling_for(arch) as builds:
        for (weights, to_dtype), batch in itertools.product(kinds, batches):
            model = _without_data(config, weights)
            autocast = torch.autocast("cpu", to_dtype or torch.bfloat16, enabled=to_dtype is not None)
            with backend("triton"), FakeTensorMode(allow_non_fake_inputs=True), Launching(), autocast:
                with torch.no_grad():
                    _sample(model.eval(), batch, solvers)
                if training:
                    _train(model.train(), batch)
    return builds


class Launching(TorchDispatchMode):
    """Ops call their launchers, though their tensors have no data; what torch computes does not matter."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0  # a label, when the model checks its range
        launcher = launchers().get(func._schema.name.partition("::")[2]) if func.namespace == "ditfast" else None
        return func(*args, **(kwargs or {})) if launcher is None else launcher(*args)


def _without_data(config: DiTConfig, dtype: torch.dtype) -> DiT:
    """Few blocks stand for all: they differ in the strides of their vectors only, whose alignment is that of an even depth
    or an odd one.
    """
    few = dataclasses.replace(config, depth=min(config.depth, 2 + config.depth % 2))
    with torch.device("meta"):
        model = DiT(few)
    return model.to(dtype).to_empty(device="cpu")


def _inputs(model: DiT, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.empty(batch, *model.config.input_shape, dtype=model.pos_embed.dtype)
    return x, torch.empty(batch), torch.empty(batch, dtype=torch.int64)


def _sample(model: DiT, batch: int, solvers: Sequence[Sequence[Step]]) -> None:
    x, t, y = _inputs(model, batch)
    output = model(x, t, y)  # [B, C', H, W]
    model.t_embedder(t.long())
    if model.config.has_null_class:
        model.forward_with_cfg(*_inputs(model, 2 * batch), cfg_scale=4.0)
    if model.config.modulation_vectors:
        _, many_t, many_y = _inputs(model, ROWS)
        width = model.modulation_vectors(many_t, many_y).shape[1]
        for samples in (batch, 2 * batch):
            model.forward_modulated(x, x.new_empty(samples, width))
    _denoise(_Answers(model.config, model.pos_embed, output.dtype), y, solvers)


@dataclasses.dataclass(frozen=True)
class _Answers:
    """In a model's place where its own launches are known."""

    config: DiTConfig
    pos_embed: Tensor
    dtype: torch.dtype

    def parameters(self) -> Iterator[Tensor]:
        return iter([self.pos_embed])

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return x.new_empty(len(y), self.config.out_channels, *x.shape[2:], dtype=self.dtype)


def _denoise(model: _Answers, labels: Tensor, solvers: Sequence[Sequence[Step]]) -> None:
    """Steps as ``sampling`` takes them, and the one kernel in the step of a diffusers scheduler."""
    batch, config = len(labels), model.config
    scales = [None, torch.empty(batch)] if config.has_null_class else [None]
    for clip, scale in itertools.product((False, True), scales):
        run = Run(Denoiser(model), clip, (-math.inf, math.inf), config.guidance_channels, seed=0, table_bytes=0)
        for solver in solvers:
            for _ in run.solved(solver, Batch(labels, range(batch), scale)):
                pass
        samples, guided = (batch, 0) if scale is None else (2 * batch, config.guidance_channels)
        x, output = (
            torch.empty(n, c, *config.input_shape[1:]) for n, c in ((batch, config.in_channels), (samples, config.out_channels))
        )
        ops.denoise_update(x, output, None, run.prediction_row, scale, guided)


def _solvers(config: DiTConfig) -> list[list[Step]]:
    """With noise and without, from rows of numbers that are aligned to 16 bytes and that are not. Reads numbers of tensors."""
    process, flow = GaussianDiffusion("3", learn_sigma=config.learn_sigma), FlowMatching(num_steps=2)
    return [*(steps(process, solver) for solver in process.solvers), *(steps(flow, solver) for solver in flow.solvers)]


def _train(model: DiT, batch: int) -> None:
    out = model(*_inputs(model, batch))
    out.backward(torch.empty_like(out))
