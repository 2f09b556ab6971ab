"""Averages, the loss scale, the loss curve, logs and signals."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda, fake_cuda, parameters
from fake_cuda.fixtures import fake_gpu

from ditfast import timer
from ditfast.interrupt import Announced
from ditfast.training import RunError, speed, unsaved
from ditfast.training.averages import Averages
from ditfast.training.folder import claim
from ditfast.training.log import JsonLines, RunLog
from ditfast.training.loss_curve import LossCurve
from ditfast.training.loss_scale import PATIENCE, LossScale
from ditfast.training.stopping import asked_to_stop

__all__ = ["fake_gpu"]
CPU = torch.device("cpu")


def test_averages_follow_at_their_own_pace() -> None:
    weight = torch.zeros(3, requires_grad=True)
    averages = Averages({"w": weight}, [0.5, 0.9])
    for step in (1000, 1001):
        weight.data.fill_(1.0)
        averages.update(step)
    torch.testing.assert_close(averages.by_decay[0.5]["w"], torch.full((3,), 0.75))
    torch.testing.assert_close(averages.by_decay[0.9]["w"], torch.full((3,), 0.19))
    assert not averages.by_decay[0.5]["w"].requires_grad


def test_averages_soon_forget_what_the_run_began_with() -> None:
    weight = torch.ones(3)
    averages = Averages({"w": weight}, [0.0, 0.9999])
    weight.zero_()
    for step in range(100):
        averages.update(step)
    assert averages.by_decay[0.0]["w"].eq(0).all()
    left = math.prod((1 + step) / (10 + step) for step in range(100))
    torch.testing.assert_close(averages.by_decay[0.9999]["w"], torch.full((3,), left))
    assert left < 1e-8


def test_the_loss_scale_halves_at_once_and_doubles_with_patience() -> None:
    scale = LossScale(enabled=True)
    first = scale.scale
    scale.update(finite=False)
    assert scale.scale == first / 2
    for _ in range(PATIENCE - 1):
        scale.update(finite=True)
    assert scale.scale == first / 2
    scale.update(finite=True)
    assert scale.scale == first


def test_without_fp16_there_is_no_scale() -> None:
    scale = LossScale(enabled=False)
    scale.update(finite=False)
    assert scale.scale == 1


def test_the_curve_is_the_mean_of_each_tenth_of_the_timesteps() -> None:
    curve = LossCurve(1000)
    curve.add(torch.tensor([0, 99, 100, 999, 950]), torch.tensor([1.0, 3.0, 5.0, 7.0, float("nan")]))
    assert curve.take() == [2.0, 5.0, *[None] * 7, 7.0]
    assert curve.take() == [None] * 10


def test_a_resumed_log_drops_later_lines_and_one_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = JsonLines(path, 0)
    for step in range(1, 5):
        log.write({"step": step})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 5, "lo')
    resumed = JsonLines(path, 3)
    resumed.write({"step": 4, "again": True})
    resumed.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1},
        {"step": 2},
        {"step": 3},
        {"step": 4, "again": True},
    ]


def test_scalars_of_a_resumed_run_replace_later_ones(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for step, last, loss in ((0, 4, 1.0), (2, 3, 5.0)):
        log = RunLog(tmp_path, step, writes=True)
        for done in range(step + 1, last + 1):
            log.write("log", done, {"loss": loss, "parts": [0.5, None]})
        log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["log/loss", "log/parts0"]
    assert [(event.step, event.value) for event in events.Scalars("log/loss")] == [(1, 1.0), (2, 1.0), (3, 5.0)]


def test_a_folder_is_one_run_s(tmp_path: Path) -> None:
    run = tmp_path / "run"
    claim(run, {"seed": 0, "model": {"depth": 2}}, resume=False)
    claim(run, {"seed": 0, "model": {"depth": 2}}, resume=True)
    with pytest.raises(RunError, match=r"holds a run already; run\(resume=True\) goes on with it"):
        claim(run, {"seed": 0, "model": {"depth": 2}}, resume=False)
    with pytest.raises(RunError, match=r"other settings: model\.depth: was 2, is 3"):
        claim(run, {"seed": 0, "model": {"depth": 3}}, resume=True)


def test_a_disk_is_asked_for_room_once_a_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("ditfast.training.folder.check_room", lambda folder, needed, what: asked.append(needed))
    claim(tmp_path / "run", {"seed": 0}, resume=False, needed=1)
    claim(tmp_path / "run", {"seed": 0}, resume=True, needed=2)
    assert asked == [1, 2]


@pytest.mark.parametrize("content", ["", "[]", '{"settings": 3}'], ids=["empty", "list", "number"])
def test_a_damaged_record_is_said_to_be_one(content: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunError, match="does not hold a run's settings"):
        claim(tmp_path, {"seed": 0}, resume=True)


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RunError, match=r"holds thesis\.tex"):
        claim(tmp_path, {"seed": 0}, resume=True)
    with pytest.raises(RunError, match="a file is in the way"):
        claim(tmp_path / "thesis.tex", {"seed": 0}, resume=True)


@pytest.fixture
def hears_ctrl_c() -> Iterator[None]:
    """As at a terminal: a shell starts what is in the background deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("hears_ctrl_c")
@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_heard_and_ctrl_c_is_obeyed_at_once_the_second_time(
    first: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with asked_to_stop(lambda last: "the last" if last else "the first") as asked:
        assert not asked()
        for number in (first, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
            assert asked()
        if first == signal.SIGTERM:
            os.kill(os.getpid(), signal.SIGINT)
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(Announced):
            time.sleep(30)
    assert capsys.readouterr().err == "the first\nthe last\n"
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("hears_ctrl_c")
def test_the_first_ctrl_c_is_answered_while_the_main_thread_computes(capfd: pytest.CaptureFixture[str]) -> None:
    """A backward is one call into C++, in which Python handles no signal."""
    a = torch.ones(256, 256)
    with asked_to_stop(lambda last: f"{time.monotonic()}") as asked:
        pressed = time.monotonic()
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        with torch.no_grad():
            torch.linalg.svd(a.expand(200, 256, 256) + torch.rand(200, 256, 256))  # about two seconds
        done = time.monotonic()
        assert asked()
    assert pressed < float(capfd.readouterr().err) < done - 0.1


def test_a_child_that_outlives_it_does_not_hold_it_up() -> None:
    """A loader's worker, forked from this process, has its own copies of the open files."""
    with asked_to_stop():
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(20,))
        child.start()
    assert child.is_alive()
    child.kill()  # it has this process's handler of the other signal
    child.join()


@pytest.mark.usefixtures("hears_ctrl_c")
def test_a_forked_child_s_ctrl_c_is_not_counted() -> None:
    """A terminal sends one press to both; under load the child gets it much later."""
    context = multiprocessing.get_context("fork")
    with asked_to_stop(lambda last: None) as asked:
        begun = context.Event()
        child = context.Process(target=_begin_and_sleep, args=(begun,))
        child.start()
        assert begun.wait(60)
        os.kill(child.pid or 0, signal.SIGINT)
        child.kill()
        child.join()
        assert not asked()
    assert asked.interrupts == 0


def _begin_and_sleep(begun: Any) -> None:
    begun.set()
    time.sleep(60)


def test_what_ctrl_c_costs_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(unsaved.time, "monotonic", lambda: now[0])
    steps = unsaved.Unsaved(tmp_path, 3 * unsaved.PROBE_BYTES)
    monkeypatch.setattr(unsaved, "_write_seconds", lambda folder: 2.0)
    now[0] = 4.0
    steps.count_step()
    assert steps.describe_interrupt(False, "resume").endswith(
        "and ends, in about 10 s; once more loses 1 step (4 s) taken so far"
    )
    assert (
        steps.describe_interrupt(True, "resume")
        == "interrupted at once; lost: 1 step (4 s) taken so far; no checkpoint is there"
    )
    path = tmp_path / "step-00000001"
    with steps.saving(path):
        now[0] += 150
    for _ in range(2):
        now[0] += 100
        steps.count_step()
    assert steps.describe_interrupt(False, "resume").endswith(
        f"in about 4.2 min; once more loses 2 steps (3.3 min) since {path}"
    )
    end = f"lost: 2 steps (3.3 min) since {path}; resume goes on from it"
    assert steps.describe_interrupt(True, "resume") == f"interrupted at once; {end}"


def test_a_disk_that_tells_no_speed_promises_none(tmp_path: Path) -> None:
    assert "in a few seconds" in unsaved.Unsaved(tmp_path / "missing", 1).describe_interrupt(False, "resume")
    assert "in about 1 s" in unsaved.Unsaved(tmp_path, 1).describe_interrupt(False, "resume")


@pytest.fixture
def _nothing_measured() -> Iterator[None]:
    speed._measured.cache_clear()
    yield
    speed._measured.cache_clear()


@pytest.mark.usefixtures("_nothing_measured")
@pytest.mark.parametrize("slow", [True, False], ids=["no bf16 products", "bf16 products"])
def test_peak_is_of_the_products_that_ops_take(slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    multiplied: list[torch.dtype] = []

    def seconds(product: partial[torch.Tensor], device: torch.device) -> float:
        multiplied.append(product.args[0].dtype)
        return 1.0

    monkeypatch.setattr(timer, "seconds", seconds)
    monkeypatch.setattr(speed, "SLOW_DTYPES", frozenset({torch.bfloat16} if slow else ()))
    assert speed.peak_flops(CPU, torch.bfloat16) == 2 * 512**3
    assert set(multiplied) == {torch.float32 if slow else torch.bfloat16}


@pytest.mark.usefixtures("_nothing_measured")
def test_peak_is_measured_once_on_products_that_take_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    sides: list[int] = []

    def seconds(product: partial[torch.Tensor], device: torch.device) -> float:
        sides.append(len(product.args[0]))
        return 1e-5 + 2 * sides[-1] ** 3 / 5e11  # a launch, and 500 GFLOPS

    monkeypatch.setattr(timer, "seconds", seconds)
    assert speed.peak_flops(CPU, torch.float32) == pytest.approx(5e11, rel=1e-3)
    assert sorted(set(sides)) == [512, 1024, 2048]
    sides.clear()
    speed.peak_flops(CPU, torch.float32)
    assert not sides


@pytest.mark.parametrize(
    ("dtype", "precision", "tera"),
    [
        pytest.param(torch.float32, "highest", 66.9, id="fp32"),
        pytest.param(torch.float32, "high", 494.7, id="tf32"),
        pytest.param(torch.bfloat16, "highest", 989.4, id="bf16"),
    ],
)
def test_peak_of_a_known_gpu_is_its_data_sheet_s(
    dtype: torch.dtype, precision: str, tera: float, fake_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "_measured", lambda *_: pytest.fail("measured"))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert speed.peak_flops(torch.device("cuda", 0), dtype) == pytest.approx(1e12 * tera)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_peak_of_another_gpu(dtype: torch.dtype) -> None:
    if torch.cuda.is_available():
        pytest.skip("fakes a GPU")
    with fake_cuda(name="NVIDIA GeForce RTX 2080", capability=(7, 5)):
        a = torch.ones(32, 32, dtype=dtype, device="cuda")
        assert 0 < timer.seconds(lambda: a @ a, a.device) < 1
        assert speed._data_sheet(a.device, dtype) is None


def test_peak_of_a_board_with_other_multiprocessors_of_a_known_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("fakes a GPU")
    monkeypatch.setitem(parameters.MULTIPROCESSORS, 90, 114)
    with fake_cuda(name="NVIDIA H100 PCIe", capability=(9, 0)):
        assert speed._data_sheet(torch.device("cuda", 0), torch.bfloat16) == pytest.approx(989.4e12 * 114 / 132)
