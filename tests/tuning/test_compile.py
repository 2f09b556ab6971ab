"""`ditfast tune` compiles kernels before it times them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from stub_timer import StubTimer
from support import WHERE

if WHERE == "interpreter":
    pytest.skip("kernels were jitted for the interpreter, which compiles nothing", allow_module_level=True)

from test_compile_command import ARCH, ON_SIMULATOR, Asked, launched

from ditfast.dispatch.shapes import OpShape
from ditfast.tuning.compile import compile_kernels, kernel_builds
from ditfast.tuning.measure import Measured
from ditfast.tuning.tune import tune

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
NORM = OpShape("layer_norm_modulate", torch.float32, 8, (4, 128))
STEP = OpShape("gated_residual_layer_norm_modulate", torch.bfloat16, 8, (4, 128), training=True)


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[OpShape], tuple[Measured, Asked, list[str]]]:
    """Tune a shape with Triton's cache empty: what was found, what launches compiled, and what was shown."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def tuned(shape: OpShape) -> tuple[Measured, Asked, list[str]]:
        shown: list[str] = []
        with launched() as asked:
            timer = StubTimer(lambda op, route: 1.0)
            (found,) = tune({shape: 1}, timer, 1e9, lambda entries: None, lambda doing, done, steps: shown.append(doing))
        assert len(timer.measured) > 2
        return found, asked, shown

    return tuned


@ON_SIMULATOR
@pytest.mark.parametrize("shape", [NORM, STEP], ids=["inference", "training"])
def test_no_kernel_is_compiled_while_it_is_timed(
    shape: OpShape, tuned: Callable[[OpShape], tuple[Measured, Asked, list[str]]]
) -> None:
    found, asked, shown = tuned(shape)
    assert not found.notes
    assert asked.sources
    assert asked.compiled == []
    builds = len(kernel_builds(shape, ARCH, every_config=True))
    assert f"compiling kernels, {builds} of {builds}" in shown


@ON_SIMULATOR
def test_results_are_those_of_compiling_one_by_one(
    tuned: Callable[[OpShape], tuple[Measured, Asked, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ditfast.tuning.tune.compile_kernels", lambda *_, **__: None)
    one_by_one, asked, _ = tuned(NORM)
    monkeypatch.undo()
    assert asked.compiled  # while they were timed
    assert one_by_one == tuned(NORM)[0]


@ON_SIMULATOR
def test_no_more_is_compiled_when_the_budget_is_spent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    shown: list[tuple[int, int]] = []
    with launched():
        compile_kernels([NORM], CPU, True, lambda: False, lambda done, kernels: shown.append((done, kernels)))
    assert [done for done, _ in shown] == [0, 1]
    assert shown[0][1] > 2


def test_where_no_kernel_can_run_nothing_is_compiled() -> None:
    if torch.cuda.is_available():
        pytest.skip("kernels run on the GPU")
    compile_kernels([NORM], CPU, True, lambda: True, lambda *_: pytest.fail("compiled"))
