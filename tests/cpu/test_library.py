"""Building the CPU engine: by whom, where it is kept, and what is said where it cannot be built."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ditfast.cpu import engine, library
from ditfast.files import cache_folder

NATIVE = frozenset({*library.AVX2, *library.AVX512, *library.EXTRAS})


def test_options_follow_the_cpu() -> None:
    assert library.options_for(frozenset(library.AVX2)) == ("-mavx2", "-mfma")
    everything = library.options_for(NATIVE)
    assert {"-mavx512f", "-mavx512bf16", "-mavx512vnni", "-mprefer-vector-width=512"} <= set(everything)
    assert "-mavx512bf16" not in library.options_for(NATIVE - {"avx512_bf16"})
    with pytest.raises(library.Unavailable, match="AVX2"):
        library.options_for(frozenset({"sse4_2"}))


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(library.Unavailable, match="needs a C\\+\\+ compiler, and 'no-such-compiler' is not installed"):
        library.build(("-mavx2",), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exit 0", "wrote nothing"),
        ("exit 3", "failed: exit status 3"),
        ("printf '\\377 oops\\n' >&2; exit 1", "failed: \N{REPLACEMENT CHARACTER} oops"),
    ],
)
def test_odd_compilers(script: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    with pytest.raises(library.Unavailable, match=f"{message}$"):
        library.build(("-mavx2",), tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("", ["g++"]),
        ("  ", ["g++"]),
        ("env g++ -g", ["env", "g++", "-g"]),
        ("'env'", ["env"]),
        ('"env" g++ "-DNAME=two words"', ["env", "g++", "-DNAME=two words"]),
        ("'{folder}/my tools/g++' -g", ["{folder}/my tools/g++", "-g"]),
        ("{folder}/my\\ tools/g++ -g", ["{folder}/my tools/g++", "-g"]),
        ("{folder}/my tools/g++", ["{folder}/my tools/g++"]),
    ],
)
def test_the_compiler_is_read_as_a_shell_would(
    value: str, words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tool = tmp_path / "my tools" / "g++"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("CXX", value.format(folder=tmp_path))
    assert library.compiler() == [word.format(folder=tmp_path) for word in words]


def test_an_open_quote_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "'g++ -g")
    with pytest.raises(library.NotBuilt, match=r"^CXX: got \"'g\+\+ -g\", expected a command, quoted as in a shell$"):
        library.compiler()


def compiler_of(folder: Path, content: str) -> Path:
    """A compiler that writes the same content each time, and a line in ``calls`` beside it."""
    path = folder / "compiler"
    path.write_text(f'#!/bin/sh\necho >> {folder}/calls\nwhile [ "$1" != -o ]; do shift; done\nprintf "{content}" > "$2"\n')
    path.chmod(0o755)
    return path


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def lengthened(path: Path) -> None:
    path.write_bytes(path.read_bytes() + bytes(40))


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)


def removed(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [emptied, cut_off, lengthened, flipped, removed])
def test_a_damaged_library_is_built_again(
    damage: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", str(compiler_of(tmp_path, "a library " * 20)))
    cache = tmp_path / "cache"
    path = library.build(("-mavx2",), cache)
    whole = path.read_bytes()
    damage(path)
    assert library.build(("-mavx2",), cache) == path
    assert path.read_bytes() == whole
    library.build(("-mavx2",), cache)
    assert (tmp_path / "calls").read_text() == "\n" * 2, "a whole library is not built again"
    assert list(cache.iterdir()) == [path]


def test_a_damaged_library_that_cannot_be_replaced_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", str(compiler_of(tmp_path, "a library")))
    path = library.build(("-mavx2",), tmp_path / "cache")
    path.unlink()
    path.mkdir()
    (path / "file").touch()
    with pytest.raises(library.NotBuilt, match=rf"^the CPU engine was not built: .*{path.name}.*XDG_CACHE_HOME"):
        library.build(("-mavx2",), tmp_path / "cache")


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder("cpu") == Path("/nonexistent/.cache/ditfast/cpu")


def test_a_compiler_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(library.Unavailable, match=r"failed: .*no-such-option"):
        library.build(("--no-such-option",), tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(library.Unavailable, match="was not built"):
        library.build(("-mavx2",), tmp_path / "file" / "cache")


def test_built_once_by_whoever_is_first(tmp_path: Path) -> None:
    options = ("-O0", "-mavx2", "-mfma")
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(lambda _: library.build(options, tmp_path), range(2)))
    assert paths[0] == paths[1]
    assert list(tmp_path.iterdir()) == [paths[0]]
    stamp = paths[0].stat().st_mtime_ns
    assert library.build(options, tmp_path).stat().st_mtime_ns == stamp
    library.load(paths[0])


def test_a_damaged_library_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.so"
    path.write_bytes(b"no library")
    with pytest.raises(library.Unavailable, match="does not load"):
        library.load(path)


def test_a_machine_without_a_compiler_runs_on_torch(tmp_path: Path) -> None:
    code = (
        "import torch, ditfast; from ditfast import cpu\n"
        "model = ditfast.load_digits()\n"
        "from ditfast.ops import torch_chain\n"
        "run, calls = torch_chain.run, []\n"
        "torch_chain.run = lambda *args: calls.append(1) or run(*args)\n"
        "with torch.inference_mode(): out = model(torch.zeros(2, 1, 8, 8), torch.tensor([0, 999]), torch.tensor([3, 10]))\n"
        "print(len(calls)); print(cpu.found()[1]); print(bool(out.isfinite().all()))"
    )
    environment = os.environ | {"CXX": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    calls, why, finite = done.stdout.splitlines()
    assert (calls, finite) == ("1", "True")
    assert why == "the CPU engine needs a C++ compiler, and 'no-such-compiler' is not installed"
    warning, *_ = done.stderr.splitlines()
    assert warning.endswith(f"UserWarning: {why}; without it blocks run on torch's kernels, slower")
    assert done.stderr.count("Warning") == 1


def test_a_cpu_that_cannot_have_it_is_told_nothing(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    monkeypatch.setattr(library, "cpu_features", lambda: frozenset({"sse4_2"}))
    assert engine.found.__wrapped__() == (None, "the CPU engine needs an x86 CPU with AVX2, and Linux")
    assert not recwarn.list
