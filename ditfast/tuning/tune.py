"""All op shapes of some models within a budget: first each one's backends, then kernel configs; what has most work first.

Their kernels are compiled before they are timed, the backends' together, then the configs' of each shape.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping

from ..dispatch.selection import forget, use_measured_configs
from ..dispatch.shapes import SIZES, OpShape
from ..dispatch.tuning_cache import Entry
from ..flops import DEVICES
from .compile import compile_kernels
from .graph_timer import Timer
from .measure import Measured, measure_backends, measure_configs

ORDERED_FOR = DEVICES["H100"]  # which shapes take long is much the same on all devices
TENSORS = {  # of the op's size, read and written
    "layer_norm_modulate": 2,
    "gated_residual": 3,
    "gated_residual_layer_norm_modulate": 4,
    "unpatchify": 2,
    "timestep_embedding": 1,
    "classifier_free_guidance": 2,
    "denoise_update": 4,
}
GRADIENTS = 2  # times a forward's work is its backward's


def one_a_bucket(shapes: Iterable[tuple[OpShape, int]]) -> dict[OpShape, int]:
    """Return the largest shape of each bucket of the tuning cache; the one with most work in a model comes first."""
    largest: dict[OpShape, tuple[OpShape, int]] = {}
    for shape, times in shapes:
        bucket = shape.bucket()
        if bucket not in largest or largest[bucket][0].rows < shape.rows:
            largest[bucket] = shape, times
    return dict(sorted(largest.values(), key=_cost, reverse=True))


def _cost(item: tuple[OpShape, int]) -> float:
    shape, times = item
    macs, values = work(shape)
    peak, bandwidth = ORDERED_FOR.peak(shape.dtype), ORDERED_FOR.bandwidth
    seconds = max(2 * macs / peak, values * shape.dtype.itemsize / bandwidth)
    return times * seconds * (1 + GRADIENTS * shape.training)


def work(shape: OpShape) -> tuple[int, int]:
    """Return the multiply-adds of a forward, and the values that it reads and writes, vectors left out."""
    rows, sizes = shape.rows, dict(zip(SIZES[shape.op], shape.sizes, strict=True))
    if "K" in sizes:
        N, K = sizes["N"], sizes["K"]
        weights = sizes["hidden"] * (N + K) if "hidden" in sizes else N * K
        residual = N if shape.op == "linear_gated_residual" else 0
        return rows * weights, weights + rows * (N + K + residual)
    if "d" in sizes:
        width, keys = sizes["H"] * sizes["d"], sizes.get("S", sizes["T"])
        return 2 * rows * keys * width, 2 * (rows + rows * keys // max(sizes["T"], 1)) * width
    return 0, TENSORS[shape.op] * rows * next(reversed(sizes.values()))


def tune(
    shapes: Mapping[OpShape, int],
    timer: Timer,
    budget: float,
    remember: Callable[[Mapping[OpShape, Entry]], None],
    show: Callable[[str, int, int], None],
) -> list[Measured]:
    """Measure shapes in their order.

    Args:
        shapes: and how often each comes in the model.
        timer: of the device.
        budget: seconds. Compiling before the first measurement takes half of them at most; a measurement that has begun when
            they are over is finished.
        remember: is given each shape's entry as soon as there is one, and again if its configs got better.
        show: is told what is being measured, how many of how many steps are done.

    Returns:
        What was found, one for each shape; those there was no time for have no ``ms``.
    """
    start = timer.seconds()
    found = [Measured(shape, times) for shape, times in shapes.items()]
    steps = 2 * len(found)

    def in_time(share: float = 1.0) -> bool:
        return timer.seconds() < start + share * budget

    def compile_them(shapes: Iterable[OpShape], step: int, every_config: bool, share: float = 1.0) -> None:
        def told(done: int, kernels: int) -> None:
            show(f"compiling kernels, {done} of {kernels}", step, steps)

        compile_kernels(shapes, timer.device, every_config, lambda: in_time(share), told)

    with _undisturbed(timer):
        compile_them(shapes, 0, every_config=False, share=0.5)
        for i, one in enumerate(found):
            if not in_time():
                one.notes.append("skipped: the budget is spent")
                continue
            show(f"{one.shape.op}: backends", i, steps)
            measure_backends(one, timer)
            _remember(one, remember)
        for i, one in enumerate(found):
            if not in_time():
                break
            if "triton" in one.ms:
                compile_them([one.shape], len(found) + i, every_config=True)
            show(f"{one.shape.op}: kernel configs", len(found) + i, steps)
            measure_configs(one, timer, in_time)
            _remember(one, remember)
    return found


def _remember(one: Measured, remember: Callable[[Mapping[OpShape, Entry]], None]) -> None:
    if one.ms:
        remember({one.shape.bucket(): one.entry})


@contextlib.contextmanager
def _undisturbed(timer: Timer) -> Iterator[None]:
    """Keep configs of an older tuning cache from launches inside; afterwards the new one is read."""
    use_measured_configs(timer.device)
    try:
        yield
    finally:
        forget()
