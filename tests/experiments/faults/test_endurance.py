"""Thousands of steps: memory, open files and bytes of the event file for a step stay what they were."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.experiments.faults.zygote import Zygote

WATCH = """
import json, os
from experiments.views.tracking import Tracker
real, page = Tracker.log, os.sysconf("SC_PAGE_SIZE")
def log(self, step, values):
    real(self, step, values)
    if step % 100 == 0:
        with open("watched.jsonl", "a") as file:
            found = {"step": step, "rss": int(open("/proc/self/statm").read().split()[1]) * page}
            found["files"] = len(os.listdir("/proc/self/fd"))
            found["events"] = sum(p.stat().st_size for p in self.folder.glob("events.out.tfevents.*"))
            found["lines"] = (self.folder / "metrics.jsonl").stat().st_size
            file.write(json.dumps(found) + chr(10))
Tracker.log = log
"""


@pytest.mark.soak
def test_five_thousand_steps(
    zygote: Zygote, words: list[str], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    given = [word for word in words if not word.startswith(("trainer.budget_offered_tokens", "trainer.checkpoint_every_s"))]
    given += ["trainer.budget_offered_tokens=960000", "trainer.checkpoint_every_s=1"]
    done = zygote.run(given, tmp_path, WATCH)
    assert done.code == 0, done.said
    seen = [json.loads(line) for line in (tmp_path / "watched.jsonl").read_text().splitlines()]
    assert seen[-1]["step"] >= 5000
    first, middle, last = (next(s for s in seen if s["step"] >= step) for step in (1000, 3000, 5000))
    # the first evaluation, at a third of the run, loads what draws figures: 36 MB and its fonts' files, once
    assert last["rss"] - middle["rss"] <= 4e6 + 0.02 * middle["rss"]
    early, late = (max(s["files"] for s in seen if a <= s["step"] < a + 1000) for a in (2000, 4000))
    assert late <= early + 1  # a checkpoint that is being written has a file or two open
    for name in ("events", "lines"):
        before, after = ((b[name] - a[name]) / 2000 for a, b in ((first, middle), (middle, last)))
        assert after <= 1.05 * before + 100, name
    grew = (last["rss"] - middle["rss"]) / 1e6
    told = f"{seen[-1]['step']} steps: {middle['rss'] / 1e6:.0f} MB at step 3,000, {grew:+.1f} MB at 5,000"
    told += f"; {late} open files at most; {(last['events'] - middle['events']) / 2000:.0f} event bytes a step"
    record_property("soak", {"what": told, "tried": seen[-1]["step"]})
