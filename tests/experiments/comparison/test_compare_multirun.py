"""Three arms times five seeds through Hydra, then `compare`; and the same with runs among them that cannot be used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.experiments.console import spikegate
from tests.shared import once

FAST = [
    "model.width=16", "model.layers=2", "model.heads=2", "model.context=32", "model.attention=explicit",
    "trainer.batch_windows=4", "trainer.eval_tokens=1024", "trainer.evaluations=2", "trainer.precision=fp32",
    "trainer.budget_reference_s=0.4", "trainer.log_every_steps=5",
    "gate.pool_windows=32", "gate.ngram_bits=12", "data=files", "data.garbage_fraction=0.3", "progress=false",
]  # fmt: skip
ARMS = ("dense", "random", "surprise")
SEEDS = range(5)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifteen runs of one `-m` command, named after their arm and seed."""
    return once(tmp_path_factory, "multirun", fifteen_runs)


def fifteen_runs(folder: Path) -> None:
    generator = np.random.default_rng(0)
    words = [bytes(generator.integers(97, 123, generator.integers(2, 8)).astype(np.uint8)) for _ in range(200)]
    (folder / "text").mkdir()
    for i in range(12):
        chosen = generator.integers(0, 200, 1500)
        (folder / "text" / f"{i}.txt").write_bytes(b" ".join(words[j] for j in chosen))
    seeds = ",".join(map(str, SEEDS))
    sweep = [f"gate={','.join(ARMS)}", f"seed={seeds}", "run=runs/${gate.name}-s${seed}", f"data.path={folder / 'text'}"]
    done = spikegate("train", "-m", *FAST, *sweep, cwd=folder)
    printed = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [item["status"] for item in printed] == ["finished"] * 15


def test_fifteen_runs_make_one_table_with_verdicts(runs: Path) -> None:
    done = spikegate("compare", "folder=runs", "out=all", cwd=runs)
    last = done.stdout.splitlines()[-1]
    assert len(last.encode()) <= 4096
    document = json.loads((runs / json.loads(last)["file"]).read_text())
    assert document["excluded"] == []
    rows = {row["name"]: row for row in document["table"]}
    assert list(rows) == list(ARMS)
    for arm in ARMS:
        losses = [json.loads((runs / "runs" / f"{arm}-s{s}" / "result.json").read_text())["loss_nats"] for s in SEEDS]
        assert rows[arm]["n"] == 5
        assert rows[arm]["loss_nats"] == pytest.approx(np.mean(losses))
        # Student's t for 4 degrees of freedom, by table
        half = 2.7764 * np.std(losses, ddof=1) / np.sqrt(5)
        assert rows[arm]["loss_high"] - rows[arm]["loss_nats"] == pytest.approx(half, rel=1e-3)
    assert len(document["verdicts"]) == 2
    for control, sentence in zip(("dense", "random at the same rate"), document["verdicts"], strict=True):
        assert sentence.startswith(f"noisy: surprise beats {control}: ")
        assert "n = 5, one-sided paired t, Holm-adjusted p = " in sentence
        assert sentence in done.stdout
    page = (runs / "all" / "comparison.html").read_text()
    assert "noisy: surprise beats random at the same rate" in page
    assert "15 training runs" in page
    assert all((runs / "all" / f"comparison.{kind}").stat().st_size > 1000 for kind in ("png", "svg", "md", "json"))


def test_the_gate_says_what_it_saved_while_it_trains(runs: Path) -> None:
    def last(arm: str) -> dict[str, float]:
        lines = (runs / "runs" / f"{arm}-s0" / "metrics.jsonl").read_text().splitlines()
        return dict(json.loads(lines[-1]))

    dense, random = last("dense"), last("random")
    assert dense["saved/flops"] == pytest.approx(0.0, abs=1.0)
    assert dense["saved/reference_s_share"] == pytest.approx(0.0, abs=1e-6)
    # windows kept are trained at the dense price, and choosing at random is free of FLOPs
    assert random["saved/flops_share"] == pytest.approx(1 - random["keep_fraction"], abs=1e-6)
    assert random["saved/reference_s_share"] <= 1 - random["keep_fraction"] + 1e-6
    assert random["saved/reference_s"] > 0


def test_broken_unfinished_and_older_runs_are_named_and_left_out(runs: Path) -> None:
    mixed = runs / "mixed"
    shutil.copytree(runs / "runs", mixed)
    broken, unfinished, older = (mixed / name for name in ("broken", "unfinished", "older"))
    for place in (broken, unfinished, older):
        shutil.copytree(runs / "runs" / "surprise-s0", place)
    (broken / "result.json").write_text('{"loss_nats": 1.')
    record = json.loads((unfinished / "run.json").read_text())
    (unfinished / "run.json").write_text(json.dumps(record | {"status": "interrupted"}))
    (unfinished / "result.json").unlink()
    (older / "run.json").write_text(json.dumps(record | {"schema": 0}))
    done = spikegate("compare", "folder=mixed", cwd=runs)
    last = done.stdout.splitlines()[-1]
    assert len(last.encode()) <= 4096
    document = json.loads((runs / json.loads(last)["file"]).read_text())
    reasons = {Path(item["folder"]).name: item["reason"] for item in document["excluded"]}
    assert set(reasons) == {"broken", "unfinished", "older"}
    assert "interrupted" in reasons["unfinished"]
    assert "schema 0" in reasons["older"]
    assert {row["name"]: row["n"] for row in document["table"]} == dict.fromkeys(ARMS, 5)
    page = (mixed / "comparison" / "comparison.html").read_text()
    markdown = (mixed / "comparison" / "comparison.md").read_text()
    for name in reasons:
        assert f"mixed/{name}" in page
        assert f"mixed/{name}" in markdown
        assert f"mixed/{name}" in done.stdout
