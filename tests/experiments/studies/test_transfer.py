"""The study of transfer: orders of tasks, and what its rows say of points."""

from __future__ import annotations

import pytest

from experiments.studies.transfer import POOL, UNSEEN, Point, diminishing, main, summary, table


def point(count, seed, after, at_once=None):
    found = {"count": count, "seed": seed, "after": {"loss_nats": after, "solved": 0.5}}
    return found | ({"at_once": {"loss_nats": at_once, "solved": 0.1}} if at_once else {})


def test_more_tasks_hold_the_fewer_ones_of_their_seed_and_no_unseen_one():
    few, more, other = (Point(count, seed, 1, 1, 8, 8).tasks for count, seed in ((2, 0), (5, 0), (5, 1)))
    assert more[:2] == few
    assert other != more
    assert sorted(Point(len(POOL), 3, 1, 1, 8, 8).tasks) == sorted(POOL)
    names = {spec.rsplit(":", 1)[0] for spec in POOL}
    assert not names & {spec.rsplit(":", 1)[0] for spec in UNSEEN}


def test_gains_are_taken_within_seeds_and_intervals_over_them():
    points = [point(0, 0, 2.0), point(0, 1, 1.0), point(4, 0, 1.5, 5.0), point(4, 1, 0.7, 4.0), point(12, 0, 1.4, 3.0)]
    rows = {row["tasks"]: row for row in summary(points)}
    assert rows[4]["gain_nats"]["mean"] == pytest.approx((0.5 + 0.3) / 2)
    assert rows[4]["at_once_loss_nats"]["mean"] == pytest.approx(4.5)
    assert rows[12]["gain_nats"]["mean"] == pytest.approx(0.1)  # of the seed that has both
    assert rows[12]["gain_nats"]["low"] is None
    assert rows[0]["at_once_loss_nats"]["mean"] is None
    assert rows[0]["after_solved"]["mean"] == 0.5
    assert len(table(list(rows.values())).splitlines()) == 4


def test_what_a_task_more_brings_is_told_for_few_and_for_many():
    points = [point(count, seed, 1.0, 8.0 + seed - number) for seed in (0, 1) for number, count in enumerate((1, 2, 4, 8))]
    found = diminishing([*points, point(0, 0, 2.0)], "at_once")  # a nat for each doubling
    assert found["counts"] == [1, 4, 8]
    assert found["early_nats_per_task"]["mean"] == pytest.approx(2 / 3)
    assert found["late_nats_per_task"]["mean"] == pytest.approx(1 / 4)
    assert found["early_less_late"]["low"] == pytest.approx(2 / 3 - 1 / 4)
    assert found["nats_per_doubling"]["mean"] == pytest.approx(1.0)
    assert diminishing(points[:2], "at_once") == {}


def test_numbers_of_tasks_that_there_are_not_are_refused(capsys, tmp_path):
    assert main(["--counts", "27", "--out", str(tmp_path)]) == 2
    assert "from 0 to 26 tasks" in capsys.readouterr().err
