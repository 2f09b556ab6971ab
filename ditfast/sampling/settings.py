"""What decides the bytes of a run's images, as it is written down beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..version import __version__

_LONGEST_VALUE = 60


def digest(state: Mapping[str, Tensor]) -> str:
    """Of the names, shapes, dtypes and bits of tensors: 16 hexadecimal digits."""
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def device_kind(device: torch.device) -> str:
    """What rounds alike: two devices of one kind."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.backends.cpu.get_cpu_capability()}"


def versions() -> dict[str, str]:
    """Of the packages whose arithmetic it is."""
    return {"ditfast": __version__, "torch": torch.__version__, "numpy": np.__version__}


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """``seed: was 0, is 1; model.depth: was 12, is 28``; empty where nothing differs. Values as in JSON."""
    before, after = _flat(was), _flat(now)
    keys = list(dict.fromkeys([*after, *before]))
    values = [(key, before.get(key, "absent"), after.get(key, "absent")) for key in keys]
    return "; ".join(f"{key}: was {_short(old)}, is {_short(new)}" for key, old, new in values if old != new)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        found |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: json.dumps(value)}
    return found


def _short(value: str) -> str:
    return value if len(value) <= _LONGEST_VALUE else f"{value[:_LONGEST_VALUE]}..."
