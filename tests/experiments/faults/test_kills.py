"""Processes that end at a random moment, by SIGKILL: the same command again ends with the bytes of an uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparse_update.loop.checkpoint import has_checkpoint
from sparse_update.loop.saving.files import open_checkpoint
from sparse_update.loop.saving.places import whole_place
from tests.experiments.faults.traces import leftovers, points, trace
from tests.experiments.faults.zygote import Process, Zygote


def killed(process: Process, after_s: float, number: int = signal.SIGKILL) -> bool:
    """Whether the signal came before the end."""
    end = time.monotonic() + after_s
    while time.monotonic() < end and process.running():
        time.sleep(0.002)
    came = process.running()
    if came:
        os.kill(process.pid, number)
    process.wait()
    return came


AIMED = """
import os, signal
real, left = os.fsync, [{number}]
def fsync(handle):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    real(handle)
os.fsync = fsync
"""
"""The process ends when it has asked so many times for something to reach the disk, which it does inside a checkpoint."""


def survived(
    zygote: Zygote, words: list[str], folder: Path, kills: int, draw: random.Random, aimed: int = 0
) -> dict[str, Any]:
    """Kill a run again and again, `aimed` times inside a checkpoint, let it end, and say what was seen."""
    seen = {"kills": 0, "starts": 0, "most steps lost": 0, "inside a checkpoint": 0, "before the first checkpoint": 0}
    run = folder / "run"
    longest_s = 1.0
    while seen["kills"] < kills:
        inside = seen["kills"] < aimed
        process = zygote.start(words, folder, AIMED.format(number=draw.randint(1, 12)) if inside else "")
        seen["starts"] += 1
        if inside:
            if process.wait() != -signal.SIGKILL:
                assert process.code == 0, process.said
                break
        elif not killed(process, draw.uniform(0, longest_s)):
            assert process.code == 0, process.said
            break
        longest_s = min(4.0, longest_s * 1.3)
        seen["kills"] += 1
        seen["inside a checkpoint"] += (run / ".checkpoint.new").exists()
        seen["before the first checkpoint"] += not (run / "checkpoint").exists()
        seen["most steps lost"] = max(seen["most steps lost"], steps_told(run) - steps_saved(run))
    done = zygote.run(words, folder)
    assert done.code == 0, done.said
    return seen


def steps_told(run: Path) -> int:
    """The last step with a whole line."""
    text = (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""
    told = text[: text.rfind("\n") + 1].splitlines()
    return int(json.loads(told[-1])["step"]) if told else 0


def steps_saved(run: Path) -> int:
    """The step that a restart goes on from."""
    if not has_checkpoint(run / "checkpoint"):
        return 0
    return int(open_checkpoint(whole_place(run / "checkpoint")).meta["step"])


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.soak)])
def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_happened(
    zygote: Zygote, words: list[str], whole: dict[str, Any], tmp_path: Path, seed: int
) -> None:
    seen = survived(zygote, words, tmp_path, 4, random.Random(seed))
    found = trace(tmp_path / "run")
    for part, expected in whole.items():
        assert found[part] == expected, (part, seen)
    assert leftovers(tmp_path / "run") == []
    assert max(points(tmp_path / "run").values()) == 1


LAST = """
import os, signal
from experiments.runs import plain_json
from sparse_update.loop.saving import keeper
{patch}
"""
MOMENTS = {
    "after the last step, before its checkpoint": """
def die(self, take, *, best=False):
    os.kill(os.getpid(), signal.SIGKILL)
keeper.Keeper.save_now = die
""",
    "after the last checkpoint, before the result": """
real = keeper.Keeper.save_now
def die(self, take, *, best=False):
    real(self, take, best=best)
    os.kill(os.getpid(), signal.SIGKILL)
keeper.Keeper.save_now = die
""",
    "after the result, before the run is called finished": """
import experiments.train as train
real = train.write_json
def die(path, document):
    real(path, document)
    if path.name == "result.json":
        os.kill(os.getpid(), signal.SIGKILL)
train.write_json = die
""",
}


@pytest.mark.parametrize("moment", list(MOMENTS))
def test_a_run_that_is_killed_at_its_end_ends_the_same(
    zygote: Zygote, words: list[str], whole: dict[str, Any], tmp_path: Path, moment: str
) -> None:
    done = zygote.run(words, tmp_path, LAST.format(patch=MOMENTS[moment]))
    assert done.code == -signal.SIGKILL, done.said
    done = zygote.run(words, tmp_path)
    assert done.code == 0, done.said
    assert trace(tmp_path / "run") == whole
    assert max(points(tmp_path / "run").values()) == 1
    again = zygote.run(words, tmp_path)
    assert again.code == 0
    assert "holds the finished run already" in again.said
    assert trace(tmp_path / "run") == whole


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_so_by_its_exit_code(
    zygote: Zygote, words: list[str], whole: dict[str, Any], tmp_path: Path, number: int, code: int
) -> None:
    """At a moment in the training, and at once: the first second of a run is loading."""
    run = tmp_path / "run"
    process = zygote.start(words, tmp_path)
    deadline = time.monotonic() + 120
    while process.running() and not (run / "checkpoint").exists():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, number)
    assert process.wait() == code, process.said
    assert process.document["status"] == "interrupted"
    assert process.document["interrupted_by"] == signal.Signals(number).name
    assert "the same command goes on from there" in process.said
    for after_s in (0.02, 0.3):
        process = zygote.start(words, tmp_path / "early")
        while not process.begun():
            time.sleep(0.001)
        if killed(process, after_s, number):
            assert process.code in (code, -signal.SIGTERM), (
                process.said
            )  # SIGTERM before anything has begun ends it as ever
            assert "Traceback" not in process.said, process.said
    for folder in (tmp_path, tmp_path / "early"):
        done = zygote.run(words, folder)
        assert done.code == 0, done.said
        assert trace(folder / "run") == whole
        assert leftovers(folder / "run") == []


def test_a_second_process_on_the_folder_is_refused_also_while_it_resumes(
    zygote: Zygote, words: list[str], whole: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first = zygote.start(words, tmp_path)
    while first.running() and not (run / "checkpoint").exists():
        time.sleep(0.002)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    slow = "import experiments.train as train, time\nreal = train.begin\n"
    slow += "def begin(*given):\n    time.sleep(4)\n    return real(*given)\ntrain.begin = begin\n"
    first = zygote.start(words, tmp_path, slow)
    while not (run / ".lock").read_text().endswith(str(first.pid)):
        time.sleep(0.002)
    (tmp_path / "elsewhere").mkdir()
    second = zygote.run([*words[:-1], f"run={run}"], tmp_path / "elsewhere")
    assert second.code == 2
    assert f"in progress (training surprise, process {first.pid})" in second.said
    assert first.wait() == 0, first.said
    assert trace(run) == whole


@pytest.mark.soak
def test_fifty_kills(
    zygote: Zygote,
    words: list[str],
    whole: dict[str, Any],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    seen: Counter[str] = Counter()
    draw, runs, lost = random.Random(5), 0, 0
    while seen["kills"] < 50:
        folder = tmp_path / str(runs)
        found = survived(zygote, words, folder, 5, draw, aimed=2)
        lost = max(lost, found.pop("most steps lost"))
        seen.update(found)
        assert trace(folder / "run") == whole, found
        assert leftovers(folder / "run") == []
        runs += 1
    assert seen["inside a checkpoint"]
    told = f"SIGKILL of a training at random moments, {seen['inside a checkpoint']} inside a checkpoint,"
    told += f" {seen['before the first checkpoint']} before the first, {runs} runs"
    faults = seen["kills"]
    record_property("soak", {"what": told, "faults": faults, "survived": faults, "lost": f"at most {lost} steps"})
