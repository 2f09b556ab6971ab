"""Compiling a model's kernels where there is no GPU: nothing that a launch asks for is missing."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import support
import torch
from support import WHERE, raises_naming
from torch import Tensor

if WHERE == "interpreter":
    pytest.skip("kernels were jitted for the interpreter, which compiles nothing", allow_module_level=True)

import triton

from ditfast import DiT, DiTConfig, cli
from ditfast.ahead import launches
from ditfast.diffusion import FlowMatching, GaussianDiffusion, steps
from ditfast.dispatch.backends import has_triton
from ditfast.dispatch.launchers import triton_kernels
from ditfast.sampling import sample

ARCH = "sm_80"
ON_SIMULATOR = pytest.mark.skipif(WHERE != "simulator", reason="counts compilations on the simulator")
pytestmark = pytest.mark.usefixtures("one_thread")


def small(**fields: Any) -> DiTConfig:
    return DiTConfig(**{"depth": 2, "hidden_size": 144, "num_heads": 2, "input_size": (8, 12), "num_classes": 7, **fields})


loaded: list[dict[int, Any]] = []  # which Triton would unload with whatever driver is there when nobody holds them


@dataclass
class Asked:
    """What launches ask Triton's compiler for."""

    sources: dict[str, str] = field(default_factory=dict)  # hashes of kernels, and of their sources
    compiled: list[str] = field(default_factory=list)  # names of those that were not in Triton's cache

    def listen(self, *, src: Any, metadata: dict[str, Any], cache_hit: bool, **_: object) -> None:
        self.sources[metadata["hash"]] = src.hash()
        if not cache_hit:
            self.compiled.append(src.name)


@contextlib.contextmanager
def launched() -> Iterator[Asked]:
    """On the simulator, as if no kernel had been launched before."""
    asked, knobs = Asked(), triton.knobs.compilation
    before, knobs.listener = knobs.listener, asked.listen
    try:
        with support.Runner.open(ARCH, checks=False):
            for kernel in {id(value): value for value in jitted()}.values():
                loaded.append(kernel.device_caches.copy())
                kernel.device_caches.clear()
            yield asked
    finally:
        knobs.listener = before


def jitted() -> Iterator[Any]:
    for name, module in list(sys.modules.items()):
        if name.startswith("ditfast.kernels."):
            yield from (value for value in vars(module).values() if isinstance(value, triton.JITFunction))


def built(config: DiTConfig, batch: int, asked: Asked) -> set[str]:
    """Hashes of those builds whose source was asked for: compiling the others would only take the test's time."""
    builds = launches(config, ARCH, [batch], torch.bfloat16, training=True)
    return {build.compiled.hash for build in builds if build.source.hash() in asked.sources.values()}


def forwards(model: DiT, batch: int, autocast: torch.dtype | None) -> None:
    """Times that are numbers of steps, a guided forward, three steps of two solvers from a table, and one without."""
    x, t, y = inputs(model, 2 * batch)
    with torch.inference_mode(), torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        model(x[:batch], t[:batch].long(), y[:batch])
        guided = model.config.class_dropout_prob > 0
        if guided:
            model.forward_with_cfg(x, t, y, cfg_scale=2.0)
        ddpm = steps(GaussianDiffusion("3", learn_sigma=model.config.learn_sigma), "ddpm")
        sample(model, ddpm, y[:batch], cfg_scale=2.0 if guided else 1.0)
        sample(model, steps(FlowMatching(num_steps=2), "heun"), y[:batch], clip=True)
        sample(model, steps(GaussianDiffusion("1", learn_sigma=model.config.learn_sigma), "ddim"), y[:batch], table_bytes=0)


def inputs(model: DiT, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(batch, *model.config.input_shape, dtype=model.pos_embed.dtype)
    return x, torch.rand(batch) * 999, torch.randint(model.config.num_classes, (batch,))


def step(model: DiT, batch: int, autocast: torch.dtype | None) -> None:
    x, t, y = inputs(model, batch)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        out = model(x, t, y)
    out.float().square().mean().backward()


# ------------------------------------------------------------------------------------------------ nothing is missing
BF16, FP32 = torch.bfloat16, torch.float32
CASES = [
    pytest.param({}, 3, BF16, id="adaln_zero"),
    pytest.param({}, 3, FP32, id="autocast"),
    pytest.param({"conditioning": "cross_attention"}, 3, BF16, id="cross_attention"),
    pytest.param({"conditioning": "in_context"}, 3, BF16, id="in_context", marks=pytest.mark.slow),
    pytest.param({"conditioning": "adaln"}, 3, BF16, id="adaln", marks=pytest.mark.slow),
    pytest.param({"hidden_size": 36, "depth": 3}, 3, BF16, id="unaligned vectors"),
    pytest.param({"learn_sigma": False, "class_dropout_prob": 0.0, "input_size": 4}, 1, BF16, id="one image"),
]


@ON_SIMULATOR
@pytest.mark.parametrize(("fields", "batch", "weights"), CASES)
def test_every_kernel_launched_was_compiled(fields: dict[str, Any], batch: int, weights: torch.dtype) -> None:
    config, autocast = small(**fields), torch.bfloat16 if weights == FP32 else None
    model = DiT(config).to(weights)
    with launched() as asked:
        forwards(model.eval(), batch, autocast)
        step(model.train(), batch, autocast)
    assert len(asked.sources) > 20
    assert set(asked.sources) == built(config, batch, asked)


def test_recomputed_blocks_launch_nothing_new(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = {build.key for build in launches(small(), ARCH, [3], torch.bfloat16, training=True)}
    monkeypatch.setattr(DiT, "checkpoint_activations", True)
    assert {build.key for build in launches(small(), ARCH, [3], torch.bfloat16, training=True)} == plain


@ON_SIMULATOR
@pytest.mark.slow
def test_dit_s2_compiles_nothing_after_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into an empty cache: a forward, guided and sampled, and a training step, batch 2."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    model = DiT(DiTConfig.from_name("DiT-S/2")).bfloat16()
    assert cli.main(["compile", "--arch", ARCH, "--model", "DiT-S/2", "--batch", "2"]) == 0
    x, t, y = inputs(model, 2)
    with torch.inference_mode(), launched() as asked:
        model.eval()(x, t, y)
    assert len(asked.sources) == 8
    assert asked.compiled == []
    with launched() as asked:
        step(model.train(), 2, None)
    assert asked.compiled
    for folder in tmp_path.iterdir():
        shutil.rmtree(folder)
    assert cli.main(["compile", "--arch", ARCH, "--model", "DiT-S/2", "--batch", "2", "--training"]) == 0
    with launched() as asked:
        step(model.train(), 2, None)
    assert len(asked.sources) > 15
    assert asked.compiled == []


# ------------------------------------------------------------------------------------------------ the command
ARGUMENTS = ["compile", "--arch", ARCH, "--model", "digits", "--batch", "2"]


@pytest.fixture
def three_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of all that there are, into an empty cache."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("ditfast.commands.compile.launches", lambda *arguments: launches(*arguments)[:3])


@pytest.mark.usefixtures("three_kernels")
def test_compiles_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(ARGUMENTS) == 0
    first = capsys.readouterr().out
    assert f"3 compiled, 0 already there, in {tmp_path}" in first
    assert {"sm_80", "timestep_embedding", "patch_embed"} <= set(first.split())
    assert len(list(tmp_path.glob("*/*.cubin"))) == 3
    assert cli.main([*ARGUMENTS, "--jobs", "1"]) == 0
    assert f"0 compiled, 3 already there, in {tmp_path}" in capsys.readouterr().out


@pytest.mark.usefixtures("three_kernels")
def test_what_does_not_compile_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(source: Any, **_: object) -> None:
        raise RuntimeError("ptxas died")

    monkeypatch.setattr(triton, "compile", fail)
    assert cli.main(ARGUMENTS) == 1
    out, err = capsys.readouterr()
    assert "0 compiled, 0 already there, 3 FAILED" in out
    kernels = "timestep_embedding for sm_80, grouped_linear for sm_80 and patch_embed for sm_80"
    assert err == f"ditfast compile: {kernels}: RuntimeError: ptxas died\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "sm_70", "--model", "digits"], "arch: got 'sm_70', expected one of sm_80, sm_86, "),
        (["--arch", "sm_80", "--model", "DiT-S/2", "--image-size", "100"], "image_size: got 100, expected multiples of 8"),
        (["--arch", "sm_80", "--model", "DiT-M/2"], "argument --model: invalid choice: 'DiT-M/2' (choose from "),
        (["--arch", "sm_80", "--model", "digits", "--batch", "0"], "argument --batch: got '0', expected a positive integer"),
        (["--model", "digits"], "the following arguments are required: --arch"),
    ],
    ids=["arch", "image size", "model", "batch", "no arch"],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    status: object
    try:
        status = cli.main(["compile", *arguments])
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_under_the_interpreter(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert cli.main(ARGUMENTS) == 2
    assert "cannot be compiled under TRITON_INTERPRET=1" in capsys.readouterr().err


def test_without_triton(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    has_triton.cache_clear()
    triton_kernels.cache_clear()
    try:
        assert cli.main(ARGUMENTS) == 2
    finally:
        has_triton.cache_clear()
    assert "needs the package triton, which is not installed" in capsys.readouterr().err


def test_bad_batches() -> None:
    raises_naming("batch", partial(launches, small(), ARCH, [2, 0], torch.bfloat16, training=False))
