"""Predicted times: what must hold whatever is assumed, and that the counts behind them are those of today's kernels."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch
from support import WHERE

import ditfast.prediction as prediction
from ditfast import DiTConfig
from ditfast.config import CONDITIONINGS
from ditfast.flops import DEVICES, PLANS, DeviceSpec, floor_ms
from ditfast.prediction import ASSUMPTIONS, ROUTES, counts, predicted_model_ms, predicted_ms, predicted_ops, spec_of
from ditfast.prediction.devices import spec_named
from ditfast.problem import SIZES, Problem

BF16 = torch.bfloat16
XL_SIZES = {
    "layer_norm_modulate": (256, 1152),
    "gated_residual": (256, 1152),
    "gated_residual_layer_norm_modulate": (256, 1152),
    "linear": (3456, 1152),
    "linear_gelu": (4608, 1152),
    "linear_gated_residual": (1152, 4608),
    "mlp": (4608, 1152, 1152),
    "attention": (256, 16, 72),
    "cross_attention": (256, 2, 16, 72),
    "patch_embed": (1152, 16),
    "final_layer": (32, 1152),
    "linear_unpatchify": (32, 1152),
    "unpatchify": (32,),
    "timestep_embedding": (256,),
    "classifier_free_guidance": (8192,),
    "denoise_update": (4096,),
}
ROW_OPS = ("layer_norm_modulate", "gated_residual", "gated_residual_layer_norm_modulate")
DEVICE_PARAMETERS = [pytest.param(spec, id=name) for name, spec in DEVICES.items()]


def known_ms(problem: Problem, route: str, device: DeviceSpec) -> float:
    found = predicted_ms(problem, route, device)
    assert found is not None
    return found


# ------------------------------------------------------------------------------------------------ ops
def test_every_op_has_a_prediction_in_torch_and_triton() -> None:
    assert set(XL_SIZES) == set(SIZES)
    for op, sizes in XL_SIZES.items():
        for route in ("torch", "triton"):
            assert known_ms(Problem(op, BF16, 2048, sizes), route, DEVICES["H100"]) > 0


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("device", DEVICE_PARAMETERS)
def test_four_times_the_rows_never_take_less(device: DeviceSpec, training: bool) -> None:
    """From one bucket of tiles to the next a few rows more may take less: the table is no search."""
    for op, sizes in XL_SIZES.items():
        for route in ROUTES:
            found = [predicted_ms(Problem(op, BF16, 256 * 4**i, sizes, training), route, device) for i in range(6)]
            known = [ms for ms in found if ms is not None]
            assert known == sorted(known), (op, route)


@pytest.mark.parametrize("route", ["torch", "triton"])
@pytest.mark.parametrize("op", ["layer_norm_modulate", "attention", "timestep_embedding"])
def test_more_rows_never_take_less(op: str, route: str) -> None:
    found = [known_ms(Problem(op, BF16, 256 * i, XL_SIZES[op]), route, DEVICES["H100"]) for i in range(1, 40)]
    assert found == sorted(found)


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("op", ROW_OPS)
@pytest.mark.parametrize("device", DEVICE_PARAMETERS)
def test_a_fused_row_op_beats_the_chain_of_passes(device: DeviceSpec, op: str, training: bool) -> None:
    for width in (384, 768, 1024, 1152):
        problem = Problem(op, BF16, 32768, (256, width), training)
        assert known_ms(problem, "triton", device) < known_ms(problem, "torch", device)


def test_no_op_takes_less_than_its_products_and_bytes() -> None:
    device = DEVICES["H100"]
    for N, K in ((3456, 1152), (1152, 4608), (32, 384)):
        for M in (1, 256, 8192):
            floor = 1e3 * max(2 * M * N * K / device.half, 2 * (M * N + M * K + N * K) / device.bandwidth)
            for op in ("linear", "linear_gelu"):
                for route in ("torch", "triton", "cublaslt"):
                    ms = predicted_ms(Problem(op, BF16, M, (N, K)), route, device)
                    assert ms is None or ms > floor


@pytest.mark.parametrize(
    ("op", "dtype", "sizes", "route"),
    [
        ("linear", BF16, (384, 384), "cublaslt"),
        ("linear_gelu", BF16, (384, 384), "sdpa"),
        ("linear", torch.float32, (384, 384), "triton"),
        ("attention", torch.float32, (256, 6, 64), "triton"),
        ("attention", torch.float32, (256, 6, 64), "flash"),
        ("attention", BF16, (256, 6, 80), "triton"),
        ("attention", BF16, (256, 6, 512), "sdpa"),
        ("layer_norm_modulate", BF16, (256, 384), "flash"),
        ("patch_embed", BF16, (384, 16), "sdpa"),
    ],
)
def test_nothing_is_predicted_for(op: str, dtype: torch.dtype, sizes: tuple[int, ...], route: str) -> None:
    assert predicted_ms(Problem(op, dtype, 512, sizes), route, DEVICES["H100"]) is None


@pytest.mark.parametrize(("op", "route"), [("linear_gelu", "cublaslt"), ("patch_embed", "triton"), ("final_layer", "triton")])
def test_nothing_is_predicted_for_training(op: str, route: str) -> None:
    problem = Problem(op, BF16, 512, XL_SIZES[op])
    assert predicted_ms(problem, route, DEVICES["H100"]) is not None
    assert predicted_ms(problem._replace(training=True), route, DEVICES["H100"]) is None


def test_another_architecture() -> None:
    device = DEVICES["H100"]._replace(arch="sm_75")
    assert predicted_ms(Problem("linear", BF16, 512, (384, 384)), "torch", device) is None
    with pytest.raises(ValueError, match="device: got architecture 'sm_75', expected one of sm_80"):
        predicted_ops(DiTConfig(), 1, BF16, device)


@pytest.mark.parametrize(
    ("problem", "route", "message"),
    [
        (Problem("softmax", BF16, 1, (1,)), "torch", "op: got 'softmax', expected one of layer_norm_modulate"),
        (Problem("linear", BF16, 1, (1, 1)), "cutlass", "route: got 'cutlass', expected one of torch, triton"),
        (Problem("linear", BF16, 1, (1,)), "torch", r"sizes: got \(1,\), expected N, K"),
    ],
    ids=["op", "route", "sizes"],
)
def test_bad_problems(problem: Problem, route: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predicted_ms(problem, route, DEVICES["H100"])


# ------------------------------------------------------------------------------------------------ models
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("device", DEVICE_PARAMETERS)
def test_no_model_is_faster_than_its_floor(device: DeviceSpec, plan: str) -> None:
    for name in ("DiT-S/8", "DiT-B/4", "DiT-XL/2"):
        config = DiTConfig.from_name(name)
        for batch in (1, 32):
            for fused in (False, True):
                for dtype in (BF16, torch.float32):
                    ms = predicted_model_ms(config, batch, dtype, device, plan, fused=fused, graph=True)
                    assert ms > floor_ms(config, batch, dtype, device, plan, fused=fused)


@pytest.mark.parametrize("plan", PLANS)
def test_a_model_is_the_sum_of_its_ops(plan: str) -> None:
    config, device = DiTConfig.from_name("DiT-B/2"), DEVICES["H100"]
    found = predicted_ops(config, 8, BF16, device, plan)
    on_device, on_host = (sum(op.times * time for op, time in zip(found, times, strict=True)) for times in _times(found))
    assert predicted_model_ms(config, 8, BF16, device, plan, graph=True) == pytest.approx(on_device)
    assert predicted_model_ms(config, 8, BF16, device, plan) == pytest.approx(max(on_device, on_host))
    assert {op.route for op in found} <= set(ROUTES)


def _times(found: list[prediction.PredictedOp]) -> tuple[list[float], list[float]]:
    return [op.ms for op in found], [op.host_ms for op in found]


@pytest.mark.parametrize("name", ["DiT-S/2", "DiT-S/8"])
def test_a_small_model_waits_for_its_launches(name: str) -> None:
    config, device = DiTConfig.from_name(name), DEVICES["H100"]
    launched, replayed = (predicted_model_ms(config, 1, BF16, device, fused=False, graph=graph) for graph in (False, True))
    assert launched > 1.5 * replayed


def test_a_large_batch_waits_for_the_device() -> None:
    config, device = DiTConfig.from_name("DiT-XL/2"), DEVICES["H100"]
    launched, replayed = (predicted_model_ms(config, 128, BF16, device, graph=graph) for graph in (False, True))
    assert launched == replayed


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_fused_beats_eager_under_a_graph(conditioning: str) -> None:
    config = DiTConfig.from_name("DiT-B/4", conditioning=conditioning)
    for plan in PLANS:
        fused, eager = (predicted_model_ms(config, 8, BF16, DEVICES["H100"], plan, fused=f, graph=True) for f in (True, False))
        assert fused < eager


def test_recomputing_costs_time() -> None:
    config = DiTConfig.from_name("DiT-B/2")
    forward, keep, checkpoint = (predicted_model_ms(config, 32, BF16, DEVICES["H100"], plan, graph=True) for plan in PLANS)
    assert 2.5 * forward < keep < checkpoint < 1.5 * keep


# ------------------------------------------------------------------------------------------------ devices, assumptions
@pytest.mark.parametrize(
    ("name", "multiprocessors", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 132, "H100"),
        ("NVIDIA A100-SXM4-80GB", 108, "A100"),
        ("AMD Instinct MI300X", 304, "MI300X"),
        ("NVIDIA H200", None, "H200"),
        ("NVIDIA H100 PCIe", 114, None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", 60, None),
        ("NVIDIA GH200 480GB", 132, None),
        ("AMD EPYC 7763 64-Core Processor", None, None),
    ],
)
def test_devices_by_name(name: str, multiprocessors: int | None, expected: str | None) -> None:
    spec = spec_named(name, multiprocessors)
    assert (None if spec is None else spec.name) == expected


def test_a_cpu_is_no_known_device() -> None:
    assert spec_of(torch.device("cpu")) is None
    if not torch.cuda.is_available():
        assert spec_of(torch.device("cuda")) is None


def test_assumptions_are_listed_with_a_reason() -> None:
    names = [assumption.name for assumption in ASSUMPTIONS]
    assert len(set(names)) == len(names) >= 15
    for _, value, reason in ASSUMPTIONS:
        values = list(value.values()) if isinstance(value, dict) else [value]
        assert all(number > 0 for number in values)
        assert len(reason) > 20
        if isinstance(value, dict) and "sm_80" in value:
            assert set(value) == {spec.arch for spec in DEVICES.values()}


def test_predictions_import_no_kernels() -> None:
    for path in Path(prediction.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 2:
                assert node.module in ("flops", "problem", "config"), path


# ------------------------------------------------------------------------------------------------ the counts
needs_compiler = pytest.mark.skipif(WHERE == "interpreter", reason="kernels were jitted for the interpreter")
FILE = json.loads(counts.PATH.read_text("utf-8"))
SAMPLE = {"gated_residual_layer_norm_modulate": "D=1152", "linear_gelu": "M=2048", "attention": "d=72 T=256"}


@needs_compiler
@pytest.mark.parametrize("arch", FILE["tiles"])
def test_tiles_are_those_of_the_launchers(arch: str) -> None:
    from ditfast.kernels.static_counts import COLUMNS, HEADS, gemm_tiles

    assert FILE["tiles"][arch] == {columns: gemm_tiles(arch, N) for columns, N in COLUMNS.items()}
    assert set(FILE["heads"]) == {str(head) for head in HEADS}


@needs_compiler
@pytest.mark.parametrize("kernel", SAMPLE)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_counts_are_those_of_the_kernels(arch: str, kernel: str) -> None:
    import triton

    from ditfast.kernels import inspect
    from ditfast.kernels.static_counts import FIELDS, _short

    if triton.__version__ != FILE["triton"]:
        pytest.skip(f"counted with triton {FILE['triton']}, this is {triton.__version__}")
    ((case, build),) = [(case, build) for case, build in inspect.collect([arch], [kernel]) if case.label == SAMPLE[kernel]]
    row = inspect.inspect(case, build)
    assert [_short(getattr(row, field)) for field in FIELDS] in FILE["rows"]


@needs_compiler
def test_the_command_writes_what_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ditfast.kernels import inspect

    path = tmp_path / "counts.json"
    assert inspect.main(["--arch", "sm_90", "--kernel", "timestep_embedding", "--json", "--counts", str(path)]) == 0
    written = json.loads(path.read_text("utf-8"))
    assert len(written["rows"]) == len(json.loads(capsys.readouterr().out))
    assert set(written) == set(FILE)
    assert (written["fields"], written["heads"]) == (FILE["fields"], FILE["heads"])
    assert written["tiles"]["sm_90"] == FILE["tiles"]["sm_90"]


def test_the_counts_are_small_and_cover_the_devices() -> None:
    assert counts.PATH.stat().st_size < 200_000
    assert {spec.arch for spec in DEVICES.values()} == set(FILE["tiles"])
    for arch in FILE["tiles"]:
        for width in (384, 768, 1024, 1152):
            assert counts.rows(arch, "layer_norm_modulate", width) is not None
        for M in (1, 256, 4096, 1 << 20):
            for N in (1152, 4608):
                assert counts.product(arch, "linear_gelu", M, N) is not None
