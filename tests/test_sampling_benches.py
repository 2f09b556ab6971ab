"""How fast and how good ways to sample are: each lever's latents are checked, and what spoils images is found."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ditfast import cpu
from ditfast.benchmarks import digits_quality, sampling
from ditfast.benchmarks.digits_quality import Draw
from ditfast.cpu import engine
from ditfast.cpu.packed import BYTE

needs_sklearn = pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="needs scikit-learn")
needs_engine = pytest.mark.skipif(cpu.found()[0] is None, reason="needs the CPU engine")
pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ["--seeds", "2", "--images", "40", "--steps", "ddim3"]


# ------------------------------------------------------------------------------------------------ speed
def test_every_lever_makes_the_reference_loops_latents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rivals = ["reference", "model", "model+table", "model+shared", "model+update", "ditfast", "ditfast-torch", "ditfast-bf16"]
    arguments = ["--width", "S", "--depth", "1", "--steps", "3", "--batch", "2", "--rounds", "1", "--device", "cpu"]
    assert sampling.main([*arguments, "--rivals", *rivals, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert all(rival in shown for rival in rivals)
    assert max(map(len, shown.splitlines())) <= 80
    rows = json.loads((tmp_path / "sampling.json").read_text())["rows"]
    assert [row["rival"] for row in rows] == rivals
    assert all(row["error"] < 1e-5 for row in rows[:-1])
    assert 1e-4 < rows[-1]["error"] < 0.1
    assert (tmp_path / "sampling.png").read_bytes().startswith(b"\x89PNG")


@needs_engine
def test_the_engine_and_int8_inside_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_engine: list[bool] = []
    call = engine.Engine.call
    monkeypatch.setattr(engine.Engine, "call", lambda *args: on_engine.append(args[2] == BYTE) or call(*args))
    arguments = ["--width", "S", "--depth", "1", "--steps", "2", "--rounds", "1", "--device", "cpu"]
    assert sampling.main([*arguments, "--rivals", "ditfast-torch"]) == 0
    assert on_engine == []
    arguments += ["--out", str(tmp_path), "--rivals", "ditfast", "ditfast-torch", "ditfast-int8"]
    assert sampling.main(arguments) == 0
    assert on_engine.count(True) == on_engine.count(False) > 0
    errors = {row["rival"]: row["error"] for row in json.loads((tmp_path / "sampling.json").read_text())["rows"]}
    assert errors["ditfast"] < 1e-5
    assert 1e-4 < errors["ditfast-int8"] < 0.1


def test_int8_without_an_engine_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine, "found", lambda: (None, "the CPU engine needs a C++ compiler"))
    arguments = ["--width", "S", "--depth", "1", "--steps", "2", "--rounds", "1", "--device", "cpu", "--out", str(tmp_path)]
    assert sampling.main([*arguments, "--rivals", "ditfast", "ditfast-int8"]) == 0
    note = "skipped: ditfast-int8: got int8, but the CPU engine needs a C++ compiler"
    assert note in capsys.readouterr().out
    report = json.loads((tmp_path / "sampling.json").read_text())
    assert [row["rival"] for row in report["rows"]] == ["reference", "ditfast"]
    assert note in report["notes"]


def test_wrong_latents_fail_the_bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sampling.Setting, "_shared", lambda self, x, t, y: 1.01 * self.model(x, t, y))
    arguments = ["--width", "S", "--depth", "1", "--steps", "2", "--rounds", "1", "--device", "cpu"]
    assert sampling.main([*arguments, "--rivals", "model", "model+shared"]) == 1
    assert "model+shared: latents are off by" in capsys.readouterr().out


@pytest.mark.parametrize("calls", [1, 4], ids=["at its first call", "in a later step"])
def test_a_failure_costs_its_row(
    calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, count = sampling.Setting._shared, []

    def shared(self: sampling.Setting, *inputs: Tensor) -> Tensor:
        count.append(1)
        if len(count) >= calls:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self, *inputs)

    monkeypatch.setattr(sampling.Setting, "_shared", shared)
    arguments = ["--width", "S", "--depth", "1", "--steps", "3", "--rounds", "2", "--device", "cpu", "--out", str(tmp_path)]
    assert sampling.main([*arguments, "--rivals", "model+shared", "model"]) == 0
    report = json.loads((tmp_path / "sampling.json").read_text())
    assert [row["rival"] for row in report["rows"]] == ["reference", "model"]
    assert "sampling: model+shared skipped, out of memory: take a smaller batch" in capsys.readouterr().out.replace("\n", " ")


# ------------------------------------------------------------------------------------------------ quality
@needs_sklearn
def test_levers_are_within_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["reference", "no table", "table in windows"]
    assert digits_quality.main([*QUICK, "--variants", *wanted, "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("within noise") == len(wanted)
    report = json.loads((tmp_path / "digits_quality.json").read_text())
    assert report["machine"]["threads"] == 1
    assert [row["variant"] for row in report["rows"]] == ["fp32", *wanted]
    first, *others = report["rows"]
    for row in others:
        changes = [own - base for own, base in zip(row["distances"], first["distances"], strict=True)]
        assert row["distance_change"]["mean"] == pytest.approx(sum(changes) / 2)
        assert row["distance_change"]["deviation"] < 0.1 * first["distance"]["deviation"]
        assert min(row["accuracies"]) > 0.9


@needs_sklearn
@needs_engine
def test_int8_is_within_noise(tmp_path: Path) -> None:
    assert digits_quality.main([*QUICK, "--variants", "int8", "--out", str(tmp_path)]) == 0
    fp32, int8 = json.loads((tmp_path / "digits_quality.json").read_text())["rows"]
    assert int8["distances"] != fp32["distances"]
    assert min(int8["accuracies"]) > 0.9


@needs_sklearn
def test_int8_is_skipped_without_an_engine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(engine, "found", lambda: (None, "the CPU engine needs a C++ compiler"))
    assert digits_quality.main([*QUICK, "--variants", "int8"]) == 0
    assert "skipped: int8: got int8, but the CPU engine needs a C++ compiler" in capsys.readouterr().out


@needs_sklearn
def test_a_lever_that_spoils_images_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plain_variants = digits_quality.variants

    def variants(schedule: list[object]) -> dict[str, Draw]:
        drawn = plain_variants(schedule)  # type: ignore[arg-type]

        def grey(labels: Tensor, images: range, seed: int) -> Tensor:
            return 0.7 * drawn["fp32"](labels, images, seed)

        def another_digit(labels: Tensor, images: range, seed: int) -> Tensor:
            return drawn["fp32"]((labels + 1) % 10, images, seed)

        return {"fp32": drawn["fp32"], "grey": grey, "another digit": another_digit}

    monkeypatch.setattr(digits_quality, "variants", variants)
    assert digits_quality.main([*QUICK, "--variants", "grey", "another digit"]) == 1
    rows = (re.split(" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines())
    found = {row[0]: row[1:] for row in rows}
    assert found["grey"][-1] == "more than noise"
    assert float(found["another digit"][2].split("±")[0]) < 10  # % read as asked


@needs_sklearn
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "1"], "argument --seeds: got '1', expected an integer of at least 2"),
        (["--images", "0"], "argument --images: got '0', expected a positive integer"),
        (["--steps", "ddim3000"], "argument --steps: "),
        (["--variants", "int3", "bf16"], "argument --variants: got int3, expected some of fp32, reference"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        digits_quality.main(arguments)
    assert message in capsys.readouterr().err


@needs_sklearn
def test_blocks_make_all_images() -> None:
    """Each once, with its own label, in order."""
    seen: list[tuple[int, list[int]]] = []

    def draw(labels: Tensor, images: range, seed: int) -> Tensor:
        assert labels.tolist() == [k % 10 for k in images]
        seen.append((seed, list(images)))
        return torch.randn(len(images), 1, 8, 8, generator=torch.Generator().manual_seed(seed * 1000 + images.start))

    ticks: list[tuple[str, int]] = []
    first, second = digits_quality.measure({"a": draw, "b": draw}, 2, 120, lambda name, count: ticks.append((name, count)))
    assert [sum(count for name, count in ticks if name == wanted) for wanted in "ab"] == [240, 240]
    assert [images for seed, images in seen if seed == 1][:3] == [list(range(50)), list(range(50, 100)), list(range(100, 120))]
    assert first.distances == second.distances
    assert second.distance_change.mean == second.distance_change.deviation == 0
    assert first.distances[0] != first.distances[1]
