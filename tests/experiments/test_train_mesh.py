"""`spikegate train mesh=...` as a user starts it: real processes, one record, errors told once."""

from __future__ import annotations

import json

import pytest

from tests.experiments.console import spikegate
from tests.experiments.test_train import FAST, last_json

SHORT = [*FAST, "gate=surprise", "trainer.budget_offered_tokens=3072", "progress=false", "optim=adamw"]


@pytest.mark.slow
def test_two_processes_leave_the_run_of_one(text, tmp_path):
    words = [*SHORT, f"data.path={text}"]
    spikegate("train", *words, "run=one", cwd=tmp_path)
    done = spikegate("train", *words, "run=two", "mesh=ddp", "mesh.processes=2", cwd=tmp_path, process=True)
    assert last_json(done)["file"] == "two/result.json"
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    assert two["mesh"] == {"kind": "ddp", "world_size": 2, "data": 2, "tensor": 1, "backend": "gloo"}
    assert one["mesh"]["world_size"] == 1
    for key in ("tokens", "steps", "flops", "reference_s", "gate_reference_s", "windows_offered", "source_keep"):
        assert two[key] == one[key], key
    assert two["loss_nats"] == pytest.approx(one["loss_nats"], abs=2e-5)
    lines = [(tmp_path / name / "metrics.jsonl").read_text().count("\n") for name in ("one", "two")]
    assert lines[0] == lines[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mesh=ddp"], "mesh.processes=N starts them"),
        (["mesh.processes=2"], "several processes need mesh=ddp"),
        (["mesh=ddp", "mesh.processes=1"], "one process is mesh=single"),
        (["mesh=fsdp", "mesh.tensor=2", "mesh.processes=4"], "needs mesh=fsdp_tp"),
        (["mesh=ring"], "no such choice; there are"),
        (["trainer.accumulate=0"], "must be at least 1"),
        (["trainer.accumulate=3"], "choose a multiple of 3"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(words, message, text, tmp_path):
    done = spikegate("train", *SHORT, f"data.path={text}", *words, cwd=tmp_path, check=False)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_what_every_process_finds_wrong_is_told_once(text, tmp_path):
    words = [*SHORT, f"data.path={text}", "mesh=ddp", "mesh.processes=2", "subset=blocks", "subset.inactive=sign8"]
    done = spikegate("train", *words, cwd=tmp_path, check=False, process=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("Use sign or frozen") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_damaged_shard_is_named_and_the_run_goes_on_from_the_checkpoint_before(text, tmp_path):
    words = [
        "train",
        *SHORT,
        f"data.path={text}",
        "run=parts",
        "mesh=fsdp",
        "mesh.processes=2",
        "trainer.checkpoint_every_s=0",
    ]
    first = last_json(spikegate(*words, cwd=tmp_path, process=True))
    (tmp_path / "parts" / "result.json").unlink()
    shard = tmp_path / "parts" / "checkpoint" / "state" / "shard-00002-model-00001-of-00001.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-9] ^= 1
    shard.write_bytes(raw)
    done = spikegate(*words, cwd=tmp_path, process=True)
    assert f"{shard} is damaged" in done.stderr
    assert "going on from step" in done.stderr
    again = last_json(done)
    assert (again["loss_nats"], again["steps"]) == (first["loss_nats"], first["steps"])
