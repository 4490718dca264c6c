"""Does it pay on a model of one's own: the command and the call, killed, resumed, read by `compare`, refused in words."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from experiments import UserTask, does_it_pay
from experiments.comparison.collection import collect
from experiments.comparison.document import to_json
from experiments.runs.hydra_app import ConfigError
from experiments.runs.own.finding import find_task
from experiments.runs.own.settings import merged
from tests.experiments.console import spikegate
from tests.sparse_update.own.tasks import mlp, rows, task

MODULE = """
import torch
from torch import nn

from sparse_update import UserTask


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.drop, self.up = nn.Embedding(19, 16), nn.Dropout(0.1), nn.Linear(16, 32)
        self.head = nn.Linear(32, 19)

    def forward(self, x):
        return self.head(torch.relu(self.up(self.drop(self.embed(x)))))


def task():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 3, (80, 13), generator=generator).cumsum(1) % 19
    train = torch.utils.data.DataLoader(rows[16:], batch_size=8, shuffle=True)
    return UserTask(model=Net, train=train, held_out=[rows[:16]], name="net", bytes_per_token=2.0)


def broken():
    return [][1]


def wrong():
    return 3


value = 3
"""
WORDS = ("module=my_own_net:task", "gate=surprise_tokens", "budget_steps=120", "clock=modelled", "progress=false")
WORDS += ("evaluations=4",)
PAYS = ("pays", *WORDS, "seeds=[0,1]", "folder=out", "tensorboard=false")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "my_own_net.py").write_text(MODULE)
    return folder


@pytest.fixture
def no_pictures(monkeypatch):
    """Comparisons without figures and pages, where those are not what a test is about."""

    def light(cfg):
        return {"folder": cfg.out, **to_json(collect(cfg.runs))}

    monkeypatch.setattr("experiments.runs.own.comparison.compare", light)


@pytest.fixture(scope="module")
def done(place):
    return spikegate(*PAYS, cwd=place)


def result(folder):
    return json.loads((folder / "result.json").read_text())


def test_the_command_ends_in_verdicts(place, done):
    outcome = json.loads((place / "out" / "outcome.json").read_text())
    assert outcome["status"] == "finished"
    arms = outcome["streams"]["net"]
    assert {"dense", "random", "surprise_tokens"} <= set(arms)
    for control in ("dense", "random at the same rate"):
        (sentence,) = [v for v in outcome["verdicts"] if f"surprise_tokens beats {control}: " in v]
        assert "n = 2, one-sided paired t" in sentence
        assert sentence in done.stdout
    shown = json.loads(done.stdout.splitlines()[-1])
    assert shown["verdicts"] == outcome["verdicts"]
    assert outcome["clock"]["source"] == "modelled"
    steps = outcome["steps"]
    assert steps["random"]["counted_over_dense"] == pytest.approx(steps["surprise_tokens"]["counted_over_dense"], rel=0.1)
    assert f"{steps['random']['counted_over_dense']:.2f} by the clock" in done.stdout


def test_run_folders_are_those_of_every_training_run(place, done):
    shas = set()
    for arm in ("dense", "random", "surprise_tokens"):
        for seed in (0, 1):
            run = place / "out" / f"{arm}-s{seed}"
            record, found = json.loads((run / "run.json").read_text()), result(run)
            assert (record["kind"], record["status"], record["stream"]) == ("train", "finished", "net")
            shas.add(record["component_times_sha256"])
            assert found["bits_per_byte"] == pytest.approx(found["loss_nats"] / 0.6931472 / 2)
            assert found["reference_s"] <= found["budget_reference_s"]
            assert found["reference_s"] > 0.95 * found["budget_reference_s"]
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            assert sum("val_loss_nats" in line for line in lines) == 4
            assert lines[-1]["val_loss_nats"] == found["loss_nats"]
            assert list(run.glob("events.out.tfevents.*"))
            assert (run / "checkpoint" / "model.safetensors").exists()
            parts = found["clock"]["by_part"]
            assert sum(part["reference_s"] for part in parts.values()) == pytest.approx(found["reference_s"])
            assert sum(part["flops"] for part in parts.values()) == found["flops"]
            assert found["clock"]["source"] == "modelled"
            assert "not counted" in found["notes"][0]
    assert len(shas) == 1


def test_compare_reads_the_folder(place, done):
    said = spikegate("compare", "folder=out", "out=again", cwd=place)
    there = json.loads((place / "again" / "comparison.json").read_text())
    here = json.loads((place / "out" / "comparison" / "comparison.json").read_text())
    assert there["verdicts"] == here["verdicts"]
    assert there["excluded"] == []
    assert "reference seconds are modelled" in said.stdout
    assert (place / "again" / "comparison.html").read_text().count("surprise_tokens") > 3


def test_the_same_command_again_runs_nothing(place, done, no_pictures):
    before = {path: path.stat().st_mtime_ns for path in (place / "out").glob("*-s?/result.json")}
    spikegate(*PAYS, cwd=place)
    assert {path: path.stat().st_mtime_ns for path in (place / "out").glob("*-s?/result.json")} == before
    refused = spikegate(*PAYS, "gate.keep_fraction=0.25", "gate.noise_cut=0.0", cwd=place, check=False)
    assert refused.returncode == 2
    assert "holds a comparison with other settings (arms was" in refused.stderr
    assert max(map(len, refused.stderr.splitlines())) < 600


def killed_when(path, words, cwd):
    """Run a command in a process of its own and end it with SIGKILL as soon as `path` is there."""
    command = [sys.executable, "-m", "experiments.cli", *words]
    with subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while not path.exists():
            assert process.poll() is None, process.stderr.read().decode()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
    return process.returncode


@pytest.mark.slow
def test_a_comparison_that_is_killed_goes_on_to_the_same_numbers(place, done, no_pictures):
    words = ["pays", *WORDS, "seeds=[0]", "folder=killed", "tensorboard=false", "checkpoint_every_s=0"]
    code = killed_when(place / "killed" / "random-s0" / "checkpoint" / "meta.json", words, place)
    assert code == -signal.SIGKILL
    assert not (place / "killed" / "random-s0" / "result.json").exists()
    spikegate(*words, cwd=place)
    for run in sorted((place / "out").glob("*-s0")):
        ours, theirs = result(place / "killed" / run.name), result(run)
        for key in ("loss_nats", "steps", "tokens", "flops", "reference_s", "keep_fraction"):
            assert ours[key] == theirs[key], (run.name, key)


def test_one_arm_by_train_and_its_repetition(place, done):
    spikegate("train", *WORDS, "run=single", cwd=place)
    single, of_pays = result(place / "single"), result(place / "out" / "surprise_tokens-s0")
    for key in ("loss_nats", "steps", "tokens", "flops", "reference_s"):
        assert single[key] == of_pays[key], key  # an arm is the same run wherever it is started from
    assert spikegate("train", *WORDS, "run=single", "resume=false", cwd=place, check=False).returncode == 2
    spikegate("train", *WORDS, "run=single", cwd=place)
    assert result(place / "single") == single  # the same command finds it finished
    unasked = spikegate("rerun", "single", "--out", "twice", cwd=place, check=False)
    assert unasked.returncode == 2
    assert "module names 'my_own_net:task', code that is not of this package" in unasked.stderr
    assert not (place / "twice").exists()
    allowed = ("--code", "my_own_net:task")
    found = json.loads(spikegate("rerun", "single", "--out", "twice", *allowed, cwd=place).stdout.splitlines()[-1])
    assert found["equal"], found["compared"]
    refused = spikegate("deploy", "run=single", cwd=place, check=False)
    assert refused.returncode != 0
    assert "a model of one's own (my_own_net:task)" in refused.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "module has no value: name the function"),
        (("module=net",), "module = net: written PACKAGE:FUNCTION"),
        (("module=no_such_module:task",), "there is no module no_such_module that Python can import"),
        (("module=my_own_net:nothing",), "my_own_net has no nothing; it has UserTask, Net, task"),
        (("module=my_own_net:value",), "value is no function but int"),
        (("module=my_own_net:wrong",), "wrong() returns int, not a sparse_update.UserTask"),
        (("module=my_own_net:broken",), "broken() failed: IndexError: list index out of range (my_own_net.py, line"),
        (("module=my_own_net:task", "gate=dense"), "nothing to compare"),
        (("module=my_own_net:task", "gate=random"), "gate = random is the control"),
        (("module=my_own_net:task", "gate=surprise_ltd"), "gate.unit = 'bypass' looks into the package's own Transformer"),
        (("module=my_own_net:task", "gate=surprise", "gate.anneal_fraction=0.1"), "gate.anneal_fraction = 0.1: a gate on"),
        (("module=my_own_net:task", "gate=surprise_tokens", "modell=tiny"), "unknown configuration key 'modell'"),
        (("module=my_own_net:task", "gate=surprise_tokens", "attach.backward.kept=1"), "backward.kept is no setting"),
        (("module=my_own_net:task", "gate=surprise_tokens", "seeds=[]"), "seeds = []: at least one"),
        (("module=my_own_net:task", "gate=surprise_tokens", "learning_rates=[0]"), "positive rates to try"),
        (("module=my_own_net:task", "gate=surprise_tokens", "budget_steps=0"), "at least one step"),
    ],
)
def test_what_cannot_be_is_refused_in_words(place, words, says, tmp_path):
    refused = spikegate("pays", *words, f"folder={tmp_path}/x", cwd=place, check=False)
    assert refused.returncode == 2, refused.stderr
    assert says in refused.stderr
    assert "Traceback" not in refused.stderr


def test_the_packages_own_settings_are_unknown_beside_a_module(place):
    refused = spikegate("train", *WORDS, "model=tiny", cwd=place, check=False)
    assert refused.returncode == 2
    assert "model" in refused.stderr


def test_the_call_on_one_seed_says_that_it_proves_nothing(tmp_path, capsys, no_pictures):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found = does_it_pay(
        task(mlp), {"weights": {"kind": "blocks", "active_fraction": 0.5, "block_rows": 4}},
        seeds=[3], budget_steps=80, clock="modelled", folder=tmp_path / "one", progress=False, tensorboard=False,
        learning_rates=[1e-3, 1e-2],
    )  # fmt: skip
    assert torch.equal(torch.get_rng_state(), before)
    assert found["demonstration"]
    assert any("n = 1: no test possible" in sentence for sentence in found["verdicts"])
    assert "one seed is a demonstration and proves nothing" in capsys.readouterr().out
    assert set(found["streams"]["small"]) >= {"dense", "random", "gated"}
    rates = {result(run)["learning_rate"] for run in (tmp_path / "one").glob("*-s3")}
    tried = {float(run.name.split("-", 1)[1]): result(run)["loss_nats"] for run in (tmp_path / "one/tuning").iterdir()}
    assert rates == {min(tried, key=tried.get)}
    assert found["streams"]["small"]["dense"]["bits_per_byte"] is None


def test_ctrl_c_stops_between_two_steps_and_the_same_call_goes_on(tmp_path, no_pictures):
    calls = []

    def loss(model, batch):
        calls.append(1)
        if len(calls) == 30:
            os.kill(os.getpid(), signal.SIGINT)
        return model(batch[:, :-1]), batch[:, 1:]

    def ask(name):
        return does_it_pay(
            task(mlp, loss=loss), {"weights": {"kind": "blocks", "active_fraction": 0.5, "block_rows": 4}},
            seeds=[0], budget_steps=25, clock="modelled", folder=tmp_path / name, progress=False, show=False,
        )  # fmt: skip

    stopped = ask("a")
    assert stopped["status"] == "interrupted"
    assert len(calls) == 30
    assert json.loads((tmp_path / "a" / "dense-s0" / "run.json").read_text())["status"] == "interrupted"
    assert ask("a")["status"] == "finished"
    assert ask("b")["status"] == "finished"
    for run in ("dense-s0", "random-s0", "gated-s0"):
        assert result(tmp_path / "a" / run)["loss_nats"] == result(tmp_path / "b" / run)["loss_nats"]


class Explodes(nn.Module):
    """Trains for a while, then has no finite loss any more."""

    def __init__(self):
        super().__init__()
        self.body, self.calls = mlp(), 0

    def forward(self, x):
        self.calls += self.training
        return self.body(x) * (float("nan") if self.calls > 3 else 1.0)


def test_an_arm_that_diverges_is_named_and_the_others_compared(tmp_path, capsys, no_pictures):
    made = iter([mlp, mlp, Explodes, mlp])  # the dense step that the budget counts, then dense, random and gated
    with pytest.raises(ValueError, match="give gate = the settings of one gate, or gates"):
        does_it_pay(task(mlp))
    small = UserTask(model=lambda: next(made)(), train=rows(64).split(8), held_out=[rows(16, 1)], name="fragile")
    gate = {"backward": {"unit": "token", "keep_fraction": 0.5}}
    found = does_it_pay(
        small,
        gate,
        seeds=[0],
        budget_steps=80,
        clock="modelled",
        folder=tmp_path / "runs",
        progress=False,
        tensorboard=False,
    )
    assert len(found["missing"]) == 1
    assert set(found["missing"]) == {"random-s0"}
    assert "missing: random-s0: arm random, seed 0" in capsys.readouterr().out
    assert "the loss was not finite in 20 steps in a row" in next(iter(found["missing"].values()))


def test_settings_of_attach_lie_over_those_of_the_gate():
    assert merged({"backward": {"unit": "token", "signal": "x"}}, {"backward": {"signal": "y"}, "exclude": ["head"]}) == {
        "backward": {"unit": "token", "signal": "y"},
        "exclude": ["head"],
    }


def test_a_missing_dependency_of_the_module_is_not_taken_for_the_module(tmp_path, monkeypatch):
    (tmp_path / "my_needy_net.py").write_text("import no_such_dependency")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(tmp_path)))
    with pytest.raises(ConfigError, match="my_needy_net imports no_such_dependency, which is not installed"):
        find_task("my_needy_net:task")
