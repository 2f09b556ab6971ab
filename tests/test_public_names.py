"""The names that `import ditfast` gives."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from timm_style import SiT

import ditfast
from ditfast.diffusion import FlowMatching, GaussianDiffusion
from ditfast.evaluation import Report, Score

ROOT = Path(__file__).resolve().parents[1]
LAZY = ("evaluation", "sampling", "training")


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_lazy_modules_work_after_import_ditfast() -> None:
    code = """
import sys, ditfast
print(*(name for name in sys.modules if name.split(".")[:2] in (["ditfast", "evaluation"], ["ditfast", "training"])))
print(ditfast.sampling.Sampler.__name__, ditfast.training.Data.__name__, ditfast.evaluation.open_images.__name__)
print(ditfast.Trainer is ditfast.training.Trainer)
"""
    done = run_python(code)
    assert done.stdout == "\nSampler Data open_images\nTrue\n", done.stderr


def test_dir_lists_the_public_names_only() -> None:
    assert dir(ditfast) == sorted(ditfast.__all__)
    assert {"Trainer", *LAZY} <= set(dir(ditfast))
    names: dict[str, object] = {}
    exec("from ditfast import *", names)
    assert set(ditfast.__all__) <= set(names)


def test_a_misspelled_name_is_an_attribute_error_with_a_suggestion() -> None:
    with pytest.raises(AttributeError, match="module 'ditfast' has no attribute 'load_digit'"):
        getattr(ditfast, "load_digit")  # noqa: B009 - mypy knows that it is missing
    assert "Did you mean: 'training'?" in run_python("import ditfast; ditfast.trainin").stderr


def test_a_process_shows_how_it_was_made() -> None:
    made = [
        GaussianDiffusion(),
        GaussianDiffusion("ddim50", "cosine", False, "x0"),
        GaussianDiffusion([0, 999]),
        FlowMatching("gvp", 9),
    ]
    for process in made:
        shown = repr(process)
        same = eval(shown, {"GaussianDiffusion": GaussianDiffusion, "FlowMatching": FlowMatching})
        assert repr(same) == shown
        solver = next(iter(process.solvers))
        assert same.solvers[solver]() == process.solvers[solver]()


def test_reports_show_themselves_as_tables() -> None:
    report = ditfast.acceleration_report(ditfast.accelerate(SiT(depth=2).eval()))
    assert repr(report) == str(report)
    assert repr(report).splitlines()[0].split()[:2] == ["module", "family"]
    scores = [Score("fid", "Frechet distance", "lower", 1.62, 0.5, 82)]
    evaluated = Report("samples", 1000, "digits", 1797, "the digits classifier", scores, ["99.9% are read as asked"])
    heading, *table, note = repr(evaluated).splitlines()
    assert heading == "samples: 1,000 images against digits, 1,797 images, by the digits classifier"
    assert any("Frechet distance" in line and "1.620" in line and "82.000" in line for line in table)
    assert note == "99.9% are read as asked"


def test_the_example_trains_samples_and_evaluates(tmp_path: Path, one_thread: None) -> None:
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("train_on_digits", ROOT / "examples/train_on_digits.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    report = example.main(["--steps", "3", "--count", "100", "--out", str(tmp_path)])
    assert (report.count, report.reference) == (100, "digits")
    assert {"frechet_distance", "accuracy"} <= {score.key for score in report.scores}
