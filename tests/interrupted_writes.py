"""Ctrl-C while torch.save writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch


class Interrupted:
    """A file whose third write is where Ctrl-C is heard."""

    def __init__(self, file: Any):
        self._file = file
        self._writes = 0

    def write(self, data: bytes) -> int:
        self._writes += 1
        if self._writes == 3:
            raise KeyboardInterrupt
        return int(self._file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def interrupt_torch_save(monkeypatch: pytest.MonkeyPatch) -> None:
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda content, file, *args, **kwargs: save(content, Interrupted(file), *args, **kwargs))
