"""benchmarks/host.py on the simulator: what it replaces, what it times, where the time goes, and what it says without one."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import WHERE, Runner
from torch import Tensor

import ditfast
from ditfast import DiT, DiTConfig, ops
from ditfast.benchmarks import host, host_cases, host_parts, host_rounds
from ditfast.benchmarks.host_cases import (
    CALLED,
    EAGER,
    FORWARD,
    LAYER_NORM,
    OP,
    OP_BACKWARD,
    OP_GRAD,
    OURS,
    STEP,
    launches_without_kernels,
)
from ditfast.benchmarks.host_parts import ALLOCATION, AUTOGRAD, CHECKS, LAUNCH, PARTS, PLAN, Stopwatches
from ditfast.benchmarks.kernel_cases import OPS
from ditfast.benchmarks.rivals import random_case

ON_SIMULATOR = pytest.mark.skipif(WHERE != "simulator", reason="needs g++, which builds the simulator")
FEW_OPS = ("layer_norm_modulate", "gated_residual_layer_norm_modulate", "timestep_embedding")
Launches = list[tuple[Any, ...]]


@pytest.fixture
def few_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_cases, "OPS", {name: host_cases.OPS[name] for name in FEW_OPS})
    monkeypatch.setattr(host_cases, "OP_CALLS", 2)


@pytest.fixture
def without_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let even the shortest part have some time."""
    monkeypatch.setattr(Stopwatches, "_calibrate", lambda self: (0.0, 0.0))


# ------------------------------------------------------------------ what is replaced
def noted(launches: Launches, then: Callable[..., None] = lambda *_: None) -> Callable[..., None]:
    """Return an enqueueing call that notes the grid and the kernel's name and arguments, then calls another."""

    def enqueue(launcher: Any, x: int, y: int, z: int, stream: int, function: Any, metadata: Any, *args: Any) -> None:
        launches.append(((x, y, z), launcher.metadata.name, *args[3:]))  # behind the hooks
        then(launcher, x, y, z, stream, function, metadata, *args)

    return enqueue


def described(launches: Launches) -> Launches:
    def describe(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.dtype, value.shape, value.stride()
        return type(value) if hasattr(value, "data_ptr") else value

    return [tuple(map(describe, launch)) for launch in launches]


x, shift, scale, weight, qkv = (torch.ones(shape) for shape in ((2, 4, 64), (2, 64), (2, 64), (64, 64), (2, 4, 3, 2, 32)))


@ON_SIMULATOR
@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.layer_norm_modulate(x, shift, scale),
        lambda: ops.linear(x, weight, shift[0]),
        lambda: ops.attention(qkv),
    ],
    ids=["layer_norm_modulate", "linear", "attention"],
)
def test_only_the_enqueueing_call_is_replaced(call: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    from ptxsim.driver import SimLauncher

    real: Launches = []
    with monkeypatch.context() as patch, Runner.open("sm_90", checks=False):
        patch.setattr(SimLauncher, "__call__", noted(real, SimLauncher.__call__))
        call()
        first = len(real)
        call()
    replaced: Launches = []
    outputs = []
    with launches_without_kernels(noted(replaced)), ditfast.backend("triton"):
        for _ in range(2):
            outputs.append(call())
    assert described(replaced) == described(real)
    for output, launch in zip(outputs, (replaced[first - 1], replaced[-1]), strict=True):
        assert output.data_ptr() in {value.data_ptr() for value in launch if isinstance(value, Tensor)}
    assert outputs[0].data_ptr() != outputs[1].data_ptr()


@ON_SIMULATOR
def test_the_simulator_runs_kernels_again_afterwards() -> None:
    from ptxsim.driver import SimLauncher

    launch = SimLauncher.__call__
    with launches_without_kernels(), ditfast.backend("triton"):
        ops.layer_norm_modulate(x, shift, scale)
    assert SimLauncher.__call__ is launch
    with Runner.open("sm_90", checks=False):
        assert torch.equal(ops.layer_norm_modulate(x, shift, scale), shift[:, None].expand_as(x))


@pytest.mark.parametrize(("count", "called"), [(1, [1, 0, 0, 0]), (3, [1, 1, 1, 0]), (28, [1, 1, 1, 1])])
def test_so_many_linears_are_called(count: int, called: list[int]) -> None:
    config = DiTConfig(depth=1, hidden_size=32, num_heads=2, input_size=4, num_classes=10)
    model = host_cases.with_called_linears(DiT(config), count)
    calls = [0] * 4
    (block,) = model.blocks
    for i, linear in enumerate((block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)):
        if isinstance(linear, host_cases.CalledLinear):
            linear.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    with torch.no_grad():
        model(torch.randn(1, 4, 4, 4), 5, torch.tensor([1]))
    assert calls == called


# ------------------------------------------------------------------ the command
@ON_SIMULATOR
@pytest.mark.usefixtures("few_ops", "without_calibration")
def test_main_writes_tables_json_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quick", "--depth", "1", "--rounds", "3", "--device", "cpu", "--out", str(tmp_path)]
    assert host.main(arguments) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "wanted at most 0.8" in printed
    assert "wanted at most 1.1" in printed
    assert "of 3 take at most 3 of aten.layer_norm's and 30 us" in printed
    report = json.loads((tmp_path / "host.json").read_text())
    assert report["notes"] == []
    assert report["machine"]["threads"] == 1
    rows = {(row["kind"], row["name"]): row for row in report["rows"]}
    models = [(kind, name) for kind in (FORWARD, STEP) for name in (OURS, EAGER, *CALLED)]
    differentiable = [(kind, name) for kind in (OP_GRAD, OP_BACKWARD) for name in (LAYER_NORM, *FEW_OPS[:2])]
    assert set(rows) == {*models, *differentiable, *((OP, name) for name in (LAYER_NORM, *FEW_OPS))}
    for (_, name), row in rows.items():
        assert row["us_p20"] <= row["us"] <= row["us_p80"]
        assert row["cpu_us"] > 0
        assert row["rounds"] == 3
        assert row["baseline"] == (None if name in (EAGER, LAYER_NORM) else EAGER if name in (OURS, *CALLED) else LAYER_NORM)
        if row["baseline"]:
            assert 0 < row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    assert [(rows[kind, OURS]["most_ratio"], rows[kind, OURS]["most_us"]) for kind in (FORWARD, STEP)] == [
        (0.8, None),
        (1.1, None),
    ]
    assert (rows[OP, FEW_OPS[0]]["most_ratio"], rows[OP, FEW_OPS[0]]["most_us"]) == (3.0, 30.0)
    forward, step = (rows[kind, OURS]["parts_us"] for kind in (FORWARD, STEP))
    assert {part for part, us in forward.items() if us > 0} == set(PARTS) - {AUTOGRAD}
    assert {part for part, us in step.items() if us > 0} == set(PARTS)
    pytest.importorskip("matplotlib")
    assert (tmp_path / "host.png").stat().st_size > 0


@ON_SIMULATOR
@pytest.mark.usefixtures("few_ops")
def test_a_call_that_fails_costs_its_own_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(host_cases.OPS, "timestep_embedding", dataclasses.replace(OPS["timestep_embedding"], call=fail))
    assert host.main(["--quick", "--depth", "1", "--rounds", "2", "--device", "cpu"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "note: tiny fp32 batch 1: op timestep_embedding failed: RuntimeError: no such kernel" in printed
    assert "of 2 take at most" in printed


@ON_SIMULATOR
@pytest.mark.usefixtures("few_ops")
def test_a_budget_leaves_out_what_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(1000))
    monkeypatch.setattr(host_rounds.time, "monotonic", lambda: next(seconds))  # a second for each case to prepare
    case = random_case("tiny", host.TINY_CONFIG, 1, torch.device("cpu"), "fp32")
    with launches_without_kernels():
        bench = host_rounds.CaseBench(case, ["diffusers"], 10.0, lambda phase: None)
        bench.prepare()
    prepared = [f"{timed.kind} {timed.name}" for timed in bench.timed]
    assert prepared == [
        "forward ditfast",
        "step ditfast",
        "forward eager",
        "step eager",
        f"op {LAYER_NORM}",
        f"op {FEW_OPS[0]}",
    ]
    assert bench.left_out[0] == f"op {FEW_OPS[1]}"
    assert bench.left_out[-2:] == ["forward diffusers", "step diffusers"]
    assert bench.failures == []


def test_without_a_clone_or_a_compiler_one_line_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(host_cases, "__file__", str(tmp_path / "benchmarks" / "host_cases.py"))
        assert host.main(["--device", "cpu"]) == 2
    expected = (
        "benchmarks/host.py: device: got cpu, expected cuda, or a clone of ditfast, whose tests/ptxsim does without a GPU\n"
    )
    assert capsys.readouterr().err == expected
    with monkeypatch.context() as patch:
        patch.setenv("CXX", "no-such-compiler")
        patch.setenv("PTXSIM_CACHE", str(tmp_path))
        assert host.main(["--device", "cpu"]) == 2
    message = capsys.readouterr().err
    assert message.startswith(
        "benchmarks/host.py: device: got cpu, expected cuda, or g++ (or CXX) to build the simulator with: "
    )
    assert message.count("\n") == 1
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert host.main(["--device", "cpu"]) == 2
    assert capsys.readouterr().err.startswith("benchmarks/host.py: TRITON_INTERPRET: got 1, expected it unset")


# ------------------------------------------------------------------ parts and intervals
class Ticks:
    """A clock of one second a look, and as many as somebody adds."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        self.seconds += 1
        return self.seconds

    def add(self, seconds: float) -> None:
        self.seconds += seconds


def test_a_part_has_neither_the_parts_inside_it_nor_what_measuring_takes() -> None:
    clock = Ticks()
    watches = Stopwatches(clock)
    watches.reset()
    allocate = watches.timed(lambda: clock.add(5), ALLOCATION)

    def run() -> str:
        clock.add(3)
        for _ in range(10):
            allocate()
        return "outputs"

    assert watches.timed(watches.timed(run, PLAN), CHECKS)() == "outputs"
    seconds = [watches.seconds(part) for part in (CHECKS, PLAN, ALLOCATION, LAUNCH)]
    assert seconds == pytest.approx([0, 3, 50, 0], abs=0.1)


@ON_SIMULATOR
def test_functions_are_put_back_as_they_were() -> None:
    with launches_without_kernels():
        before = functions()
        with host_parts.measured(Stopwatches(Ticks())):
            assert all(now is not old for now, old in zip(functions(), before, strict=True))
        assert all(now is old for now, old in zip(functions(), before, strict=True))


def functions() -> list[Any]:
    return [vars(owner)[name] for owner, name, _ in host_parts._functions()]


@pytest.mark.parametrize("rounds", [6, 10, 20, 50, 100, 1001])
def test_the_narrowest_interval_holds_the_median_with_95_percent(rounds: int) -> None:
    low, high = map(int, host_rounds.median_interval(range(rounds)))
    chances = [math.comb(rounds, k) / 2**rounds for k in range(rounds + 1)]  # that k values are below the median
    assert low + high == rounds - 1
    assert sum(chances[low + 1 : high + 1]) >= 0.95 > sum(chances[low + 2 : high])


def test_the_median_of_few_rounds_is_anywhere_between_them() -> None:
    assert host_rounds.median_interval([1.0, 2.0, 9.0]) == (1.0, 9.0)
