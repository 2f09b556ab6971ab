"""What is compared: a case (weights and inputs) and the rivals that run it."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

import ditfast
from ditfast import DiTConfig, reference
from ditfast.diffusion import GaussianDiffusion
from ditfast.digits import real_digits

RIVALS = ("eager", "compile", "ditfast")
SWAPPED = ("diffusers", "ditfast-swapped")  # diffusers' own model, as it is and after ditfast.accelerate
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DIGITS = "digits"
IN_DIFFUSERS = ", in diffusers"
DIGITS_BATCH = 64

Run = Callable[..., Tensor]
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Case:
    """One model on one input; weights are those of its dtype, in whatever dtype a model computes."""

    model: str
    config: DiTConfig
    batch: int
    dtype_name: str
    device: torch.device
    weights: Callable[[], dict[str, Tensor]]
    inputs: Callable[[], tuple[Tensor, Tensor, Tensor]]
    rivals: tuple[str, ...] = RIVALS

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @property
    def title(self) -> str:
        return f"{self.model} {self.dtype_name} batch {self.batch}"

    def reference(self, dtype: torch.dtype | None = None) -> reference.DiT:
        return self._loaded(reference.DiT, dtype)

    def rival(self, name: str, others: dict[str, Run]) -> Run:
        """A rival as a function of (x, t, y); ``NAME+graph`` captures the one of ``others`` called NAME."""
        kind, _, graphed = name.partition("+")
        if graphed:
            return _under_cuda_graph(others[kind], self.inputs())
        if kind in SWAPPED:
            return self._in_diffusers(swapped=kind == "ditfast-swapped")
        if kind == "ditfast":
            return self._loaded(ditfast.DiT)
        model = self.reference()
        if kind == "compile":
            torch._dynamo.reset()  # else the cases before this one count against torch.compile's recompilation limit
            model.compile(dynamic=False)
        return model

    def _in_diffusers(self, swapped: bool) -> Run:
        from diffusers import DiTTransformer2DModel

        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "model"
            ditfast.save_checkpoint(self._loaded(ditfast.DiT), folder, layout="diffusers")
            model = (
                DiTTransformer2DModel.from_pretrained(folder, torch_dtype=self.dtype, low_cpu_mem_usage=False)
                .eval()
                .to(self.device)
            )
        if swapped:
            ditfast.accelerate(model)
        return lambda x, t, y: model(x, t, y, return_dict=False)[0]

    def _loaded(self, kind: Callable[[DiTConfig], Model], dtype: torch.dtype | None = None) -> Model:
        with torch.device("meta"):  # weights are about to come: initialising would only cost time
            model = kind(self.config)
        model.load_state_dict({name: weight.to(self.dtype) for name, weight in self.weights().items()}, assign=True)
        return model.eval().to(self.device, self.dtype if dtype is None else dtype)


def random_case(model: str, config: DiTConfig, batch: int, device: torch.device, dtype_name: str) -> Case:
    """Random weights, all of them non-zero, and unit-variance latents."""

    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(batch, *config.input_shape, generator=generator)
        t = torch.randint(1000, (batch,), generator=generator)
        y = torch.randint(config.num_classes, (batch,), generator=generator)
        return x.to(device, DTYPES[dtype_name]), t.to(device), y.to(device)

    return Case(model, config, batch, dtype_name, device, functools.partial(_random_weights, config), inputs)


@functools.lru_cache(maxsize=1)  # one model's at a time: every rival and batch size of it asks again
def _random_weights(config: DiTConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        parameters = {name: p.shape for name, p in reference.DiT(config).named_parameters() if p.requires_grad}
    weights = {"pos_embed": reference.sincos_positions(config)}
    for name, shape in parameters.items():
        std = 0.5 * shape[1:].numel() ** -0.5 if len(shape) > 1 else 0.02
        weights[name] = torch.randn(shape, generator=generator) * std
    return weights


def checkpoint_case(path: Path, batch: int, device: torch.device, dtype_name: str) -> Case:
    """Weights from a file or folder on random latents."""
    model = ditfast.load_checkpoint(path)
    random = random_case(path.name, model.config, batch, device, dtype_name)
    return dataclasses.replace(random, weights=model.state_dict)


def swapped_case(case: Case) -> Case:
    """The same weights in diffusers' own model, with diffusers' arithmetic, before and after ``ditfast.accelerate``."""
    config = dataclasses.replace(case.config, flavour="diffusers")
    return dataclasses.replace(case, model=f"{case.model}{IN_DIFFUSERS}", config=config, rivals=SWAPPED)


def digits_case(dtype_name: str, device: torch.device) -> Case:
    """The trained checkpoint on scans of real digits, at every depth of noise."""
    trained = ditfast.load_digits()

    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        images, labels = (part[:DIGITS_BATCH] for part in real_digits())
        t = torch.linspace(0, 999, DIGITS_BATCH).long()
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
        x = GaussianDiffusion().add_noise(images, t, noise)
        return x.to(device, DTYPES[dtype_name]), t.to(device), labels.to(device)

    return Case(DIGITS, trained.config, DIGITS_BATCH, dtype_name, device, trained.state_dict, inputs)


def available_rivals(wanted: Sequence[str], device: torch.device) -> tuple[list[str], list[str]]:
    """The rivals that can run here, on CUDA each also under a CUDA graph; and a note for each that cannot."""
    names, notes = list(dict.fromkeys(wanted)), []
    compiler = os.environ.get("CXX", "g++")
    if "compile" in names and device.type == "cpu" and not shutil.which(compiler):
        names.remove("compile")
        notes.append(f"compile: skipped, torch.compile needs a C++ compiler on CPU and {compiler!r} is not installed")
    if any(name in SWAPPED for name in names) and importlib.util.find_spec("diffusers") is None:
        names = [name for name in names if name not in SWAPPED]
        notes.append("diffusers: skipped, it is not installed (pip install diffusers)")
    if device.type == "cuda":
        names += [f"{name}+graph" for name in names]
    return names, notes


def _under_cuda_graph(run: Run, inputs: tuple[Tensor, Tensor, Tensor]) -> Run:
    """``run`` captured once on inputs of its own; a call copies its arguments in, replays, and returns the same output."""
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        for _ in range(3):
            run(*inputs)
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run(*inputs)

    def replay(*arguments: Tensor) -> Tensor:
        for buffer, argument in zip(inputs, arguments, strict=True):
            buffer.copy_(argument)
        graph.replay()
        return output

    return replay
