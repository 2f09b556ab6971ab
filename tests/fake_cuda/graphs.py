"""CUDA graphs: the class below torch.cuda.CUDAGraph, and Triton's launches in a graph."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch

from .build import native

_numbers = itertools.count()
_python_work: dict[int, tuple[int, Callable[[], None]]] = {}  # number -> its graph, what to run
_capturing: list[int] = []
counts = {"captures": 0, "replays": 0}


def new_pool() -> tuple[int, int]:
    """Return what torch.cuda.graph_pool_handle does."""
    return 0, next(_numbers)


def record(run: Callable[[], None]) -> None:
    """Add something that Python launched to the graph that is being captured."""
    number = next(_numbers)
    _python_work[number] = _capturing[-1], run
    native().record_python(number)


def _drop(graph: int) -> None:
    native().drop_graph(graph)
    for number in [number for number, (owner, _) in _python_work.items() if owner == graph]:
        del _python_work[number]


class GraphBase:
    """``torch._C._CUDAGraph``: what runs between begin and end of a capture, run again by ``replay``."""

    def __new__(cls, keep_graph: bool = False) -> Any:
        graph = super().__new__(cls)
        graph.number_ = next(_numbers)
        graph.captured_ = False
        weakref.finalize(graph, _drop, graph.number_)
        graph.pool_ = (0, graph.number_)
        return graph

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        if capture_error_mode not in ("global", "thread_local", "relaxed"):
            raise RuntimeError(
                f"Unknown capture error mode. Expected `global`, `thread_local`, or `relaxed`, got {capture_error_mode}"
            )
        if self.captured_:
            raise RuntimeError(
                "This CUDAGraph instance already owns a captured graph. To capture a new graph, create a new instance."
            )
        native().begin_capture(self.number_)
        self.pool_ = pool or self.pool_
        _capturing.append(self.number_)

    def capture_end_pre(self) -> None:
        _capturing.pop()
        native().end_capture()
        counts["captures"] += 1
        self.captured_ = True

    def capture_end_post(self) -> None:
        pass

    def capture_end(self) -> None:
        """End the capture; torch 2.14 calls the two halves itself."""
        self.capture_end_pre()

    @property
    def _has_graph_exec(self) -> bool:
        return self.captured_

    def instantiate(self) -> None:
        self._check()

    def replay(self) -> None:
        self._check()
        counts["replays"] += 1
        done, count = 0, native().work_count(self.number_)
        while done < count:
            done, number = native().replay(self.number_, done)
            if number >= 0:
                _python_work[number][1]()
                done += 1

    def _check(self) -> None:
        if not self.captured_:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")

    def reset(self) -> None:
        self.captured_ = False
        _drop(self.number_)

    def pool(self) -> tuple[int, int]:
        return self.pool_

    def pools(self) -> list[tuple[int, int]]:
        return [self.pool_]

    def register_generator_state(self, generator: torch.Generator) -> None:
        """Generators of the fake draw on at every replay anyway."""

    def enable_debug_mode(self) -> None:
        pass

    def debug_dump(self, path: str) -> None:
        pass
