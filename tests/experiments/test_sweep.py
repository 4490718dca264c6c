"""Sweeps: files are checked, runs are made once, interruptions are passed on and resumed, budgets become times."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.runs.folder import RunError
from experiments.runs.sweeps.plan import Job, settle
from experiments.runs.sweeps.reading import SweepError, find_sweep, read_sweep
from experiments.runs.sweeps.runner import Runner
from experiments.runs.sweeps.shipped import shipped
from experiments.sweep import main, sweep

ROOT = Path(__file__).resolve().parents[2]

# Stands in for experiments.train: writes what a run writes, counts its starts, and can be told to wait or to fail.
FAKE = """
import json, os, signal, sys, time
from pathlib import Path
words = dict(word.split("=", 1) for word in sys.argv[1:])
run = Path(words["run"]); run.mkdir(parents=True, exist_ok=True)
starts = run / "starts"
goes_on = words["resume"] == "auto" and (run / "checkpoint").exists()
starts.write_text((starts.read_text() if starts.exists() else "") + ("on " if goes_on else "new "))
(run / "run.json").write_text(json.dumps({"status": "running"}))
if "trainer.component_times" in words: Path(words["trainer.component_times"]).touch()
(run / "threads").write_text(os.environ["OMP_NUM_THREADS"] + words["trainer.threads"])
if words.get("fail"): print("no such gate", file=sys.stderr); sys.exit(3)
stopped = []
signal.signal(signal.SIGINT, lambda *a: stopped.append(1))
(run / "ready").touch()
end = time.time() + (float(words.get("wait", 0)) if not goes_on else 0)
while time.time() < end and not stopped: time.sleep(0.01)
if stopped:
    (run / "checkpoint").mkdir(); (run / "run.json").write_text(json.dumps({"status": "interrupted"})); sys.exit(0)
loss = 2.0 + abs(float(words.get("lr", 0.3)) - 0.3) + 0.01 * int(words["seed"])
(run / "result.json").write_text(json.dumps({"loss_nats": loss, "reference_s": float(words["trainer.budget_reference_s"])}))
(run / "run.json").write_text(json.dumps({"status": "finished"}))
"""


@pytest.fixture
def fake(tmp_path: Path) -> tuple[str, ...]:
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    return (sys.executable, str(script))


def write(path: Path, **body: Any) -> Path:
    plan = {"folder": str(path / "out"), "budget_reference_s": 10.0, "seeds": [0, 1], "arms": {"dense": {}}} | body
    plan = {key: value for key, value in plan.items() if value is not None}
    (path / "sweep.yaml").write_text(yaml.safe_dump(plan))
    return path / "sweep.yaml"


def test_jobs_carry_arm_seed_budget_and_the_tuned_choice(tmp_path: Path) -> None:
    arms = {
        "dense": {"grid": {"lr": [0.1, 0.3, 0.9]}},
        "surprise": {"set": ["gate=surprise", "init={base}"], "budgets": [0.5, 1.0], "tuned_as": "dense", "seeds": [7]},
    }
    plan = read_sweep(write(tmp_path, arms=arms, settings=["experiment=noisy"], base=["experiment=clean"]))
    tuning = plan.tuning_jobs()
    assert [job.name for job in tuning] == ["tuning/dense-0", "tuning/dense-1", "tuning/dense-2"]
    with pytest.raises(RunError, match="dense-0"):
        plan.main_jobs()
    for i, loss in enumerate((2.0, 1.9, "nan")):
        (tmp_path / "out/tuning" / f"dense-{i}").mkdir(parents=True)
        (tmp_path / "out/tuning" / f"dense-{i}" / "result.json").write_text(json.dumps({"loss_nats": loss}))
    jobs = {job.name: job.words for job in plan.main_jobs()}
    assert list(jobs) == ["dense-b1-s0", "surprise-b1-s7", "surprise-b0.5-s7", "dense-b1-s1"]
    half = jobs["surprise-b0.5-s7"]
    for word in ("experiment=noisy", "gate=surprise", "lr=0.3", "arm=surprise", "seed=7", "trainer.budget_reference_s=5"):
        assert word in half
    assert f"init={tmp_path / 'out' / 'base'}" in half
    assert "experiment=clean" in plan.base_jobs()[0].words


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"arms": {}}, "at least `arms"),
        ({"seeds": None}, "`seeds` is missing"),
        ({"budget_reference_s": None}, "one of them and positive"),
        ({"budget_tokens": 100}, "one of them and positive"),
        ({"budget_reference_s": -1}, "one of them and positive"),
        ({"sedes": [1]}, "unknown key sedes"),
        ({"arms": {"a": {"sets": []}}}, "unknown key arms.a.sets"),
        ({"arms": {"a": {"budgets": [0.0]}}}, "above 0"),
        ({"arms": {"a": {"grid": {"lr": 3}}}}, "list of values"),
        ({"arms": {"a": {"tuned_as": "b"}}}, "'b' is no arm here: a"),
        ({"arms": {"a": {"tuned_as": "b"}, "b": {"tuned_as": "c"}, "c": {}}}, "name that one"),
        ({"arms": {"a": {"grid": {"lr": [1]}, "tuned_as": "a"}}}, "give one of them"),
    ],
)
def test_files_that_cannot_be_run_are_refused(
    tmp_path: Path, body: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, **body)
    with pytest.raises(SweepError) as caught:
        read_sweep(path)
    assert message in str(caught.value)
    assert main([str(path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "configs/sweep").glob("**/*.yaml")), ids=lambda path: path.stem)
def test_shipped_files_are_read_and_open_with_their_command(path: Path) -> None:
    plan = read_sweep(path)
    assert find_sweep(path.stem).read_text() == find_sweep(str(path)).read_text() == path.read_text()
    assert path.read_text().startswith(f"# spikegate sweep {path.stem}")
    assert "dense" in {arm.name for arm in plan.arms}
    settings = [word for arm in plan.arms for word in arm.settings]
    controls = {  # setting -> what it has to stand beside
        "gate=": "random",
        "mask=": "random",
        "trainer.batch_schedule=": "dense",
        "trainer.vocabulary": "random",
        "growth=": "dense_",  # is it growth, or would a dense model of another size have done?
        "subset=": "dense_small_lr",  # where only weights are chosen: does a small rate forget less?
    }
    needed = {control for start, control in controls.items() if any(word.startswith(start) for word in settings)}
    if "random" in needed:
        needed.discard("dense_small_lr")
    assert needed or all(arm.name.startswith("dense") for arm in plan.arms)  # dense models alone are controls of each other
    assert all(any(arm.name.startswith(control) for arm in plan.arms) for control in needed)


def test_finished_runs_are_skipped_and_failures_do_not_stop_the_rest(
    tmp_path: Path, fake: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    jobs = [Job(f"a-{i}", (f"seed={i}", "trainer.budget_reference_s=4", *(["fail=1"] if i == 1 else []))) for i in range(3)]
    first = Runner(out, 2, 1, fake)
    assert first.run(jobs, "runs")
    assert first.failed == {"a-1": "failed with exit code 3: no such gate"}
    printed = capsys.readouterr().err
    assert "a-1 FAILED with exit code 3" in printed
    assert "no such gate" in printed
    assert "a-2: 2.0200 nats, 4.0 reference s" in printed
    assert (out / "a-0" / "threads").read_text() == "11"
    again = Runner(out, 2, 1, fake)
    assert again.run([jobs[0], jobs[2]], "runs")
    assert (out / "a-0" / "starts").read_text() == "new "
    assert "2 of 2 are there already" in capsys.readouterr().err


def test_names_that_are_no_sweep_list_those_that_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for word in ("noisi", "sweeps/mine.yaml"):
        with pytest.raises(SweepError) as caught:
            find_sweep(word)
        assert ", ".join(shipped()) in str(caught.value)
    with pytest.raises(SweepError, match="the shipped one: spikegate sweep noisy"):
        find_sweep("configs/sweep/noisy.yaml")
    (tmp_path / "mine.yml").write_text("arms: {}")
    assert find_sweep("mine.yml").name == "mine.yml"


def test_a_failed_arm_is_named_and_the_rest_compared_until_it_is_mended(
    tmp_path: Path, fake: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One arm fails, one cannot be tuned: what is finished is compared; mended, the same command makes the rest."""
    compared: list[list[str]] = []

    def compare(cfg: Any) -> dict[str, Any]:
        compared.append([Path(run).name for run in cfg.runs])
        return {"folder": cfg.out, "streams": {"s": {}}, "verdicts": [], "excluded": []}

    monkeypatch.setattr("experiments.compare.compare", compare)
    broken = {"dense": {}, "bad": {"set": ["fail=1"]}, "lost": {"set": ["fail=1"], "grid": {"lr": [0.1, 0.3]}}}
    assert sweep(read_sweep(write(tmp_path, arms=broken, seeds=[0])), 2, 1, command=fake) == 1
    assert compared == [["dense-b1-s0"]]
    shown = capsys.readouterr()
    assert "missing: bad-b1-s0: failed with exit code 3: no such gate" in shown.out
    document = json.loads(shown.out.splitlines()[-1])
    assert set(document["missing"]) == {"bad-b1-s0", "tuning/lost-0", "tuning/lost-1", "arm lost"}
    assert json.loads(Path(document["file"]).read_text())["missing"] == document["missing"]
    assert "the same command tries them again" in shown.err

    mended = {"dense": {}, "bad": {"set": ["lr=0.5"]}, "lost": {"grid": {"lr": [0.1, 0.3]}}}
    assert sweep(read_sweep(write(tmp_path, arms=mended, seeds=[0])), 2, 1, command=fake) == 0
    assert compared[-1] == ["bad-b1-s0", "dense-b1-s0", "lost-b1-s0"]
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (document["missing"], document["tuned"]) == ({}, {"lost": ["lr=0.3"]})
    assert (tmp_path / "out" / "dense-b1-s0" / "starts").read_text() == "new "  # a finished arm is left alone
    changed = {"dense": {"set": ["lr=0.7"]}}
    with pytest.raises(RunError, match=r"dense-b1-s0 is finished and was made with other settings \(lr=0\.7\)"):
        sweep(read_sweep(write(tmp_path, arms=changed, seeds=[0])), 2, 1, command=fake)


def test_one_failed_point_of_a_grid_leaves_the_others_to_choose_from(tmp_path: Path, fake: tuple[str, ...]) -> None:
    arms = {"dense": {"grid": {"fail": ["1", ""]}}}
    assert sweep(read_sweep(write(tmp_path, arms=arms, seeds=[0])), 1, 1, compare=False, command=fake) == 1
    assert json.loads((tmp_path / "out/outcome.json").read_text())["tuned"] == {"dense": ["fail="]}
    assert (tmp_path / "out/dense-b1-s0/result.json").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_and_the_sweep_goes_on_from_there(
    tmp_path: Path, fake: tuple[str, ...], number: signal.Signals
) -> None:
    plan = write(tmp_path, arms={"dense": {"set": ["wait=60"]}})
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path; from experiments.sweep import sweep; "
        "from experiments.runs.sweeps.reading import read_sweep; "
        f"sys.exit(sweep(read_sweep(Path({str(plan)!r})), 2, 1, compare=False, command={fake!r}))"
    )
    out = tmp_path / "out"
    out.mkdir()
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 240
    while len(list(out.glob("*/ready"))) < 2 and time.time() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, number)
    _, printed = process.communicate(timeout=240)
    assert process.returncode == (130 if number == signal.SIGINT else 75)
    assert "the same command goes on from here" in printed
    assert len(list(out.glob("*/checkpoint"))) == 2
    done = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert [path.read_text() for path in sorted(out.glob("dense*/starts"))] == ["new on "] * 2
    assert (out / "dense-b1-s1" / "result.json").exists()


def test_finished_runs_of_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    job, other = Job("a", ("lr=1", "seed=0")), Job("a", ("lr=2", "seed=0"))
    settle(tmp_path, [job])
    settle(tmp_path, [other])  # nothing was run yet
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "run.json").write_text('{"status": "failed"}')
    settle(tmp_path, [job])  # what failed is no obstacle
    (tmp_path / "a" / "run.json").write_text('{"status": "finished"}')
    with pytest.raises(RunError, match=r"other settings \(lr=1, lr=2\)"):
        settle(tmp_path, [other])


def test_dry_run_lists_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write(tmp_path)), "--dry-run", "--seeds", "3,4", "--folder", str(tmp_path / "else")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["dense-b1-s3", "dense-b1-s4"]
    assert json.loads(lines[-1]) == {"runs": 2, "tuning_first": False}
    assert not (tmp_path / "else").exists()
