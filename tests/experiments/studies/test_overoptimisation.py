"""The study on over-optimisation: its setting, what it concludes from curves, and the whole of it in small."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from experiments.studies import overoptimisation
from experiments.studies.rewards.setting import Setting, answers, complete, demonstration, questions, reference
from experiments.studies.rewards.summary import flagged, summarise, verdicts
from experiments.studies.rewards.training import TrainingConfig, reinforce
from sparse_update.tasks import Draw, make_task

SMALL = Setting(width=16, layers=1, tuning_steps=2, pair_prompts=8)


def test_demonstrations_are_complete_unless_they_stop_early_and_too_long_only_by_padding():
    task, draw = make_task("brackets"), Draw("test")
    for instance in questions(Setting(), "train", 0).take(60):
        careful = demonstration(instance, draw, Setting(early=0.0, padded=0.0))
        assert careful == instance.answer
        assert complete(instance, demonstration(instance, draw, Setting(early=0.0, padded=0.4))) == 1
        assert complete(instance, demonstration(instance, draw, Setting(early=1.0, padded=0.4))) == 0
        long = instance.answer + "()" * len(instance.answer)
        assert complete(instance, long) == 1  # what annotators do not count
        assert task.score(instance, long) == 0


class Shortness:
    """A reward that likes short answers."""

    def rewards(self, prompts, answers):
        return -np.array([float(len(answer)) for answer in answers])


def test_reinforcement_begins_at_the_reference_and_moves_towards_its_reward():
    start = reference(SMALL, 0)
    assert not any(p.requires_grad for p in start.parameters())
    cfg = TrainingConfig(steps=6, prompts=8, n=4, lr=3e-3, warmup_steps=1, every=3, watched_prompts=8, watched_outputs=4)
    points = [point for point, _ in reinforce(start, Shortness(), Shortness(), SMALL, cfg, 0)]
    assert [point.step for point in points] == [0, 3, 6]
    assert points[0].kl == pytest.approx(0, abs=1e-6)
    assert points[0].distance < points[1].distance < points[2].distance
    assert points[2].proxy > points[0].proxy
    far = TrainingConfig(**{**vars(cfg), "farthest": 0.0})
    assert [point.step for point, _ in reinforce(start, Shortness(), Shortness(), SMALL, far, 0)] in ([0], [0, 3])


def test_a_kl_term_keeps_a_policy_nearer():
    start = reference(SMALL, 0)
    ends = []
    for kl in (0.0, 10.0):
        cfg = TrainingConfig(
            steps=8,
            prompts=8,
            n=4,
            lr=3e-3,
            warmup_steps=1,
            every=8,
            kl=kl,
            farthest=99,
            watched_prompts=8,
            watched_outputs=4,
        )
        ends.append([point for point, _ in reinforce(start, Shortness(), Shortness(), SMALL, cfg, 0)][-1].distance)
    assert ends[1] < 0.8 * ends[0]


def test_answers_carry_the_log_probability_of_the_model():
    start = reference(SMALL, 1)
    found = answers(start, questions(SMALL, "train", 0).take(3), 2, 0, SMALL)
    assert found.true_PN.shape == found.seen_PN.shape == found.length_PN.shape == (3, 2)
    for place, row in enumerate(found.whole):
        log = torch.log_softmax(start(torch.from_numpy(row)[None]), -1)[0]
        begin = len(found.prompts[place])
        total = sum(float(log[i - 1, int(row[i])]) for i in range(begin, len(row)))
        assert found.logp_R[place] == pytest.approx(total, abs=1e-3)


def seed_of(true, flag=None, number=0):
    d = np.linspace(0, 2.4, len(true))
    points = [
        {"step": 4 * i, "d": float(d[i]), "true": float(value), "proxy": float(d[i]), "length": 5.0}
        for i, value in enumerate(true)
    ]
    run = {"points": points, "flag": None if flag is None else {"step": flag, "true_p": 1e-6}}
    return {
        "seed": number,
        "best_of_n": {"learned": points},
        "reinforcement": {"learned": run},
        "dpo": [],
        "reward_models": [],
    }


def test_what_is_lost_at_the_flag_is_measured_from_the_highest_point_before_it():
    run = seed_of([0.4, 0.6, 0.8, 0.76, 0.5], flag=12)["reinforcement"]["learned"]
    found = flagged(run)
    assert found["gain"] == pytest.approx(0.4)
    assert found["lost"] == pytest.approx(0.1)
    assert flagged(seed_of([0.4, 0.5])["reinforcement"]["learned"]) is None
    assert flagged(seed_of([0.4, 0.3], flag=4)["reinforcement"]["learned"])["lost"] == float("inf")


def test_verdicts_say_yes_only_where_every_seed_meets_its_target():
    d = np.linspace(0, 2.4, 30)
    good = 0.4 + d * (0.6 - 0.25 * d)  # best-of-n's form; reinforcement's explains less of it
    early, late = seed_of(good, flag=64), seed_of(good, flag=100, number=1)
    found = summarise([early])
    assert found["fits"]["best_of_n/learned"]["seeds"][0]["explained"] == pytest.approx(1)
    assert found["fits"]["best_of_n/learned"]["seeds"][0]["turning_d"] == pytest.approx(1.2)
    said, _ = verdicts(found)
    assert "best-of-n: yes" in said[0]
    assert "lost: yes" in said[2]
    said, met = verdicts(summarise([early, late]))
    assert "lost: no" in said[2]
    assert not met
    said, met = verdicts(summarise([seed_of(good)]))
    assert "never flagged" in said[2]
    assert not met


def test_the_study_in_small_writes_all_that_it_promises(tmp_path, capsys):
    words = "--seeds 0 --steps 2 --every 1 --watched 8 --outputs 8 --members 1 --pair-prompts 16 --tuning-steps 4"
    out = tmp_path / "study"
    code = overoptimisation.main([*words.split(), "--arms", "learned", "--out", str(out)])
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == 1  # three points of an untrained policy meet no target
    assert said["holds"] is False
    document = json.loads((out / "result.json").read_text())
    assert document["seeds"][0]["reinforcement"]["learned"]["points"][0]["d"] == pytest.approx(0, abs=1e-3)
    assert "<svg" in (out / "page.html").read_text()
    assert (out / "picture.svg").read_text().startswith("<?xml")
    lines = [json.loads(line) for line in (out / "seed-0" / "learned" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert lines[0]["reward/flagged"] == 0
    before = {path: path.stat().st_mtime_ns for path in (out / "seed-0").rglob("*")}
    assert overoptimisation.main([*words.split(), "--arms", "learned", "--out", str(out)]) == 1  # nothing is made again
    assert {path: path.stat().st_mtime_ns for path in (out / "seed-0").rglob("*")} == before
    assert overoptimisation.main(["--out", str(out)]) == 2
    assert "made with other settings" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--arms", "cheating"], ["--steps", "0"], ["--outputs", "4"], ["--seeds", "one"]])
def test_wrong_words_are_refused(words, tmp_path, capsys):
    assert overoptimisation.main([*words, "--out", str(tmp_path / "x")]) == 2
    assert "overoptimisation:" in capsys.readouterr().err
