"""Runs into folders, with a quick painter: which blocks are made, what stays, what is refused, what a full disk does."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from full_disk import files_end_at
from sampling_cli import content

from ditfast.files import whole_file
from ditfast.images import Pixels, load_png, save_png
from ditfast.sampling.folder import FolderError, ImageFolder, RunStopped
from ditfast.sampling.painter import drawn_label
from ditfast.sampling.ranks import Ranks
from ditfast.sampling.settings import differences, digest
from ditfast.training.folder import claim

SETTINGS = {"seed": 0, "steps": "250", "model": {"depth": 2, "flavour": "official"}, "interval": [0.5, 2.0]}
ALONE = Ranks()


class Painter:
    """Noise that depends on an image and on its block, as rounding does; 64 x 64, so that a file has kilobytes."""

    def __init__(self) -> None:
        self.painted: list[range] = []

    def __call__(self, block: range) -> Pixels:
        self.painted.append(block)
        return np.stack([np.random.default_rng([k, len(block)]).integers(0, 256, (64, 64, 3)).astype(np.uint8) for k in block])


def started(path: Path, num: int = 10, batch: int = 4, **settings: Any) -> ImageFolder:
    folder = ImageFolder(path, num, batch)
    folder.claim({**SETTINGS, **settings}, {"checkpoint": "here.pt"}, file_bytes=64 * 64 * 3)
    return folder


def finished(path: Path) -> ImageFolder:
    folder = started(path)
    folder.fill(folder.unfinished(ALONE), Painter())
    return folder


# ------------------------------------------------------------------------------------------------ what is made
def test_all_images_are_there(tmp_path: Path) -> None:
    folder = finished(tmp_path / "a" / "b")
    assert sorted(content(folder.path)) == [*(f"{k:06d}.png" for k in range(10)), "run.json"]
    assert (load_png(folder.file(9)) == Painter()(range(8, 10))[1]).all()
    assert folder.missing() == folder.unfinished(ALONE) == []


def test_a_second_start_makes_whole_blocks_and_writes_what_is_missing(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    before = content(tmp_path)
    for k in (1, 2, 9):
        folder.file(k).unlink()
    identities = {file: file.stat().st_ino for file in tmp_path.iterdir()}
    folder, painter = started(tmp_path), Painter()
    assert folder.missing() == [1, 2, 9]
    folder.fill(folder.unfinished(ALONE), painter)
    assert painter.painted == [range(0, 4), range(8, 10)]
    assert content(tmp_path) == before
    assert {file: file.stat().st_ino for file in identities} == identities


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_ranks_share_the_blocks(world: int, tmp_path: Path) -> None:
    whole, shared = finished(tmp_path / "whole"), started(tmp_path / "shared")
    blocks = [shared.unfinished(Ranks(rank, world)) for rank in range(world)]
    assert sorted((block for mine in blocks for block in mine), key=lambda block: block.start) == whole.blocks
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1
    for mine in reversed(blocks):
        shared.fill(mine, Painter())
    assert content(shared.path) == content(whole.path)


def test_ranks_are_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Ranks.from_environment() == ALONE
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert Ranks.from_environment() == Ranks(rank=5, world=8, local=1)


def test_images_of_another_process_stay(tmp_path: Path) -> None:
    folder = started(tmp_path)

    def paint(block: range) -> Pixels:  # meanwhile somebody writes the block's first image
        save_png(folder.file(block.start), np.zeros((1, 1, 1), np.uint8))
        return Painter()(block)

    folder.fill(folder.unfinished(ALONE), paint)
    assert [load_png(folder.file(k)).size for k in (0, 1, 4, 8)] == [1, 64 * 64 * 3, 1, 1]


def test_what_killed_processes_left_goes(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    before = content(tmp_path)
    (tmp_path / ".000003.png.0123abcd.part").write_bytes(b"half")
    assert started(tmp_path).missing() == []
    folder.tidy()
    assert content(tmp_path) == before


def test_more_than_a_million_images_have_names_of_one_length(tmp_path: Path) -> None:
    folder = ImageFolder(tmp_path, 1_000_001, 500_000)
    assert [folder.file(k).name for k in (0, 1_000_000)] == ["0000000.png", "1000000.png"]
    assert folder.blocks[-1] == range(1_000_000, 1_000_001)


# ------------------------------------------------------------------------------------------------ what is refused
def test_other_settings_are_refused_with_the_difference(tmp_path: Path) -> None:
    finished(tmp_path)
    before = content(tmp_path)
    with pytest.raises(FolderError) as caught:
        started(tmp_path, seed=1, model={"depth": 3, "flavour": "official"}, interval=[0.5, 3.0])
    assert str(caught.value) == (
        f"{tmp_path}: holds a run with other settings: "
        "seed: was 0, is 1; model.depth: was 2, is 3; interval: was [0.5, 2.0], is [0.5, 3.0]; give another folder"
    )
    assert content(tmp_path) == before


def test_another_place_of_the_same_weights_is_no_other_setting(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    before = content(tmp_path)
    folder.claim(SETTINGS, {"checkpoint": "moved.pt"}, file_bytes=1)
    assert content(tmp_path) == before


def test_differences() -> None:
    assert differences(SETTINGS, json.loads(json.dumps(SETTINGS))) == ""
    assert differences({"a": 1, "old": "x"}, {"a": 1, "new": None}) == 'new: was absent, is null; old: was "x", is absent'
    assert differences({"a": list(range(99))}, {"a": 1}).endswith("..., is 1")
    assert len(differences({"a": list(range(99))}, {"a": 1})) < 100


def test_of_two_runs_that_begin_at_once_one_is_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def first(path: Path, needed: int, content: str) -> None:  # at the last moment before the record is written
        monkeypatch.undo()
        started(tmp_path, seed=7)

    monkeypatch.setattr("ditfast.sampling.folder.check_room", first)
    with pytest.raises(FolderError, match="seed: was 7, is 0"):
        started(tmp_path)


@pytest.mark.parametrize("record", ["", "{", "[]", '{"settings": 3}', "{}"])
def test_a_damaged_record_is_refused(record: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(record)
    with pytest.raises(FolderError, match=r"run\.json: does not hold a run's settings"):
        started(tmp_path)


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".hidden").touch()
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(FolderError, match=r"holds thesis\.tex and no run\.json"):
        started(tmp_path)
    assert sorted(content(tmp_path)) == [".hidden", "thesis.tex"]
    (tmp_path / "thesis.tex").unlink()
    started(tmp_path)


def test_a_folder_of_what_systems_leave_behind_is_empty(tmp_path: Path) -> None:
    for name in ("Thumbs.db", "desktop.ini", "._run.json", ".DS_Store"):
        (tmp_path / name).touch()
    started(tmp_path)
    claim(tmp_path / "run", {}, False)
    for name in ("THUMBS.DB", "Desktop.ini"):
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / name).touch()
    claim(tmp_path / "other", {}, False)


@pytest.mark.parametrize("inside", [".", "deeper"])
def test_a_file_in_the_way_is_refused(inside: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FolderError, match="a file is in the way"):
        started(tmp_path / "file" / inside)


def test_an_unwritable_place_is_refused() -> None:
    with pytest.raises(FolderError, match=r"^/proc/images: cannot be written: "):  # where not even root may
        started(Path("/proc/images"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_refused(tmp_path: Path) -> None:
    finished(tmp_path).file(3).unlink()
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(FolderError, match="cannot be written: Permission denied"):
            started(tmp_path)
    finally:
        tmp_path.chmod(0o700)


def test_too_little_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 10 * (64 * 64 * 3 + 4096)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(FolderError, match=r"the images take up to 163\.84 kB, but 163\.839 kB are free"):
        started(tmp_path)
    assert content(tmp_path) == {}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    folder = started(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    folder.fill(folder.unfinished(ALONE), Painter())
    started(tmp_path)  # nothing is missing, so nothing is needed


# ------------------------------------------------------------------------------------------------ full disks
def test_a_full_disk_leaves_whole_images_and_the_run_goes_on(tmp_path: Path) -> None:
    whole = finished(tmp_path / "whole")
    folder = started(tmp_path / "full")
    folder.fill(folder.unfinished(ALONE)[:1], Painter())
    with files_end_at(6000), pytest.raises(RunStopped) as caught:
        folder.fill(folder.unfinished(ALONE), Painter())
    assert str(caught.value).startswith(f"{folder.file(4)}: {os.strerror(errno.EFBIG)}; every image there is whole")
    assert sorted(content(folder.path)) == [*(f"{k:06d}.png" for k in range(4)), "run.json"]
    folder.fill(folder.unfinished(ALONE), Painter())
    assert content(folder.path) == content(whole.path)


def test_other_files_of_a_run_are_whole_too(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    with files_end_at(6000), pytest.raises(RunStopped, match=r"grid\.png: "):
        folder.write_once("grid.png", lambda path: save_png(path, Painter()(range(1))[0]))
    assert "grid.png" not in content(tmp_path)
    folder.write_once("grid.png", lambda path: save_png(path, np.zeros((1, 1, 1), np.uint8)))
    folder.write_once("grid.png", lambda path: path.unlink())  # there already
    assert "grid.png" in content(tmp_path)


def test_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with whole_file(path) as one, whole_file(path) as other:
        one.write_text("one")
        other.write_text("other")
        assert not path.exists()
    assert path.read_text() == "one"
    with whole_file(path, keep=True) as third:
        third.write_text("third")
    assert path.read_text() == "one"
    with contextlib.suppress(KeyboardInterrupt), whole_file(path) as fourth:
        fourth.write_text("four")
        raise KeyboardInterrupt
    assert content(tmp_path) == {"file": b"one"}


def test_whole_folders(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with contextlib.suppress(KeyboardInterrupt), whole_file(path) as half:
        half.mkdir()
        (half / "a").write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with whole_file(path) as whole:
        whole.mkdir()
        (whole / "a").write_text("whole")
        assert not path.exists()
    with contextlib.suppress(OSError), whole_file(path) as late:
        late.mkdir()
        (late / "b").write_text("late")
    assert content(path) == {"a": b"whole"}
    assert list(tmp_path.iterdir()) == [path]


def test_keeping_works_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*arguments: object) -> None:
        raise PermissionError(errno.EPERM, "not here")

    monkeypatch.setattr(os, "link", no_links)
    for text in ("one", "two"):
        with whole_file(tmp_path / "file", keep=True) as temporary:
            temporary.write_text(text)
    assert content(tmp_path) == {"file": b"one"}


# ------------------------------------------------------------------------------------------------ labels and weights
def test_labels_belong_to_seed_and_image() -> None:
    classes = [3, 7, 8]
    labels = [drawn_label(classes, k, seed=5) for k in range(3000)]
    assert [drawn_label(classes, k, seed=5) for k in (2999, 17)] == [labels[2999], labels[17]]
    assert all(900 < labels.count(label) < 1100 for label in classes)
    assert sum(drawn_label(classes, k, seed=6) == labels[k] for k in range(3000)) < 1200
    assert drawn_label(classes, 2**40, seed=2**64 - 1) in classes
    assert labels[:8] == [7, 7, 8, 8, 8, 8, 7, 7], "of all runs so far: a change makes them others"


def test_digests_tell_weights_apart() -> None:
    state = {"a": torch.zeros(2, 3), "b": torch.tensor(1.0)}
    others = [
        {"a": torch.zeros(3, 2), "b": torch.tensor(1.0)},
        {"a": torch.zeros(2, 3, dtype=torch.int32), "b": torch.tensor(1.0)},
        {"a": torch.zeros(2, 3), "c": torch.tensor(1.0)},
        {"a": torch.zeros(2, 3), "b": torch.tensor(1.0 + 2**-23)},
    ]
    assert digest(dict(reversed(state.items()))) == digest(state)
    assert digest({**state, "a": torch.zeros(3, 2).T}) == digest(state)
    assert len({digest(other) for other in [state, *others]}) == 5
    assert digest({"a": torch.zeros(2, dtype=torch.bfloat16)}) != digest({"a": torch.zeros(2, dtype=torch.float16)})
