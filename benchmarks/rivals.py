"""Cases (weights and inputs) and the rivals that run them."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import ditfast
from ditfast import DiTConfig, reference
from ditfast.checkpoints.configs import to_diffusers_config
from ditfast.checkpoints.layouts import to_diffusers
from ditfast.diffusion import GaussianDiffusion
from ditfast.digits import real_digits
from ditfast.dtypes import DTYPES
from ditfast.ops.cpu_chain import check_int8

from .gpu import Gpu, Replay
from .in_openvino import InOpenVino
from .weights import Model, load, random_weights


class Ours(NamedTuple):
    """A way to run ditfast's own model."""

    int8: bool = False
    tabulated: bool = False  # the modulation computed beforehand, as sampling does


COMPILED = {"compile": "default", "max-autotune": "max-autotune-no-cudagraphs"}  # torch.compile's modes
IN_DIFFUSERS = ("diffusers", "ditfast-swapped")  # its own model, as it is and after ditfast.accelerate
IN_OPENVINO = {"openvino": ("openvino",), "openvino-int8": ("openvino", "nncf")}  # and the packages that each needs
OURS = {
    "ditfast": Ours(),
    "ditfast+table": Ours(tabulated=True),
    "ditfast-int8": Ours(int8=True),
    "ditfast-int8+table": Ours(int8=True, tabulated=True),
}
OURS_IN_INT8 = tuple(name for name, way in OURS.items() if way.int8)
RIVALS = ("eager", *COMPILED, *IN_OPENVINO, *OURS, *IN_DIFFUSERS)
LOOSE_BAR = 0.3  # of rivals whose arithmetic is coarser by design: shown beside their error, not judged by it
GRAPH = "+graph"
DIGITS = "digits"
DIGITS_BATCH = 64

Run = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One model on one input; weights are those of its dtype, in whatever dtype a model computes."""

    model: str
    config: DiTConfig
    batch: int
    dtype_name: str
    device: torch.device
    weights: Callable[[], Mapping[str, Tensor]]
    inputs: Callable[[], tuple[Tensor, Tensor, Tensor]]

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @property
    def title(self) -> str:
        return f"{self.model} {self.dtype_name} batch {self.batch}"

    def reference(self, dtype: torch.dtype | None = None) -> reference.DiT:
        return self._loaded(reference.DiT, dtype)

    def arithmetic_of(self, rival: str) -> Case:
        """Return the case with the arithmetic of a rival, which for diffusers' model is diffusers'."""
        flavour = "diffusers" if kind_of(rival) in IN_DIFFUSERS else self.config.flavour
        return dataclasses.replace(self, config=dataclasses.replace(self.config, flavour=flavour))

    def rival(self, name: str, others: dict[str, Run], gpu: Gpu | None = None) -> Run:
        """Return a rival as a function of (x, t, y); ``NAME+graph`` captures NAME, one of ``others``, at its first call."""
        kind = kind_of(name)
        if gpu is not None and name.endswith(GRAPH):
            return Captured(others[kind], gpu)
        if kind in IN_DIFFUSERS:
            return self.arithmetic_of(kind)._in_diffusers(swapped=kind == "ditfast-swapped")
        if kind in OURS:
            return self._ours(OURS[kind])
        if kind in IN_OPENVINO:
            exact = functools.partial(self.reference, torch.float32)
            return InOpenVino(exact, self.dtype_name, self.config.num_classes, int8=kind == "openvino-int8")
        model = self.reference()
        if kind in COMPILED:
            model.compile(dynamic=False, mode=COMPILED[kind])
        return model

    def _ours(self, way: Ours) -> Run:
        model = self._loaded(ditfast.DiT)
        if way.int8:
            check_int8("rival", model.parameters())
            model.int8 = True
        if not way.tabulated:
            return model
        _, t, y = self.inputs()
        vectors = model.modulation_vectors(t, y)
        return lambda x, t, y: model.forward_modulated(x, vectors)

    def _in_diffusers(self, swapped: bool) -> Run:
        from diffusers import DiTTransformer2DModel

        with self.device:
            model = DiTTransformer2DModel.from_config(to_diffusers_config(self.config))
        weights = {name: weight.to(self.dtype) for name, weight in self.weights().items()}
        model.load_state_dict(to_diffusers(weights))
        nn.Module.to(model, self.device, self.dtype).eval()  # diffusers' own ``to`` warns of a dtype
        model.pos_embed.pos_embed.copy_(weights["pos_embed"])  # which it computes, and no state dict of it has
        if swapped:
            ditfast.accelerate(model)
        return lambda x, t, y: model(x, t, y, return_dict=False)[0]

    def _loaded(self, kind: Callable[[DiTConfig], Model], dtype: torch.dtype | None = None) -> Model:
        weights = {name: weight.to(self.dtype) for name, weight in self.weights().items()}
        on_gpu = self.device.type == "cuda"  # where each rival's memory is measured
        return load(kind, self.config, weights, self.device, copy=on_gpu).eval().to(dtype or self.dtype)


def random_case(model: str, config: DiTConfig, batch: int, device: torch.device, dtype_name: str) -> Case:
    """Return a case of random weights, all of them non-zero, and unit-variance latents."""

    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(batch, *config.input_shape, generator=generator)
        t = torch.randint(1000, (batch,), generator=generator)
        y = torch.randint(config.num_classes, (batch,), generator=generator)
        return x.to(device, DTYPES[dtype_name]), t.to(device), y.to(device)

    weights = functools.partial(random_weights, config, DTYPES[dtype_name], device)
    return Case(model, config, batch, dtype_name, device, weights, inputs)


def checkpoint_case(path: Path, batch: int, device: torch.device, dtype_name: str) -> Case:
    """Return a case of weights from a file or folder on random latents."""
    model = ditfast.load_checkpoint(path)
    random = random_case(path.name, model.config, batch, device, dtype_name)
    return dataclasses.replace(random, weights=model.state_dict)


def digits_case(dtype_name: str, device: torch.device) -> Case:
    """Return the case of the trained checkpoint on scans of real digits, at every depth of noise."""
    trained = ditfast.load_digits()

    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        images, labels = (part[:DIGITS_BATCH] for part in real_digits())
        t = torch.linspace(0, 999, DIGITS_BATCH).long()
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
        x = GaussianDiffusion().add_noise(images, t, noise)
        return x.to(device, DTYPES[dtype_name]), t.to(device), labels.to(device)

    return Case(DIGITS, trained.config, DIGITS_BATCH, dtype_name, device, trained.state_dict, inputs)


def available_rivals(wanted: Sequence[str], *, on_gpu: bool) -> tuple[list[str], list[str]]:
    """Return the rivals that can run here, on a GPU each also under a CUDA graph; and a note for each that cannot."""
    skipped: dict[str, str] = {}  # a note for each rival
    compiler = os.environ.get("CXX", "g++")
    if not on_gpu and not shutil.which(compiler):
        why = f"torch.compile needs a C++ compiler on CPU and {compiler!r} is not installed"
        skipped |= {name: f"{name}: skipped, {why}" for name in COMPILED}
    if importlib.util.find_spec("diffusers") is None:
        skipped |= dict.fromkeys(IN_DIFFUSERS, "diffusers: skipped, it is not installed (pip install diffusers)")
    for rival, packages in IN_OPENVINO.items():
        if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
            skipped[rival] = f"{rival}: skipped, it needs {' and '.join(missing)} (pip install 'ditfast[openvino]')"
    if on_gpu:
        skipped |= {name: f"{name}: skipped, it runs on CPU only" for name in (*IN_OPENVINO, *OURS_IN_INT8)}
    names = [name for name in dict.fromkeys(wanted) if name not in skipped]
    notes = list(dict.fromkeys(skipped[name] for name in wanted if name in skipped))
    if on_gpu:
        names += [f"{name}{GRAPH}" for name in names]
    return names, notes


def loose(rival: str) -> bool:
    """True if a rival is timed up to ``LOOSE_BAR``: int8, and OpenVINO, which in fp32 too misses eager's error."""
    return rival in (*IN_OPENVINO, *OURS_IN_INT8)


def kind_of(rival: str) -> str:
    """Return what runs, under a CUDA graph or not."""
    return rival.removesuffix(GRAPH)


class Captured:
    """``run`` as a CUDA graph on inputs of its own; a call copies its arguments in, replays, and returns the same output."""

    def __init__(self, run: Run, gpu: Gpu):
        self.run, self.gpu = run, gpu
        self.replay: Replay | None = None

    def __call__(self, *arguments: Tensor) -> Tensor:
        if self.replay is None:
            buffers = [argument.clone() for argument in arguments]
            self.output, self.replay = self.gpu.capture(lambda: self.run(*buffers))
            self.buffers = buffers
        for buffer, argument in zip(self.buffers, arguments, strict=True):
            buffer.copy_(argument)
        self.replay()
        return self.output
