"""All problems of some models within a budget: first each one's routes, then tiles; what costs the model most comes first.

Their kernels are compiled before they are timed, the routes' together, then the tiles' of each problem.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping

from ..flops import DEVICES
from ..ops.decisions import forget, use_tiles
from ..ops.routes import ROUTES
from ..prediction import predicted_ms
from ..problem import Problem
from .clock import Clock
from .compile import compile_kernels
from .measure import Measured, measure_routes, measure_tiles
from .record import Entry

ORDERED_FOR = DEVICES["H100"]  # which problems take long is much the same on all devices


def one_a_bucket(problems: Iterable[tuple[Problem, int]]) -> dict[Problem, int]:
    """Of the problems that records do not tell apart, the largest; the one that takes most of a model's time comes first."""
    largest: dict[Problem, tuple[Problem, int]] = {}
    for problem, times in problems:
        bucket = problem.bucket()
        if bucket not in largest or largest[bucket][0].rows < problem.rows:
            largest[bucket] = problem, times
    return dict(sorted(largest.values(), key=_cost, reverse=True))


def _cost(item: tuple[Problem, int]) -> float:
    problem, times = item
    return times * (predicted_ms(problem, ROUTES[problem.op][0], ORDERED_FOR) or 0.0)


def tune(
    problems: Mapping[Problem, int],
    clock: Clock,
    budget: float,
    remember: Callable[[Mapping[Problem, Entry]], None],
    show: Callable[[str, int, int], None],
) -> list[Measured]:
    """Measures problems in their order.

    Args:
        problems: and how often each comes in the model.
        clock: of the device.
        budget: seconds. Compiling before the first measurement takes half of them at most; a measurement that has begun when
            they are over is finished.
        remember: is given each problem's entry as soon as there is one, and again if its tiles got better.
        show: is told what is being measured, how many of how many steps are done.

    Returns:
        What was found, one for each problem; those there was no time for have no ``ms``.
    """
    start = clock.seconds()
    found = [Measured(problem, times) for problem, times in problems.items()]
    steps = 2 * len(found)

    def in_time(share: float = 1.0) -> bool:
        return clock.seconds() < start + share * budget

    def compile_them(problems: Iterable[Problem], step: int, every_config: bool, share: float = 1.0) -> None:
        def told(done: int, kernels: int) -> None:
            show(f"compiling kernels, {done} of {kernels}", step, steps)

        compile_kernels(problems, clock.device, every_config, lambda: in_time(share), told)

    with _undisturbed(clock):
        compile_them(problems, 0, every_config=False, share=0.5)
        for i, one in enumerate(found):
            if not in_time():
                one.notes.append("skipped: the budget is spent")
                continue
            show(f"{one.problem.op}: routes", i, steps)
            measure_routes(one, clock)
            _remember(one, remember)
        for i, one in enumerate(found):
            if not in_time():
                break
            if "triton" in one.ms:
                compile_them([one.problem], len(found) + i, every_config=True)
            show(f"{one.problem.op}: tiles", len(found) + i, steps)
            measure_tiles(one, clock, in_time)
            _remember(one, remember)
    return found


def _remember(one: Measured, remember: Callable[[Mapping[Problem, Entry]], None]) -> None:
    if one.ms:
        remember({one.problem.bucket(): one.entry})


@contextlib.contextmanager
def _undisturbed(clock: Clock) -> Iterator[None]:
    """By tiles of an older record, which a launch inside would look for; afterwards the new one is read."""
    use_tiles(clock.device)
    try:
        yield
    finally:
        forget()
