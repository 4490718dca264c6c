"""`spikegate train objective=instruct task=...` as a user starts it: what is recorded, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.experiments.console import spikegate

SMALL = [
    "model.width=16", "model.layers=1", "model.heads=2", "model.context=32", "model.attention=explicit",
    "trainer.batch_windows=4", "trainer.evaluations=2", "trainer.budget_reference_s=0.1", "task.form=short",
    "task.judged=8", "task.new_tokens=4",
]  # fmt: skip
"""Fits sums:1-2 in its short form."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    spikegate("train", "objective=instruct", "task=sums", "task.unseen=[modular:1]", *SMALL, "run=tuned", cwd=folder)
    return folder


def test_the_share_of_questions_solved_stands_beside_the_loss(runs):
    result = json.loads((runs / "tuned" / "result.json").read_text())
    assert result["objective"] == "instruct"
    assert set(result["task"]) == {f"task/accuracy{end}" for end in ("", "_unseen", "/sums", "/modular")}
    assert all(0 <= value <= 1 for value in result["task"].values())
    assert set(result["held_out"]) == {"val", "sums", "modular"}
    assert result["val_tokens"] < 8 * 32  # the answers' tokens alone are counted
    assert result["bits_per_byte"] is None
    lines = [json.loads(line) for line in (runs / "tuned" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["task/accuracy"] == result["task"]["task/accuracy"]
    assert lines[-1]["health/empty_steps"] == 0


def test_a_run_starts_from_another_and_is_compared_with_it(runs):
    spikegate("train", "objective=instruct", "task=sums", *SMALL, "gate=random", "init=tuned", "run=more", cwd=runs)
    found = json.loads((runs / "more" / "result.json").read_text())
    assert (found["stream"], found["arm"]) == ("sums", "instruct+random")
    done = spikegate("compare", "folder=.", cwd=runs)
    assert "solved" in done.stdout
    again = spikegate("train", "objective=instruct", "task=sums", *SMALL, "gate=random", "init=tuned", "run=more", cwd=runs)
    assert json.loads(again.stdout.strip().splitlines()[-1])["steps"] == found["steps"]


def test_a_refused_run_leaves_its_folder_free(tmp_path):
    words = ["objective=rl", "task=sums", *SMALL, "objective.sample.new_tokens=4", "run=again"]
    refused = spikegate("train", *words, "objective.sample.n=1", cwd=tmp_path, check=False)
    assert refused.returncode == 2
    spikegate("train", *words, "objective.sample.n=2", cwd=tmp_path)
    changed = spikegate("train", *words, "objective.sample.n=3", cwd=tmp_path, check=False)
    assert changed.returncode == 2
    assert "had other settings: objective.sample.n was 2, is 3" in changed.stderr


@pytest.mark.parametrize("name", ["instruct", "reinforce", "rejection", "dpo", "reward"])
def test_an_experiment_file_says_its_command_time_and_result_and_composes(name, tmp_path):
    head = (Path(__file__).parents[3] / "configs" / "experiment" / f"{name}.yaml").read_text().split("defaults:")[0]
    assert f"# spikegate train experiment={name}" in head
    assert "on one thread" in head
    assert "Expect" in head or "expect" in head
    kind = {"reinforce": "rl"}.get(name, name)
    assert f"kind: {kind}" in spikegate("train", f"experiment={name}", "--cfg", "job", cwd=tmp_path).stdout


PLUGIN = """
from sparse_update.tasks.base import Made, Task, register_task


class Base(Task):
    wordings = ("{}",)
    levels = range(1, 2)

    def make(self, draw, level):
        number = draw.between(0, 99999)
        return Made(str(number), (str(number),), {})


@register_task("raising")
class Raising(Base):
    def verify(self, instance, answer):
        raise RuntimeError("boom")


@register_task("not_a_number")
class NotANumber(Base):
    def verify(self, instance, answer):
        return float("nan")


@register_task("never")
class Never(Base):
    def verify(self, instance, answer):
        return 0.0
"""


def test_verifiers_that_fail_are_named_and_equal_rewards_are_counted(tmp_path, monkeypatch):
    (tmp_path / "verifiers_of_a_test.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    small = [*SMALL, "objective=rl", "objective.sample.new_tokens=4", "task.plugins=[verifiers_of_a_test]"]
    for name, said in (("raising", "('boom')"), ("not_a_number", "score nan")):
        done = spikegate("train", *small, f"task.tasks=[{name}]", f"run={name}", cwd=tmp_path, check=False)
        assert done.returncode == 1
        assert f"verifier of {name}, seed 0, index" in done.stderr
        assert said in done.stderr
        assert not (tmp_path / name / "checkpoint").exists()
    spikegate("train", *small, "task.tasks=[never]", "run=never", cwd=tmp_path)
    result = json.loads((tmp_path / "never" / "result.json").read_text())
    assert result["empty_steps"] == result["steps"] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["objective=instruct"], "trains on tasks: task=sums"),
        (["task=sums"], "which trains on text"),
        (["objective=instruct", "task=sums", "task.tasks=[sums:40]"], "sums has levels 1 to 12"),
        (["objective=instruct", "task=sums", "task.tasks=[nothing]"], "there is no task"),
        (["objective=instruct", "task=sums", "task.levels=2"], "unknown configuration key 'task.levels'"),
        (["objective=instruct", "task=sums", "gate=auto"], "gate.unit = auto with objective.kind = instruct"),
        (["objective=instruct", "task=sums", "model.context=8"], "the model reads 8 in a row"),
        (["objective=reward", "task=sums"], "objective.reward.models is empty"),
        (["objective=reward", "task=sums", "objective.reward.models=[nowhere]"], "spikegate reward RUN FOLDER"),
        (["objective=rl", "task=sums", "objective.sample.n=1"], "at least 2 are needed"),
        (["objective=dpo", "task=sums", "objective.sample.micro_rows=3"], "an even number"),
        (["objective=rl", "task=sums", "objective.rl.prompts.keep_fraction=0"], "above 0, and 1 at most"),
        (["objective=rejection", "task=sums", "gate=surprise_tokens"], "its windows are prompts"),
        (["objective=rl", "task=sums", "objective.sample.new_tokens=30"], "do not fit a context of 32"),
        (["objective=instruct", "task=sums", "task.rows=2"], "no row may come twice"),
        (["objective=instruct", "task=sums", "task.split=train"], "one of development, held_out"),
        (["objective=other"], "no such choice"),
        (["objective.kind=other"], "objective.kind"),
        (["objective=instruct", "task=sums", "objective.sample.temperature=0"], "likeliest tokens are the same"),
    ],
)
def test_settings_that_do_not_fit_are_named(words, said, tmp_path):
    small = [word for word in SMALL if word.split("=")[0] not in {w.split("=")[0] for w in words}]
    done = spikegate("train", *small, *words, "run=bad", cwd=tmp_path, check=False)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
