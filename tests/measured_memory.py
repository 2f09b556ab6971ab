"""Peaks of memory that work takes beside its process, each measured in a child of its own; prints JSON."""

from __future__ import annotations

import json
import os
import resource
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import TensorDataset

import ditfast
from ditfast import DiTConfig
from ditfast.diffusion import GaussianDiffusion, steps
from ditfast.sampling import sample
from ditfast.training import Trainer, TrainSettings

TINY = DiTConfig(depth=1, hidden_size=32, num_heads=2, input_size=8, num_classes=4)
CONFIG = DiTConfig(depth=2, hidden_size=384, num_heads=6, input_size=32, num_classes=4)
BATCH = 8
SAMPLES = 32  # and as many without a class
TRAINED: dict[str, dict[str, Any]] = {
    "keep": {},
    "checkpoint": {"checkpoint_activations": True},
    "bf16": {"dtype": "bf16"},
}


def train(config: DiTConfig, batch: int, **recipe: Any) -> None:
    data = TensorDataset(torch.randn(batch, *config.input_shape), torch.zeros(batch, dtype=torch.long))
    with tempfile.TemporaryDirectory() as out:
        Trainer(ditfast.DiT(config), data, TrainSettings(steps=1, batch=batch, **recipe), out).run()


def draw(model: ditfast.DiT, batch: int) -> None:
    sample(model, steps(GaussianDiffusion("1"), "ddim"), [0] * batch, cfg_scale=2.0)


def peak_of(work: Callable[[], object]) -> int:
    """Return the bytes that work adds to a process's resident memory at its peak."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        work()
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        os.write(writer, str(1024 * (after - before)).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    return int(os.read(reader, 100))


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(TINY, 2)
    tiny, model = ditfast.DiT(TINY).eval(), ditfast.DiT(CONFIG).eval()
    draw(tiny, 1)
    peaks = {name: peak_of(lambda: train(CONFIG, BATCH, **recipe)) for name, recipe in TRAINED.items()}  # noqa: B023
    peaks["sample"] = peak_of(lambda: draw(model, SAMPLES))
    with ditfast.backend("torch"):
        peaks["sample by torch"] = peak_of(lambda: draw(model, SAMPLES))
    print(json.dumps(peaks))
