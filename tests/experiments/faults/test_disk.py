"""Disks that are full or cannot be written, bits that flip, files that are cut, an event file that cannot be written."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.experiments.faults.traces import OUTCOME, leftovers, lines, points, trace
from tests.experiments.faults.zygote import Process, Zygote

FILES = ("meta.json", "model.safetensors", "state.safetensors")


def mounted(place: Path, *options: str) -> None:
    """A file system of the test's own. Skips where this machine does not let the test mount one."""
    place.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, str(place)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs the right to mount a file system of its own: {done.stderr.strip()}")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1.5 MB."""
    place = tmp_path / "small"
    if os.geteuid():
        pytest.skip("needs the right to mount a file system of its own: not root")
    mounted(place, "-t", "tmpfs", "-o", "size=1536k", "tmpfs")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def stopped_halfway(zygote: Zygote, words: list[str], folder: Path) -> Process:
    """A run that was killed after its first few checkpoints."""
    process = zygote.start(words, folder)
    kept = folder / "run" / "checkpoints"
    while process.running() and not (kept.exists() and any(kept.iterdir())):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return process


def test_a_full_disk_loses_nothing_that_was_saved_and_the_run_goes_on_when_there_is_room(
    zygote: Zygote, words: list[str], whole: dict[str, Any], small: Path, tmp_path: Path
) -> None:
    stopped_halfway(zygote, words, small)
    filler = small / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    full = zygote.run(words, small, out=tmp_path / "out")
    assert full.code == 1, full.said
    assert "No space left on device" in full.said
    assert "make room, and the same command goes on" in full.said
    assert "Traceback" not in full.said, full.said
    filler.unlink()
    done = zygote.run(words, small)
    assert done.code == 0, done.said
    assert trace(small / "run") == whole
    assert leftovers(small / "run") == []


def test_a_disk_that_fills_while_training_is_a_warning_until_there_is_room(
    zygote: Zygote, words: list[str], whole: dict[str, Any], tmp_path: Path
) -> None:
    """A limit on the size of files stands for the disk: for the checkpoints of steps 10 to 30."""
    limited = """
import resource, signal
from sparse_update.loop.updates import Updates
real = Updates.take
def take(self, *given):
    found = real(self, *given)
    limit = 4096 if 10 <= self.tally.step < 30 else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    return found
Updates.take = take
"""
    done = zygote.run(words, tmp_path, limited)
    assert done.code == 0, done.said
    assert "a checkpoint is not saved" in done.said
    assert "Training goes on" in done.said
    found = trace(tmp_path / "run")
    for part in ("tensors", "head", "lines", "outcome"):
        assert found[part] == whole[part], part
    assert leftovers(tmp_path / "run") == []


def test_a_folder_that_cannot_be_written_is_refused_in_words(zygote: Zygote, words: list[str], tmp_path: Path) -> None:
    """Rights do not bind root, a file system that is mounted read-only does."""
    if os.geteuid():
        pytest.skip("needs the right to mount a file system of its own: not root")
    place = tmp_path / "run"
    mounted(place, "-t", "tmpfs", "-o", "ro", "tmpfs")
    try:
        done = zygote.run(words, tmp_path)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
    assert done.code == 2
    assert "cannot be written to (Read-only file system): take another folder" in done.said
    assert "Traceback" not in done.said


@pytest.mark.parametrize(
    ("harm", "names"),
    [
        ("flipped", FILES[:1]),
        ("cut", FILES[1:2]),
        *(pytest.param(h, FILES, marks=pytest.mark.soak) for h in ("flipped", "cut")),
    ],
)
def test_damage_to_the_last_checkpoint_is_named_and_the_one_before_is_gone_on_from(
    zygote: Zygote, words: list[str], whole: dict[str, Any], tmp_path: Path, harm: str, names: tuple[str, ...]
) -> None:
    draw = random.Random(harm)
    for name in names:
        folder = tmp_path / name
        stopped_halfway(zygote, words, folder)
        damaged = folder / "run" / "checkpoint" / name
        if not damaged.exists():  # it died between two moves: what was being written becomes the checkpoint
            damaged = folder / "run" / ".checkpoint.new" / name
        data = bytearray(damaged.read_bytes())
        if harm == "flipped":
            bit = draw.randrange(8 * len(data))
            data[bit // 8] ^= 1 << bit % 8
        else:
            del data[draw.randrange(len(data)) :]
        damaged.write_bytes(data)
        done = zygote.run(words, folder)
        assert done.code == 0, done.said
        assert f"{name} is damaged" in done.said, done.said
        assert "set aside as" in done.said
        assert "going on from step" in done.said
        assert trace(folder / "run") == whole
        assert max(points(folder / "run").values()) == 1


def test_an_event_file_that_cannot_be_written_is_one_warning(
    zygote: Zygote, words: list[str], whole: dict[str, Any], tmp_path: Path
) -> None:
    """A folder in its place, from step 10 on: what root cannot write either."""
    taken = """
from pathlib import Path
from experiments.views.tracking import Tracker
real = Tracker.log
def log(self, step, values):
    if step == 10:
        for path in self.folder.glob("events.out.tfevents.*"):
            path.unlink()
            path.mkdir()
    real(self, step, values)
Tracker.log = log
"""
    done = zygote.run(words, tmp_path, taken)
    assert done.code == 0, done.said
    assert done.said.count("TensorBoard's event file") == 1, done.said
    assert "metrics.jsonl has the same numbers" in done.said
    assert lines(tmp_path / "run") == whole["lines"]
    assert {key: done.document[key] for key in ("loss_nats", "steps")} == {
        key: whole["outcome"][key] for key in ("loss_nats", "steps")
    }
    assert set(OUTCOME) <= whole["outcome"].keys()
