"""Tasks of reasoning-gym: scores are those of its own scorers, and instances are the same in every process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sparse_update.tasks import SPLITS, TaskError, TaskStream, gym_datasets, make_task
from sparse_update.tasks.gym import NO_REFERENCE, NOT_THE_SAME, REFUSED

library = pytest.importorskip("reasoning_gym")
SOME = ("basic_arithmetic", "chain_sum", "number_sorting", "caesar_cipher", "gcd", "prime_factorization")


def gym(name, **settings):
    return make_task("gym", {"dataset": name, "settings": settings} if settings else {"dataset": name})


@pytest.mark.parametrize("name", SOME)
def test_scores_are_the_librarys_own(name):
    task = gym(name)
    theirs = library.get_score_answer_fn(name)
    for index in range(12):
        found = task.instance(0, index, task.levels[index % len(task.levels)])
        entry = found.facts["entry"]
        assert found.instruction == entry["question"]
        assert task.score(found, found.answer) == 1 == theirs(found.answer, entry)
        for answer in ("7", found.answer + " or so"):
            try:
                expected = theirs(answer, entry)
            except ValueError:
                expected = 0.0
            assert task.score(found, answer) == expected
        assert task.score(found, "no answer (") < 1


def test_levels_are_those_of_the_curriculum():
    task = gym("chain_sum")
    assert len(task.levels) > 1
    ends = [max(len(task.instance(0, i, level).instruction) for i in range(20)) for level in (1, task.levels[-1])]
    assert ends[0] < ends[1]
    assert gym("caesar_cipher").levels == range(1, 3)  # its curriculum goes on to a rotation that it refuses
    with pytest.raises(TaskError, match="has no level 99"):
        task.instance(0, 0, 99)


def test_seeds_share_no_more_than_chance_and_splits_are_disjoint():
    task = gym("chain_sum")
    level = task.levels[-1]
    one, other = ({task.instance(seed, i, level).short for i in range(100)} for seed in (0, 1))
    assert not one & other
    found = {split: {i.short for i in TaskStream([(task, [level])], split).take(30)} for split in SPLITS}
    assert sum(map(len, found.values())) == len(set().union(*found.values()))


def test_refused_data_sets_and_bad_settings():
    for name, reason in REFUSED.items():
        with pytest.raises(TaskError, match=f"{name} is not taken: {reason[:20]}"):
            gym(name)
    with pytest.raises(TaskError, match="has no data set 'sums'"):
        gym("sums")
    with pytest.raises(TaskError, match="reasoning-gym refuses these settings"):
        gym("chain_sum", nonsense=1)


CODE = """
from sparse_update.tasks import make_task
from sparse_update.tasks.gym import gym_datasets
for name in {names}:
    task = make_task("gym", {{"dataset": name}})
    for i in range({count}):
        found = task.instance(0, i, task.levels[0])
        print(name, found.id, repr(found.answer), task.score(found, found.answer))
"""


def in_processes(names, count):
    return [
        subprocess.run(
            [sys.executable, "-c", CODE.format(names=names, count=count)], check=True, capture_output=True, text=True,
            env={"PYTHONHASHSEED": str(seed), "PYTHONPATH": ":".join(sys.path)},
        ).stdout
        for seed in (1, 2)
    ]  # fmt: skip


@pytest.mark.soak
def test_every_data_set_that_is_taken_is_the_same_everywhere_and_right_at_its_reference():
    first, second = in_processes("gym_datasets()", 4)
    assert first == second
    assert len(gym_datasets()) > 70
    assert all(line.endswith(" 1.0") for line in first.splitlines())


def test_reasons_still_hold():
    """The library may mend what keeps a data set out: then it is to be taken."""
    graphs = library.create_dataset("graph_color", seed=0)
    assert graphs.score_answer(str(graphs[0]["answer"]), graphs[0]) == 0
    words = library.create_dataset("spell_backward", seed=0)
    assert max(words.score_answer(words[i]["answer"] + " or so", words[i]) for i in range(40)) >= 1
    assert REFUSED["graph_color"] == NO_REFERENCE
    assert REFUSED["ransom_note"] == NOT_THE_SAME
