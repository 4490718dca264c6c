"""`trainer=fast` as a user starts it: what it chose is in the record, and the run is that of the settings it stands for."""

from __future__ import annotations

import json

from sparse_update.loop.fast import GROWS_BELOW, GROWS_UNTIL
from tests.experiments.console import spikegate

SMALL = [
    "model.width=16", "model.layers=2", "model.heads=2", "model.context=64", "model.attention=explicit", "seed=3",
    "trainer.batch_windows=4", "trainer.eval_tokens=2048", "trainer.evaluations=1", "trainer.budget_reference_s=0.6",
    "gate.pool_windows=32", "gate.ngram_bits=12", "data=files", "progress=false",
]  # fmt: skip


def test_fast_is_the_run_of_what_it_chose(text, tmp_path):
    spikegate("train", *SMALL, f"data.path={text}", "trainer=fast", "run=fast", cwd=tmp_path)
    found = json.loads((tmp_path / "fast/result.json").read_text())
    chosen = {choice["part"]: choice for choice in found["fast"]}
    assert found["arm"] == "fast"
    assert chosen["growth"]["tokens_per_parameter"] < GROWS_BELOW
    schedule = chosen["length_schedule"]["chosen"]
    words = ["gate.name=auto", "gate.unit=auto", "growth=depth", "optim.schedule=wsd", f"growth.until={GROWS_UNTIL}"]
    words += [f"trainer.length_schedule='{schedule}'"] if schedule != "none" else []
    spikegate("train", *SMALL, f"data.path={text}", *words, "run=by_hand", cwd=tmp_path)
    by_hand = json.loads((tmp_path / "by_hand/result.json").read_text())
    assert by_hand["fast"] == []
    for key in ("loss_nats", "steps", "flops", "reference_s", "gate_decisions", "params"):
        assert found[key] == by_hand[key], key
    done = spikegate("train", *SMALL, f"data.path={text}", "trainer=fast", "run=fast", "resume=true", cwd=tmp_path)
    assert json.loads(done.stdout.strip().splitlines()[-1])["loss_nats"] == found["loss_nats"]


def test_a_user_who_sets_a_part_keeps_it_and_the_arm_says_so(text, tmp_path):
    words = ["trainer=fast", "gate=surprise", "trainer.budget_reference_s=0.2", "run=mine"]
    spikegate("train", *SMALL, *words, f"data.path={text}", cwd=tmp_path)
    found = json.loads((tmp_path / "mine/result.json").read_text())
    assert found["arm"] == "surprise+fast"
    assert {choice["part"]: choice["why"] for choice in found["fast"]}["gate"] == "set by the user"
