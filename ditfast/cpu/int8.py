"""What int8 gains and costs, measured where it is switched on."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import timer
from ..dtypes import DTYPES
from . import engine
from .packed import PRODUCTS

CPU = torch.device("cpu")
LEAST_SECONDS = 0.2  # of forwards behind each median
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Cost(NamedTuple):
    """Of int8, beside the dtype that the weights have."""

    dtype: torch.dtype
    seconds: float  # median of a forward
    plain_seconds: float
    error: float | None  # ||int8 - plain|| / ||plain||; None of a model that returns zeros

    def __str__(self) -> str:
        plain = DTYPE_NAMES[self.dtype]
        gain = self.plain_seconds / self.seconds
        times = f"{1e3 * self.seconds:.4g} ms a forward, {plain} {1e3 * self.plain_seconds:.4g} ms"
        error = "no error to tell: the output is zero" if self.error is None else f"relative error {self.error:.1e}"
        return f"int8: {gain:.2f} times as fast as {plain} ({times}), {error}"


def unfit(parameters: Iterable[Tensor]) -> str:
    """In words, the kinds of parameters that the CPU engine has no int8 for; empty if there are none."""
    kinds = {(parameter.device.type, parameter.dtype) for parameter in parameters}
    others = sorted(f"{dtype} on {device}" for device, dtype in kinds if device != "cpu" or dtype not in PRODUCTS)
    return f"weights of {', '.join(others)}" if others else ""


def forget(parameters: Iterable[Tensor]) -> None:
    """Drops what the CPU engine has packed of them, which it packs again where it is wanted."""
    found, _ = engine.found()
    if found is not None:
        found.forget(parameters)


@torch.no_grad()
def measure(
    run: Callable[..., Any],
    inputs: Sequence[tuple[Any, ...]],
    parameters: Sequence[nn.Parameter],
    switch: Callable[[bool], None],
) -> Cost:
    """Runs each of the inputs with int8 switched off, then on, and leaves it on.

    Args:
        run: a model without randomness; its first tensor is compared.
        inputs: arguments of a few forwards.
        parameters: the model's, all that is packed of which is dropped before and after.
        switch: turns int8 on or off.
    """
    outputs: list[list[Tensor]] = []
    seconds: list[float] = []
    for on in (False, True):
        switch(on)
        outputs.append([_first_tensor(run(*arguments)).double() for arguments in inputs])
        seconds.append(_median(run, inputs))
        if not on:
            forget(parameters)
    plain, found = (torch.cat([output.flatten() for output in each]) for each in outputs)
    error = ((found - plain).norm() / plain.norm()).item() if plain.any() else None
    return Cost(next(p.dtype for p in parameters if p.is_floating_point()), seconds[1], seconds[0], error)


def _median(run: Callable[..., Any], inputs: Sequence[tuple[Any, ...]]) -> float:
    times: list[float] = []
    while len(times) < len(inputs) or sum(times) < LEAST_SECONDS:
        times.append(timer.seconds(partial(run, *inputs[len(times) % len(inputs)]), CPU))
    return statistics.median(times)


def _first_tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return next(part for part in (output.values() if isinstance(output, dict) else output) if isinstance(part, Tensor))
