"""Measurements and a summary for benchmarks/gpu.sh, beside the benches' own commands; files are in the folder that OUT names.

    python -m ditfast.benchmarks.gpu_first micro           measures host times and attention backends, into facts.jsonl
    python -m ditfast.benchmarks.gpu_first bench ...       is bench.py
    python -m ditfast.benchmarks.gpu_first training ...    is training.py
    python -m ditfast.benchmarks.gpu_first summary         prints the figures of all files
    python -m pytest -p ditfast.benchmarks.gpu_first       writes a line per test into tests.jsonl

In a dry run (DRY is set) models have one block, and peaks are measured on matrices that a CPU multiplies in no time.
"""

from __future__ import annotations

from ditfast import interrupt  # acts while the rest is imported

# isort: split
import argparse
import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ditfast import DiT, DiTConfig, ops, reference, timer
from ditfast.benchmarks import environment, gauges, rivals, timing
from ditfast.terminal import HelpFormatter, say

DRY = bool(os.environ.get("DRY"))
OUT = Path(os.environ.get("OUT", "."))
DEVICE = torch.device("cuda", 0)
DTYPE = torch.bfloat16
CALLS, WARMUP_CALLS = (3, 1) if DRY else (33, 3)
DRY_DIGITS = 16  # images
HEADS = 16
ATTENTION_BACKENDS = ("sdpa", "cudnn", "flash", "efficient", "triton")
FAILURES_SHOWN = 25


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu_first.py", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("command", choices=("micro", "bench", "training", "summary"))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of bench and training")
    args = parser.parse_args(argv)
    command, arguments = args.command, args.arguments
    if DRY:
        measure_small_ceilings()
    if command == "bench":
        from ditfast.benchmarks import bench

        if DRY:
            bench.config_of, rivals.DIGITS_BATCH = one_block, DRY_DIGITS
        return bench.main(arguments)
    if command == "training":
        from ditfast.benchmarks import training

        return training.main(arguments)
    return {"micro": micro, "summary": summary}[command]()


def one_block(model: str) -> DiTConfig:
    return dataclasses.replace(DiTConfig.from_name(model), depth=1)


def measure_small_ceilings() -> None:
    """Let the benches measure the GPU's peaks on sizes that a CPU can compute, and time the host once."""
    gauges.measure_ceilings = functools.partial(gauges.measure_ceilings, largest_copy=2**20, largest_side=64)
    gauges.ENERGY_WINDOW_S = 0.01
    timing.HOST_CALLS = 1


# ------------------------------------------------------------------------------------------------ pytest
def pytest_configure() -> None:
    if DRY:
        measure_small_ceilings()


def pytest_runtest_logreport(report: Any) -> None:
    """Write each outcome as it comes, so that a run that is cut off leaves what it found."""
    if "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.passed):
        return
    crash = getattr(report.longrepr, "reprcrash", None)
    reason = "" if report.passed else crash.message if crash else str(report.longrepr)
    outcome = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
    append("tests.jsonl", {**outcome, "reason": reason.partition("\n")[0][:200]})


# ------------------------------------------------------------------------------------------------ micro
def micro() -> int:
    versions = {**environment.versions(), "commit": environment.commit()}
    record_fact({"measured": "machine"}, lambda: {**environment.machine(DEVICE), **versions})
    with torch.inference_mode():
        for model, batch in itertools.product((reference.DiT, DiT), (1,) if DRY else (1, 8, 32)):
            name = model.__module__.removesuffix(".model")
            record_fact({"measured": "host time", "model": name, "batch": batch}, functools.partial(host_time, model, batch))
        for tokens, head_dim, backend in itertools.product((64,) if DRY else (64, 256, 1024), (64, 72), ATTENTION_BACKENDS):
            about = {"measured": "attention", "backend": backend, "T": tokens, "d": head_dim}
            record_fact(about, functools.partial(attention_speed, backend, tokens, head_dim))
    return 0


def host_time(model_class: type[torch.nn.Module], batch: int) -> dict[str, float]:
    """Return microseconds until a forward returns, and until the device is done with it."""
    config = one_block("DiT-S/8") if DRY else DiTConfig.from_name("DiT-XL/2")
    with DEVICE:
        model = model_class(config).to(DTYPE).eval()
        x = torch.randn(batch, *config.input_shape, dtype=DTYPE)
        t = torch.full((batch,), 500)
    times = [timer.host_seconds(lambda: model(x, t, t), DEVICE) for _ in range(CALLS)][WARMUP_CALLS:]
    host, total = (round(1e6 * statistics.median(column), 1) for column in zip(*times, strict=True))
    return {"host_us": host, "total_us": total}


def attention_speed(backend: str, tokens: int, head_dim: int) -> dict[str, float]:
    """Return microseconds of a call, its relative error against fp32, and TFLOP/s; four sets of inputs take turns."""
    from ditfast.tuning.graph_timer import GraphTimer

    batch, copies = (2, 1) if DRY else (8192 // tokens, 4)
    inputs = [torch.randn(batch, tokens, 3, HEADS, head_dim, device=DEVICE, dtype=DTYPE) for _ in range(copies)]
    exact = ops.attention(inputs[0].float(), "sdpa")
    error = (attend(backend, inputs[0]) - exact).norm() / exact.norm()
    us = 1e3 * GraphTimer(DEVICE).median_ms([functools.partial(attend, backend, qkv) for qkv in inputs])
    operations = 4 * batch * HEADS * tokens**2 * head_dim
    return {"us": round(us, 2), "error": round(error.item(), 6), "tflops": round(1e-6 * operations / us, 1)}


def attend(backend: str, qkv: Tensor) -> Tensor:
    if backend in ("sdpa", "triton"):
        return ops.attention(qkv, backend)
    with sdpa_kernel(getattr(SDPBackend, f"{backend.upper()}_ATTENTION")):
        return ops.attention(qkv, "sdpa")


def record_fact(about: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
    """Append a measurement, or the reason why there is none, to facts.jsonl."""
    try:
        fact = {**about, **measure()}
    except Exception as error:  # one that fails costs itself only
        fact = {**about, "failed": f"{type(error).__name__}: {error}".partition("\n")[0]}
    print(fact, flush=True)
    append("facts.jsonl", fact)


def append(name: str, entry: dict[str, Any]) -> None:
    with (OUT / name).open("a") as file:
        file.write(json.dumps(entry) + "\n")


# ------------------------------------------------------------------------------------------------ summary
def summary() -> int:
    for line in itertools.chain(bench_lines(), host_lines(), kernel_lines(), fact_lines(), test_lines()):
        say(line)
    return 0


def bench_lines() -> Iterator[str]:
    for name in ("forward", "compile", "training"):
        report = read_json(f"{name}.json")
        for row in report.get("rows", []):
            yield f"{name:9}{row['model']} b{row['batch']:<4}{row['rival']:15}" + ", ".join(bench_figures(row))
        yield from (f"{name} note: {note}" for note in report.get("notes", []))


def bench_figures(row: dict[str, Any]) -> Iterator[str]:
    yield f"{row.get('ms_median') or 0:9.3f} ms"
    yield from (f"{ratio:.2f} x {other}" for other, ratio in row["speedup_over"].items() if not other.startswith("ditfast"))
    if row.get("error") is not None:
        yield f"error {row['error']:.1e} of {row['allowed_error']:.1e}"
    if row.get("launches") is not None:
        yield f"{row['launches']} launches"
    if row.get("roofline_share_measured") is not None:
        yield f"{row['roofline_share_measured']:.0%} of the roofline"


def host_lines() -> Iterator[str]:
    report = read_json("host.json")
    for row in report.get("rows", []):
        ratio = "" if row["ratio"] is None else f", {row['ratio']:.2f} of {row['baseline']}"
        yield f"host     {row['kind']:21}{row['name']:36}{row['us']:9.1f} us{ratio}"
    yield from (f"host note: {note}" for note in report.get("notes", []))


def kernel_lines() -> Iterator[str]:
    for timed_op in read_json("kernels.json").get("benchmarks", []):
        row = timed_op["extra_info"]
        share = "" if row["share"] is None else f", {row['share']:.0%} of the roofline"
        yield f"kernel   {row['op']:36}{row['implementation']:8}{row['us']:9.1f} us{share}"


def fact_lines() -> Iterator[str]:
    for fact in read_lines("facts.jsonl"):
        yield "fact     " + ", ".join(f"{key} {value}" for key, value in fact.items())


def test_lines() -> Iterator[str]:
    outcomes = read_lines("tests.jsonl")
    counts = collections.Counter(test["outcome"] for test in outcomes)
    yield "tests    " + (", ".join(f"{count} {outcome}" for outcome, count in counts.items()) or "none ran")
    failures = collections.Counter(
        (test["test"].partition("::")[0], test["reason"][:110]) for test in outcomes if test["outcome"] == "failed"
    )
    for (file, reason), count in failures.most_common(FAILURES_SHOWN):
        yield f"  {count} x {file}: {reason}"


def read_json(name: str) -> dict[str, Any]:
    """Return what a bench left; nothing if it left no whole file."""
    try:
        report = json.loads((OUT / name).read_text())
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def read_lines(name: str) -> list[dict[str, Any]]:
    """Return the entries of a file of lines; a last line that was cut off is left out."""
    entries = []
    for line in (OUT / name).read_text().splitlines() if (OUT / name).exists() else []:
        with contextlib.suppress(ValueError):
            entries.append(json.loads(line))
    return entries


if __name__ == "__main__":
    raise SystemExit(interrupt.run("benchmarks/gpu_first.py", main))
