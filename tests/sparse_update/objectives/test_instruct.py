"""Rows of tasks, and instruction tuning on them: against one example at a time, and against autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sparse_update.data.tokens import ByteTokenizer
from sparse_update.gates.config import GateConfig
from sparse_update.objectives.examples.settings import TaskConfig, parsed
from sparse_update.objectives.instruction.instruct import Instruct
from sparse_update.objectives.instruction.settings import InstructConfig
from sparse_update.objectives.questions import answer_loss
from sparse_update.tasks.base import END, TaskError
from sparse_update.tasks.encoding import PromptTooLong
from sparse_update.tasks.splits import split_of
from sparse_update.weights.subset import SubsetConfig
from tests.sparse_update.objectives.house import build, examples_of, model_of

MIXED = {"tasks": ["sums:1-2", "modular:1", "brackets:1-2"], "form": "short"}


def one_by_one(rows):
    """Every text of packed rows as (tokens (L,), which of tokens[1:] count)."""
    for row in range(len(rows)):
        segment = rows.packing.segment_BT[row]
        for number in range(len(rows.instances[row])):
            where = (segment == number).nonzero()[:, 0]
            first, last = int(where[0]), int(where[-1])
            end = min(last + 2, int(rows.lengths_N[row])) if number == len(rows.instances[row]) - 1 else last + 1
            yield rows.tokens_NT1[row, first:end], rows.weight_NT[row, first : end - 1] > 0


def trainer_of(examples, folder, cfg=None, **more):
    return build(lambda given: Instruct(given, examples, cfg), examples.examples(), examples, folder, **more)


def test_packed_rows_hold_whole_examples_of_the_training_split():
    examples = examples_of(**MIXED)
    rows = examples.examples().rows(torch.arange(20))
    seen = set()
    for (tokens, counts), instance in zip(one_by_one(rows), (i for row in rows.instances for i in row), strict=True):
        assert split_of(instance) == "train"
        text = bytes(tokens.tolist()).decode()
        assert text == f"{instance.short}\n{instance.answer}{END}"
        assert bytes(tokens[1:][counts].tolist()).decode() == instance.answer + END
        seen.add(instance.task)
    assert seen == {"sums", "modular", "brackets"}
    assert max(map(len, rows.instances)) > 2


@pytest.mark.parametrize("attention", ["explicit", "sdpa"])
@pytest.mark.parametrize("average", ["tokens", "answers"])
def test_packed_losses_and_gradients_are_those_of_one_example_at_a_time(tmp_path, attention, average):
    examples = examples_of(**MIXED)
    model = model_of(attention=attention)
    for p in model.parameters():  # outputs that start at zero would hide the attention
        torch.nn.init.normal_(p, std=0.2) if p.dim() == 2 else None
    trainer, _ = trainer_of(examples, tmp_path, InstructConfig(average), model=model)
    objective, batch = trainer.updates.objective, trainer.gate.next(4)
    step = trainer.budget.step(0.0)
    objective.prepare(batch, step, 0.0)
    found = objective.gradients(batch, step)
    packed = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    parts, counted = [], 0
    for tokens, counts in one_by_one(examples.examples().rows(batch.window)):
        losses = F.cross_entropy(model(tokens[None, :-1])[0], tokens[1:], reduction="none")[counts]
        parts.append(losses.mean() if average == "answers" else losses.sum())
        counted += 1 if average == "answers" else len(losses)
    total = sum(parts) / counted
    total.backward()
    assert float(found.loss_BT.mean()) == pytest.approx(float(total.detach()), rel=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(packed[name], p.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_row_is_a_function_of_its_number_and_epochs_show_the_same_ones(tmp_path):
    stream = examples_of(rows=8).examples()
    first, second = stream.take(8), stream.take(8)
    assert sorted(first.window.tolist()) == sorted(second.window.tolist()) == list(range(8))
    assert first.window.tolist() != second.window.tolist()
    again = examples_of(rows=8).examples()
    again.load_state_dict(stream.state_dict())
    assert torch.equal(again.take(5).tokens, stream.take(5).tokens)
    other = examples_of(rows=8, tasks=["sums:2"]).examples()
    with pytest.raises(ValueError, match="another stream: tasks"):
        other.load_state_dict(stream.state_dict())


def test_pieces_give_the_gradient_of_the_whole_batch(tmp_path):
    whole, _ = trainer_of(examples_of(**MIXED), tmp_path / "a", steps=3)
    cut, _ = trainer_of(examples_of(**MIXED), tmp_path / "b", steps=3, accumulate=2)
    whole.run(), cut.run()
    for (name, a), b in zip(whole.updates.model.named_parameters(), cut.updates.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5, msg=name)


def test_a_tuned_model_answers_and_the_record_says_so(tmp_path):
    examples = examples_of(tasks=["brackets:1"], judged=8)
    trainer, _ = trainer_of(examples, tmp_path, steps=150, windows=16)
    before = answer_loss(trainer.updates.model, examples.held_out["val"])
    result = trainer.run()
    assert result.val_loss_nats < before / 3
    assert result.scores["task/accuracy"] == result.scores["task/accuracy/brackets"] > 0.8


def test_the_gate_skips_windows_and_rows_and_weights_go_on_by_the_sparse_step(tmp_path):
    gate = GateConfig(unit="token", signal="token_loss", keep_fraction=0.5)
    examples = examples_of(**MIXED, packed=False)
    trainer, _ = trainer_of(examples, tmp_path / "a", steps=4, gate=gate)
    assert trainer.run().step > 0
    subset = SubsetConfig(kind="blocks", active_fraction=0.5, block_rows=4, change_every_steps=3)
    trainer, _ = trainer_of(examples, tmp_path / "b", steps=4, subset=subset)
    assert trainer.run().step > 0
    packed, _ = trainer_of(examples_of(**MIXED), tmp_path / "c", steps=4, gate=gate, subset=subset)
    assert packed.run().step > 0
    choosing = GateConfig(unit="sequence", signal="random", policy="random", keep_fraction=0.5, pool_windows=8)
    trainer, _ = trainer_of(examples_of(**MIXED), tmp_path / "d", steps=4, gate=choosing)
    result = trainer.run()
    assert result.keep_fraction == pytest.approx(0.5)


@pytest.mark.parametrize("packed", [False, True])
def test_the_sparse_step_takes_the_same_weighted_gradient_as_autograd(tmp_path, packed):
    examples = examples_of(**MIXED, packed=packed)
    trainer, _ = trainer_of(examples, tmp_path)
    objective, batch = trainer.updates.objective, trainer.gate.next(4)
    rows = examples.examples().rows(batch.window)
    x_RT, y_RT = rows.tokens_NT1[:, :-1], rows.tokens_NT1[:, 1:]

    def weigh(view, which):  # depends on the losses, as a policy gradient does
        return rows.weight_NT[which] * torch.exp(-view.loss_BT) / 7

    objective.weighted_step(x_RT, y_RT, weigh, packing=rows.packing, micro_rows=2)
    by_autograd = {name: p.grad.clone() for name, p in trainer.updates.model.named_parameters()}
    objective._by_autograd = lambda plan: False
    found = objective.weighted_step(x_RT, y_RT, weigh, packing=rows.packing, micro_rows=2)
    for name, gradient in by_autograd.items():
        torch.testing.assert_close(found.gradients[name][0], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_settings_name_tasks_and_levels():
    assert parsed("sums:1-3") == ("sums", (1, 2, 3))
    assert parsed("gym:chain_sum") == ("gym:chain_sum", ())
    for bad in ("", "sums:a", "sums:3-1", "sums:1:2", "gym"):
        with pytest.raises(ValueError, match="task"):
            parsed(bad)
    with pytest.raises(ValueError, match="trains on"):
        TaskConfig(tasks=["sums:1"], unseen=["sums:2"])
    with pytest.raises(TaskError, match="has levels 1 to 12"):
        _ = examples_of(tasks=["sums:40"]).tasks
    with pytest.raises(PromptTooLong, match="the model reads 6"):
        examples_of(context=6).examples().take(4)


def test_unseen_tasks_are_judged_and_not_trained_on(tmp_path):
    examples = examples_of(tasks=["sums:2"], unseen=["modular:1"])
    assert {instance.task for row in examples.examples().rows(torch.arange(9)).instances for instance in row} == {"sums"}
    found = examples.accuracy(model_of())
    assert set(found) == {"accuracy", "accuracy_unseen", "accuracy/sums", "accuracy/modular"}
    keys = {name: {instance.key for instance in each} for name, each in examples.judged.items()}
    assert len(keys["sums"]) == 12
    assert isinstance(examples.text(np.frombuffer(b"42\x03rest", dtype=np.uint8)), str)
    assert examples.text(ByteTokenizer().encode([b"42\x03rest"])[0]) == "42"
