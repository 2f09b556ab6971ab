"""What is compared: a case (weights and inputs) and the rivals that run it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

import ditfast
from ditfast import DiTConfig, reference
from ditfast.diffusion import GaussianDiffusion

RIVALS = ("eager", "compile", "ditfast")
DIGITS = "digits"
DIGITS_BATCH = 64
Model = TypeVar("Model", bound=nn.Module)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One model on one input; the weights are made when it is run."""

    model: str
    config: DiTConfig
    batch: int
    dtype_name: str
    device: torch.device
    weights: Callable[[], dict[str, Tensor]]
    inputs: Callable[[], tuple[Tensor, Tensor, Tensor]]

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @property
    def title(self) -> str:
        return f"{self.model} {self.dtype_name} batch {self.batch}"

    def reference(self, dtype: torch.dtype | None = None) -> reference.DiT:
        return _loaded(reference.DiT(self.config), self, dtype)

    def rivals(self, names: Sequence[str]) -> Iterator[tuple[str, Callable[..., Tensor]]]:
        """Each rival as a function of (x, t, y), warmed up by its first call."""
        for name in names:
            kind, _, graphed = name.partition("+")
            model: nn.Module = _loaded(ditfast.DiT(self.config), self) if kind == "ditfast" else self.reference()
            if kind == "compile":
                torch._dynamo.reset()  # else the models before this one count against its recompilation limit
                model.compile(dynamic=False)
            yield name, _under_cuda_graph(model, self.inputs()) if graphed else model


def random_case(model: str, config: DiTConfig, batch: int, device: torch.device, dtype_name: str) -> Case:
    """Random weights, all of them non-zero, and unit-variance latents."""

    def weights() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        with torch.device("meta"):
            shapes = {name: (p.shape, p.requires_grad) for name, p in reference.DiT(config).named_parameters()}
        made = {
            name: torch.randn(shape, generator=generator) * (0.5 * shape[1:].numel() ** -0.5 if len(shape) > 1 else 0.02)
            for name, (shape, trained) in shapes.items()
            if trained
        }
        return made | {"pos_embed": reference.sincos_positions(config)}

    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(batch, *config.input_shape, generator=generator)
        t = torch.randint(1000, (batch,), generator=generator)
        y = torch.randint(config.num_classes, (batch,), generator=generator)
        return x.to(device, DTYPES[dtype_name]), t.to(device), y.to(device)

    return Case(model, config, batch, dtype_name, device, weights, inputs)


def digits_case(dtype_name: str, device: torch.device) -> Case:
    """The trained checkpoint on scans of real digits, half way into the noise."""
    trained = ditfast.load_digits()

    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        x0 = torch.tensor(pixels[:DIGITS_BATCH], dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
        t = torch.linspace(0, 999, DIGITS_BATCH).long()
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
        x = GaussianDiffusion().add_noise(x0, t, noise)
        return x.to(device, DTYPES[dtype_name]), t.to(device), torch.tensor(labels[:DIGITS_BATCH], device=device)

    return Case(DIGITS, trained.config, DIGITS_BATCH, dtype_name, device, trained.state_dict, inputs)


def available_rivals(wanted: Sequence[str], device: torch.device) -> tuple[list[str], list[str]]:
    """The rivals that can run here, on CUDA each also under a CUDA graph; and a note for each that cannot."""
    names, notes = list(dict.fromkeys(wanted)), []
    compiler = os.environ.get("CXX", "g++")
    if "compile" in names and device.type == "cpu" and not shutil.which(compiler):
        names.remove("compile")
        notes.append(f"compile: skipped, torch.compile needs a C++ compiler on CPU and {compiler!r} is not installed")
    if device.type == "cuda":
        names += [f"{name}+graph" for name in names]
    return names, notes


def _loaded(model: Model, case: Case, dtype: torch.dtype | None = None) -> Model:
    """With the case's weights as rounded to its dtype, computing in that dtype or another."""
    model.load_state_dict({name: weight.to(case.dtype) for name, weight in case.weights().items()})
    return model.eval().to(case.device, case.dtype if dtype is None else dtype)


def _under_cuda_graph(model: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> Callable[..., Tensor]:
    """The model captured once on fixed inputs; a call copies its arguments in and replays."""
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        for _ in range(3):
            model(*inputs)
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = model(*inputs)

    def replay(*arguments: Tensor) -> Tensor:
        for buffer, argument in zip(inputs, arguments, strict=True):
            buffer.copy_(argument)
        graph.replay()
        return output

    return replay
