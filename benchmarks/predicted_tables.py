"""The tables of predicted times, in Markdown: each says that nothing was run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from ditfast import DiTConfig
from ditfast.config import MODEL_NAMES
from ditfast.dtypes import DTYPES
from ditfast.flops import DEVICES, DeviceSpec, floor_ms, training_bytes
from ditfast.prediction import ASSUMPTIONS, predicted_model_ms
from ditfast.prediction.devices import spec_named

from .markdown import head, row
from .results import read

MODELS = [*MODEL_NAMES, "DiT-XL/2@512"]
IN_SUMMARY = ["DiT-S/2", "DiT-B/2", "DiT-L/2", "DiT-XL/2", "DiT-XL/2@512"]
BATCHES = (1, 8, 32, 128)
DTYPE = torch.bfloat16
NOTHING = "predicted, nothing was run"
LEFT_FREE = 0.1  # of memory: libraries' workspaces, and what the allocator cannot use
GRAPH = "+graph"
FUSED = {"eager": False, "ditfast": True}  # the rivals of bench.json that have a prediction

INFERENCE = """\
## A forward, bf16

Under a CUDA graph: floor / eager PyTorch / ditfast in ms, then ditfast's images/s. Launched from Python: eager PyTorch /
ditfast in ms, where the host's launches take the time if they take longer than the device; there ditfast's Python costs more
at small batches than the launches that it saves. Floors are `ditfast.flops.floor_ms` of the fused data flow at data sheets'
peaks. In ditfast each op takes the route that is predicted to be fastest on the device; eager attention is SDPA."""
STEP = """\
## A step of training, bf16 autocast, one GPU

Launched from Python: floor / eager PyTorch / ditfast in ms, then ditfast's images/s. Forward, backward, AdamW and one average
of the weights. With an asterisk: blocks' activations are computed again (`--checkpoint-activations`), because they do not fit
the device's memory less a tenth. Probably too fast: for DiT-XL/2 in PyTorch at batch 128 on one A100, 107 images/s are
published with every block computed again (chuanyangjin/fast-DiT), which is a third more work; here it is twice as many."""
ASSUMED = """\
## What is assumed

Beside data sheets' peaks (`ditfast/flops/devices.py`) and static counts of the compiled kernels
(`ditfast/prediction/counts.json`). None of it was measured here. sm_80 is A100, sm_90 H100 and H200, sm_100 B200, gfx942
MI300X."""


def inference() -> Iterator[str]:
    """Blocks of Markdown: what a table says, then a table a device."""
    yield INFERENCE
    for device in DEVICES.values():
        yield "\n".join(_forwards(device))


def training() -> Iterator[str]:
    yield STEP
    for device in DEVICES.values():
        yield "\n".join(_steps(device))


def assumptions() -> Iterator[str]:
    yield ASSUMED
    rows = (row(name, _value(value), reason) for name, value, reason in ASSUMPTIONS)
    yield "\n".join([*head("assumed", "value", "because"), *rows])


def summary() -> Iterator[str]:
    """For the README."""
    device, batches = DEVICES["H100"], (1, 8, 32)
    lines = [*head(f"{NOTHING}: {device.name}, bf16", *(f"batch {batch}: floor / eager / ditfast, ms" for batch in batches))]
    for name in IN_SUMMARY:
        config = config_of(name)
        lines.append(row(name, *(" / ".join(map(_ms, _graphs(config, batch, device))) for batch in batches)))
    yield "\n".join(lines)


def beside_measured(path: Path) -> Iterator[str]:
    """Rows of a bench.json that have a prediction: eager PyTorch's and ditfast's of the paper's models.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no bench.json; it was measured on a device that is not known; no row has a prediction.
    """
    results = read(path)
    name = results.machine["device"]
    device = spec_named(name)
    if device is None:
        raise ValueError(f"device: got {name!r}, expected one of {', '.join(DEVICES)}")
    lines = []
    for found in results.rows:
        rival, _, graph = found["rival"].partition(GRAPH[0])
        model = found["model"]
        if found["ms_median"] is None or rival not in FUSED or model not in MODELS:
            continue
        config, dtype, measured = config_of(model), DTYPES[found["dtype"]], found["ms_median"]
        ms = predicted_model_ms(config, found["batch"], dtype, device, fused=FUSED[rival], graph=bool(graph))
        cells = (model, found["dtype"], str(found["batch"]), found["rival"], _ms(measured), _ms(ms), f"{measured / ms:.2f}")
        lines.append(row(*cells))
    if not lines:
        raise ValueError(f"{path}: got no row of {' or '.join(FUSED)} on {', '.join(MODELS)}, expected at least one")
    title = f"{name}, as {device.name}"
    yield "\n".join([*head(title, "dtype", "batch", "rival", "measured, ms", "predicted, ms", "measured / predicted"), *lines])


def config_of(model: str) -> DiTConfig:
    """Of ``"DiT-XL/2"``, or with its pixels, ``"DiT-XL/2@512"``."""
    name, _, pixels = model.partition("@")
    return DiTConfig.from_name(name, image_size=int(pixels or 256))


def _forwards(device: DeviceSpec) -> Iterator[str]:
    graphs, launched = (f"batch {batch}" for batch in BATCHES), (f"launched, {batch}" for batch in BATCHES)
    yield from head(f"{NOTHING}: {device.name}", *graphs, *launched)
    for name in MODELS:
        config = config_of(name)
        found = [(batch, _graphs(config, batch, device)) for batch in BATCHES]
        cells = [f"{' / '.join(map(_ms, times))}, {_rate(batch, times[-1])}" for batch, times in found]
        pairs = (_both(config, batch, device, "none") for batch in BATCHES)
        yield row(name, *cells, *(" / ".join(map(_ms, pair)) for pair in pairs))


def _steps(device: DeviceSpec) -> Iterator[str]:
    yield from head(f"{NOTHING}: {device.name}", *(f"batch {batch}" for batch in BATCHES))
    for name in MODELS:
        yield row(name, *(_step(config_of(name), batch, device) for batch in BATCHES))


def _step(config: DiTConfig, batch: int, device: DeviceSpec) -> str:
    limit = (1 - LEFT_FREE) * device.memory
    fitting = [plan for plan in ("keep", "checkpoint") if training_bytes(config, batch, DTYPE, plan).total <= limit]
    if not fitting:
        return "does not fit"
    plan = fitting[0]
    times = (floor_ms(config, batch, DTYPE, device, plan), *_both(config, batch, device, plan))
    return f"{' / '.join(map(_ms, times))}, {_rate(batch, times[-1])}{'*' if plan == 'checkpoint' else ''}"


def _graphs(config: DiTConfig, batch: int, device: DeviceSpec) -> tuple[float, ...]:
    """Floor, eager and fused."""
    return floor_ms(config, batch, DTYPE, device), *_both(config, batch, device, "none", graph=True)


def _both(config: DiTConfig, batch: int, device: DeviceSpec, plan: str, *, graph: bool = False) -> Iterable[float]:
    return [predicted_model_ms(config, batch, DTYPE, device, plan, fused=fused, graph=graph) for fused in FUSED.values()]


def _value(value: float | dict[str, float]) -> str:
    return ", ".join(f"{name} {number:g}" for name, number in value.items()) if isinstance(value, dict) else f"{value:g}"


def _ms(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _rate(batch: int, ms: float) -> str:
    return f"{1e3 * batch / ms:.0f}"
