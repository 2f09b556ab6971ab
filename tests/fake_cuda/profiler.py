"""torch.profiler on the fake: the CPU's events, and a kernel's for every launch in the exported trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch.autograd.profiler import ProfilerActivity, ProfilerState, profile

from .build import native

_init, _start, _exit, _export = profile.__init__, profile._start_trace, profile.__exit__, profile.export_chrome_trace


def init(self: Any, *args: Any, **kwargs: Any) -> None:
    """Let kineto record the CPU only: there is no CUPTI to ask for the GPU's events."""
    _init(self, *args, **kwargs)
    self.fake_launches = 0
    if self.use_device == "cuda":
        self.profiler_kind = ProfilerState.KINETO
        self.kineto_activities.discard(ProfilerActivity.CUDA)


def start_trace(self: Any) -> None:
    self.fake_launches = -native().launches()
    _start(self)


def leave(self: Any, *exception: Any) -> Any:
    self.fake_launches += native().launches()
    return _exit(self, *exception)


def export_chrome_trace(self: Any, path: str, *args: Any, **kwargs: Any) -> None:
    """Write the trace, with as many kernels as were launched."""
    _export(self, path, *args, **kwargs)
    if self.use_device == "cuda" and Path(path).exists():
        trace = json.loads(Path(path).read_text())
        kernel = {"ph": "X", "cat": "kernel", "name": "kernel", "pid": 0, "tid": 7, "dur": 1}
        first = min((event["ts"] for event in trace["traceEvents"] if "ts" in event), default=0)
        trace["traceEvents"] += [{**kernel, "ts": first + i} for i in range(self.fake_launches)]
        Path(path).write_text(json.dumps(trace))


PATCHES = {"__init__": init, "_start_trace": start_trace, "__exit__": leave, "export_chrome_trace": export_chrome_trace}
