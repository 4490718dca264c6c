"""Sweeps through joblib's pool and submitit's local jobs: killed workers, killed sweeps, and the same table in the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from experiments import sweep as sweeping
from experiments.runs.sweeps.launching import in_use, launcher
from experiments.runs.sweeps.reading import SweepError, cluster_settings
from experiments.runs.sweeps.task import Task

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 240
SETTINGS = {"joblib": [], "submitit": ["--cluster-set", "cluster=local"]}
WORDS = {**SETTINGS, "processes": []}

# Stands in for experiments.train: holds its folder, says who started it, and waits at `gate` unless it goes on.
FAKE = """
import fcntl, json, os, signal, sys, time
from pathlib import Path
words = dict(word.split("=", 1) for word in sys.argv[1:])
run = Path(words["run"]); run.mkdir(parents=True, exist_ok=True)
stopped = []
signal.signal(signal.SIGINT, lambda *a: stopped.append(130))
signal.signal(signal.SIGTERM, lambda *a: stopped.append(75))
lock = (run / ".lock").open("a+")
try: fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError: sys.exit("in use")
goes_on = (run / "checkpoint").exists()
with (run / "starts").open("a") as file: file.write("on " if goes_on else "new ")
(run / "run.json").write_text(json.dumps({"status": "running"}))
(run / "pid").write_text(str(os.getpid()))
parent = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\\0")
task = b"experiments.runs.sweeps.task"
(run / "worker").write_text(parent[parent.index(task) + 1].decode() if task in parent else "none")
gate = Path(words["gate"])
while not goes_on and not gate.exists() and not stopped: time.sleep(0.01)
if stopped:
    time.sleep(0.2)  # a checkpoint takes its time
    (run / "checkpoint").touch(); (run / "run.json").write_text(json.dumps({"status": "interrupted"})); sys.exit(stopped[0])
loss = 2.0 + 0.01 * int(words["seed"]) + 0.1 * (words["arm"] == "random")
result = {"loss_nats": loss, "reference_s": float(words["trainer.budget_reference_s"])}
(run / "result.json").write_text(json.dumps(result))
(run / "run.json").write_text(json.dumps({"status": "finished"}))
"""


class Sweeps:
    """A sweep of two arms and two seeds with a stand-in for training, as a command of its own."""

    def __init__(self, folder: Path) -> None:
        self.out, self.gate = folder / "out", folder / "gate"
        (folder / "fake.py").write_text(FAKE)
        plan = {
            "folder": str(self.out), "budget_reference_s": 10.0, "seeds": [0, 1], "settings": [f"gate={self.gate}"],
            "arms": {"dense": {}, "random": {}},
        }  # fmt: skip
        self.plan = folder / "sweep.yaml"
        self.plan.write_text(yaml.safe_dump(plan))
        self.script = (
            "import sys; from experiments import sweep; "
            f"sweep.sweep.__defaults__ = (False, {(sys.executable, str(folder / 'fake.py'))!r}, None, None); "
            "sys.exit(sweep.main(sys.argv[1:]))"
        )

    def start(self, how: str) -> subprocess.Popen[str]:
        words = [str(self.plan), "--jobs", "2", "--threads", "1", "--launcher", how, *WORDS[how]]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            [sys.executable, "-c", self.script, *words], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
            env=environment,
        )  # fmt: skip

    def finish(self, how: str) -> str:
        """Open the gate, run the command to its end, and return what it said."""
        self.gate.touch()
        _, said = (process := self.start(how)).communicate(timeout=WAIT_S)
        assert process.returncode == 0, said
        return said

    def wait(self, pattern: str, count: int) -> list[Path]:
        deadline = time.time() + WAIT_S
        while len(found := sorted(self.out.glob(pattern))) < count:
            assert time.time() < deadline, f"{pattern}: {found}"
            time.sleep(0.02)
        return found

    def starts(self) -> list[str]:
        return [path.read_text().strip() for path in sorted(self.out.glob("*/starts"))]

    def table(self) -> dict[str, object]:
        outcome = json.loads((self.out / "outcome.json").read_text())
        results = {path.parent.name: json.loads(path.read_text()) for path in sorted(self.out.glob("*/result.json"))}
        return {"missing": outcome["missing"], "results": results}


EXPECTED = {
    "missing": {},
    "results": {
        f"{arm}-b1-s{seed}": {"loss_nats": 2.0 + 0.01 * seed + 0.1 * (arm == "random"), "reference_s": 10.0}
        for arm in ("dense", "random")
        for seed in (0, 1)
    },
}


@pytest.fixture
def sweeps(tmp_path: Path) -> Sweeps:
    return Sweeps(tmp_path)


@pytest.mark.parametrize("how", SETTINGS)
def test_a_killed_worker_costs_no_run(sweeps: Sweeps, how: str) -> None:
    process = sweeps.start(how)
    worker = int(sweeps.wait("*/worker", 2)[0].read_text())
    os.kill(worker, signal.SIGKILL)
    sweeps.wait("*/checkpoint", 1)  # the run was told, and wrote its checkpoint
    sweeps.gate.touch()
    _, said = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, said
    assert "it is started again (1 of 2)" in said
    assert sweeps.table() == EXPECTED
    assert sorted(set(sweeps.starts())) == ["new", "new on"]


@pytest.mark.parametrize("how", SETTINGS)
def test_a_stopped_sweep_goes_on_with_the_same_command(sweeps: Sweeps, how: str) -> None:
    process = sweeps.start(how)
    sweeps.wait("*/worker", 2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130, said
    assert len(list(sweeps.out.glob("*/checkpoint"))) == 2
    assert not any(in_use(run) for run in sweeps.out.glob("*-b1-s*"))
    sweeps.finish(how)
    assert sweeps.table() == EXPECTED
    assert sorted(sweeps.starts()) == ["new", "new", "new on", "new on"]


@pytest.mark.parametrize("how", SETTINGS)
def test_a_killed_sweep_goes_on_with_the_same_command(sweeps: Sweeps, how: str) -> None:
    process = sweeps.start(how)
    sweeps.wait("*/worker", 2)
    process.kill()
    process.wait(WAIT_S)
    assert process.stderr is not None
    process.stderr.close()  # its workers outlive it: what they do is waited for and not done again
    said = sweeps.finish(how)
    assert sweeps.table() == EXPECTED
    assert sweeps.starts() == ["new"] * 4, said


def test_a_run_that_another_process_trains_is_waited_for(sweeps: Sweeps) -> None:
    one = Task(
        (sys.executable, str(sweeps.plan.parent / "fake.py"), f"run={sweeps.out / 'dense-b1-s0'}", f"gate={sweeps.gate}",
         "seed=0", "arm=dense", "trainer.budget_reference_s=10"),
        str(sweeps.plan.parent / "log"), str(sweeps.plan.parent / "code"),
    )  # fmt: skip
    held = one.start()
    sweeps.wait("dense-b1-s0/worker", 1)
    process = sweeps.start("joblib")
    sweeps.wait("*/worker", 2)
    sweeps.gate.touch()
    assert held.wait() == 0
    _, said = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, said
    assert "another process trains in" in said
    assert sweeps.starts() == ["new"] * 4
    assert sweeps.table() == EXPECTED


def test_an_exit_code_is_left_whole_or_not_at_all(tmp_path: Path) -> None:
    task = Task((sys.executable, "-c", "import sys; sys.exit(3)"), str(tmp_path / "log"), str(tmp_path / "code"))
    assert task.left() is None
    assert task() == 3
    assert task.left() == 3
    (tmp_path / "code").write_text("")
    assert task.left() is None


REFUSED: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: launcher("slurm", folder, 1, {}), "--launcher slurm: there is processes, joblib, submitit"),
    (lambda folder: launcher("joblib", folder, 1, {"cluster": "local"}), "only --launcher submitit takes settings"),
    (lambda folder: launcher("submitit", folder, 1, {"cluster": "moon"}), "cluster=moon: there is slurm, local"),
    (lambda folder: launcher("submitit", folder, 1, {"cluster": "local", "gpu": "1"}), "submitit: "),
    (lambda folder: cluster_settings(["partition"]), "--cluster-set partition: KEY=VALUE is needed"),
    (lambda folder: cluster_settings(["a=1", "a=2"]), "--cluster-set a is given twice"),
]


def test_a_run_that_something_else_interrupts_is_started_again(sweeps: Sweeps) -> None:
    process = sweeps.start("processes")
    told = sweeps.wait("*/worker", 2)
    os.kill(int(told[0].with_name("pid").read_text()), signal.SIGTERM)  # as a scheduler does
    sweeps.wait("*/checkpoint", 1)
    sweeps.gate.touch()
    _, said = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, said
    assert "an interruption that was not this sweep's (exit code 75); it is started again (1 of 2)" in said
    assert sweeps.table() == EXPECTED
    assert sorted(sweeps.starts()) == ["new", "new", "new", "new on"]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_what_a_launcher_does_not_take_is_refused(call: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    with pytest.raises(SweepError, match=message):
        call(tmp_path)


def test_a_missing_package_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    monkeypatch.delitem(sys.modules, "experiments.runs.sweeps.cluster", raising=False)
    with pytest.raises(SweepError, match=r"needs submitit: pip install 'spikegate\[cluster\]'"):
        launcher("submitit", tmp_path, 1, {})


def test_the_command_refuses_an_unknown_launcher(sweeps: Sweeps, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweeping.main([str(sweeps.plan), "--launcher", "ray"]) == 2
    assert "--launcher ray" in capsys.readouterr().err


@pytest.mark.soak
@pytest.mark.parametrize("how", SETTINGS)
def test_a_real_sweep_that_is_killed_has_the_table_of_one_that_is_not(
    tmp_path: Path, how: str, record_property: Callable[[str, object], None]
) -> None:
    """Gates x rates x seeds, really trained: the workers and the sweep killed, and the same results in the end."""
    body = {
        "settings": ["model=tiny", "trainer.eval_tokens=2048", "trainer.checkpoint_every_s=1"],
        "budget_tokens": 20_000,
        "seeds": [0, 1],
        "arms": {
            "dense": {},
            "surprise-30": {"set": ["gate=surprise", "gate.keep_fraction=0.3"]},
            "surprise-60": {"set": ["gate=surprise", "gate.keep_fraction=0.6"]},
        },
    }
    found = {}
    faults = 0
    for name in ("whole", "killed"):
        plan = tmp_path / f"{name}.yaml"
        plan.write_text(yaml.safe_dump({"folder": str(tmp_path / name), **body}))
        words = [str(plan), "--jobs", "2", "--threads", "1"]
        if name == "killed":
            words += ["--launcher", how, *SETTINGS[how]]
        command = [sys.executable, "-m", "experiments.sweep", *words]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        if name == "killed":
            for victim in ("worker", "sweep"):
                with (tmp_path / "said").open("ab") as said:
                    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=said)
                deadline = time.time() + WAIT_S
                while not list((tmp_path / name).glob("**/checkpoint")) and time.time() < deadline:
                    time.sleep(0.05)
                if victim == "worker":
                    for worker in _workers(str(tmp_path / name)):
                        os.kill(worker, signal.SIGKILL)
                        faults += 1
                    time.sleep(5)
                process.kill()
                faults += 1
                process.wait()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        outcome = json.loads((tmp_path / name / "outcome.json").read_text())
        assert outcome["missing"] == {}
        found[name] = {
            "tuned": outcome["tuned"],
            "runs": {
                path.parent.name: {key: value for key, value in json.loads(path.read_text()).items() if key in EXACT}
                for path in sorted((tmp_path / name).glob("*-b*/result.json"))
            },
        }
    assert len(found["whole"]["runs"]) == 6
    assert found["killed"] == found["whole"]
    record_property("soak", {"what": f"a sweep by {how}, workers and sweep killed", "faults": faults, "survived": faults,
                             "lost": "no run, no number", "tried": 6})  # fmt: skip


EXACT = ("loss_nats", "bits_per_byte", "tokens", "flops", "reference_s", "steps")


def _workers(folder: str) -> list[int]:
    """The workers of runs in a folder, as their supervisors name them."""
    workers = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if "experiments.runs.sweeps.task" in words and any(folder in word for word in words):
            workers.append(int(words[words.index("experiments.runs.sweeps.task") + 1]))
    return workers
