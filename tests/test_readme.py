"""The README's promises that a machine can check."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_example_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(example, names)
    assert names["out"].shape == (2, 8, 32, 32)  # type: ignore[attr-defined]
    assert names["guided"].shape == (4, 8, 32, 32)  # type: ignore[attr-defined]


def test_figures_and_commands_exist() -> None:
    for path in re.findall(r"\]\((?!http)(.*?)\)", README):
        assert (ROOT / path).is_file()
    for name in re.findall(r"^ {4}(\S+/?) {2,}", README[README.index("## The house") :], re.MULTILINE):
        assert (ROOT / name).exists(), name


def test_ci_runs_the_test_command() -> None:
    command = "pip install -e '.[test]' && pytest"
    assert command in README
    assert command in (ROOT / ".ci" / "run").read_text()
