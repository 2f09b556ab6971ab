"""Extraction: killed, started again, shared by ranks, refused; and its command."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from extraction import SIZE, extracted, extraction, photographs
from full_disk import files_end_at
from sampling_cli import content
from tiny_vae import saved

from ditfast.cli import main
from ditfast.files import PART
from ditfast.sampling.folder import FolderError, RunStopped
from ditfast.sampling.ranks import Ranks
from ditfast.training.data import Latents

ALONE = Ranks()
COMMAND = ["extract-latents", "--image-size", str(SIZE), "--batch", "2", "--shard", "3", "--device", "cpu"]


PATIENCE = 300.0  # seconds, on a machine that has much else to do


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None: ...


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    photographs(tmp_path / "photographs")
    return tmp_path


def test_a_second_start_writes_what_is_missing_the_same_bytes(folder: Path) -> None:
    path = extracted(folder)
    before, identities = content(path), {file.name: file.stat().st_ino for file in path.iterdir()}
    (path / "000001.safetensors").unlink()
    run = extraction(folder)
    assert run.unfinished(ALONE) == [1]
    extracted(folder)
    assert content(path) == before
    assert all((path / name).stat().st_ino == inode for name, inode in identities.items() if name != "000001.safetensors")


def test_readers_change_nothing(folder: Path) -> None:
    assert content(extracted(folder, "one", readers=1)) == content(extracted(folder, "four", readers=4))


def test_ranks_share_the_shards(folder: Path) -> None:
    runs = [extraction(folder, "shared") for _ in range(2)]
    for rank, run in enumerate(runs):
        run.claim({})
        assert run.unfinished(Ranks(rank, 2)) == [[0, 2], [1]][rank]
    for rank, run in enumerate(runs):
        run.write(run.unfinished(Ranks(rank, 2)))
    assert content(folder / "shared") == content(extracted(folder, "alone"))


def test_images_are_encoded_in_batches(folder: Path) -> None:
    run, done, encoded = extraction(folder), [], []
    run.vae.encoder.register_forward_pre_hook(lambda _, inputs: encoded.append(len(inputs[0])))
    run.claim({})
    run.write(run.unfinished(ALONE), done.append)
    assert done == [2, 1, 2, 1, 1]  # of shards of 3
    assert encoded == [2] * 2 * len(done)


# ------------------------------------------------------------------------------------------------ errors
def test_other_settings_are_refused_with_the_difference(folder: Path) -> None:
    extracted(folder)
    with pytest.raises(
        FolderError, match=r"latents: holds a run with other settings: shard: was 3, is 4; give another folder$"
    ):
        extraction(folder, shard=4).claim({})
    (folder / "photographs" / "bee" / "new.png").write_bytes(b"")
    with pytest.raises(FolderError, match=r"images: was 7, is 8; files: was \"\w+\", is \"\w+\"; give another folder$"):
        extraction(folder).claim({})


def test_a_full_disk_leaves_whole_shards(folder: Path) -> None:
    expected = content(extracted(folder, "whole"))
    run = extraction(folder)
    run.claim({})
    run.write([0])
    with files_end_at(6000), pytest.raises(RunStopped, match=r"000001\.safetensors: .*; every shard there is whole, and"):
        run.write([1, 2])
    assert sorted(content(run.folder.path)) == ["000000.safetensors", "index.json"]
    assert content(extracted(folder)) == expected


def test_latents_without_a_number_are_refused(folder: Path) -> None:
    run = extraction(folder)
    run.claim({})
    with torch.no_grad():
        run.vae.quant_conv.bias[1] = torch.nan
    with pytest.raises(FloatingPointError, match=r"the latents of ant/0\.png came out infinite or NaN"):
        run.write([0])
    assert sorted(content(run.folder.path)) == ["index.json"]


# ------------------------------------------------------------------------------------------------ the command
def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vae = saved(folder / "vae", scaling_factor=0.5, shift_factor=0.25)
    command = [*COMMAND, str(folder / "photographs"), str(folder / "latents"), "--vae", str(vae)]
    assert main(command) == 0
    assert capsys.readouterr().out == f"{folder / 'latents'}: 7 images of 2 classes, 0 unreadable\n"
    found, expected = Latents(folder / "latents"), Latents(extracted(folder, "expected"))
    assert found.fingerprint == expected.fingerprint
    assert all(torch.equal(found[k].values, expected[k].values) for k in range(7))
    (folder / "latents" / "000002.safetensors").unlink()
    (folder / "latents" / f".000002.safetensors.0123abcd{PART}").touch()
    assert main(command) == 0
    assert capsys.readouterr().out.startswith(f"{folder / 'latents'}: 2 of 3 shards are there already\n")
    assert sorted(content(folder / "latents")) == [*(f"{k:06d}.safetensors" for k in range(3)), "index.json"]
    assert main([*command, "--shard", "4"]) == 2
    error = capsys.readouterr().err
    message = "holds a run with other settings: shard: was 3, is 4; give another folder"
    assert error == f"ditfast extract-latents: {folder / 'latents'}: {message}\n"


def test_the_command_without_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, str(tmp_path), str(tmp_path / "latents")]) == 2
    assert re.match(rf"ditfast extract-latents: data: {tmp_path}: no images .*\n$", capsys.readouterr().err)
    assert main([*COMMAND, str(tmp_path / "none"), str(tmp_path / "latents")]) == 2
    assert "none: cannot be read: No such file or directory" in capsys.readouterr().err


def test_a_killed_rank_leaves_to_the_next_run_what_is_missing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    photographs(tmp_path / "photographs", 80)
    vae, out = saved(tmp_path / "vae", scaling_factor=0.5, shift_factor=0.25), tmp_path / "latents"
    command = [*COMMAND, "--shard", "1", "--vae", str(vae), str(tmp_path / "photographs")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")  # a process that need not import diffusers first
    ranks = [context.Process(target=run_rank, args=(rank, port, [*command, str(out)])) for rank in range(2)]
    for rank in ranks:
        rank.start()
    try:
        while not (out / "000001.safetensors").exists():  # the second rank's first
            assert ranks[1].is_alive()
            time.sleep(0.002)
        ranks[1].kill()
        ranks[0].join(PATIENCE)
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    assert (ranks[0].exitcode, ranks[1].exitcode) == (1, -signal.SIGKILL)
    assert "ditfast extract-latents (rank 0): another rank ended before" in capfd.readouterr().err
    there = {path.name for path in out.glob("*.safetensors")}
    assert {f"{k:06d}.safetensors" for k in range(0, 80, 2)} < there  # the first rank has done its share
    assert len(there) < 80, "killed too late"
    assert main([*command, str(out)]) == 0
    assert f"{len(there)} of 80 shards are there already" in capfd.readouterr().out
    assert main([*command, str(tmp_path / "whole")]) == 0
    assert content(out) == content(tmp_path / "whole")


def run_rank(rank: int, port: int, command: list[str]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", RANK=str(rank))
    sys.exit(main(command))
