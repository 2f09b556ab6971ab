"""Every backend of a shape and every config of its kernels: checked against plain torch, then timed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..dispatch.backends import BACKENDS, has_triton, why_not
from ..dispatch.launchers import triton_kernels
from ..dispatch.override import on_trial
from ..dispatch.shapes import OpShape
from ..dispatch.tuning_cache import Config, ConfigKey, Entry
from .examples import Example, example
from .graph_timer import Timer

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Unit roundoffs by which two right results may differ, normwise: a few roundings of 16-bit values, or a sum of thousands in
# fp32 in another order. A wrong result differs by about its size.
ROUNDINGS = {torch.float32: 512, torch.bfloat16: 8, torch.float16: 8}


@dataclass
class Measured:
    """Measurements of a shape so far."""

    shape: OpShape
    times: int  # in the model
    ms: dict[str, float] = field(default_factory=dict)
    excluded: dict[str, str] = field(default_factory=dict)
    configs: dict[ConfigKey, Config] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what was skipped, and why

    @property
    def entry(self) -> Entry:
        return Entry(self.ms, self.excluded, self.configs)

    @property
    def plain(self) -> str:
        return BACKENDS[self.shape.op][0]

    @property
    def winner(self) -> str:
        return min(self.ms, key=lambda backend: self.ms[backend])


def measure_backends(found: Measured, timer: Timer) -> None:
    """Measure each backend that the device has, Triton at its built-in configs; none if plain torch cannot be run."""
    before = len(found.notes)
    with _prepared(found, timer) as prepared:
        for backend in BACKENDS[found.shape.op]:
            if why_not(backend, timer.device, found.shape):
                continue
            try:
                found.ms[backend] = prepared.ms(backend, {})
            except Exception as error:  # of somebody else's code, in a configuration that may be nobody's yet
                if isinstance(error, torch.OutOfMemoryError) or backend == found.plain:
                    raise
                found.excluded[backend] = _line(error)
    if len(found.notes) > before:
        found.ms.clear()


def measure_configs(found: Measured, timer: Timer, in_time: Callable[[], bool]) -> None:
    """Measure the configs of each kernel that the Triton backend launches, of one after the other, as long as there is time."""
    if "triton" not in found.ms:
        return
    with _prepared(found, timer) as prepared:
        for key, configs in prepared.candidates().items():
            for config in configs[1:]:
                if not in_time():
                    return
                try:
                    ms = prepared.ms("triton", {**found.configs, key: config})
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:
                    found.notes.append(f"{key[0]} in config {'x'.join(map(str, config))} excluded: {_line(error)}")
                    continue
                if ms < found.ms["triton"]:
                    found.ms["triton"] = ms
                    found.configs[key] = config


class Wrong(Exception):
    """Results that are not those of plain torch."""


class _Prepared:
    """Inputs of a shape on a device, copies of them, and the results of plain torch for the first."""

    def __init__(self, found: Measured, timer: Timer):
        self.op, self.dtype, self.timer = found.shape.op, found.shape.dtype, timer
        first = example(found.shape, timer.device, seed=0)
        others = range(1, timer.copies(first.nbytes))
        self.examples = [first, *(example(found.shape, timer.device, seed) for seed in others)]
        self.expected = self._run(found.plain, {}, first)

    def ms(self, backend: str, configs: Mapping[ConfigKey, Config]) -> float:
        """Raise Wrong, or what the backend raises."""
        check(self._run(backend, configs, self.examples[0]), self.expected, self.dtype)
        with on_trial(self.op, backend), _using(configs):
            return self.timer.median_ms([one.run for one in self.examples])

    def candidates(self) -> Mapping[ConfigKey, Sequence[Config]]:
        with triton_kernels().tiles.asking() as asked:
            self._run("triton", {}, self.examples[0])
        return asked

    def _run(self, backend: str, configs: Mapping[ConfigKey, Config], one: Example) -> tuple[Tensor, ...]:
        with on_trial(self.op, backend), _using(configs):
            return one.run()


@contextlib.contextmanager
def _prepared(found: Measured, timer: Timer) -> Iterator[_Prepared]:
    """Record failures as notes and go on with the next shape."""
    try:
        yield _Prepared(found, timer)
    except torch.OutOfMemoryError:
        found.notes.append("skipped: the device has too little memory")
    except Exception as error:
        found.notes.append(f"skipped: plain torch failed: {_line(error)}")


def check(found: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Raises Wrong if results differ by more than rounding."""
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            raise Wrong(f"result {i} is {tuple(one.shape)} {one.dtype}, plain torch's {tuple(other.shape)} {other.dtype}")
        difference, allowed = _difference(one.float(), other.float()), ROUNDINGS[dtype] * UNIT_ROUNDOFF[dtype]
        if not difference <= allowed:
            raise Wrong(f"result {i} is off by {difference:.1e}, {allowed:.1e} allowed")


def _difference(found: Tensor, expected: Tensor) -> float:
    """Of the worst row, relative to its norm, or to that of a mean row: one row that is wrong shows."""
    if found.numel() == 0:
        return 0.0
    rows = expected.flatten(0, -2) if expected.dim() > 1 else expected[None]  # [rows, columns]
    norms = rows.norm(dim=1)
    return ((found.view_as(rows) - rows).norm(dim=1) / norms.clamp(min=max(norms.mean().item(), 1e-30))).max().item()


def _using(configs: Mapping[ConfigKey, Config]) -> contextlib.AbstractContextManager[Any]:
    if not has_triton():
        return contextlib.nullcontext()
    tiles = triton_kernels().tiles
    return tiles.trying({tiles.Key(*key): config for key, config in configs.items()})


def _line(error: Exception) -> str:
    first = str(error).strip().partition("\n")[0]
    return first if isinstance(error, Wrong) else f"{type(error).__name__}: {first}"
