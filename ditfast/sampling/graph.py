"""A function captured once as a CUDA graph for each shape of its arguments, and replayed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Graphed:
    """``function`` of tensors (or None), captured at the first call with arguments of a shape, dtype and presence.

    A call copies its arguments into the graph's own buffers, replays, and returns the graph's output, which the next call
    overwrites. Other options, constants of the function, are another graph. Where capturing fails the function runs as it
    is, after one warning. The arguments are on one device, which need not be the current one.
    """

    def __init__(self, function: Callable[..., Tensor]):
        self.function = function
        self._graphs: dict[Any, tuple[list[Tensor | None], Tensor, Callable[[], None]]] = {}
        self._failed = False

    def __call__(self, *arguments: Tensor | None, **options: bool) -> Tensor:
        if self._failed:
            return self.function(*arguments, **options)
        with torch.cuda.device(next(a.device for a in arguments if a is not None)):  # whose streams capture and replay
            return self._replayed(arguments, options)

    def _replayed(self, arguments: tuple[Tensor | None, ...], options: dict[str, bool]) -> Tensor:
        key = (*(None if a is None else (a.shape, a.dtype, a.device) for a in arguments), *options.items())
        if key not in self._graphs:
            buffers = [None if a is None else a.clone() for a in arguments]
            try:
                output, replay = cuda_capture(lambda: self.function(*buffers, **options))
            except RuntimeError as error:
                self._failed = True
                first_line = str(error).strip().partition("\n")[0]
                warnings.warn(f"sampling goes on without a CUDA graph, whose capture failed: {first_line}", stacklevel=3)
                return self.function(*arguments, **options)
            self._graphs[key] = buffers, output, replay
        buffers, output, replay = self._graphs[key]
        for buffer, argument in zip(buffers, arguments, strict=True):
            if buffer is not None and argument is not None:
                buffer.copy_(argument, non_blocking=True)
        replay()
        return output


def cuda_capture(run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    """Warmed up on a stream of its own, as capturing wants it."""
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    return output, graph.replay
