"""Numbers that are not finite, and clocks that jump."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.experiments.faults.traces import lines, points, trace
from tests.experiments.faults.zygote import Zygote

NAN = """
from sparse_update.loop.updates import Updates
real, nan = Updates._update, float("nan")
def update(self, loss, found, progress):
    if {first} <= self.tally.step < {last}:
        {harm}
    real(self, loss, found, progress)
Updates._update = update
"""
"""The loss, or the gradients that the backward left, before the trainer looks at them."""
LOSS = "loss = nan"
GRADIENT = "[leaf.grad.view(-1)[:1].fill_(nan) for leaf in self._leaves() if leaf.grad is not None]"


@pytest.mark.parametrize("harm", [LOSS, GRADIENT], ids=["loss", "gradient"])
def test_a_burst_of_nan_is_left_out_and_counted(zygote: Zygote, words: list[str], tmp_path: Path, harm: str) -> None:
    done = zygote.run(words, tmp_path, NAN.format(first=20, last=25, harm=harm))
    assert done.code == 0, done.said
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["skipped_steps"] == 5
    assert 0 < result["loss_nats"] < 10
    by_step = {line["step"]: line for line in lines(tmp_path / "run")}
    assert by_step[25]["health/skipped_steps"] == 5
    assert isinstance(by_step[26]["loss_nats"], float)


def test_a_burst_that_does_not_end_stops_the_run_which_goes_on_from_the_last_good_checkpoint(
    zygote: Zygote, words: list[str], whole: dict[str, Any], tmp_path: Path
) -> None:
    done = zygote.run(words, tmp_path, NAN.format(first=20, last=10**9, harm=LOSS))
    assert done.code == 1
    assert "for 20 steps in a row" in done.said
    assert "Traceback" not in done.said
    head = json.loads((tmp_path / "run" / "checkpoint" / "meta.json").read_text())
    assert head["step"] <= 20
    assert head["state"]["counters"]["skipped"] == 0
    done = zygote.run(words, tmp_path)
    assert done.code == 0, done.said
    assert trace(tmp_path / "run") == whole


@pytest.mark.parametrize("days", [-400, pytest.param(400, marks=pytest.mark.soak)])
def test_a_clock_that_jumps_changes_nothing_and_leaves_one_curve(
    zygote: Zygote, words: list[str], whole: dict[str, Any], tmp_path: Path, days: int
) -> None:
    """The clock of the day as Python gives it, since the machine's own is not the test's to set: it jumps at step 20, the
    run is interrupted at step 40, and goes on with the clock as it was."""
    jumped = f"""
import os, signal, time
from sparse_update.loop.updates import Updates
real, now = Updates.take, time.time
def take(self, *given):
    found = real(self, *given)
    if self.tally.step == 20:
        time.time = lambda: now() + {days} * 86400
    if self.tally.step == 40:
        os.kill(os.getpid(), signal.SIGTERM)
    return found
Updates.take = take
{"time.time = lambda: now() + 800 * 86400" if days < 0 else ""}
"""
    done = zygote.run(words, tmp_path, jumped)
    assert done.code == 75, done.said
    done = zygote.run(words, tmp_path)
    assert done.code == 0, done.said
    assert trace(tmp_path / "run") == whole
    names = sorted(path.name for path in (tmp_path / "run").glob("events.out.tfevents.*"))
    steps = [_steps(tmp_path / "run" / name) for name in names]
    assert len(steps) == 2
    assert max(steps[0]) == 40 < min(steps[1])
    assert max(points(tmp_path / "run").values()) == 1


def _steps(path: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    return [
        event.step
        for event in EventFileLoader(str(path)).Load()
        if any(value.tag == "train/loss_nats" for value in event.summary.value)
    ]
