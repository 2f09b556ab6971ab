"""Tuning caches: written and read back, merged, and ignored with a line where they do not serve."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

from ditfast.dispatch import tuning_cache
from ditfast.dispatch.shapes import OpShape
from ditfast.dispatch.tuning_cache import Entry
from ditfast.tuning.save import save

VERSIONS = {"device": "NVIDIA H100 80GB HBM3", "torch": "2.13.0", "driver": "580.1"}
LINEAR = OpShape("linear", torch.bfloat16, 2048, (3456, 1152))
NORM = OpShape("layer_norm_modulate", torch.float32, 256, (256, 1152), training=True)
KEY = ("linear", "sm_90", torch.bfloat16, 2048, (3456, 1152))
FIRST = Entry({"torch": 0.25, "triton": 0.125}, {}, {KEY: (128, 256, 64, 8, 4)})
SECOND = Entry({"torch": 0.5}, {"triton": "result 0 is off by 1.0e+00"})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "h100.json"


def test_what_was_saved_is_read_back(path: Path) -> None:
    save(path, VERSIONS, {LINEAR: FIRST, NORM: SECOND})
    assert tuning_cache.load(path, VERSIONS) == {LINEAR: FIRST, NORM: SECOND}


def test_saving_merges_into_what_is_there(path: Path) -> None:
    save(path, VERSIONS, {LINEAR: FIRST})
    save(path, VERSIONS, {NORM: SECOND})
    save(path, VERSIONS, {LINEAR: SECOND})
    assert tuning_cache.load(path, VERSIONS) == {LINEAR: SECOND, NORM: SECOND}
    assert [other.name for other in path.parent.iterdir()] == ["h100.json"]


@pytest.mark.parametrize(
    ("name", "now"), [("device", "NVIDIA A100"), ("torch", "2.14.1"), ("driver", "unknown"), ("rocm", "7")]
)
def test_a_cache_of_other_versions_is_ignored_and_replaced(path: Path, name: str, now: str) -> None:
    save(path, VERSIONS, {LINEAR: FIRST})
    others = {**VERSIONS, name: now}
    with pytest.warns(UserWarning, match=f"h100.json was measured with {name} .*, now {now}: it is ignored; `ditfast tune`"):
        assert tuning_cache.load(path, others) == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(path, others, {NORM: SECOND})
        assert tuning_cache.load(path, others) == {NORM: SECOND}


def _changed(**fields: object) -> dict[str, object]:
    entry = {"op": "linear", "dtype": "bfloat16", "rows": 1, "sizes": [1, 1], "training": False}
    return {**entry, "ms": {"torch": 1.0}, "excluded": {}, "configs": [], **fields}


def _content(**fields: object) -> str:
    return json.dumps({"format": 2, "versions": VERSIONS, "entries": [_changed(**fields)]})


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("", id="empty"),
        pytest.param('{"format": 2, "versions": {', id="torn"),
        pytest.param("[]", id="another shape"),
        pytest.param('{"format": 2, "versions": null, "entries": []}', id="no versions"),
        pytest.param(_content(op="fft"), id="an op that is none"),
        pytest.param(_content(dtype="cat"), id="a dtype that is none"),
        pytest.param(_content(sizes=[1]), id="a size too few"),
        pytest.param(_content(ms={"torch": -1.0}), id="a negative time"),
        pytest.param(_content(ms={"torch": None}), id="no time"),
        pytest.param(_content(configs=[["linear", "sm_90"]]), id="half a config"),
    ],
)
def test_a_damaged_cache_is_ignored_with_a_line(path: Path, content: str) -> None:
    path.parent.mkdir()
    path.write_text(content, "utf-8")
    with pytest.warns(UserWarning, match="h100.json is damaged: it is ignored; `ditfast tune` measures again"):
        assert tuning_cache.load(path, VERSIONS) == {}


def test_bytes_that_are_no_text(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"\xff\xfe")
    with pytest.warns(UserWarning, match="cannot be read"):
        assert tuning_cache.load(path, VERSIONS) == {}


@pytest.mark.parametrize("other", [1, 3], ids=["earlier", "later"])
def test_another_format(path: Path, other: int) -> None:
    path.parent.mkdir()
    path.write_text(json.dumps({"format": other}), "utf-8")
    with pytest.warns(UserWarning, match=f"has format {other}, this ditfast reads 2"):
        assert tuning_cache.load(path, VERSIONS) == {}


def test_no_cache_is_no_warning(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning_cache.load(path, VERSIONS) == {}


def test_where_a_device_s_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DITFAST_TUNING", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning_cache.path_of("NVIDIA H100 80GB HBM3") == tmp_path / "ditfast" / "tuning" / "nvidia-h100-80gb-hbm3.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuning_cache.path_of("A100") == Path.home() / ".cache" / "ditfast" / "tuning" / "a100.json"
    monkeypatch.setenv("DITFAST_TUNING", "mine.json")
    assert tuning_cache.path_of("A100") == Path("mine.json")
    monkeypatch.setenv("DITFAST_TUNING", "off")
    assert tuning_cache.path_of("A100") is None
