"""A run of reinforcement that is killed in the middle of a generation phase ends with the bytes of one that was not."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from tests.experiments.console import spikegate

WORDS = [
    "objective=rl", "task=brackets", "task.form=short", "task.judged=8", "model.width=16", "model.layers=1",
    "model.heads=2", "model.context=32", "task.tasks=[brackets:1]", "objective.sample.new_tokens=4",
    "objective.sample.n=4", "objective.sample.batches=2", "objective.sample.epochs=4", "trainer.batch_windows=4",
    "trainer.evaluations=1", "trainer.log_every_steps=1", "trainer.budget_reference_s=0.4", "progress=false",
    "trainer.checkpoint_every_s=0", "trainer.checkpoint_beside=false", "optim=adamw",
]  # fmt: skip
"""A phase is eight updates."""


@pytest.mark.slow
def test_a_kill_in_the_middle_of_a_phase_changes_no_bit(tmp_path):
    spikegate("train", *WORDS, "run=whole", cwd=tmp_path)
    killed = subprocess.Popen(
        [sys.executable, "-m", "experiments.train", *WORDS, "run=cut"],
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    lines = tmp_path / "cut" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not lines.exists() or lines.read_text().count("\n") < 11:
        assert killed.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    killed.kill()
    killed.wait()
    spikegate("train", *WORDS, "run=cut", cwd=tmp_path)
    whole, cut = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "cut"))
    assert cut["checkpoints"]["resumed_at_step"] > 0
    for name in ("loss_nats", "steps", "tokens", "reference_s", "gate_reference_s", "empty_steps", "task"):
        assert cut[name] == whole[name], name
    assert len({(tmp_path / name / "checkpoint" / "model.safetensors").read_bytes() for name in ("whole", "cut")}) == 1
