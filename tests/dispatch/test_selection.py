"""Backend selection on CUDA: forced, else measured, else the default. No CUDA device is asked."""

from __future__ import annotations

import importlib
import sys
import timeit
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ditfast
from ditfast import ops
from ditfast.dispatch import backends, selection, tuning_cache
from ditfast.dispatch.launchers import triton_kernels
from ditfast.dispatch.selection import choose
from ditfast.dispatch.shapes import SIZES, OpShape
from ditfast.dispatch.tuning_cache import Entry
from ditfast.tuning.save import save

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GELU = OpShape("linear_gelu", torch.bfloat16, 2048, (4608, 1152))
LINEAR = OpShape("linear", torch.bfloat16, 2048, (3456, 1152))
ATTENTION = OpShape("attention", torch.bfloat16, 2048, (256, 16, 72))

Know = Callable[[Mapping[OpShape, Entry]], None]


@pytest.fixture
def know(monkeypatch: pytest.MonkeyPatch) -> Iterator[Know]:
    """Make a tuning cache that of every CUDA device."""

    def know(entries: Mapping[OpShape, Entry]) -> None:
        selection.select.cache_clear()
        monkeypatch.setattr(selection, "measured", lambda device: entries)

    selection.forget()
    yield know
    selection.select.cache_clear()


def test_an_override_beats_a_measurement_beats_the_default(know: Know) -> None:
    know({})
    assert choose(CUDA, GELU) == ("triton", "the default on CUDA")
    know({GELU: Entry({"torch": 0.06, "cublaslt": 0.07, "triton": 0.05})})
    assert choose(CUDA, GELU) == ("triton", "measured 50 us, torch 60 us, cublaslt 70 us")
    with ditfast.backend("torch"):
        assert choose(CUDA, GELU) == ("torch", "forced by ditfast.backend")
    assert choose(CPU, GELU)[0] == "torch"


def test_a_loser_is_switched_off(know: Know) -> None:
    know({GELU: Entry({"torch": 0.04, "triton": 0.041}, {"cublaslt": "RuntimeError: no algorithm"})})
    assert choose(CUDA, GELU) == ("torch", "measured 40 us, triton 41 us; cublaslt excluded: RuntimeError: no algorithm")
    know({GELU: Entry({"torch": 0.04, "triton": 0.04})})
    assert choose(CUDA, GELU).backend == "torch"


def test_a_measured_winner_that_is_gone_leaves_the_next(know: Know, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Entry({"sdpa": 0.05, "flash": 0.03, "triton": 0.06})
    monkeypatch.setattr(backends, "WHY_NO_FLASH", "")
    know({ATTENTION: entry})
    assert choose(CUDA, ATTENTION).backend == "flash"
    monkeypatch.setattr(backends, "WHY_NO_FLASH", "flash-attn is not installed")
    know({ATTENTION: entry})
    assert choose(CUDA, ATTENTION) == ("sdpa", "measured 50 us, triton 60 us")


def test_cublaslt_is_for_inference_on_cuda(know: Know) -> None:
    entry = Entry({"torch": 0.05, "cublaslt": 0.01, "triton": 0.05})
    know({GELU: entry, GELU._replace(training=True): entry})
    assert choose(CUDA, GELU).backend == "cublaslt"
    assert choose(CUDA, GELU._replace(training=True)).backend == "torch"
    assert backends.why_not("cublaslt", CPU, GELU)


@pytest.mark.parametrize("rows", [1025, 1500, 2048])
def test_a_measurement_serves_a_bucket_of_rows(know: Know, rows: int) -> None:
    know({GELU: Entry({"torch": 0.04, "triton": 0.05})})
    assert choose(CUDA, GELU._replace(rows=rows)).backend == "torch"
    assert choose(CUDA, GELU._replace(rows=1024)).backend == "triton"
    assert choose(CUDA, GELU._replace(rows=rows, training=True)).why == backends.GRADIENTS


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 255, 256, 257, 2**31 + 1])
def test_a_bucket_is_the_next_power_of_two(rows: int) -> None:
    bucket = GELU._replace(rows=rows).bucket().rows
    assert bucket == 1 << max(rows - 1, 0).bit_length()


@pytest.mark.parametrize("op", SIZES)
def test_every_op_has_a_choice(op: str) -> None:
    for training in (False, True):
        choice = choose(CUDA, OpShape(op, torch.bfloat16, 512, (64,) * len(SIZES[op]), training))
        assert choice.backend in backends.BACKENDS[op]
        assert choice.why


def test_the_tables_have_every_op() -> None:
    assert set(backends.DEFAULTS) == set(backends.BACKENDS) == set(SIZES)


@pytest.mark.parametrize("device", [CPU, CUDA], ids=["cpu", "cuda"])
def test_an_op_without_a_row_in_the_tables_is_named_with_those_that_have_one(device: torch.device) -> None:
    shape = OpShape("rms_norm_modulate", torch.bfloat16, 256, (256, 1152))
    message = "op: got 'rms_norm_modulate', expected one of layer_norm_modulate, gated_residual, "
    for call in (lambda: choose(device, shape), shape.bucket, lambda: backends.default(device, shape)):
        with pytest.raises(ValueError, match=f"^{message}"):
            call()


def test_a_shape_of_too_few_sizes_is_named_with_those_of_its_op() -> None:
    with pytest.raises(ValueError, match=r"^sizes: got \(256,\) of layer_norm_modulate, expected T, D$"):
        choose(CUDA, OpShape("layer_norm_modulate", torch.bfloat16, 256, (256,)))


def test_ops_say_what_they_are_asked() -> None:
    x, weight, bias = torch.randn(3, 8, 32), torch.randn(16, 32), torch.randn(16, requires_grad=True)
    seen: list[OpShape] = []
    with selection.record_calls(seen.append):
        ops.linear(x, weight, bias)
        ops.attention(torch.randn(2, 8, 3, 4, 16))
    ops.linear(x, weight, bias)
    expected = OpShape("linear", torch.float32, 24, (16, 32), True), OpShape("attention", torch.float32, 16, (8, 4, 16))
    assert tuple(seen) == expected


def test_a_compiled_graph_of_any_batch_is_traced_again_for_another_bucket_only(know: Know) -> None:
    """As on CUDA, on a backend that the CPU has."""
    know({GELU._replace(rows=2**n, sizes=(8, 16), dtype=torch.float32): Entry({"torch": 1.0}) for n in range(20)})
    graphs: list[object] = []

    def count(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    def op(x: Tensor) -> Tensor:
        rows = x.shape[0] * x.shape[1]
        backend = choose(CUDA, OpShape("linear_gelu", x.dtype, rows, (8, 16))).backend
        return x + 1 if backend == "torch" else x - 1

    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend=count)
    for batch in (33, 40, 64, 50, 63):
        assert torch.equal(compiled(torch.zeros(batch, 4, 16)), torch.ones(batch, 4, 16))
    assert len(graphs) == 1
    compiled(torch.zeros(65, 4, 16))
    assert len(graphs) == 2


def test_choosing_again_costs_microseconds(know: Know) -> None:
    know({GELU: Entry({"torch": 0.05, "cublaslt": 0.01, "triton": 0.05})})

    def asked() -> None:
        choose(CUDA, OpShape("linear_gelu", torch.bfloat16, 2048, (4608, 1152)))

    asked()
    assert min(timeit.repeat(asked, number=1000, repeat=5)) / 1000 < 20e-6  # about 1.5 us; a shared machine may be slow


def test_a_device_s_tuning_cache_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Select a backend for the first time on CUDA, for a device that is not here."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("DITFAST_TUNING", raising=False)
    name, entries = "NVIDIA H100 80GB HBM3", {LINEAR: Entry({"torch": 0.04, "triton": 0.03})}
    assert not tuning_cache.of_device(name)
    path = tuning_cache.path_of(name)
    assert path is not None
    save(path, tuning_cache.versions_of(name), entries)
    assert tuning_cache.of_device(name) == entries
    assert not tuning_cache.of_device("NVIDIA H200")


@pytest.mark.skipif(not backends.HAS_TRITON, reason="needs triton")
def test_measured_configs_reach_the_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = {("linear", "sm_90", torch.bfloat16, 2048, (3456, 1152)): (128, 256, 64, 8, 4)}
    monkeypatch.setattr(selection, "measured", lambda device: {LINEAR: Entry({"triton": 0.03}, {}, configs)})
    selection.use_measured_configs.cache_clear()
    kernels = triton_kernels()
    selection.use_measured_configs(CUDA)
    assert configs == kernels.tiles.TILES
    x, weight = (torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((1, 2048, 1152), (3456, 1152)))
    with importlib.import_module("ditfast.kernels.ahead").compiling_for("sm_90") as builds:
        kernels.linear(x, weight, weight[:, 0])
    assert (builds[0].constants["BLOCK_N"], builds[0].options["num_stages"]) == (256, 4)
    monkeypatch.undo()
    selection.forget()
    assert not kernels.tiles.TILES


def test_old_names_of_modules_warn_for_one_release() -> None:
    for old in ("ditfast.problem", "ditfast.ops.dispatch"):
        sys.modules.pop(old, None)
        with pytest.warns(DeprecationWarning, match=r"is ditfast\.dispatch"):
            importlib.import_module(old)
    with pytest.raises(ValueError, match=r"^op: got 'rms_norm', expected one of "):
        importlib.import_module("ditfast.ops.dispatch").choose(CUDA, OpShape("rms_norm", torch.bfloat16, 256, (256, 64)))
