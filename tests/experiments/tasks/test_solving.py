"""Answers of any module against the sampler's, what answering reads, and joules of a solved question by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from experiments.comparison import overview
from experiments.runs import solving
from experiments.runs.solving import Answers, Questions
from sparse_update.data.tokens import ByteTokenizer
from sparse_update.generation import GenerateConfig, Sampler
from sparse_update.objectives.examples.examples import Examples
from sparse_update.objectives.examples.rows import prompt_tokens
from sparse_update.objectives.examples.settings import TaskConfig
from sparse_update.transformer import ModelConfig, Transformer

TASK = TaskConfig(tasks=["sums:2", "sorting:1"], form="short", judged=9, new_tokens=5, packed=False)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    found = Transformer(ModelConfig(width=32, layers=1, heads=2, context=40, vocab_size=256, attention="explicit"))
    with torch.no_grad():
        for p in found.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        found.head.weight[3] += 2 * found.norm.weight.sign() * 0.3
    return found


@pytest.fixture(scope="module")
def questions():
    return Questions(Examples(TASK, ByteTokenizer(), 40, 0))


def test_answers_are_those_of_greedy_decoding(model, questions):
    found = solving.answers(model, questions)
    examples = questions.examples
    prompts = [prompt_tokens(examples.tokenizer, instance, "short") for instance in questions.asked]
    outputs = Sampler(model, GenerateConfig(new_tokens=5, temperature=0.0), examples.stop).sample(prompts)
    assert len(found.tokens) == len(prompts) == 18
    for text, prompt, output in zip(found.tokens, prompts, outputs, strict=True):
        assert text.tolist() == [*prompt.tolist(), *output.tolist()]
    assert found.score_Q.tolist() == examples.greedy(model, questions.asked)
    assert 0 < outputs.stopped_R.sum() < 18


def test_rows_are_whole_questions_of_one_length(questions):
    for rows in (questions.training(200), questions.held_out(64)):
        texts = [bytes(row.tolist()) for row in rows]
        assert all(text.endswith(b"\x03") and b"\n" in text and text.count(b"\x00") == 0 for text in texts)
        assert rows.shape[1] > 4
    assert len(questions.held_out(10)) <= 2


def test_what_is_read_is_every_token_but_the_last_once():
    texts = [np.array([1, 2, 3]), np.array([4, 5, 6]), np.array([7, 8, 9, 10])]
    READ.clear()
    assert solving.read_once(Reader(), Answers(texts, np.zeros(3))) == 2 + 2 + 3
    assert sorted(row for part in READ for row in part) == [[1, 2], [4, 5], [7, 8, 9]]


READ: list[list[list[int]]] = []


class Reader(torch.nn.Module):
    def forward(self, tokens_BT):
        READ.append(tokens_BT.tolist())
        return tokens_BT


def test_joules_of_a_solved_question(questions):
    whole = {"profile": "p", "kind": "modelled", "source": "s", "low_j": 18e-6, "mid_j": 36e-6, "high_j": 72e-6}
    report = SimpleNamespace(to_dict=lambda: whole)
    score = np.array([1.0] * 6 + [0.5] * 3 + [0.0] * 9)
    right = Answers([], score)
    found = solving.record(
        questions, {"float": Answers([], np.ones(18)), "quantised": right, "simulated": right}, [report], 180
    )
    assert found["simulated"]["accuracy"] == pytest.approx(6 / 18)
    assert found["simulated_less_float"]["mean"] == pytest.approx(-12 / 18)
    assert found["families"]["sums"]["simulated"]["accuracy"] == pytest.approx(6 / 9)
    assert found["tokens_per_question"] == 10
    (energy,) = found["energy"]
    assert energy["mid_j_per_question"] == pytest.approx(2e-6)
    assert energy["low_j_per_solved"] == pytest.approx(3e-6)
    assert "| p | 3.000 | 6.000 | 12.000 | s |" in solving.markdown(found)
    none = Answers([], np.zeros(18))
    found = solving.record(questions, {"float": none, "quantised": none, "simulated": none}, [report], 180)
    assert found["energy"][0]["mid_j_per_solved"] is None
    assert "none solved" in solving.markdown(found)


def test_a_deployed_row_tells_what_it_solves():
    record = {"solved": {"simulated": {"accuracy": 0.8}, "energy": [{"profile": "p", "mid_j_per_solved": 3e-6}]}}
    assert overview._solved([overview._answered(record)])["solved"] == 0.8
    assert overview._solved_joules([record], "p") == {"solved_j": 3e-6}
    assert overview._solved_joules([record], "q") == {"solved_j": None}
    assert overview._solved([overview._answered({"solved": None})])["solved"] is None
    column = next(column for column in overview.COLUMNS if column.key == "solved_j")
    assert column.text({"solved_j": 3e-6}).startswith(">= 3")
