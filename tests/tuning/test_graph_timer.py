"""The timer of `ditfast tune`, which replays CUDA graphs, on a fake GPU."""

from __future__ import annotations

import pytest
import torch
from fake_cuda import FakeCuda
from fake_cuda.fixtures import fake_gpu

from ditfast.tuning.graph_timer import GraphTimer

__all__ = ["fake_gpu"]


def test_the_clock_divides_by_calls_and_repeats(fake_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a timer by which a replay takes a millisecond."""
    called: list[int] = []
    monkeypatch.setattr(torch.cuda.Event, "record", lambda event, stream=None: setattr(event, "at", fake_gpu.replays))
    monkeypatch.setattr(torch.cuda.Event, "elapsed_time", lambda start, end: float(end.at - start.at))
    monkeypatch.setattr(torch.cuda.Stream, "wait_stream", lambda stream, other: None)  # by an event
    timer = GraphTimer(torch.device("cuda", 0))
    assert timer.median_ms([lambda: called.append(0), lambda: called.append(1)]) == 0.5
    assert called == 4 * [0, 1]  # warm-ups and the capture
    assert (fake_gpu.captures, fake_gpu.replays) == (1, 2 + 11 * 2)


@pytest.mark.usefixtures("fake_gpu")
@pytest.mark.parametrize(("nbytes", "copies"), [(0, 32), (2**20, 32), (20_000_000, 6), (100_000_000, 2), (10**9, 1)])
def test_inputs_of_a_round_do_not_fit_the_cache(nbytes: int, copies: int) -> None:
    assert GraphTimer(torch.device("cuda", 0)).copies(nbytes) == copies
