"""`ditfast tune` without a GPU: a stub says how long calls take; Triton runs on the simulator where a test needs it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import fake_cuda
from fake_cuda.fixtures import fake_gpu
from stub_timer import StubTimer
from support import TARGETS, WHERE, Runner
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ditfast import DiTConfig, cli
from ditfast.commands import tune as command
from ditfast.dispatch import selection, tuning_cache
from ditfast.dispatch.launchers import triton_kernels
from ditfast.dispatch.override import backend
from ditfast.dispatch.selection import choose
from ditfast.dispatch.shapes import SIZES, OpShape
from ditfast.dispatch.tuning_cache import Entry
from ditfast.ops import linear_gelu
from ditfast.tuning import measure
from ditfast.tuning.collect import model_shapes
from ditfast.tuning.examples import example
from ditfast.tuning.measure import Measured, Wrong, check, measure_backends, measure_configs
from ditfast.tuning.tune import one_a_bucket, tune, work

pytestmark = pytest.mark.usefixtures("one_thread")
__all__ = ["fake_gpu"]
CPU = torch.device("cpu")
NORM = OpShape("layer_norm_modulate", torch.float32, 8, (4, 128))
LINEAR = OpShape("linear", torch.float32, 8, (16, 32))
GELU = OpShape("linear_gelu", torch.float32, 8, (16, 32))
VERSIONS = {"device": "Stub 1", "torch": "2"}
TINY = {
    "layer_norm_modulate": (4, 32),
    "gated_residual": (4, 32),
    "gated_residual_layer_norm_modulate": (4, 32),
    "linear": (16, 32),
    "grouped_linear": (2, 48, 32),
    "linear_gelu": (16, 32),
    "linear_gated_residual": (16, 32),
    "mlp": (16, 32, 32),
    "attention": (4, 2, 16),
    "cross_attention": (4, 2, 2, 16),
    "patch_embed": (32, 16),
    "final_layer": (32, 32),
    "linear_unpatchify": (32, 32),
    "unpatchify": (32,),
    "timestep_embedding": (32,),
    "classifier_free_guidance": (64,),
    "denoise_update": (64,),
}
WIDE = {  # so that vectors are small beside tensors
    "layer_norm_modulate": (256, 128),
    "gated_residual": (256, 128),
    "gated_residual_layer_norm_modulate": (256, 128),
    "attention": (256, 2, 16),
    "cross_attention": (256, 64, 2, 16),
}
WITHOUT_BACKWARD = ("final_layer", "grouped_linear", "linear_gated_residual", "timestep_embedding", "denoise_update")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    selection.forget()
    yield
    selection.forget()


def tuned(prepared: dict[OpShape, int], timer: StubTimer, budget: float = 1e9) -> tuple[list[Measured], dict[OpShape, Entry]]:
    entries: dict[OpShape, Entry] = {}
    found = tune(prepared, timer, budget, entries.update, lambda *_: None)
    return found, entries


# ------------------------------------------------------------------------------------------------ what is prepared
@pytest.mark.parametrize(
    ("op", "training"),
    [(op, False) for op in SIZES if op != "mlp"] + [(op, True) for op in SIZES if op not in WITHOUT_BACKWARD],
)
def test_every_op_has_an_example_that_of_its_shape(op: str, training: bool) -> None:
    shape = OpShape(op, torch.float32, 8, TINY[op], training)
    one = example(shape, CPU, seed=1)
    seen: list[OpShape] = []
    with selection.record_calls(seen.append):
        found = one.run()
    assert shape in seen
    assert all(tensor.isfinite().all() and not tensor.requires_grad for tensor in found)
    assert len(found) > (1 if training else 0)
    assert all(torch.equal(a, b) for a, b in zip(found, example(shape, CPU, seed=1).run(), strict=True))


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_a_model_s_shapes_are_those_of_its_forward(training: bool) -> None:
    config = DiTConfig(depth=3, hidden_size=64, num_heads=4, input_size=8)
    found = model_shapes(config, 2, torch.bfloat16, training)
    assert found[OpShape("attention", torch.bfloat16, 32, (16, 4, 16), training)] == 3
    joint = OpShape("gated_residual_layer_norm_modulate", torch.float32 if training else torch.bfloat16, 32, (16, 64), training)
    assert found[joint] == 6
    assert {shape.op for shape in found} >= ({"mlp"} if training else {"linear_gelu"})


def test_of_a_bucket_the_largest_is_measured_and_the_longest_first() -> None:
    small = [LINEAR._replace(rows=rows) for rows in (1000, 1024, 600)]
    large = LINEAR._replace(rows=4096)
    assert list(one_a_bucket([*((shape, 2) for shape in small), (large, 2)])) == [large, small[1]]


@pytest.mark.parametrize("op", SIZES)
def test_the_work_of_an_op_is_what_it_multiplies_and_moves(op: str) -> None:
    """Against torch's counter, and the tensors of a call; vectors are small beside them."""
    shape = OpShape(op, torch.float32, 4096, WIDE.get(op, TINY[op]))
    math = sdpa_kernel(SDPBackend.MATH)  # the counter does not know the CPU's flash attention
    with FakeTensorMode(), backend("torch"), math, FlopCounterMode(display=False) as counter:
        one = example(shape, torch.device("cpu"), seed=0)
        outputs = one.run()
    macs, values = work(shape)
    assert 2 * macs == counter.get_total_flops()
    assert values == pytest.approx(sum(tensor.numel() for tensor in (*one.inputs, *outputs)), rel=0.1)


# ------------------------------------------------------------------------------------------------ what is measured
def test_without_a_device_for_triton_it_is_excluded_and_named() -> None:
    found, entries = tuned({NORM: 2}, StubTimer(lambda op, backend: 1.0))
    assert found[0].ms == {"torch": 1.0}
    assert "Triton" in found[0].excluded["triton"] or "TRITON" in found[0].excluded["triton"]
    assert entries == {NORM.bucket(): found[0].entry}


@pytest.mark.skipif(WHERE == "gpu", reason="on the simulator")
def test_configs_are_tried_and_the_fastest_kept() -> None:
    def ms(op: str, backend: str) -> float:
        if backend == "torch":
            return 5.0
        return 1.0 if (4, 128, 2) in triton_kernels().tiles.TILES.values() else 4.0

    with Runner.open(TARGETS[0]):
        timer = StubTimer(ms)
        found, entries = tuned({NORM: 1}, timer)
        assert found[0].ms == {"torch": 5.0, "triton": 1.0}
        assert not found[0].excluded
        assert not found[0].notes
        ((key, tile),) = entries[NORM.bucket()].configs.items()
        assert (key[0], key[2:], tile) == ("layer_norm_modulate", (torch.float32, 8, (128,)), (4, 128, 2))
        assert len(timer.measured) == (9 if WHERE == "simulator" else 2)
        assert not triton_kernels().tiles.TILES


@pytest.mark.skipif(WHERE != "simulator", reason="counts what is asked of compiled kernels")
def test_a_step_s_kernels_are_all_tuned() -> None:
    shape = OpShape("mlp", torch.bfloat16, 16, (32, 32, 32), training=True)
    with Runner.open(TARGETS[0]):
        prepared = measure._Prepared(Measured(shape, 1), StubTimer(lambda op, backend: 1.0))
        asked = prepared.candidates()
    names = {key[0] for key in asked}
    assert names == {"linear_gelu_training", "linear", "input_gradient_through_gelu", "input_gradient", "weight_gradient"}
    assert all(len(tiles) > 1 for tiles in asked.values())


@pytest.mark.skipif(WHERE != "simulator", reason="launches compiled kernels")
def test_a_measured_config_is_launched() -> None:
    import ptxsim

    one = example(NORM, CPU, seed=0)
    with Runner.open(TARGETS[0]):
        tiles = triton_kernels().tiles
        with tiles.asking() as asked:
            expected = one.run()[0]
        (key,) = asked
        grids = []
        for tile in (None, (2, 128, 1)):
            with tiles.trying({} if tile is None else {key: tile}), ptxsim.record() as recorded:
                assert torch.equal(one.run()[0], expected)
            grids.append(recorded["layer_norm_modulate_kernel"].grid[0])
    assert grids == [1, 4]


def test_a_wrong_backend_is_excluded_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU the library's epilogue computes the other GELU, and one row in eight may be wrong."""

    def wrong(bias: Tensor, x: Tensor, weight: Tensor, use_gelu: bool) -> Tensor:
        out = torch.nn.functional.gelu(torch.addmm(bias, x, weight), approximate="tanh")
        out[3] += 1
        return out

    monkeypatch.setattr(measure, "why_not", lambda name, *_: "" if name != "triton" else "not here")
    found = Measured(GELU, 1)
    measure_backends(found, StubTimer(lambda op, backend: 1.0))
    assert "result 0 is off by" in found.excluded["cublaslt"]  # the erf form
    monkeypatch.setattr(linear_gelu_module().torch, "_addmm_activation", wrong)
    found = Measured(GELU, 1)
    measure_backends(found, StubTimer(lambda op, backend: 1.0))
    assert found.ms == {"torch": 1.0}
    assert "result 0 is off by" in found.excluded["cublaslt"]


def linear_gelu_module() -> Any:
    import sys

    return sys.modules[linear_gelu.__module__]


@pytest.mark.parametrize(
    ("found", "why"),
    [
        pytest.param(torch.ones(4, 8, 1), "is .4, 8, 1. torch.float32", id="shape"),
        pytest.param(torch.ones(4, 8).half(), "torch.float16, plain torch's", id="dtype"),
        pytest.param(torch.full((4, 8), torch.nan), "off by nan", id="nan"),
        pytest.param(torch.ones(4, 8) * torch.tensor([1.0, 1.0, 1.0, 1.001])[:, None], "off by 1.0e-03", id="one row"),
    ],
)
def test_what_counts_as_wrong(found: Tensor, why: str) -> None:
    check([torch.ones(4, 8) + 1e-6], [torch.ones(4, 8)], torch.float32)
    with pytest.raises(Wrong, match=why):
        check([found], [torch.ones(4, 8)], torch.float32)


def test_a_shape_that_memory_does_not_hold_is_skipped() -> None:
    def ms(op: str, backend: str) -> float:
        if op == "linear":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1.0

    found, entries = tuned({LINEAR: 1, NORM: 1}, StubTimer(ms))
    assert found[0].notes == ["skipped: the device has too little memory"]
    assert set(entries) == {NORM.bucket()}


def test_memory_that_ends_at_the_second_backend_skips_the_shape_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def ms(op: str, backend: str) -> float:
        if backend == "cublaslt":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1.0

    monkeypatch.setattr(measure, "why_not", lambda name, *_: "" if name != "triton" else "not here")
    monkeypatch.setattr(measure, "check", lambda *_: None)
    found, entries = tuned({GELU: 1}, StubTimer(ms))
    assert found[0].notes == ["skipped: the device has too little memory"]
    assert not entries


def test_a_shape_that_plain_torch_cannot_do_is_skipped() -> None:
    def ms(op: str, backend: str) -> float:
        raise RuntimeError("device-side assert\nand more")

    found, entries = tuned({LINEAR: 1}, StubTimer(ms))
    assert found[0].notes == ["skipped: plain torch failed: RuntimeError: device-side assert"]
    assert not entries


def test_a_short_budget_measures_what_comes_first() -> None:
    timer = StubTimer(lambda op, backend: 1.0, takes=10.0)
    found, entries = tuned({LINEAR: 1, NORM: 1}, timer, budget=5.0)
    assert timer.measured == [("linear", "torch")]
    assert found[1].notes == ["skipped: the budget is spent"]
    assert set(entries) == {LINEAR.bucket()}


def test_compiling_leaves_half_of_a_short_budget_to_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = StubTimer(lambda op, backend: 1.0)

    def compile_for_long(problems: object, device: object, every: bool, in_time: Callable[[], bool], told: object) -> None:
        while in_time():
            timer.now += 1

    monkeypatch.setattr("ditfast.tuning.tune.compile_kernels", compile_for_long)
    found, _ = tuned({LINEAR: 1}, timer, budget=8.0)
    assert found[0].ms
    assert timer.measured


@pytest.mark.skipif(WHERE != "simulator", reason="compiles configs")
def test_no_tile_is_begun_when_the_budget_is_spent() -> None:
    with Runner.open(TARGETS[0]):
        timer = StubTimer(lambda op, backend: 1.0)
        tuned({NORM: 1}, timer, budget=3.5)
    assert timer.measured == [("layer_norm_modulate", "torch"), *[("layer_norm_modulate", "triton")] * 3]


@pytest.mark.skipif(WHERE != "simulator", reason="compiles configs")
def test_a_tile_that_raises_is_named_and_not_kept() -> None:
    found = Measured(NORM, 1, ms={"torch": 1.0, "triton": 1.0})

    def ms(op: str, backend: str) -> float:
        if (2, 128, 1) in triton_kernels().tiles.TILES.values():
            raise RuntimeError("out of resource: registers")
        return 2.0

    with Runner.open(TARGETS[0]):
        measure_configs(found, StubTimer(ms), lambda: len(found.notes) == 0)
    assert found.notes == ["layer_norm_modulate in config 2x128x1 excluded: RuntimeError: out of resource: registers"]
    assert not found.configs


def test_measured_times_decide_and_torch_is_never_beaten_by_hope(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "why_not", lambda name, *_: "" if name != "triton" else "not here")
    monkeypatch.setattr(measure, "check", lambda *_: None)
    _, entries = tuned({GELU: 1}, StubTimer(lambda op, backend: {"torch": 1.0, "cublaslt": 1.5}[backend]))
    monkeypatch.setattr(selection, "measured", lambda device: entries)
    assert choose(torch.device("cuda"), GELU) == ("torch", "measured 1e+03 us, cublaslt 1.5e+03 us")


# ------------------------------------------------------------------------------------------------ the command
def arguments(*given: str) -> argparse.Namespace:
    return cli._parser().parse_args(["tune", *given])


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("DITFAST_TUNING", str(tmp_path / "cache.json"))
    return tmp_path / "cache.json"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    config = DiTConfig(depth=2, hidden_size=64, num_heads=4, input_size=8)
    monkeypatch.setattr(command.DiTConfig, "from_name", lambda *_, **__: config)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("training", [(), ("--training",)], ids=["inference", "training"])
def test_the_command(path: Path, training: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    args = arguments("--batch", "1", "2", "--dtype", "fp32", *training)
    assert command.measure(args, StubTimer(lambda op, backend: 0.002 if backend == "triton" else 0.004), VERSIONS) == 0
    out = capsys.readouterr().out
    written = json.loads(path.read_text("utf-8"))
    assert written["versions"] == VERSIONS
    assert {entry["rows"] for entry in written["entries"] if entry["op"] == "attention"} == {16, 32}
    assert "triton excluded: " in out
    assert "shapes are in" in out
    assert tuning_cache.load(path, VERSIONS)


@pytest.mark.usefixtures("small")
def test_interrupted_it_keeps_what_it_has(path: Path) -> None:
    def ms(op: str, backend: str) -> float:
        if op == "attention":
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt, match=rf"^[1-9]\d* of \d+ shapes are in {path}$") as stopped:
        command.measure(arguments("--batch", "1", "--dtype", "fp32"), StubTimer(ms), VERSIONS)
    assert int(str(stopped.value).split()[0]) == len(tuning_cache.load(path, VERSIONS))


@pytest.mark.usefixtures("small")
def test_a_folder_that_cannot_be_written_ends_it(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.mkdir()
    assert command.measure(arguments("--batch", "1"), StubTimer(lambda op, backend: 1.0), VERSIONS) == 1
    assert str(path) in capsys.readouterr().err


def test_without_a_place_for_the_cache(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DITFAST_TUNING", "off")
    assert command.measure(arguments(), StubTimer(lambda op, backend: 1.0), VERSIONS) == 2
    assert "DITFAST_TUNING=off" in capsys.readouterr().err


def test_an_image_size_that_is_none(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.measure(arguments("--image-size", "100"), StubTimer(lambda op, backend: 1.0), VERSIONS) == 2
    assert "image_size: got 100" in capsys.readouterr().err


@pytest.mark.skipif(WHERE == "gpu", reason="there is a GPU")
def test_without_a_gpu_it_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune"]) == 2
    assert capsys.readouterr().err.startswith("ditfast tune: needs a GPU")


def test_on_cuda_it_measures_on_the_current_device(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(command, "measure", lambda args, timer, versions: seen.append((timer.device, versions)) or 0)
    with fake_cuda(count=2):
        torch.cuda.set_device(1)
        assert cli.main(["tune", "--batch", "2"]) == 0
    ((device, versions),) = seen
    assert device == torch.device("cuda", 1)
    assert (versions["device"], versions["torch"]) == ("NVIDIA H200", torch.__version__)
