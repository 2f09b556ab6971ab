"""The tables of a CPU's times: the guides' are those of the committed JSON, and any subset of rivals makes some."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from ditfast.benchmarks import cpu_tables
from ditfast.benchmarks.cpu_tables import PARTS
from ditfast.benchmarks.rows import Row

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = ROOT / "docs/cpu-bench.json"
MADE_UP = {
    "bench": "bench",
    "date": "2026-11-30",
    "commit": None,
    "command": None,
    "machine": {"device": "a CPU", "threads": 2, "cpu features": "avx2 fma"},
    "versions": {"torch": "2.13.0", "openvino": "2026.4.1", "nncf": None},
    "notes": [],
}


def a_row(rival: str, ms: float | None, error: float = 1e-3, dtype: str = "bf16", **ratios: float) -> Row:
    fields: dict[str, Any] = {"model": "DiT-S/4", "batch": 8, "device": "cpu", "gmacs": 1.0, "gflops": 2.0, "parameters": 3}
    row = Row(rival=rival, dtype=dtype, error=error, allowed_error=0.01, parity=error <= 0.01, **fields)
    row.ms_median, row.ms_p20, row.ms_p80 = (None, None, None) if ms is None else (ms, ms - 1, ms + 1)
    row.speedup_over, row.first_call_s = {name.replace("_", "-"): ratio for name, ratio in ratios.items()}, 7.0
    return row


def bench_json(path: Path, rows: list[Row], **fields: Any) -> Path:
    """Made up, as benchmarks/bench.py would write it."""
    report = {**MADE_UP, "rows": [dataclasses.asdict(row) for row in rows]}
    path.write_text(json.dumps({**report, **fields}))
    return path


def printed(capsys: pytest.CaptureFixture[str], path: Path) -> tuple[str, list[dict[str, str]], list[dict[str, str]]]:
    """All of it, and the lines of both tables by column."""
    assert cpu_tables.main([str(path)]) == 0
    text = capsys.readouterr().out
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]
    lines = [[[cell.strip() for cell in line.split("|")[1:-1]] for line in (table[0], *table[2:])] for table in tables]
    summary, times = ([dict(zip(head, line, strict=True)) for line in rest] for head, *rest in lines)
    return text, summary, times


@pytest.mark.parametrize("guide", ["README.md", "docs/cpu.md"])
def test_a_guides_table_is_that_of_the_committed_json(guide: str) -> None:
    text = (ROOT / guide).read_text("utf-8")
    assert "`python benchmarks/cpu_tables.py docs/cpu-bench.json --into README.md docs/cpu.md`" in text.replace("\n", " ")
    assert cpu_tables.filled(text, cpu_tables.read(COMMITTED)) == text


def test_a_line_for_each_dtype_and_one_for_int8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        a_row("compile", 40.0, dtype="fp32"),
        a_row("ditfast", 20.0, dtype="fp32", compile=2.0),
        a_row("openvino", 15.0),
        a_row("openvino-int8", 8.0, error=0.004),
        a_row("ditfast+table", 10.0, openvino=1.5, openvino_int8=0.8),
        a_row("ditfast-int8", 6.0, error=0.002, openvino=2.5, openvino_int8=1.33),
        a_row("ditfast-int8+table", 5.0, error=0.002, openvino=3.0, openvino_int8=1.6),
    ]
    text, summary, times = printed(capsys, bench_json(tmp_path / "bench.json", rows))
    assert summary == [
        {
            "model, batch": "DiT-S/4, 8",
            "dtype": dtype,
            "torch.compile, ms": compiled,
            "OpenVINO, ms": openvino,
            "ditfast, ms": own,
            "with table, ms": table,
            "over torch.compile": over_compile,
            "over OpenVINO": over_openvino,
            "over OpenVINO int8": over_int8,
            "error: OpenVINO, ditfast": errors,
            "first call, s: torch.compile, OpenVINO, ditfast": first_calls,
        }
        for dtype, compiled, openvino, own, table, over_compile, over_openvino, over_int8, errors, first_calls in [
            ("fp32", "40", "", "20", "", "2.00, -", "", "", "-, 1.0e-03", "7, -, 7"),
            ("bf16", "", "15", "", "10", "", "-, 1.50", "-, 0.80", "1.0e-03, -", "-, 7, -"),
            ("int8, rest bf16", "", "8", "6", "5", "", "2.50, 3.00", "1.33, 1.60", "4.0e-03, 2.0e-03", "-, 7, 7"),
        ]
    ]
    assert [line["rival"] for line in times] == [cpu_tables.LABELS.get(row.rival, row.rival) for row in rows]
    assert times[-1]["p20 to p80"] == "4 to 6"
    assert "a CPU, avx2 fma, threads: 2, " in text
    assert "torch 2.13.0 (torch.compile); openvino 2026.4.1 (OpenVINO, OpenVINO int8); nncf of unknown version" in text


def test_rivals_that_were_not_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [a_row("eager", 10.0), a_row("ditfast", None, error=0.5)]
    notes = ["DiT-S/4 bf16 batch 8: openvino failed: RuntimeError: no such thing"]
    text, (line,), times = printed(capsys, bench_json(tmp_path / "bench.json", rows, notes=notes))
    assert (line["ditfast, ms"], line["error: OpenVINO, ditfast"]) == ("not timed", "-, 5.0e-01")
    assert "OpenVINO, ms" not in line
    assert (times[1]["ms"], times[1]["p20 to p80"], times[1]["error"]) == ("not timed", "", "5.0e-01")
    assert text.rstrip().endswith(f"- {notes[0]}")


def test_tables_go_where_they_are_marked(tmp_path: Path) -> None:
    bench = bench_json(tmp_path / "bench.json", [a_row("eager", 10.0)])
    guide = tmp_path / "guide.md"
    guide.write_text("before\n\n<!-- cpu-summary --> old\n<!-- /cpu-summary -->\n\nbehind\n")
    for _ in range(2):
        assert cpu_tables.main([str(bench), "--into", str(guide)]) == 0
        text = guide.read_text()
        assert text.startswith("before\n\n<!-- cpu-summary -->\n\na CPU")
        assert text.endswith("|\n\n<!-- /cpu-summary -->\n\nbehind\n")
        assert "| DiT-S/4, 8 | bf16 | 10 |" in text
        assert "old" not in text


@pytest.mark.parametrize(
    ("bench", "guide", "message"),
    [
        ("{}", "", "bench.json: got no results (KeyError('bench'))"),
        ("", "", "bench.json: got no results (JSONDecodeError"),
        (
            json.dumps({**MADE_UP, "rows": [{"speed": 1}]}),
            "",
            "bench.json: got rows of another version",
        ),
        (None, "", "No such file"),
        (COMMITTED.read_text("utf-8"), "a guide", "guide.md: got no <!-- cpu-summary --> or <!-- cpu-times --> with its end"),
        (COMMITTED.read_text("utf-8"), None, "No such file"),
    ],
    ids=["no results", "no JSON", "other rows", "no file", "no place", "no guide"],
)
def test_bad_files(
    bench: str | None, guide: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (("bench.json", bench), ("guide.md", guide)):
        if text is not None:
            (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit):
        cpu_tables.main([str(tmp_path / "bench.json"), "--into", str(tmp_path / "guide.md")])
    assert message in capsys.readouterr().err


def test_every_part_is_in_a_guide() -> None:
    guides = "".join((ROOT / name).read_text("utf-8") for name in ("README.md", "docs/cpu.md"))
    assert all(f"<!-- {name} -->" in guides for name in PARTS)
