"""`spikegate bench clean`: both controls are there or nothing is said, and its numbers are those of the runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from experiments import bench
from experiments.benches import clean
from experiments.comparison.collection import collect
from experiments.runs.sweeps.reading import find_sweep, read_sweep
from tests.experiments.comparison.records import arm_record

ENDS = {
    "dense": {20.0: [1.80, 1.82, 1.81]},
    "dense_small": {20.0: [1.70, 1.73, 1.72], 10.0: [1.78, 1.83, 1.80]},
    "growth": {20.0: [1.74, 1.75, 1.73], 10.0: [1.82, 1.86, 1.83]},
}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Run folders as training leaves them, named as the sweep's jobs are; a tenth of the loss is in no other number."""
    make(tmp_path, ENDS)
    return tmp_path


def make(folder: Path, ends: dict[str, dict[float, list[float]]]) -> None:
    for arm, by_budget in ends.items():
        for budget, losses in by_budget.items():
            for seed, loss in enumerate(losses):
                run = folder / f"{arm}-b{budget / 20:g}-s{seed}"
                run.mkdir(parents=True)
                info = {"schema": 1, "kind": "train", "status": "finished", "stream": "clean", "arm": arm, "seed": seed}
                info |= {"component_times_sha256": "a" * 64, "started": f"2026-01-0{seed + 1}T00:00:00"}
                (run / "run.json").write_text(json.dumps(info))
                numbers: dict[str, Any] = {"budget_reference_s": budget, "reference_s": 0.999 * budget, "params": 1000}
                (run / "result.json").write_text(json.dumps(arm_record(loss, **numbers) | {"loss_nats": loss}))


def test_every_arm_stands_against_both_controls(runs: Path) -> None:
    (stream,) = collect([runs]).streams.values()
    document = clean.judge(stream)
    assert list(document["controls"]) == ["dense", "dense_small"]
    assert document["best_dense"] == "dense_small"
    grown = document["arms"]["growth"]
    ours, dense, small = (ENDS[arm][20.0] for arm in ("growth", "dense", "dense_small"))
    for key, theirs in (("against_dense", dense), ("against_best_dense", small)):
        differences = [a - b for a, b in zip(ours, theirs, strict=True)]
        assert grown[key]["nats"] == pytest.approx(sum(differences) / 3)
    p_dense, p_small = (stats.ttest_rel(ours, theirs, alternative="less").pvalue for theirs in (dense, small))
    # seed by seed between 10 and 20 seconds, linear: 1.82 to 1.74 meets 1.80 after a quarter, and so on
    times = [0.999 * (10 + 10 * (a - t) / (a - b)) for a, b, t in zip(ENDS["growth"][10.0], ours, dense, strict=True)]
    p_time = stats.ttest_rel(times, [0.999 * 20] * 3, alternative="less").pvalue
    assert grown["time_to_dense"]["mean"] == pytest.approx(sum(times) / 3 / (0.999 * 20))
    ordered = sorted([p_dense, p_small, p_time])
    expected, highest = {}, 0.0
    for rank, p in enumerate(ordered):  # Holm, written out
        highest = max(highest, min(1.0, (3 - rank) * p))
        expected[p] = highest
    assert grown["time_p"] == pytest.approx(expected[p_time])
    assert grown["against_dense"]["p"] == pytest.approx(expected[p_dense])
    assert grown["against_best_dense"]["p"] == pytest.approx(expected[p_small])
    assert grown["against_best_dense"]["p"] > 0.5  # it loses to the small model
    assert document["controls"]["dense_small"]["time_to_dense"]["n"] == 3
    said = clean.lines(document)
    assert len(said) == 4
    assert [line.split()[0] for line in said[1:]] == ["dense", "dense_small", "growth"]


@pytest.mark.parametrize(
    ("without", "said"),
    [
        ("dense", "no finished run of arm dense"),
        ("dense_small", "a dense model of another size"),
        ("growth", "nothing to judge"),
    ],
)
def test_without_a_control_nothing_is_said(tmp_path: Path, without: str, said: str) -> None:
    make(tmp_path, {arm: ends for arm, ends in ENDS.items() if arm != without})
    (stream,) = collect([tmp_path]).streams.values()
    with pytest.raises(clean.ControlError, match=said):
        clean.judge(stream)


def test_a_sweep_whose_runs_are_there_is_judged(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = {arm: {"budgets": sorted(budget / 20 for budget in ends)} for arm, ends in ENDS.items()}
    file = runs / "mine.yaml"
    file.write_text(json.dumps({"folder": str(runs), "budget_reference_s": 20.0, "seeds": [0, 1, 2], "arms": arms}))
    assert bench.main(["clean", "--sweep", str(file)]) == 0
    printed = capsys.readouterr().out.splitlines()
    document = json.loads(printed[-1])
    assert sum(line.startswith("{") for line in printed) == 1
    assert document["best_dense"] == "dense_small"
    assert document == json.loads((runs / "clean.json").read_text()) | {"file": document["file"]}


@pytest.mark.parametrize("words", [["--sweep", "nothing"], ["--seeds", "a"], ["--jobs", "0"]])
def test_wrong_words_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["clean", *words]) == 2
    assert capsys.readouterr().err.startswith("bench clean: ")


def test_the_shipped_sweep_has_both_controls_on_one_schedule() -> None:
    plan = read_sweep(find_sweep("growth"))
    names = [arm.name for arm in plan.arms]
    assert names[0] == "dense"
    assert any(name.startswith("dense_") for name in names)
    assert "optim.schedule=wsd" in plan.settings
    assert plan.tuning_seed not in plan.seeds
    assert not any("optim.schedule" in word for arm in plan.arms for word in arm.settings)
