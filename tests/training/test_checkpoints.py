"""Checkpoints: whole or not there, the same bits on other numbers of ranks, and what a damaged one is replaced by."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ranks_of_checkpoints as work
import torch
from full_disk import files_end_at
from interrupted_writes import interrupt_torch_save
from ranks_of_checkpoints import ALONE, Run, assert_same
from several_ranks import on_ranks
from torch import distributed

from ditfast.checkpoints.runs import sha256_of
from ditfast.training.checkpoints import CheckpointFault, Checkpoints, start_at_zero

pytestmark = pytest.mark.usefixtures("one_thread")
needs_gloo = pytest.mark.skipif(not distributed.is_available() or not distributed.is_gloo_available(), reason="needs gloo")

SHARES = {"1 rank": (1, "ddp"), "2 of DDP": (2, "ddp"), "2 of FSDP": (2, "fsdp"), "3 of FSDP": (3, "fsdp")}


def saved(folder: Path, *steps: int, keep: int = 2) -> Checkpoints:
    run = Run()
    checkpoints = Checkpoints(folder, keep, ALONE)
    for step in steps:
        run.step(step)
        checkpoints.save(step, run.state(), {"loss": step / 3})
    return checkpoints


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------------------ round trips
def test_a_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    run, other = Run(seed=0), Run(seed=1)
    run.step(0)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", 2, ALONE)
    about = {"scale": 2.0**16, "loss": 0.1 + 0.2, "settings": {"ema": (0.9, 0.5), "none": None}}
    path = checkpoints.save(1, run.state(), about)
    newest = checkpoints.newest()
    assert newest == (path, {**json.loads(json.dumps(about)), "step": 1})
    other.fill(checkpoints, path)
    assert_same(other.content(), run.content())
    for one in (run, other):
        one.step(1)
    assert_same(other.content(), run.content())


def test_a_state_is_filled_in_place(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 1, ALONE)
    path = checkpoints.save(1, {"a": {"b": torch.arange(6.0).reshape(2, 3)}}, {})
    whole = torch.zeros(3, 2)
    checkpoints.load(path, {"a": {"b": whole.T}})
    assert whole.tolist() == [[0, 3], [1, 4], [2, 5]]


@needs_gloo
def test_ctrl_c_in_a_write_is_no_fault_of_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_torch_save(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        saved(tmp_path, 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("2 of FSDP", "1 rank"),
        ("2 of DDP", "1 rank"),
        ("1 rank", "2 of DDP"),
        ("1 rank", "2 of FSDP"),
        ("2 of DDP", "2 of FSDP"),
        ("2 of FSDP", "2 of DDP"),
        ("2 of FSDP", "2 of FSDP"),
        ("3 of FSDP", "2 of FSDP"),
    ],
)
def test_other_ranks_load_the_same_bits(before: str, after: str, tmp_path: Path) -> None:
    for share, do in ((SHARES[before], work.save_after_two_steps), (SHARES[after], work.load_and_compare)):
        world, kind = share
        if world == 1:
            do(ALONE, tmp_path, kind)
        else:
            on_ranks(world, do, tmp_path, kind)


def test_an_optimizer_that_took_no_step_is_saved_as_one_that_took_none() -> None:
    run = Run()
    before = run.model.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    start_at_zero(run.called, run.optimizer)
    optimizer = run.state()["optimizer"]
    kept = [value for state in optimizer["state"].values() for value in state.values()]
    assert kept
    assert not any(value.any() for value in kept)
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    assert optimizer["param_groups"][0]["lr"] == 1e-2


# ------------------------------------------------------------------------------------------------ which ones stay
def test_the_last_ones_stay(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 5, 10, 15, keep=2)
    assert names(tmp_path) == ["step-00000010", "step-00000015"]
    assert checkpoints.newest() == (tmp_path / "step-00000015", {"loss": 5.0, "step": 15})


def test_steps_of_more_digits_are_later(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 99_999_999, 100_000_000, keep=1)
    assert names(tmp_path) == ["step-100000000"]
    assert checkpoints.newest() == (tmp_path / "step-100000000", {"loss": 100_000_000 / 3, "step": 100_000_000})


def test_where_nothing_was_saved_nothing_is_newest(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "step-3").mkdir()
    assert Checkpoints(tmp_path, 2, ALONE).newest() is None
    assert Checkpoints(tmp_path / "absent", 2, ALONE).newest() is None


def test_what_a_killed_process_left_is_no_checkpoint_and_goes(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".step-00000002.part")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoints.newest() == (tmp_path / "step-00000001", {"loss": 1 / 3, "step": 1})
    saved(tmp_path, 3)
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


# ------------------------------------------------------------------------------------------------ damage
def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def rewrite(file: Path) -> None:
    file.write_text(file.read_text().replace('"loss": 0.6', '"loss": 0.7'))


def forge(file: Path, **changes: Any) -> None:
    """Change a manifest, or leave out what is None, and give it the checksum that it has then."""
    manifest = {**json.loads(file.read_text()), **changes}
    manifest = {key: value for key, value in manifest.items() if key != "sha256" and value is not None}
    file.write_text(json.dumps({**manifest, "sha256": sha256_of(manifest)}))


DAMAGE = {
    "no manifest": (Path.unlink, "manifest.json", "manifest.json is missing"),
    "half a manifest": (cut, "manifest.json", "manifest.json is damaged"),
    "another manifest": (rewrite, "manifest.json", "manifest.json does not match its checksum"),
    "a manifest of something else": (lambda file: file.write_text("[1]"), "manifest.json", "manifest.json is damaged"),
    "a manifest of no files": (partial(forge, files=None), "manifest.json", "manifest.json is damaged"),
    "a manifest of a number of files": (partial(forge, files=2), "manifest.json", "manifest.json is damaged"),
    "a manifest of files without sizes": (
        partial(forge, files={"__0_0.distcp": {}}),
        "manifest.json",
        "manifest.json is damaged",
    ),
    "a manifest that tells nothing": (partial(forge, about=None), "manifest.json", "manifest.json is damaged"),
    "no tensors": (Path.unlink, "__0_0.distcp", "__0_0.distcp is missing"),
    "tensors cut off": (cut, "__0_0.distcp", r"__0_0.distcp has \d+ bytes, expected \d+"),
    "a bit flipped": (flip, "__0_0.distcp", "__0_0.distcp does not match its checksum"),
    "no index": (Path.unlink, ".metadata", ".metadata is missing"),
    "a bit of the index flipped": (flip, ".metadata", ".metadata does not match its checksum"),
}
each_damage = pytest.mark.parametrize(("damage", "file", "why"), DAMAGE.values(), ids=DAMAGE)


@each_damage
def test_a_damaged_one_is_named_and_the_one_before_taken(
    damage: Callable[[Path], object], file: str, why: str, tmp_path: Path
) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    damage(tmp_path / "step-00000002" / file)
    with pytest.warns(UserWarning, match=f"step-00000002: not a whole checkpoint: {why}$") as caught:
        assert checkpoints.newest() == (tmp_path / "step-00000001", {"loss": 1 / 3, "step": 1})
    assert len(caught) == 1


def test_damaged_ones_do_not_count_among_those_kept(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 4)
    cut(tmp_path / "step-00000004" / "__0_0.distcp")
    checkpoints, run = Checkpoints(tmp_path, 1, ALONE), Run()
    with pytest.warns(UserWarning, match="step-00000004"):
        checkpoints.newest()
    checkpoints.save(3, run.state(), {})
    assert names(tmp_path) == ["step-00000003", "step-00000004"]
    checkpoints.save(5, run.state(), {})
    assert names(tmp_path) == ["step-00000004", "step-00000005"]


def test_the_same_step_again_replaces_a_damaged_one_only(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    flip(tmp_path / "step-00000002" / "__0_0.distcp")
    for path in (tmp_path / "step-00000001", tmp_path / "step-00000002"):
        checkpoints.save(int(path.name[-1]), Run(seed=1).state(), {"again": True})
    assert json.loads((tmp_path / "step-00000001" / "manifest.json").read_text())["about"] == {"loss": 1 / 3}
    assert checkpoints.newest() == (tmp_path / "step-00000002", {"again": True, "step": 2})


def test_a_run_of_damaged_ones_only_does_not_begin_anew(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    for step in (1, 2):
        cut(tmp_path / f"step-0000000{step}" / "__0_0.distcp")
    with pytest.warns(UserWarning, match="step-0000000"), pytest.raises(CheckpointFault, match="no checkpoint in it is whole"):
        checkpoints.newest()
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


@needs_gloo
def test_all_ranks_hear_of_a_damaged_one(tmp_path: Path) -> None:
    on_ranks(2, work.all_ranks_hear_of_a_damaged_one, tmp_path)


# ------------------------------------------------------------------------------------------------ what cannot be done
@pytest.mark.parametrize("room", [0, 100_000, 600_000], ids=["none", "of some tensors", "of most tensors"])
def test_a_full_disk_leaves_the_older_ones(room: int, tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    run = Run()
    with files_end_at(room), pytest.raises(CheckpointFault, match=r"^[^\n]*step-00000002: File too large$"):
        checkpoints.save(2, run.state(), {})
    assert names(tmp_path) == ["step-00000001"]
    assert checkpoints.newest() == (tmp_path / "step-00000001", {"loss": 1 / 3, "step": 1})
    checkpoints.save(2, run.state(), {})
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


@needs_gloo
def test_a_full_disk_of_one_rank_is_everybodys(tmp_path: Path) -> None:
    on_ranks(2, work.one_ranks_disk_is_full, tmp_path)


@needs_gloo
def test_ranks_that_share_no_folder_are_told(tmp_path: Path) -> None:
    on_ranks(2, work.ranks_share_no_folder, tmp_path)


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    checkpoints = Checkpoints(tmp_path / "run", 1, ALONE)
    for attempt in (lambda: checkpoints.save(1, Run().state(), {}), checkpoints.newest):
        with pytest.raises(CheckpointFault, match=r"run.*: (File exists|Not a directory)$"):
            attempt()


def test_another_state_is_refused_in_one_line(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 1, ALONE)
    path = checkpoints.save(1, {"a": torch.zeros(3)}, {})
    for state in ({"b": torch.zeros(3)}, {"a": torch.zeros(4)}):
        with pytest.raises(CheckpointFault, match=f"^{path}: [^\n]*(b|size)"):
            checkpoints.load(path, state)


# ------------------------------------------------------------------------------------------------ killed
def test_a_process_killed_while_saving_leaves_whole_ones(tmp_path: Path) -> None:
    last = 0
    for delay in (0, 0.02, 0.1):  # seconds: as a checkpoint appears, and anywhere
        process = multiprocessing.get_context("forkserver").Process(target=work.save_forever, args=(tmp_path,))
        process.start()
        deadline = time.monotonic() + 120
        while not (tmp_path / f"step-{last + 2:08d}").exists():
            assert process.is_alive()
            assert time.monotonic() < deadline
            pass
        time.sleep(delay)
        process.kill()
        process.join()
        checkpoints, run = Checkpoints(tmp_path, 2, ALONE), Run()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            newest = checkpoints.newest()
        assert newest is not None
        last = newest[1]["step"]
        run.fill(checkpoints, newest[0])
        assert run.plain["count"] == newest[1]["count"] == last
