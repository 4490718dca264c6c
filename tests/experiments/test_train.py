"""The applications as a user starts them: real processes, real folders, errors as a person reads them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from experiments.rerun import rerun
from experiments.runs.lock import exclusive
from tests.experiments.console import spikegate

FAST = [
    "model.width=16", "model.layers=1", "model.heads=2", "model.context=32", "trainer.batch_windows=4",
    "trainer.eval_tokens=2048", "trainer.evaluations=2", "trainer.precision=fp32", "model.attention=explicit",
    "gate.pool_windows=32", "gate.ngram_bits=12", "data=files",
]  # fmt: skip


def last_json(done):
    line = done.stdout.strip().splitlines()[-1]
    assert len(line.encode()) <= 4096
    return json.loads(line)


@pytest.fixture(scope="module")
def runs(text, tmp_path_factory):
    """Three arms on one table of component times, the dense one deployed."""
    folder = tmp_path_factory.mktemp("runs")
    for arm in ("dense", "random", "surprise"):
        words = [f"gate={arm}", f"run={arm}", "trainer.budget_reference_s=0.5", "trainer.component_times=times.json"]
        spikegate("train", *FAST, f"data.path={text}", "data.garbage_fraction=0.3", *words, cwd=folder)
    return folder


@pytest.mark.slow
def test_train_deploy_compare_end_to_end(runs):
    done = spikegate("deploy", "run=dense", "eval_tokens=2048", "calibration_tokens=1024", cwd=runs, process=True)
    assert last_json(done)["file"] == "dense/deploy/deploy.json"
    deployed = json.loads((runs / "dense/deploy/deploy.json").read_text())
    assert "embedding lookup" in done.stdout
    assert abs(deployed["loss_simulated_nats"] - deployed["loss_float_nats"]) < 0.05
    assert 0 < deployed["synops_per_token"] <= deployed["mapped_macs_per_token"] * 1.1
    assert 0 < deployed["mapped_mac_share"] < 1
    assert {e["kind"] for e in deployed["energy"]} == {"modelled", "extrapolated"}
    for entry in deployed["energy"]:
        assert 0 < entry["low_j"] <= entry["mid_j"] <= entry["high_j"]
        assert entry["source"]
    assert all(e["lower_bound"] for e in deployed["energy"] if e["profile"].startswith("loihi1"))
    assert all(e["labels"] for e in deployed["energy"] if e["profile"].startswith("loihi1"))

    done = spikegate("compare", "folder=.", cwd=runs)
    found = json.loads((runs / "comparison" / "comparison.json").read_text())
    assert last_json(done)["file"] == "comparison/comparison.json"
    stream = found["streams"]["noisy"]
    assert {"dense", "random", "surprise", "deployed"} <= set(stream)
    for arm in ("dense", "random", "surprise"):
        for key in ("loss_nats", "bits_per_byte", "tokens", "flops", "reference_s", "wall_s", "peak_bytes"):
            assert stream[arm][key] > 0, (arm, key)
        assert "energy_j" in stream[arm]
    assert stream["surprise"]["gate_reference_s"] > 0
    assert stream["dense"]["gate_reference_s"] == 0
    assert "n = 1" in done.stdout


def test_the_held_out_loss_is_split_by_difficulty_and_document(runs):
    result = json.loads((runs / "dense" / "result.json").read_text())
    for parts in (result["val_split"]["difficulty"], list(result["val_split"]["documents"].values())):
        assert sum(part["tokens"] for part in parts) == result["val_tokens"]
        total = sum(part["tokens"] * part["loss_nats"] for part in parts)
        assert total / result["val_tokens"] == pytest.approx(result["loss_nats"], abs=1e-4)
    easy, *_, hard = result["val_split"]["difficulty"]
    assert easy["loss_nats"] < hard["loss_nats"]


def test_rerun_repeats_a_run_from_its_folder(runs):
    found = last_json(spikegate("rerun", "surprise", cwd=runs, process=True))
    assert found["equal"], found["compared"]
    assert found["compared"]["loss_nats"][0] > 0


def test_a_repetition_is_not_written_into_the_folder_of_another_run(tmp_path, capsys):
    for folder in (tmp_path / "run", tmp_path / "run-rerun"):
        folder.mkdir()
        (folder / "run.json").write_text('{"kind": "train", "status": "finished"}')
    assert rerun(tmp_path / "nowhere") == 2
    assert rerun(tmp_path / "run") == 1
    assert "run-rerun holds a run already: name another folder with --out FOLDER" in capsys.readouterr().err


def test_an_interrupted_process_resumes_to_the_same_bits(runs, text, tmp_path):
    common = [*FAST, f"data.path={text}", "gate=surprise", "seed=3", "trainer.budget_reference_s=1.2"]
    common += [f"trainer.component_times={runs / 'times.json'}", "trainer.log_every_steps=1"]
    whole = last_json(spikegate("train", *common, "run=whole", cwd=tmp_path))
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.cli", "train", *common, "run=cut"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    lines = tmp_path / "cut" / "metrics.jsonl"
    deadline = time.monotonic() + 400
    while not (lines.exists() and len(lines.read_text().splitlines()) > 5):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=400)
    assert process.returncode == 130  # so that `train && deploy` does not go on
    assert json.loads(stdout.splitlines()[-1])["status"] == "interrupted"
    assert b"the same command goes on from there" in stderr
    assert not (tmp_path / "cut" / "result.json").exists()
    resumed = last_json(spikegate("train", *common, "run=cut", cwd=tmp_path))
    assert resumed["status"] == "finished"
    for key in ("loss_nats", "steps", "tokens", "flops", "reference_s", "source_keep"):
        assert resumed[key] == whole[key], key

    def curve(name):
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [(row["step"], row["loss_nats"]) for row in rows]

    assert curve("cut") == curve("whole")
    again = spikegate("train", *common, "run=cut", "resume=true", cwd=tmp_path)
    assert "holds the finished run already" in again.stderr
    assert last_json(again) == last_json(spikegate("train", *common, "run=cut", "resume=auto", cwd=tmp_path))
    assert curve("cut") == curve("whole")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["gate.kep_fraction=0.5"], 2, "did you mean gate.keep_fraction"),
        (["+gate.threshold=3"], 2, "unknown configuration key 'gate.threshold'"),
        (["gate=surprise", "gate.policy=best"], 2, "gate.policy = 'best' is not known"),
        (["gate=surprise_tokens", "gate.signal=stale_loss"], 2, "cannot gate unit 'token'"),
        ([*FAST[:-1], "trainer.compile=off", "gate=rho_loss"], 1, "signal 'excess' needs reference"),
        ([*FAST[:-1], "trainer.compile=off", "gate=rho_loss", "gate.reference=nowhere"], 1, "there is no checkpoint"),
        ([*FAST[:-1], "trainer.compile=off", "trainer.init_from=nowhere"], 1, "there is no checkpoint"),
        (["trainer.batch_windows=100000"], 2, "fewer than one batch"),
        ([*FAST[:-1], "trainer.compile=off", "trainer.length_schedule=5@0.5"], 2, "does not divide the model's context"),
        (["gate=surprize"], 2, "no such choice; there are"),
        (["trainer.batch_windows=many"], 2, "trainer.batch_windows"),
        (["gate=random", "gate.keep_fraction=0"], 2, "must lie in (0, 1]"),
        (["data=files", "data.path=nowhere"], 1, "'nowhere' does not exist"),
        (["trainer.device=cuda"], 2, "sees no CUDA device"),
        (["trainer.component_times=times.json"], 1, "not a table of component times"),
        (["resume=perhaps"], 2, "resume is perhaps; it is false, true or auto"),
        (["run=a=b"], 2, "write \"run='a=b'\""),
        ([*FAST[:-1], "trainer.budget_reference_s=1e-6"], 1, "buys not one step"),
    ],
)
def test_bad_commands_say_what_is_wrong(words, code, message, text, tmp_path):
    (tmp_path / "times.json").write_text("[]")
    if message.startswith("sees") and __import__("torch").cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    given = [] if any(w.startswith("data=") for w in words) else ["data=files", f"data.path={text}"]
    done = spikegate("train", *given, *words, cwd=tmp_path, check=False)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_is_never_written_over_nor_resumed_with_other_settings(runs, text):
    common = [*FAST, f"data.path={text}", "data.garbage_fraction=0.3", "gate=dense", "run=dense"]
    done = spikegate("train", *common, "resume=false", cwd=runs, check=False)
    assert done.returncode == 2
    assert "already holds a run" in done.stderr
    done = spikegate("train", *common, "optim.lr=0.1", cwd=runs, check=False)
    assert done.returncode == 2
    assert "optim.lr was 0.008, is 0.1" in done.stderr


def test_a_run_killed_before_its_first_checkpoint_starts_again(runs, text):
    killed = runs / "killed"
    killed.mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(runs / "dense" / name, killed / name)
    (killed / "run.json").write_text(json.dumps({"kind": "train", "status": "running"}))
    words = [*FAST, f"data.path={text}", "data.garbage_fraction=0.3", "gate=dense", "run=killed"]
    words += ["trainer.budget_reference_s=0.5", "trainer.component_times=times.json"]
    assert "already holds a run" in spikegate("train", *words, "resume=false", cwd=runs, check=False).stderr
    with exclusive(killed, "another training"):
        done = spikegate("train", *words, cwd=runs, check=False)
    assert done.returncode == 2
    assert "already holds a run that is in progress (another training" in done.stderr
    done = spikegate("train", *words, cwd=runs)
    found = last_json(done)
    assert found["status"] == "finished"
    *_, result, spent, place, _ = done.stdout.splitlines()
    assert result.startswith(f"noisy dense, seed 0: {found['loss_nats']:.4f} nats (")
    assert spent.startswith(f"{found['tokens']:,} tokens, ")
    assert place == "all of it: killed/result.json"
    assert found["loss_nats"] == json.loads((runs / "dense" / "result.json").read_text())["loss_nats"]
    shutil.rmtree(killed)  # the comparison of this folder is of three arms


def test_deploying_what_is_no_finished_run_is_refused(runs, tmp_path):
    done = spikegate("deploy", f"run={tmp_path}", cwd=runs, check=False)
    assert done.returncode == 2
    assert "is " in done.stderr
    assert "Traceback" not in done.stderr


def test_multirun_gives_one_line_per_arm(text, tmp_path):
    done = spikegate(
        "train", "-m", *FAST, f"data.path={text}", "gate=dense,random", "trainer.budget_reference_s=0.3",
        "trainer.component_times=times.json", cwd=tmp_path,
    )  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["arm"] for line in found] == ["dense", "random"]


def test_help_and_doctor_need_no_set_up(tmp_path):
    assert "deploy" in spikegate("--help", cwd=tmp_path, process=True).stdout
    report = last_json(spikegate("doctor", cwd=tmp_path))
    assert report
    assert spikegate("no-such-command", cwd=tmp_path, check=False).returncode == 2


def test_a_deployment_can_be_repeated_too(runs):
    if not (runs / "dense" / "deploy").exists():
        spikegate("deploy", "run=dense", "eval_tokens=2048", "calibration_tokens=1024", cwd=runs)
    found = last_json(spikegate("rerun", "dense/deploy", cwd=runs))
    assert found["equal"], found["compared"]
    assert "loss_simulated_nats" in found["compared"]


def test_settings_of_the_conversion_reach_it(runs):
    words = ["run=random", "out=narrow", "eval_tokens=2048", "calibration_tokens=1024"]
    narrow = last_json(spikegate("deploy", *words, "conversion.hidden_bits=5", "conversion.square_bits=5", cwd=runs))
    wide = last_json(spikegate("deploy", *words[:1], "out=wide", *words[2:], cwd=runs))  # 13 and 12 bits
    assert narrow["max_payload_bits"] < wide["max_payload_bits"]
    done = spikegate("deploy", *words, "conversion.hidden_bits=50", cwd=runs, check=False)
    assert done.returncode == 2
    assert "hidden_bits" in done.stderr


@pytest.mark.lava
def test_verify_says_that_the_deployed_graphs_equal_lava(runs, lava):
    if not (runs / "dense" / "deploy").exists():
        spikegate("deploy", "run=dense", "eval_tokens=2048", "calibration_tokens=1024", cwd=runs)
    done = spikegate("verify", "dense/deploy", "--steps", "16", cwd=runs, SPIKEGATE_LAVA_PYTHON=str(lava))
    found = last_json(done)
    assert found["equal"]
    assert all(graph["values"] > 0 for graph in found["graphs"].values())
    assert "equal over" in done.stdout


def test_a_budget_of_tokens_is_what_the_progress_line_counts(runs, text):
    """However few reference seconds are set: they are not the budget then."""
    words = ["gate=dense", "run=tokens", "trainer.component_times=times.json", "progress=true", "seed=3"]
    words += ["trainer.budget_offered_tokens=25600", "trainer.budget_reference_s=0.001", "trainer.log_every_steps=1"]
    done = spikegate("train", *FAST, f"data.path={text}", "data.garbage_fraction=0.3", *words, cwd=runs)
    assert last_json(done)["tokens"] == 25600
    assert "25,600/25,600 tokens" in done.stderr


def test_a_run_that_grows(text, tmp_path):
    words = [*FAST, f"data.path={text}", "model.layers=3", "growth=depth", "optim.schedule=wsd", "run=grown"]
    found = last_json(spikegate("train", *words, "trainer.budget_reference_s=0.5", cwd=tmp_path))
    assert found["arm"] == "dense+depth"
    lines = [json.loads(line) for line in (tmp_path / "grown/metrics.jsonl").read_text().splitlines()]
    depths = [line["growth/layers"] for line in lines if "growth/layers" in line]
    assert set(depths) == {1.0, 3.0}
    assert depths == sorted(depths)
    for line in (line for line in lines if "growth/layers" in line):
        assert (line["growth/layers"] == 3.0) == (line["reference_s"] >= 0.6 * 0.5)
    for wrong, said in (
        ("growth.start=1", "growth.start_layers"),
        ("gate=surprise_ltd", "growth.kind = depth with gate.unit"),
        ("init=grown", "a model that starts from weights has its blocks already"),
    ):
        done = spikegate("train", *words, wrong, "run=wrong", cwd=tmp_path, check=False)
        assert done.returncode == 2
        assert said in done.stderr
