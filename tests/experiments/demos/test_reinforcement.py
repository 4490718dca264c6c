"""`spikegate demo reinforcement`, short and in this process: it goes on after an interruption and ends in a page."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import demo
from experiments.demos import reinforcement
from tests.experiments.console import spikegate

SHORTER = [
    "model.width=16", "model.layers=1", "task.judged=8", "trainer.evaluations=2", "objective.sample.n=2",
    "trainer.batch_windows=8",
]  # fmt: skip


def test_the_demo_goes_on_where_it_stopped_and_ends_in_a_picture(tmp_path, monkeypatch):
    started: list[str] = []

    def call(words, show=False):
        module, *rest = words
        started.append(next(word for word in rest if word.startswith("run=")))
        if len(started) == 3:
            raise KeyboardInterrupt
        if code := importlib.import_module(module).main([*rest, *SHORTER]):
            raise subprocess.CalledProcessError(code, [sys.executable, "-m", *words])

    monkeypatch.setattr(demo, "_call", call)
    monkeypatch.setattr(reinforcement, "START_S", 0.02)
    words = ["demo", "reinforcement", "--folder", "here", "--budget-reference-s", "0.05"]
    assert spikegate(*words, cwd=tmp_path, check=False).returncode == 130
    assert not (tmp_path / "here" / "reinforcement.html").exists()
    done = spikegate(*words, cwd=tmp_path)
    assert started.count("run=here/start") == 1  # what was finished is not made again
    found = json.loads((tmp_path / "here" / "reinforcement.json").read_text())
    assert set(found["arms"]) == set(reinforcement.ARMS)
    for name, arm in found["arms"].items():
        assert arm["curve"][0] == [0.0, found["start"]["solved"]]
        assert arm["curve"][-1][1] == arm["solved"]
        assert f"{name}: " in done.stdout
    text = (tmp_path / "here" / "reinforcement.html").read_text()
    assert "<svg" in text
    assert "default-src 'none'" in text
    assert all(f"<td>{name}</td>" in text or name in text for name in reinforcement.ARMS)


@pytest.mark.parametrize("words", [["--seeds", "2"], ["--budget-reference-s", "0"]])
def test_settings_that_it_does_not_take_are_refused(words, tmp_path: Path):
    done = spikegate("demo", "reinforcement", "--folder", "here", *words, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "takes a budget above 0" in done.stderr
