"""Run folders made by hand -> Comparison -> table, JSON, verdicts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.comparison.collection import collect
from experiments.comparison.document import to_json
from experiments.comparison.overview import rows
from experiments.comparison.verdicts import verdicts
from experiments.views.energy_figure import Point, pareto, points
from experiments.views.page import page
from experiments.views.tables import markdown, summary, table
from tests.experiments.comparison.records import arm_record, deployed_record

RunMaker = Callable[..., Path]


def test_json_has_the_agreed_form(tmp_path: Path, make_run: RunMaker, make_deployment: RunMaker) -> None:
    for arm, loss in (("surprise", 1.7), ("random", 1.8), ("dense", 1.75)):
        make_run(arm, loss)
    make_deployment()
    document = json.loads(json.dumps(to_json(collect([tmp_path]))))
    assert document["schema"] == 1
    assert list(document["streams"]["clean"]) == ["dense", "random", "surprise", "deployed"]
    dense = document["streams"]["clean"]["dense"]
    assert {key: dense[key] for key in arm_record(1.75)} == arm_record(1.75)
    assert (dense["n"], dense["seeds"], dense["interval"]) == (1, [0], None)
    assert document["streams"]["clean"]["deployed"] == deployed_record()
    assert document["excluded"] == []


def test_one_seed_is_a_demonstration_and_no_test(tmp_path: Path, make_run: RunMaker) -> None:
    make_run("dense", 1.75)
    make_run("surprise", 1.70)
    comparison = collect([tmp_path])
    assert "n = 1, a demonstration" in table(comparison)
    assert verdicts(comparison) == ["clean: surprise against dense: 0.0500 nats lower; n = 1: no test possible."]


def test_several_seeds_give_interval_and_paired_test(tmp_path: Path, make_run: RunMaker) -> None:
    for seed, shift in enumerate((0.0, 0.1, 0.2)):  # the seed moves both arms: only pairing sees the difference
        make_run("dense", 1.75 + shift, seed=seed)
        make_run("surprise", 1.70 + shift + 0.001 * seed, seed=seed, result={"energy_j": 10.0 if seed else None})
    comparison = collect([tmp_path])
    document = to_json(comparison)
    arm = document["streams"]["clean"]["dense"]
    assert (arm["n"], arm["seeds"]) == (3, [0, 1, 2])
    assert arm["loss_nats"] == pytest.approx(1.85)
    assert arm["interval"]["loss_nats"][1] - 1.85 == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-3)
    assert document["streams"]["clean"]["surprise"]["energy_j"] is None
    assert "measured in 2 of 3 runs" in document["streams"]["clean"]["surprise"]["energy_reason"]
    (sentence,) = verdicts(comparison)
    assert sentence.startswith("clean: surprise beats dense: yes; 0.0490 nats lower")
    assert "n = 3, one-sided paired t" in sentence
    assert "[1.6" in table(comparison)


def test_bad_runs_are_named_and_left_out(tmp_path: Path, make_run: RunMaker) -> None:
    make_run("dense", 1.75)
    make_run("surprise", 1.70, name="unfinished", status="interrupted")
    make_run("surprise", 1.70, name="older", schema=0)
    make_run("surprise", "nan", name="diverged")
    make_run("surprise", 1.70, name="no-result")
    (tmp_path / "no-result" / "result.json").unlink()
    make_run("surprise", 1.70, name="torn")
    (tmp_path / "torn" / "run.json").write_text('{"schema": 1, "ki')
    (tmp_path / "no-run-json").mkdir()
    (tmp_path / "no-run-json" / "metrics.jsonl").write_text("")
    make_run("dense", 1.60, name="z-again", started="2026-02-01T00:00:00")
    comparison = collect([tmp_path])
    assert list(comparison.streams["clean"].arms) == ["dense"]
    assert comparison.streams["clean"].arms["dense"].loss.mean == 1.75  # the earlier of the doubles
    reasons = {Path(item.folder).name: item.reason for item in comparison.excluded}
    assert set(reasons) == {"unfinished", "older", "diverged", "no-result", "torn", "no-run-json", "z-again"}
    assert "interrupted" in reasons["unfinished"]
    assert "schema 0" in reasons["older"]
    assert "loss_nats is nan" in reasons["diverged"]
    assert "double of" in reasons["z-again"]
    assert "seed 0" in reasons["z-again"]
    text = table(comparison)
    assert all(name in text for name in reasons)
    assert any("no verdict" in sentence for sentence in verdicts(comparison))


def test_a_diverged_seed_is_held_against_its_arm(tmp_path: Path, make_run: RunMaker) -> None:
    for seed in range(2):
        make_run("dense", 1.75 + 0.01 * seed, seed=seed)
        make_run("surprise", 1.70, seed=seed)
    make_run("surprise", "inf", seed=2)
    comparison = collect([tmp_path])
    assert comparison.streams["clean"].arms["surprise"].diverged == 1
    assert "1 diverged run(s) of surprise left out, which flatters that arm" in verdicts(comparison)[0]
    assert "2 (1 diverged)" in table(comparison)


def test_different_clocks_and_budgets_are_not_compared(tmp_path: Path, make_run: RunMaker) -> None:
    make_run("dense", 1.75, component_times_sha256="b" * 64)
    make_run("surprise", 1.70)
    make_run("dense", 1.75, stream="noisy", result={"reference_s": 30.0})
    make_run("surprise", 1.70, stream="noisy")
    comparison = collect([tmp_path])
    clock, budget = verdicts(comparison)
    assert "not compared, reference seconds are not one clock (aaaaaaaaaaaa, bbbbbbbbbbbb)" in clock
    assert "not compared, reference seconds from 20 to 30 are not one budget" in budget
    shown = {row["name"]: row["against_dense_nats"] for row in rows(comparison.streams["noisy"])}
    assert shown == {"dense": None, "surprise": None}
    assert "component times differ" in comparison.streams["clean"].notes[0]
    assert "Note: reference seconds do not compare" in table(comparison)


def test_a_budget_too_small_for_its_steps_is_named(tmp_path: Path, make_run: RunMaker) -> None:
    make_run("dense", 1.75, result={"budget_reference_s": 1.5, "reference_s": 1.412})
    make_run("surprise", 1.70, result={"budget_reference_s": 1.5, "reference_s": 1.457})
    (sentence,) = verdicts(collect([tmp_path]))
    assert "(all were given 1.5, which whole steps cannot use up to 2%; give more)" in sentence


def test_table_labels_bounds_hypotheses_and_missing_meters(
    tmp_path: Path, make_run: RunMaker, make_deployment: RunMaker
) -> None:
    make_run("dense", 1.75)
    readings = [{"source": "NVML", "joules": None, "reason": "no driver"}]
    make_deployment(host_inference_energy=readings, host_inference_j_per_token=None)
    for text in (table(collect([tmp_path])), markdown(collect([tmp_path]))):
        assert ">= 2 uJ" in text
        assert ">= 500 nJ" in text
        assert "hypothetical: binary-spike constants applied to graded payloads" in text
        assert "not in the sum: static: no time model" in text
        assert "NVML: no driver" in text
        assert "0 J" not in text
        for part in ("98.0%", "1,200", "40,000", "+0.0200 against float", "SANA-FE 2025", "modelled", "not measured"):
            assert part in text
    modelled, measured = table(collect([tmp_path])).split("Inference energy per token, measured")
    assert "loihi1_sanafe" in modelled
    assert "loihi1_sanafe" not in measured  # modelled and measured joules never share a table


def test_each_profile_meets_the_loss_of_what_it_evaluates(tmp_path: Path, make_deployment: RunMaker) -> None:
    make_deployment()
    found = {p.profile: p for p in points(collect([tmp_path]).streams["clean"].deployments)}
    assert found["loihi1_sanafe"].loss_nats == 1.72
    assert found["digital45_int8_sram"].loss_nats == 1.71
    assert found["loihi1_sanafe"].hypothetical
    assert found["loihi1_sanafe"].lower_bound


def test_pareto_keeps_what_nothing_beats() -> None:
    def point(joules: float, loss: float) -> Point:
        return Point("p", "a", joules, joules, joules, loss, "modelled", False, False)

    cloud = [point(3, 1.0), point(1, 3.0), point(2, 2.0), point(2, 2.5), point(4, 1.0), point(5, 5.0)]
    beaten = [
        any(q.mid_j <= p.mid_j and q.loss_nats <= p.loss_nats and q != p for q in cloud) for p in cloud
    ]  # by definition, pair by pair
    expected = {(p.mid_j, p.loss_nats) for p, worse in zip(cloud, beaten, strict=True) if not worse}
    assert {(p.mid_j, p.loss_nats) for p in pareto(cloud)} == expected


def test_a_gate_stands_against_random_at_its_own_rate_and_all_cheap_controls(tmp_path: Path, make_run: RunMaker) -> None:
    rates = {"dense": 1.0, "dense_near": 1.0, "random_50": 0.5, "random_25": 0.25, "a_50": 0.51, "b_33": 0.33}
    for arm, rate in rates.items():
        for seed in range(2):
            make_run(arm, 1.8 + 0.01 * seed + 0.001 * rate * (1 + seed), seed=seed, result={"keep_fraction": rate})
    against = [sentence.split(";")[0].split(": ", 1)[1] for sentence in verdicts(collect([tmp_path]))]
    tested = {tuple(part.split(":")[0].split(" beats ")) for part in against}
    assert tested == {
        ("a_50", "dense"),
        ("a_50", "dense_near"),
        ("a_50", "random_50 at the same rate"),
        ("b_33", "dense"),
        ("b_33", "dense_near"),
        ("b_33", "random_50"),
        ("b_33", "random_25"),
    }


def test_the_set_up_of_a_sweep_is_named_and_left_out(tmp_path: Path, make_run: RunMaker) -> None:
    make_run("dense", 1.75)
    (tmp_path / "sweep.json").write_text("{}")
    (tmp_path / "tuning").mkdir()
    make_run("dense", 5.9, stream="clock", name="clock")
    make_run("dense", 1.9, stream="tuning dense 0", name="tuning/dense-0")
    comparison = collect([tmp_path])
    assert list(comparison.streams) == ["clean"]
    assert {Path(item.folder).name for item in comparison.excluded} == {"clock", "tuning"}
    assert list(collect([tmp_path / "tuning"]).streams) == ["tuning dense 0"]
    (tmp_path / "sweep.json").unlink()
    assert "clock" in collect([tmp_path]).streams, "only a sweep has a set-up"


def test_what_failed_or_was_not_finished_is_missing_from_its_stream(tmp_path: Path, make_run: RunMaker) -> None:
    make_run("dense", 1.75)
    make_run("surprise", 1.70)
    make_run("random", 1.80, status="failed", error="TrainingDiverged: loss is nan at step 7")
    make_run("surprise", 1.70, seed=1, status="interrupted")
    make_run("dense", 1.75, stream="noisy")
    make_run("surprise", 1.70, stream="noisy", status="running")
    comparison = collect([tmp_path])
    missing = to_json(comparison)["missing"]
    assert missing["clean"] == [
        "random, seed 0 (not finished: status is 'failed', TrainingDiverged: loss is nan at step 7)",
        "surprise, seed 1 (not finished: status is 'interrupted')",
    ]
    said = verdicts(comparison)
    assert said[0] == "clean: surprise against dense: 0.0500 nats lower; n = 1: no test possible."
    assert said[1].endswith("and there is only dense. Missing: surprise, seed 0 (not finished: status is 'running').")
    for text in (summary(comparison), table(comparison), markdown(comparison)):
        assert "Missing: random, seed 0 (not finished: status is 'failed', TrainingDiverged" in text


def test_runs_of_one_name_say_in_which_settings_they_differ(tmp_path: Path, make_run: RunMaker) -> None:
    def settings(lr: float, place: str) -> dict[str, Any]:
        return {"run": place, "seed": 0, "optim": {"lr": lr, "name": "adamw"}, "trainer": {"batch_windows": 8}}

    make_run("dense", 1.75, settings=settings(0.008, "a"))
    make_run("dense", 1.60, name="other-rate", started="2026-02-01", settings=settings(0.004, "b"))
    make_run("dense", 1.61, name="again", started="2026-02-02", settings=settings(0.008, "c"))
    make_run("dense", 1.70, seed=1, settings=settings(0.002, "d"))
    comparison = collect([tmp_path])
    reasons = {Path(item.folder).name: item.reason for item in comparison.excluded}
    assert reasons["other-rate"].endswith(
        "the earlier one counts. Their settings differ (optim.lr 0.008 and 0.004): to compare them, give one of them "
        "another arm=NAME"
    )
    assert reasons["again"].endswith("the earlier one counts"), "where a run is written is no setting"
    assert "the runs of dense differ in more than their seed: optim.lr" in comparison.streams["clean"].notes


def test_arms_that_differ_in_more_than_their_gate_are_said_to(tmp_path: Path, make_run: RunMaker) -> None:
    rates = {"dense": 0.03, "random": 0.03, "surprise": 0.04}
    for arm, lr in rates.items():
        make_run(arm, 1.7, settings={"gate": {"signal": arm}, "optim": {"muon_lr": lr}, "model": {"width": 64}, "run": arm})
    (note,) = collect([tmp_path]).streams["clean"].notes
    assert note == "the arms differ in more than gate and subset: optim.muon_lr (0.03: dense, random; 0.04: surprise)"


def test_what_a_run_says_of_itself_stands_under_its_table(tmp_path: Path, make_run: RunMaker) -> None:
    loaded = "component times were measured on a busy machine"
    make_run("dense", 1.75, result={"notes": [loaded, "a note of its own."]})
    make_run("surprise", 1.70, result={"notes": loaded})
    comparison = collect([tmp_path])
    notes = [f"all runs: {loaded}", "dense seed 0: a note of its own"]
    assert list(comparison.streams["clean"].notes) == notes
    assert to_json(comparison)["notes"]["clean"] == notes
    for text in (summary(comparison), table(comparison), markdown(comparison)):
        assert all(f"Note: {note}." in text for note in notes)


def test_a_run_whose_true_reward_fell_is_named_in_every_view(tmp_path: Path, make_run: RunMaker) -> None:
    make_run("dense", 1.75, result={"task": {"reward/flagged": 0.0}})
    make_run("surprise", 1.70, result={"task": {"reward/flagged": 1.0, "reward/true": 0.2}})
    comparison = collect([tmp_path])
    (note,) = comparison.streams["clean"].notes
    assert note.startswith("surprise seed 0: flagged: its true reward fell while its learned reward rose")
    for text in (summary(comparison), table(comparison), markdown(comparison), page(comparison, to_json(comparison), {})):
        assert note in text
