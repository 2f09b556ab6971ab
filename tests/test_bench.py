"""The main job, on small models: its files, its refusals, and that nothing wrong is ever timed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ditfast import DiT
from ditfast.benchmarks import bench, rivals
from ditfast.benchmarks.report import Row
from ditfast.benchmarks.timing import bench_case

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def test_the_command_writes_table_json_and_plots(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/bench.py", "--models", "DiT-S/8", "--rivals", "eager", "ditfast", "--rounds", "5"]
    done = subprocess.run(
        [*command, "--device", "cpu", "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for expected in ("DiT-S/8", "digits", "GMACs", "TFLOP/s", "x eager", "ditfast"):
        assert expected in done.stdout
    report = json.loads((tmp_path / "bench.json").read_text())
    assert {"torch", "device", "threads", "git", "clock_mhz"} <= set(report["environment"])
    assert [(row["model"], row["rival"]) for row in report["rows"]] == [
        ("DiT-S/8", "eager"),
        ("DiT-S/8", "ditfast"),
        ("digits", "eager"),
        ("digits", "ditfast"),
    ]
    for row in report["rows"]:
        assert row["dtype"] == "bf16"
        assert row["ms_p20"] <= row["ms_median"] <= row["ms_p80"]
        assert row["images_per_s"] == pytest.approx(1e3 * row["batch"] / row["ms_median"])
        assert row["tflops_per_s"] == pytest.approx(row["gflops"] * row["batch"] / row["ms_median"])
    for plot in ("throughput.png", "ratios.png"):
        assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG")


def digits_rows(**options: object) -> tuple[list[Row], list[str]]:
    case = rivals.digits_case("fp32", CPU)
    return bench_case(case, ["eager", "ditfast"], 5, lambda phase: None)


def test_ratios_are_of_the_same_rounds() -> None:
    (eager, fast), remarks = digits_rows()
    assert not remarks
    assert eager.speedup_over.keys() == {"ditfast"}
    assert eager.speedup_over["ditfast"] * fast.speedup_over["eager"] == pytest.approx(1, rel=1e-6)


def test_a_red_parity_prints_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = DiT.forward
    monkeypatch.setattr(DiT, "forward", lambda self, x, t, y: 1.01 * right(self, x, t, y))
    (eager, fast), remarks = digits_rows()
    assert eager.parity
    assert eager.ms_median is not None
    assert not fast.parity
    assert fast.ms_median is None
    assert "ditfast is off by 1.0e-02" in remarks[0]


def test_compile_is_skipped_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    names, notes = rivals.available_rivals(["eager", "compile", "ditfast"], CPU)
    assert names == ["eager", "ditfast"]
    assert "needs a C++ compiler" in notes[0]


def test_cuda_adds_graphs_and_more_models() -> None:
    names, _ = rivals.available_rivals(["eager", "ditfast"], torch.device("cuda"))
    assert names == ["eager", "ditfast", "eager+graph", "ditfast+graph"]
    assert len(bench.CUDA_MODELS) == 13


def test_defaults_on_cpu() -> None:
    args = bench.parse_arguments(["--device", "cpu"])
    assert args.models == [f"DiT-{size}/{patch}" for size in "SB" for patch in (2, 4, 8)]
    assert (args.batch, args.dtype, args.rivals) == ([1], ["bf16"], ["eager", "compile", "ditfast"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "DiT-M/2"], "expected one of DiT-S/2"),
        (["--models", "DiT-S/2@100"], "multiples of 8"),
        (["--batch", "0"], "positive integer"),
        (["--rounds", "3"], "at least 5"),
        (["--dtype", "int8"], "choose from"),
        (["--rivals", "magic"], "choose from"),
        (["--device", "gpu"], "expected cpu, cuda or cuda:N"),
    ],
)
def test_bad_values_say_what_is_allowed(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.parse_arguments(arguments)
    assert message in capsys.readouterr().err
