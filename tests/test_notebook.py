"""Results that show themselves in a notebook, and progress there."""

from __future__ import annotations

import builtins
import importlib.machinery
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

import ditfast
from ditfast import terminal
from ditfast.benchmarks.results import new_results, read
from ditfast.cli import main
from ditfast.images import load_png
from ditfast.training import RunError, read_history

pytestmark = pytest.mark.usefixtures("one_thread")


def parsed(html: str) -> ElementTree.Element:
    """Return HTML as a tree; fails where a tag is not closed or text is not escaped."""
    return ElementTree.fromstring(f"<div>{html}</div>")


# ------------------------------------------------------------------------------------------------ results
def test_samples_are_an_image(tmp_path: Path) -> None:
    samples = ditfast.sample(ditfast.load_digits(), [3, 1], num_steps=2)
    png = samples._repr_png_()
    assert png is not None
    (tmp_path / "a.png").write_bytes(png)
    assert (load_png(tmp_path / "a.png") == samples.grid()).all()


def test_a_training_log_is_a_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "a <run>"
    assert main(["train", "--data", "digits", "--steps", "3", "--batch", "8", "--out", str(run), "--device", "cpu"]) == 0
    history = read_history(run)
    losses = [line["loss"] for line in history.log]
    assert (len(history), [line["step"] for line in history.log]) == (3, [1, 2, 3])
    tree = parsed(history._repr_html_())
    (curve,) = tree.iter("polyline")
    points = [tuple(map(float, point.split(","))) for point in curve.attrib["points"].split()]
    assert [x for x, _ in points] == [0, 320, 640]
    assert min(points, key=lambda point: point[1])[0] == 320 * losses.index(max(losses))  # the largest is at the top
    assert f"{losses[-1]:.4g}" in [cell.text for cell in tree.iter("td")]
    assert repr(history).startswith(f"History({str(run)!r}, 3 steps, step 3, loss {losses[-1]:.4g}")
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": null}\n{"step": 5, "lo')  # not finite, then cut off
    assert len(read_history(run)) == 4
    assert len(list(parsed(read_history(run)._repr_html_()).iter("polyline"))) == 1
    with pytest.raises(RunError, match=r"nothing: got no log\.jsonl, expected the folder of a training run"):
        read_history(tmp_path / "nothing")


def test_a_bench_result_is_a_table(tmp_path: Path) -> None:
    results = new_results("bench", torch.device("cpu"))
    rows = [{"rival": "eager", "ms": 2.0}, {"rival": "a<b", "ms": None, "launches": None, "over": {"eager": 2.5}}]
    results.rows, results.notes = rows, ["a note & more"]
    results.write(tmp_path / "bench.json")
    tree = parsed(read(str(tmp_path / "bench.json"))._repr_html_())
    assert [cell.text for cell in tree.iter("th")] == ["rival", "ms", "over"]
    assert [[cell.text for cell in row.iter("td")] for row in tree.iter("tr")][1:] == [
        ["eager", "2", None],
        ["a<b", None, "eager 2.5"],
    ]
    assert [line.text for line in tree.iter("p")][-1] == "a note & more"
    assert json.loads((tmp_path / "bench.json").read_text())["rows"] == rows


# ------------------------------------------------------------------------------------------------ progress
class ZMQInteractiveShell:
    """Stand-in for a notebook's kernel, known to rich by its name."""


class Notebook:
    """Stand-in for the packages IPython and ipywidgets: what was displayed, and what a widget showed one after the other."""

    def __init__(self) -> None:
        self.displayed: list[Any] = []
        self.shown: list[str] = []
        self.in_widget = False

    def display(self, *found: Any, **_: Any) -> None:
        if self.in_widget:
            self.shown += [one.text for one in found]
        else:
            self.displayed += found

    def widget(self) -> Any:
        notebook = self

        class Output:
            def __enter__(self) -> None:
                notebook.in_widget = True

            def __exit__(self, *error: object) -> None:
                notebook.in_widget = False

            def clear_output(self, wait: bool) -> None:
                pass

            def close(self) -> None:
                pass

        return Output


@pytest.fixture
def notebook(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Notebook]:
    """Let this process seem to be a notebook's, in which ipywidgets is installed if the parameter says so."""
    found = Notebook()
    packages: dict[str, dict[str, Any]] = {"IPython": {}, "IPython.display": {"display": found.display}}
    packages |= {"ipywidgets": {"Output": found.widget()}} if request.param else {}
    for name, content in packages.items():
        module = ModuleType(name)
        vars(module).update(content, __spec__=importlib.machinery.ModuleSpec(name, None))
        monkeypatch.setitem(sys.modules, name, module)
    if not request.param:
        monkeypatch.setitem(sys.modules, "ipywidgets", None)
    monkeypatch.setattr(builtins, "get_ipython", ZMQInteractiveShell, raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # rich's own for a missing ipywidgets, at each refresh
        yield found


@pytest.mark.parametrize("notebook", [True], indirect=True, ids=["ipywidgets"])
def test_progress_in_a_notebook_is_a_widget(notebook: Notebook, capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.track_progress("sampling", 8, "images") as progress:
        progress.update("half of it", done=4)
        progress._bar.refresh()
    widget, *rest = notebook.displayed
    assert hasattr(widget, "clear_output")
    assert not any(one.text for one in rest)
    assert any("4/8 images" in text and "half of it" in text for text in notebook.shown)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("notebook", [False], indirect=True, ids=["no-ipywidgets"])
def test_progress_without_widgets_is_a_line_now_and_then(notebook: Notebook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "FIRST_LINE_S", 0.0)
    with terminal.track_progress("sampling", 8, "images") as progress:
        for _ in range(8):
            progress.advance()
    (line,) = (shown.text for shown in notebook.displayed)
    assert line.startswith("sampling 1/8 images")
