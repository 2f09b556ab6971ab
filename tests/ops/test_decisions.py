"""Which route an op takes on CUDA: forced, else measured, else predicted, else the default. No CUDA device is asked."""

from __future__ import annotations

import importlib
import timeit
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ditfast
from ditfast import ops
from ditfast.flops import DEVICES
from ditfast.ops import decisions, dispatch, routes
from ditfast.ops.decisions import Evidence
from ditfast.ops.dispatch import choose
from ditfast.problem import SIZES, Problem
from ditfast.tuning import record
from ditfast.tuning.record import Entry

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GELU = Problem("linear_gelu", torch.bfloat16, 2048, (4608, 1152))
LINEAR = Problem("linear", torch.bfloat16, 2048, (3456, 1152))
ATTENTION = Problem("attention", torch.bfloat16, 2048, (256, 16, 72))

Know = Callable[[Mapping[Problem, Entry], Mapping[str, float | None]], None]


@pytest.fixture
def know(monkeypatch: pytest.MonkeyPatch) -> Iterator[Know]:
    """Makes a record and predictions those of every CUDA device."""

    def know(entries: Mapping[Problem, Entry], predicted: Mapping[str, float | None]) -> None:
        decisions.decide.cache_clear()
        monkeypatch.setattr(decisions, "evidence", lambda device: Evidence(entries, lambda _, route: predicted.get(route)))

    decisions.forget()
    yield know
    decisions.decide.cache_clear()


def test_the_order_of_authority(know: Know) -> None:
    know({}, {})
    assert choose(CUDA, GELU) == ("triton", "the default on CUDA")
    know({}, {"torch": 0.055, "cublaslt": 0.041, "triton": 0.05})
    assert choose(CUDA, GELU) == ("cublaslt", "predicted 41 us, torch 55 us, triton 50 us; not measured")
    know({GELU: Entry({"torch": 0.06, "cublaslt": 0.07, "triton": 0.05})}, {"torch": 0.055, "cublaslt": 0.041, "triton": 0.05})
    assert choose(CUDA, GELU) == ("triton", "measured 50 us, torch 60 us, cublaslt 70 us")
    with ditfast.backend("torch"):
        assert choose(CUDA, GELU) == ("torch", "forced by ditfast.backend")
    assert choose(CPU, GELU)[0] == "torch"


def test_predictions_that_are_alike_keep_the_default(know: Know) -> None:
    know({}, {"torch": 0.05, "triton": 0.048})
    assert choose(CUDA, LINEAR).route == "torch"
    assert choose(CUDA, LINEAR).why.endswith("predicted alike, 50 us, triton 48 us; not measured")
    assert choose(CUDA, GELU).route == "triton"
    know({}, {"torch": 0.05, "triton": 0.04})
    assert choose(CUDA, LINEAR).route == "triton"


@pytest.mark.parametrize("predicted", [{"torch": 0.04}, {"triton": None, "torch": 0.01}, {"cublaslt": 0.01}])
def test_a_default_without_a_prediction_stays(know: Know, predicted: dict[str, float | None]) -> None:
    know({}, predicted)
    assert choose(CUDA, GELU) == ("triton", "the default on CUDA")


def test_a_loser_is_switched_off(know: Know) -> None:
    know({GELU: Entry({"torch": 0.04, "triton": 0.041}, {"cublaslt": "RuntimeError: no algorithm"})}, {})
    assert choose(CUDA, GELU) == ("torch", "measured 40 us, triton 41 us; cublaslt excluded: RuntimeError: no algorithm")
    know({GELU: Entry({"torch": 0.04, "triton": 0.04})}, {})
    assert choose(CUDA, GELU).route == "torch"


def test_a_measured_winner_that_is_gone_leaves_the_next(know: Know, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Entry({"sdpa": 0.05, "flash": 0.03, "triton": 0.06})
    monkeypatch.setattr(routes, "WHY_NO_FLASH", "")
    know({ATTENTION: entry}, {})
    assert choose(CUDA, ATTENTION).route == "flash"
    monkeypatch.setattr(routes, "WHY_NO_FLASH", "flash-attn is not installed")
    know({ATTENTION: entry}, {})
    assert choose(CUDA, ATTENTION) == ("sdpa", "measured 50 us, triton 60 us")


def test_cublaslt_is_for_inference_on_cuda(know: Know) -> None:
    know({}, {"torch": 0.05, "cublaslt": 0.01, "triton": 0.05})
    assert choose(CUDA, GELU).route == "cublaslt"
    assert choose(CUDA, GELU._replace(training=True)).route == "torch"
    assert routes.why_not("cublaslt", CPU, GELU)


@pytest.mark.parametrize("rows", [1025, 1500, 2048])
def test_a_record_serves_a_bucket_of_rows(know: Know, rows: int) -> None:
    know({GELU: Entry({"torch": 0.04, "triton": 0.05})}, {})
    assert choose(CUDA, GELU._replace(rows=rows)).route == "torch"
    assert choose(CUDA, GELU._replace(rows=1024)).route == "triton"
    assert choose(CUDA, GELU._replace(rows=rows, training=True)).why == routes.TORCH_FOR_GRADIENTS["linear_gelu"]


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 255, 256, 257, 2**31 + 1])
def test_a_bucket_is_the_next_power_of_two(rows: int) -> None:
    bucket = GELU._replace(rows=rows).bucket().rows
    assert bucket == 1 << max(rows - 1, 0).bit_length()


@pytest.mark.parametrize("op", SIZES)
def test_every_op_has_a_choice(op: str) -> None:
    for training in (False, True):
        choice = choose(CUDA, Problem(op, torch.bfloat16, 512, (64,) * len(SIZES[op]), training))
        assert choice.route in routes.ROUTES[op]
        assert choice.why


def test_ops_say_what_they_are_asked() -> None:
    x, weight, bias = torch.randn(3, 8, 32), torch.randn(16, 32), torch.randn(16, requires_grad=True)
    seen: list[Problem] = []
    with dispatch.watching(seen.append):
        ops.linear(x, weight, bias)
        ops.attention(torch.randn(2, 8, 3, 4, 16))
    ops.linear(x, weight, bias)
    expected = Problem("linear", torch.float32, 24, (16, 32), True), Problem("attention", torch.float32, 16, (8, 4, 16))
    assert tuple(seen) == expected


def test_a_compiled_graph_of_any_batch_is_traced_again_for_another_bucket_only(know: Know) -> None:
    """As on CUDA, down a route that the CPU has."""
    know({GELU._replace(rows=2**n, sizes=(8, 16), dtype=torch.float32): Entry({"torch": 1.0}) for n in range(20)}, {})
    graphs: list[object] = []

    def count(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    def op(x: Tensor) -> Tensor:
        rows = x.shape[0] * x.shape[1]
        route = choose(CUDA, Problem("linear_gelu", x.dtype, rows, (8, 16))).route
        return x + 1 if route == "torch" else x - 1

    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend=count)
    for batch in (33, 40, 64, 50, 63):
        assert torch.equal(compiled(torch.zeros(batch, 4, 16)), torch.ones(batch, 4, 16))
    assert len(graphs) == 1
    compiled(torch.zeros(65, 4, 16))
    assert len(graphs) == 2


def test_choosing_again_costs_microseconds(know: Know) -> None:
    know({}, {"torch": 0.05, "cublaslt": 0.01, "triton": 0.05})

    def asked() -> None:
        choose(CUDA, Problem("linear_gelu", torch.bfloat16, 2048, (4608, 1152)))

    asked()
    assert min(timeit.repeat(asked, number=1000, repeat=5)) / 1000 < 20e-6  # about 1.5 us; a shared machine may be slow


def test_a_device_s_record_and_predictions_are_its_evidence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the first choice on CUDA does, for a device that is not here."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("DITFAST_TUNING", raising=False)
    name, entries = "NVIDIA H100 80GB HBM3", {LINEAR: Entry({"torch": 0.04, "triton": 0.03})}
    known = decisions.evidence_of(name, DEVICES["H100"])
    assert not known.entries
    assert known.predict(LINEAR, "torch")
    path = record.path_of(name)
    assert path is not None
    record.save(path, record.versions_of(name), entries)
    assert decisions.evidence_of(name, None).entries == entries
    assert decisions.evidence_of(name, None).predict(LINEAR, "torch") is None
    assert not decisions.evidence_of("NVIDIA H200", None).entries


@pytest.mark.skipif(not routes.HAS_TRITON, reason="needs triton")
def test_a_record_s_tiles_reach_the_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = {("linear", "sm_90", torch.bfloat16, 2048, (3456, 1152)): (128, 256, 64, 8, 4)}
    monkeypatch.setattr(decisions, "evidence", lambda device: Evidence({LINEAR: Entry({"triton": 0.03}, {}, tiles)}))
    decisions.use_tiles.cache_clear()
    kernels = dispatch.kernels()
    decisions.use_tiles(CUDA)
    assert tiles == kernels.tuned.TILES
    x, weight = (torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((1, 2048, 1152), (3456, 1152)))
    with importlib.import_module("ditfast.kernels.ahead").compiling_for("sm_90") as builds:
        kernels.linear(x, weight, weight[:, 0])
    assert (builds[0].constants["BLOCK_N"], builds[0].options["num_stages"]) == (256, 4)
    monkeypatch.undo()
    decisions.forget()
    assert not kernels.tuned.TILES
