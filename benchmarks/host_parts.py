"""Parts of the host time of a forward or of a training step: seconds inside functions, without those that they call."""

from __future__ import annotations

import collections
import contextlib
import functools
import math
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ditfast import ops
from ditfast.dispatch import op, plan

from .plots import saved_figure

MODEL, CHECKS, PLAN, ALLOCATION, AUTOGRAD, LAUNCH = "model", "checks and key", "plan", "allocation", "autograd", "launch"
PARTS = (MODEL, CHECKS, PLAN, ALLOCATION, AUTOGRAD, LAUNCH)
ROOT = ""  # around everything: its own time is that of whoever calls the model
CALIBRATIONS, CALIBRATION_CALLS = 50, 500  # of which the shortest counts: other processes only lengthen one


class Stopwatches:
    """Seconds in each part, less the parts inside it and less what measuring takes.

    One stack serves all threads: while autograd's thread runs a backward, the one that called it waits.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._inside, self._outside = 0.0, 0.0
        self.reset()
        self._inside, self._outside = self._calibrate()

    def reset(self) -> None:
        self._seconds = dict.fromkeys((ROOT, *PARTS), 0.0)
        self._calls: collections.Counter[str] = collections.Counter()
        self._children: collections.Counter[str] = collections.Counter()
        self._stack: list[list[Any]] = [[ROOT, 0.0]]  # parts under way, and the seconds of their children

    def timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """Return the function, whose time counts for a part."""
        clock = self._clock

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            stack = self._stack
            parent = stack[-1]
            entry: list[Any] = [part, 0.0]
            stack.append(entry)
            start = clock()
            try:
                return function(*args, **kwargs)
            finally:
                seconds = clock() - start
                stack.pop()
                parent[1] += seconds
                self._seconds[part] += seconds - entry[1]
                self._calls[part] += 1
                self._children[parent[0]] += 1

        return call

    def seconds(self, part: str) -> float:
        """Return the seconds in a part since ``reset``."""
        measuring = self._calls[part] * self._inside + self._children[part] * self._outside
        return max(0.0, self._seconds[part] - measuring)

    def _calibrate(self) -> tuple[float, float]:
        """Return what measuring one call adds to its own part, and what to the part that called it."""

        def often(function: Callable[[], None]) -> None:
            for _ in range(CALIBRATION_CALLS):
                function()

        timed, timed_often = self.timed(_nothing, LAUNCH), self.timed(often, PLAN)
        plain = inside = outside = math.inf
        for _ in range(CALIBRATIONS):
            start = self._clock()
            often(_nothing)
            plain = min(plain, self._clock() - start)
            self.reset()
            timed_often(timed)
            inside, outside = min(inside, self._seconds[LAUNCH]), min(outside, self._seconds[PLAN])
        # Both figures hold what a plain call takes, with its loop: one of them the call, the other the loop.
        return max(0.0, inside - plain / 2) / CALIBRATION_CALLS, max(0.0, outside - plain / 2) / CALIBRATION_CALLS


def _nothing() -> None:
    pass


@contextlib.contextmanager
def measured(watches: Stopwatches) -> Iterator[None]:
    """Time each part inside the ``with`` block."""
    with contextlib.ExitStack() as undo:
        for owner, name, part in _functions():
            function = vars(owner)[name]
            undo.callback(setattr, owner, name, function)
            if isinstance(function, types.FunctionType | types.BuiltinFunctionType):
                setattr(owner, name, watches.timed(function, part))
            else:  # a class method, of Python or, since torch 2.14, of C
                setattr(owner, name, classmethod(watches.timed(_unbound(function), part)))
        yield


def _unbound(method: Any) -> Callable[..., Any]:
    """Return a class method as a function of the class and its arguments."""
    return lambda cls, *args, **kwargs: method.__get__(None, cls)(*args, **kwargs)


def _functions() -> Iterator[tuple[Any, str, str]]:
    """Yield the functions that begin a part; what the others do counts for the part that calls them."""
    from triton.runtime import driver

    yield from ((ops, name, CHECKS) for name in ops.__all__)
    yield op.TritonOp, "__call__", CHECKS  # which a backward calls
    yield plan.Plan, "__call__", PLAN
    yield torch, "empty_strided", ALLOCATION
    yield torch.autograd.Function, "apply", AUTOGRAD
    yield torch.Tensor, "backward", AUTOGRAD
    yield driver.active.launcher_cls, "__call__", LAUNCH


def parts_us(
    call: Callable[[], object], before: Callable[[], None], rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Return microseconds of a warm call in each part, the least of the rounds: other processes only lengthen one.

    Args:
        call: a forward or a step.
        before: called in front of each, untimed.
        rounds: calls that count.
        clock: ``time.thread_time``, or ``time.perf_counter`` where a backward runs on a thread of its own.
    """
    watches = Stopwatches(clock)
    samples: dict[str, list[float]] = {part: [] for part in PARTS}
    with measured(watches):
        timed = watches.timed(call, MODEL)
        for i in range(-1, rounds):  # the first one warms up
            before()
            watches.reset()
            timed()
            for part, values in samples.items():
                values += [1e6 * watches.seconds(part)] * (i >= 0)
    return {part: min(values) for part, values in samples.items()}


def save_plot(path: Path, title: str, parts: Mapping[str, Mapping[str, float]], eager: Mapping[str, float]) -> None:
    """Draw a bar of microseconds for each kind of call, cut into its parts, with a line where eager PyTorch's would end."""
    with saved_figure(path, figsize=(8, 1 + 0.8 * len(parts))) as axes:
        left = dict.fromkeys(parts, 0.0)
        for part in PARTS:
            widths = [own[part] for own in parts.values()]
            axes.barh(list(parts), widths, 0.6, left=list(left.values()), label=part)
            left = {kind: before + width for (kind, before), width in zip(left.items(), widths, strict=True)}
        for place, kind in enumerate(parts):
            if kind in eager:
                axes.plot([eager[kind]] * 2, [place - 0.4, place + 0.4], color="black", label=None if place else "eager, whole")
        axes.invert_yaxis()
        axes.set(xlabel="host microseconds a call", title=title)
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
