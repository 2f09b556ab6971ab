"""The tables of predicted times: what they hold, and what they say of a file that is no measurement."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ditfast.benchmarks import predictions
from ditfast.benchmarks.predicted_tables import BATCHES, MODELS, NOTHING
from ditfast.flops import DEVICES
from ditfast.prediction import ASSUMPTIONS

RIVALS = ["eager", "compile", "ditfast", "eager+graph", "ditfast+graph"]


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert predictions.main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def tables(text: str) -> list[list[list[str]]]:
    """Of each table its rows without the rule, of each row its cells."""
    found = [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]
    return [[line.strip("| ").split(" | ") for line in lines if not line.startswith("|---")] for lines in found]


def bench_json(path: Path, device: str = "NVIDIA H100 80GB HBM3", **fields: Any) -> Path:
    """Made up, as benchmarks/bench.py would write it."""
    shape = {"model": "DiT-S/2", "dtype": "bf16", "batch": 1}
    rows = [{**shape, "rival": rival, "ms_median": 10.0 + i} for i, rival in enumerate(RIVALS)]
    rows.append({**shape, "rival": "ditfast", "model": "DiT-XL/2@512", "ms_median": 15.0})
    rows.append({**shape, "rival": "ditfast", "dtype": "fp32", "ms_median": None})
    rows.append({**shape, "rival": "ditfast", "model": "digits", "ms_median": 1.0})
    about = {"bench": "bench", "date": "2026-11-30", "commit": None, "command": None, "versions": {}, "notes": []}
    path.write_text(json.dumps({**about, "machine": {"device": device}, "rows": rows, **fields}))
    return path


def test_a_table_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    *devices, assumed = tables(printed(capsys, "--inference"))
    assert [found[0][0] for found in devices] == [f"{NOTHING}: {name}" for name in DEVICES]
    for found in devices:
        assert [cells[0] for cells in found[1:]] == MODELS
        assert {len(cells) for cells in found} == {1 + 2 * len(BATCHES)}
    assert [cells[0] for cells in assumed[1:]] == [assumption.name for assumption in ASSUMPTIONS]


def test_cells_are_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    """Floor, eager, fused; and images a second are those of the last."""
    for found in tables(printed(capsys, "--inference"))[:-1]:
        for cells in found[1:]:
            for batch, cell in zip(BATCHES, cells[1:], strict=False):
                floor, eager, fused, rate = map(float, re.split(" / |, ", cell))
                assert floor < fused < eager
                assert rate == pytest.approx(1e3 * batch / fused, rel=0.05)


def test_steps_that_do_not_fit_are_said_so(capsys: pytest.CaptureFixture[str]) -> None:
    steps = tables(printed(capsys))[len(DEVICES) : 2 * len(DEVICES)]
    largest = {found[0][0].split()[-1]: found[-1][-1] for found in steps}
    assert largest["A100"] == "does not fit"
    assert largest["MI300X"].endswith("*")
    assert not steps[0][1][1].endswith("*")


def test_the_summary_is_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = tables(printed(capsys, "--summary"))
    assert found[0][0].startswith(NOTHING)
    assert len(found) <= 7


def test_predicted_beside_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = tables(printed(capsys, "--measured", bench_json(tmp_path / "bench.json")))
    head, *rows = found
    assert head[0] == "NVIDIA H100 80GB HBM3, as H100"
    *small, large = rows
    assert [(cells[3], cells[4]) for cells in small] == [(r, f"{10.0 + i:.1f}") for i, r in enumerate(RIVALS) if r != "compile"]
    assert (large[0], large[4]) == ("DiT-XL/2@512", "15.0")
    for cells in rows:
        assert float(cells[6]) == pytest.approx(float(cells[4]) / float(cells[5]), rel=0.02)
    predicted = {cells[3]: float(cells[5]) for cells in small}
    assert predicted["ditfast+graph"] < predicted["eager+graph"] < predicted["eager"]
    assert predicted["ditfast+graph"] < predicted["ditfast"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "AMD EPYC 7763"}, "device: got 'AMD EPYC 7763', expected one of A100, H100"),
        ({"rows": []}, "got no row of eager or ditfast"),
        ({"machine": {}}, "got no results (KeyError('device'))"),
    ],
    ids=["CPU", "no rows", "no device"],
)
def test_what_cannot_be_compared(
    change: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bench_json(tmp_path / "bench.json", **change)
    with pytest.raises(SystemExit):
        predictions.main(["--measured", str(path)])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--training", "--batch", "0"], "got '0'"),
        (["--training", "--summary"], "not allowed with argument"),
        (["--measured", "/nowhere/bench.json"], "No such file"),
        (["--summary", "--out", "/nowhere/page.md"], "No such file"),
    ],
    ids=["batch", "two", "missing", "no folder"],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        predictions.main(arguments)
    assert message in capsys.readouterr().err


def test_a_page_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = printed(capsys, "--summary")
    assert printed(capsys, "--summary", "--out", tmp_path / "page.md") == ""
    assert (tmp_path / "page.md").read_text("utf-8") == expected
