import json
from pathlib import Path

import pytest

from ditfast.class_names import ClassNameError, find_class, read_names

NAMES = ["tench, Tinca tinca", "crane", "golden retriever", "goldfish, Carassius auratus", "crane", "Egyptian cat"]


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(NAMES),
        "\n".join(NAMES) + "\n\n",
        json.dumps(NAMES),
        json.dumps({str(k): name for k, name in reversed(list(enumerate(NAMES)))}),
        json.dumps({str(k): [f"n{k:08d}", name] for k, name in enumerate(NAMES)}),
    ],
    ids=["lines", "blank lines at the end", "list", "object", "object with synsets"],
)
def test_files_of_names(text: str, tmp_path: Path) -> None:
    (tmp_path / "names").write_text(text)
    assert read_names(tmp_path / "names") == NAMES


@pytest.mark.parametrize("text", ["\n".join(NAMES), json.dumps(NAMES)], ids=["lines", "list"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["no-mark", "byte-order-mark"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"], ids=["unix", "windows", "old-mac"])
def test_files_saved_by_other_systems(text: str, mark: bytes, newline: str, tmp_path: Path) -> None:
    (tmp_path / "names").write_bytes(mark + (text + "\n").replace("\n", newline).encode())
    assert read_names(tmp_path / "names") == NAMES


def test_only_line_ends_part_names(tmp_path: Path) -> None:
    (tmp_path / "names").write_text("one\u2028name\nanother\x0bname\x85\n", "utf-8")
    assert read_names(tmp_path / "names") == ["one\u2028name", "another\x0bname"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
@pytest.mark.parametrize("text", ["tench\ncrane\n", '["tench", "crane"]'], ids=["lines", "list"])
def test_other_encodings_are_named(text: str, encoding: str, tmp_path: Path) -> None:
    (tmp_path / "names").write_bytes(text.encode(encoding))
    with pytest.raises(
        ClassNameError, match=r"cannot be read: it is not text in UTF-8 but in UTF-16 or UTF-32; save it as UTF-8$"
    ):
        read_names(tmp_path / "names")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"[1, 2]", "got JSON of other things than names"),
        (b'[["n01440764", "tench"], []]', "got JSON of other things than names"),
        (b'{"0": "tench", "2": "crane"}', "damaged or skips a number"),
        (b'["tench"', "damaged or skips a number"),
        (b"tench\xe9", "cannot be read: it is not text in UTF-8$"),
        (b"\xff\xfe", "cannot be read: it is not text"),
        pytest.param(b"[" * 100_000, "damaged or skips a number", id="deeply-nested"),
    ],
)
def test_files_without(content: bytes, fault: str, tmp_path: Path) -> None:
    (tmp_path / "names").write_bytes(content)
    with pytest.raises(ClassNameError, match=fault):
        read_names(tmp_path / "names")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ClassNameError, match="missing: cannot be read: No such file or directory"):
        read_names(tmp_path / "missing")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0),
        ("005", 5),
        ("golden retriever", 2),
        ("Golden_Retriever", 2),
        ("tench", 0),
        ("tinca  TINCA", 0),
        ("tench, Tinca tinca", 0),
        ("egyptian cat", 5),
    ],
)
def test_classes_are_found(text: str, number: int) -> None:
    assert find_class(text, len(NAMES), NAMES) == number


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("golden retreiver", "got 'golden retreiver', which no class is called; close are 'golden retriever' (2)"),
        ("zeppelin", "got 'zeppelin', which no class is called"),
        ("crane", "got 'crane', which is 1 (crane) and 4 (crane): give the number"),
        ("6", "got 6, expected 0..5"),
        ("-1", "got '-1', which no class is called"),
        ("9" * 5000, f"got '{'9' * 5000}', which no class is called"),
    ],
)
def test_classes_that_are_not_there(text: str, message: str) -> None:
    with pytest.raises(ClassNameError) as caught:
        find_class(text, len(NAMES), NAMES)
    assert str(caught.value) == message


def test_names_need_a_file() -> None:
    with pytest.raises(ClassNameError, match=r"got 'tench', expected a number 0\.\.5, or --labels with names"):
        find_class("tench", 6)
