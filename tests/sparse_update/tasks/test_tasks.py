"""Generated tasks against Python's own evaluation, sorting and regular expressions; splits as a property."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparse_update.data.tokens import BpeTokenizer, ByteTokenizer
from sparse_update.tasks import (
    END,
    SPLITS,
    Made,
    PromptTooLong,
    Task,
    TaskError,
    TaskStream,
    VerifierError,
    distinct,
    encoded,
    make_task,
    register_task,
    split_of,
    task_names,
)
from sparse_update.tasks.base import TASKS
from sparse_update.tasks.countdown import Expression
from sparse_update.tasks.draw import Draw

OWN = ("brackets", "countdown", "edits", "modular", "sorting", "sums")
NUMBERS = st.tuples(st.integers(0, 2**40), st.integers(0, 2**40))


def some(name, count=60):
    task = make_task(name)
    for index in range(count):
        yield task, task.instance(7, index, task.levels[index % len(task.levels)])


def test_the_families_are_known_by_name():
    assert set(OWN) | {"gym"} <= set(task_names())


@pytest.mark.parametrize("name", OWN)
def test_references_are_right_and_instances_a_function_of_their_numbers(name):
    for task, found in some(name):
        assert task.score(found, found.answer) == 1
        assert task.score(found, found.answer + END + "whatever") == 1
        assert task.score(found, "") == 0
        assert found == make_task(name).instance(found.seed, found.index, found.level)
        assert found.question("short") == found.short
        assert found.question() == found.instruction != found.short
    assert len({found.key for _, found in some(name)}) > 40


@pytest.mark.parametrize("name", OWN)
@settings(max_examples=15, deadline=None)
@given(text=st.text(max_size=40))
def test_a_verifier_scores_every_text(name, text):
    task, found = next(some(name))
    assert 0 <= task.score(found, text) <= 1


def test_sums_and_modular_equal_pythons_evaluation_and_sums_carry():
    for task, found in some("sums"):
        value = eval(found.short.rstrip("="))
        assert task.score(found, str(value)) == 1
        assert task.score(found, f" {value:+d} ") == 1
        assert task.score(found, str(value + 1)) == task.score(found, f"{value}.0") == 0
        a, b = re.findall(r"\d+", found.short)
        digits = [int(x) + int(y) for x, y in zip(a[::-1], b[::-1], strict=True)] if len(a) == len(b) else [10]
        assert max(digits) > 9
    for task, found in some("modular"):
        value = eval(found.short.rstrip("="))
        assert task.score(found, str(value)) == 1
        assert task.score(found, str(value + 1)) == 0


def test_sorting_equals_sorted():
    for task, found in some("sorting"):
        numbers = list(map(int, re.findall(r"\d+", found.short)))
        assert task.score(found, ", ".join(map(str, sorted(numbers)))) == 1
        if len(set(numbers)) > 1:
            assert task.score(found, " ".join(map(str, sorted(numbers, reverse=True)))) == 0
        assert task.score(found, " ".join(map(str, sorted(numbers)[:-1]))) == 0


def reduced(text):
    """Balanced brackets vanish when innermost pairs are taken out again and again."""
    while (shorter := re.sub(r"\(\)|\[\]|\{\}", "", text)) != text:
        text = shorter
    return text


@settings(max_examples=150, deadline=None)
@given(index=st.integers(0, 50), answer=st.text("()[]{}", max_size=8), prefix=st.booleans())
def test_brackets_take_every_closing_that_vanishes_under_a_regular_expression(index, answer, prefix):
    task = make_task("brackets")
    found = task.instance(0, index, 1 + index % 3)
    if prefix:
        answer = "()" + found.answer
    beginning = found.short.removesuffix(" -> ")
    assert len(re.findall(r"[(\[{]", reduced(beginning))) == found.level == len(reduced(beginning))
    right = 0 < len(answer) <= 2 * found.level and reduced(beginning + answer) == ""
    assert task.score(found, answer) == right


@settings(max_examples=150, deadline=None)
@given(text=st.text("0123456789+-*/() ", max_size=14))
@example("0000000000")
@example("000000000+1")
def test_expressions_are_pythons(text):
    elsewhere = r"\*\s*\*|/\s*/|\d\s+\d|[-+*/(]\s*[-+]|^\s*[-+]|\d{10}"  # what only one of the two reads
    plain = re.fullmatch(r"[-+*/()\s\d]*", text) and not re.search(elsewhere, text)
    try:
        value = eval(re.sub(r"\d+", lambda m: f"Fraction({int(m[0])})", text)) if plain and text.strip() else None
    except (SyntaxError, ZeroDivisionError, TypeError):
        value = None
    try:
        mine = Expression(text).value
    except ValueError:
        mine = None
    assert mine == (value if isinstance(value, Fraction) else None)


def test_countdown_takes_other_expressions_and_no_foreign_number():
    several = 0
    for task, found in some("countdown"):
        numbers, target = found.facts["numbers"], found.facts["target"]
        used = list(map(int, re.findall(r"\d+", found.answer)))
        assert Counter(used) == Counter(numbers)
        assert eval(re.sub(r"\d+", lambda m: f"Fraction({m[0]})", found.answer)) == target
        assert task.score(found, str(target)) == (target in numbers)
        assert task.score(found, found.answer + "+0") == 0
        if "+" in found.answer and re.fullmatch(r"\d+\+\d+", found.answer):
            several += task.score(found, "+".join(reversed(found.answer.split("+"))))
        assert make_task("countdown", {"least": 0.1}).score(found, f"{numbers[0]}") in (0.1, 1.0)
    assert several > 0


def test_edits_equal_another_reading_of_the_request():
    for task, found in some("edits", 200):
        word, _, steps = found.short.removesuffix(" -> ").partition(": ")
        letters = list(word)
        for step in steps.split(", then "):
            if m := re.fullmatch(r"delete letter (\d+)", step):
                del letters[int(m[1]) - 1]
            elif m := re.fullmatch(r"replace every (.) by (.)", step):
                letters = [m[2] if x == m[1] else x for x in letters]
            elif m := re.fullmatch(r"put (.) in front", step):
                letters.insert(0, m[1])
            elif m := re.fullmatch(r"put (.) behind letter (\d+)", step):
                letters.insert(int(m[2]), m[1])
            elif step == "reverse it":
                letters.reverse()
            elif step == "double the last letter":
                letters.append(letters[-1])
            elif step == "swap the first and the last letter":
                letters[0], letters[-1] = letters[-1], letters[0]
            else:
                assert step == "move the first letter to the end"
                letters.append(letters.pop(0))
        assert task.score(found, "".join(letters)) == 1
        assert task.score(found, "".join(letters) + "x") == 0


@pytest.mark.parametrize("name", OWN)
@settings(max_examples=60, deadline=None)
@given(one=NUMBERS, other=NUMBERS, levels=st.tuples(st.integers(0, 99), st.integers(0, 99)))
def test_no_question_is_in_two_splits(name, one, other, levels):
    task = make_task(name)
    a, b = (task.instance(*pair, task.levels[at % len(task.levels)]) for pair, at in zip((one, other), levels, strict=True))
    if a.short == b.short or a.instruction == b.instruction or a.key == b.key:
        assert split_of(a) == split_of(b)


@pytest.mark.parametrize("name", OWN)
def test_streams_of_the_splits_share_nothing_and_have_their_shares(name):
    task = make_task(name)
    level = task.levels[:3][-1]
    found = {split: TaskStream([(task, [level])], split, seed=3).take(40) for split in SPLITS}
    questions = {
        split: {text for i in instances for text in (i.short, i.instruction)} for split, instances in found.items()
    }
    assert not questions["train"] & questions["development"]
    assert not questions["train"] & questions["held_out"]
    assert not questions["development"] & questions["held_out"]
    assert found["held_out"] == TaskStream([(task, [level])], "held_out", seed=3).take(40)
    other = TaskStream([(task, [level])], "held_out", seed=4).take(40)  # another seed, the same split
    assert not {i.key for i in other} & {i.key for i in found["train"]}
    drawn = Counter(split_of(task.instance(1, index, task.levels[-1])) for index in range(600))
    assert 0.74 < drawn["train"] / 600 < 0.86  # 80 %, five deviations
    assert all(0.04 < drawn[split] / 600 < 0.16 for split in SPLITS[1:])


def test_twins_of_a_sum_are_in_one_split():
    task = make_task("sums")
    keys = {}
    for index in range(3000):
        found = task.instance(0, index, 1)
        a, b = sorted(map(int, re.findall(r"\d+", found.short)))
        assert keys.setdefault((a, b), split_of(found)) == split_of(found)


def test_a_stream_resumes_and_mixes_tasks_and_levels():
    def fresh():
        return TaskStream([(make_task("sums"), [1, 3]), (make_task("edits"), ())], "train", seed=1)

    whole, begun = fresh(), fresh()
    expected = whole.take(30)
    begun.take(11)
    resumed = fresh()
    resumed.load_state_dict(begun.state_dict())
    assert resumed.take(19) == expected[11:]
    assert {i.level for i in expected if i.task == "sums"} == {1, 3}
    assert {i.task for i in expected} == {"sums", "edits"}


def test_distinct_questions_and_a_level_that_has_too_few():
    questions = distinct(TaskStream([(make_task("sums"), [2])], "held_out"), 50)
    assert len({i.key for i in questions}) == 50
    with pytest.raises(TaskError, match="different held_out questions found, 50 were asked for"):
        distinct(TaskStream([(make_task("sums"), [1])], "held_out"), 50)


def test_the_same_in_another_process():
    code = (
        "from sparse_update.tasks import make_task\n"
        f"for n in {OWN!r}: t = make_task(n); i = t.instance(5, 9, 2); print(repr(i.short), i.answer, i.id)"
    )
    seen = [
        subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": str(n), "PYTHONPATH": ":".join(sys.path)},
                       capture_output=True, text=True, check=True).stdout
        for n in (1, 2)
    ]  # fmt: skip
    assert seen[0] == seen[1]
    assert seen[0].count("\n") == len(OWN)


def test_draws_are_even():
    counts = Counter(Draw("even", n).between(0, 6) for n in range(7000))
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 25  # chi-square, 6 degrees: p > 0.0003
    assert sorted(Draw(1).shuffled(range(9))) == list(range(9))


class TestErrors:
    def test_names_levels_options_splits(self):
        with pytest.raises(TaskError, match="there is no task 'sum': one of brackets, "):
            make_task("sum")
        with pytest.raises(TaskError, match="task 'sums' has no option digits: it takes none"):
            make_task("sums", {"digits": 3})
        with pytest.raises(TaskError, match="sums has no level 13: 1 to 12"):
            make_task("sums").instance(0, 0, 13)
        with pytest.raises(TaskError, match="sums has no level 0: 1 to 12"):
            TaskStream([(make_task("sums"), [0])], "train")
        with pytest.raises(TaskError, match="'test': one of train, development, held_out"):
            TaskStream([(make_task("sums"), ())], "test")
        with pytest.raises(TaskError, match="taken by Sums"):
            register_task("sums")(type("Again", (Task,), {}))
        with pytest.raises(TaskError, match="no subclass"):
            register_task("nothing")(int)  # type: ignore[arg-type]
        with pytest.raises(TaskError, match="was given an instance of edits"):
            make_task("sums").score(make_task("edits").instance(0, 0, 1), "1")

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (lambda: 1 / 0, "ZeroDivisionError on the answer 'x'"),
            (lambda: float("nan"), "score nan"),
            (lambda: 1.5, "score 1.5"),
            (lambda: -0.1, "score -0.1"),
            (lambda: "right", "ValueError"),
            (lambda: None, "TypeError"),
        ],
    )
    def test_a_verifier_that_breaks_its_contract(self, given, message):
        class Broken(Task):
            def make(self, draw, level):
                return Made("q", ("a",))

            def verify(self, instance, answer):
                return given()

        task = Broken()
        with pytest.raises(VerifierError, match=re.escape(message)):
            task.score(task.instance(0, 0, 1), "x")
        assert "nothing" not in TASKS

    def test_answers_that_hold_the_closing_character(self):
        class Open(Task):
            def make(self, draw, level):
                return Made("q", ("a" + END,))

            def verify(self, instance, answer):
                return 1.0

        with pytest.raises(TaskError, match="closing character"):
            Open().instance(0, 0, 1)


def test_tokens_of_bytes_and_of_bpe_and_a_context_that_is_too_short():
    instances = TaskStream([(make_task("sums"), [3]), (make_task("edits"), [2])], "train").take(20)
    text = "".join(i.instruction + "\n" + i.answer + END for i in instances).encode()
    for tokenizer in (ByteTokenizer(), BpeTokenizer.train([text], 300)):
        for instance, found in zip(instances, encoded(tokenizer, instances), strict=True):
            assert tokenizer.decode(found.tokens).decode() == f"{instance.instruction}\n{instance.answer}{END}"
            assert tokenizer.decode(found.answer).decode() == instance.answer + END
            np.testing.assert_array_equal(found.tokens[1:][found.answer_mask], found.answer)
    longest = max(len(found.tokens) for found in encoded(ByteTokenizer(), instances))
    encoded(ByteTokenizer(), instances, context=longest - 1)
    with pytest.raises(PromptTooLong, match=f"answer are {longest} tokens, the model reads {longest - 2} in a row"):
        encoded(ByteTokenizer(), instances, context=longest - 2)
